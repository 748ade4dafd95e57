"""The report as one HTML page: chain, curves, samples, settings and costs of a run."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

from pipelines import files
from pipelines.chain import record
from pipelines.data import sources
from pipelines.kinds import KINDS
from pipelines.models import chat_template
from pipelines.report import charts, sweeps
from pipelines.report.charts import number
from pipelines.report.figures import curves, special_figures
from pipelines.report.html import chart_grid, document, duration, html_table, tile_row
from pipelines.report.run_folder import Seen, listed_stages, read

PAGE = "report.html"
WATTS = {"cpu": 50.0, "gpu": 400.0}  # assumed per process where --watts says nothing


def write(
    run: Path,
    out: Path | None = None,
    *,
    running: bool | None = None,
    every: float = 0,
    watts: float | None = None,
    price: float | None = None,
) -> Path:
    """Write the report of the folder `run` to `out` (RUN/report.html) in one step; returns where it lies.

    `watts` and `price` (per hour) are per process. With `every`, the page reloads itself every so many seconds while
    the run is running.
    """
    run = Path(run)
    out = Path(out) if out else run / PAGE
    text = page(run, read(run, running), every, watts, price)
    files.write_text(out, text)
    return out


def page(
    run: Path, stages: list[Seen], every: float = 0, watts: float | None = None, price: float | None = None
) -> str:
    """The HTML text."""
    running = any(s.state == "running" for s in stages)
    recipe = next((str(s.final.get("recipe", "")) for s in stages if s.final), "")
    sections, wrong = sweeps.sections(run)
    problems = [*listed_stages(run)[1], *wrong, *(line for s in stages for line in s.problems)]
    done = sum(s.state == "finished" for s in stages)
    seconds = sum(s.seconds for s in stages)
    tiles = [(f"{done} of {len(stages)}", "stages finished"), (duration(seconds), "training in all")]
    for stage in stages:
        value, name = headline(stage)
        if value is not None and stage.state == "finished":
            tiles.append((number(value), f"{stage.name}: {name}"))
    body = "".join(
        [
            "".join(f'<p class="problem">{escape(line)}</p>' for line in problems),
            tile_row(tiles),
            f"<section><h2>The chain</h2>{charts.picture([_node(s) for s in stages])}</section>",
            f"<section><h2>Time, energy and cost</h2>{_costs(stages, watts, price)}</section>",
            *sections,
            *(_stage(s, stages) for s in stages),
        ]
    )
    return document(run.resolve().name, recipe, body, running, every)


def headline(stage: Seen) -> tuple[float | None, str]:
    """`(value, name)` of the figure that stands for the stage: final, or the last one logged; (None, "")
    without any.
    """
    last = {k: v for entry in stage.history for k, v in entry.items()}
    for values in (stage.metrics, last):
        for key, name in KINDS[stage.kind].headline if stage.kind in KINDS else ():
            if isinstance(values.get(key), (int, float)):
                return values[key], name
    return None, ""


def _node(stage: Seen) -> charts.Node:
    value, name = headline(stage)
    state = {
        "finished": "✓ finished",
        "running": "▶ running",
        "stopped": "‖ stopped",
        "due": "○ due",
        "damaged": "✗ damaged",
    }[stage.state]
    if stage.total:
        state += f", step {stage.step} of {stage.total}"
    elif stage.seconds:
        state += f" in {duration(stage.seconds)}"
    lines = [f"{stage.kind} · {name} {number(value)}" if value is not None else stage.kind, state]
    section = stage.record.get("sections", {}).get("data", {})
    names = [Path(str(s["path"])).name for s in sources.sources(section, "train")]
    rows = [text.partition(": ")[2].split(", ")[0] for text in _rows(stage)[:1]]
    return charts.Node(stage.name, lines, stage.state, stage.parents, ", ".join(names), "".join(rows))


def _rows(stage: Seen) -> list[str]:
    """Row counts per side in words: "train: 3000 rows, 2998 used", from whatever the kind counts."""
    out = []
    for side, counts in stage.final.get("rows", {}).items():
        if isinstance(counts, dict) and side == "prompts" and "train" in counts:
            out += [f"{part}: {n:,} prompts" for part, n in counts.items()]
        elif isinstance(counts, dict):
            whole = {k: v for k, v in counts.items() if isinstance(v, int) and (v or k in ("rows", "used"))}
            order = [k for k in ("documents", "rows", "used") if k in whole]
            order += [k for k in whole if k not in order]
            if whole.get("used") == whole.get("rows"):
                order = [k for k in order if k != "used"]
            out.append(f"{side}: " + ", ".join(f"{whole[k]:,} {k.replace('_', ' ')}" for k in order))
        else:
            out.append(f"{side}: {counts}")
    return out


def _costs(stages: list[Seen], watts: float | None, price: float | None) -> str:
    """The table of time, speed, energy and cost, with the formula and what it assumes."""
    head = ["stage", "started", "time", "processes", "tokens/s", "rows/s", "energy, kWh"] + (["cost"] if price else [])
    rows, energy, money, guessed = [], 0.0, 0.0, set()
    for s in stages:
        if not s.seconds:
            continue
        processes = s.final.get("world_size")
        on_cpu = s.final.get("args", {}).get("use_cpu") or s.final.get("versions", {}).get("torch", "").endswith("+cpu")
        device = "cpu" if on_cpu else "gpu"
        row = [s.name, s.final.get("started", "")[:16].replace("T", " "), duration(s.seconds), processes or "?"]
        for count in (tokens_trained(s), rows_trained(s)):  # of all sessions, as their seconds
            row.append(number(count / s.seconds) if count else "–")
        if processes is None:
            row += ["–"] * (2 if price else 1)
        else:
            if watts is None:
                guessed.add(device)
            used = (WATTS[device] if watts is None else watts) * processes * s.seconds / 3.6e6
            energy += used
            row.append(number(used))
            if price:
                money += price * processes * s.seconds / 3600
                row.append(number(price * processes * s.seconds / 3600))
        rows.append(row)
    total = ["in all", "", duration(sum(s.seconds for s in stages)), "", "", "", number(energy)]
    assumed = (
        f"{watts:g} W (--watts)"
        if watts is not None
        else " and ".join(f"{WATTS[d]:g} W for a {d.upper()} process" for d in sorted(guessed))
        + ", an assumption, not a measurement: say --watts"
    )
    text = (
        f"Energy = watts × processes × seconds / 3,600,000, with {assumed}. "
        + (f"Cost = {price:g} per process and hour × processes × hours (--price-per-hour). " if price else "")
        + "Tokens/s = tokens trained on (PPO: sampled), padding not counted, over the stage's whole time, loading and "
        "evaluation included; – where the stage does not count tokens. Rows/s likewise: a row is a pack where rows are "
        "packed, a window of raw text, an answer of PPO."
    )
    return html_table(head, [*rows, total + ([number(money)] if price else [])], 2) + f'<p class="note">{text}</p>'


def tokens_trained(stage: Seen) -> float | None:
    """Tokens that a finished stage trained on (PPO: sampled), padding not counted; None where it does not
    count them.
    """
    last = {k: v for entry in stage.history for k, v in entry.items()}
    if "episode" in last:
        lengths = [e["response_length"] for e in stage.history if "response_length" in e]
        return last["episode"] * sum(lengths) / len(lengths)
    if "num_tokens" in last:
        counts = [e["num_tokens"] for e in stage.history if "num_tokens" in e]
        # TRL counts from 0 again when a session resumes: what the one before had counted stands before the drop
        return last["num_tokens"] + sum(a for a, b in zip(counts, counts[1:]) if b < a)
    counted = stage.final.get("rows", {}).get("train", {})
    if isinstance(counted, dict) and "tokens" in counted and "epoch" in last:
        return counted["tokens"] * last["epoch"]
    return None


def rows_trained(stage: Seen) -> int | None:
    """Rows (packs, windows, answers of PPO) that a finished stage trained on in all its sessions; None for other
    stages.
    """
    args, steps = stage.final.get("args", {}), stage.metrics.get("steps")
    if not steps or "per_device_train_batch_size" not in args:
        return None
    each = args["per_device_train_batch_size"] * args.get("gradient_accumulation_steps", 1)
    return steps * each * stage.final["world_size"]


def _stage(s: Seen, stages: list[Seen]) -> str:
    badge = f'<span class="badge {s.state}">{s.state}</span>'
    out = [
        f'<section id="{escape(s.name)}"><h2>{escape(s.name)} <span class="soft">{escape(s.kind)}</span>{badge}</h2>'
    ]
    if s.state == "due":
        return "".join([*out, f'<p class="soft">waits for {escape(", ".join(s.parents) or "its turn")}</p></section>'])
    if s.total:
        out.append(f"<p>step {s.step} of {s.total}, after {duration(s.seconds)}</p>")
    out.append(_made_from(s, stages))
    scalars = {
        k: v
        for k, v in s.metrics.items()
        if isinstance(v, (int, float)) and not k.endswith("_per_second") and not k.startswith(("tag_", "tagged_"))
    }
    for finding in s.metrics.get("diagnosis") or []:
        text = ", ".join(f"{k}: {v}" for k, v in finding.items()) if isinstance(finding, dict) else str(finding)
        out.append(f'<p class="stopped">⚠ {escape(text)}</p>')
    out.append(tile_row([(number(v), k.replace("eval_", "held-out ").replace("_", " ")) for k, v in scalars.items()]))
    main, more = curves(s)
    out.append(chart_grid([*special_figures(s), *main]))
    out.append(_samples(s.samples))
    if more:
        out.append(f"<details><summary>more curves ({len(more)})</summary>{chart_grid(more)}</details>")
    out.append(_details(s))
    return "".join([*out, "</section>"])


def _made_from(s: Seen, stages: list[Seen]) -> str:
    """In words: the model it began with, the stages it used, its data and what happened to the rows."""
    sections, by_name = s.record.get("sections", {}), {other.name: other for other in stages}
    model = sections.get("model", {})
    start = model.get("model_name_or_path") or f"a new {model.get('config', {}).get('model_type', 'model')}"
    parts = [f"Began with <code>{escape(str(start))}</code>"] if model else []
    for name, identity in s.record.get("parents", {}).items():
        parent = by_name.get(name)
        text = f'<a href="#{escape(name)}">{escape(name)}</a> (<code>{escape(str(identity))}</code>)'
        if parent and parent.final and record.identity(parent.final) != identity:
            text += ' <b class="stopped">made again since</b>'
        parts.append(f"built on {text}")
    section = sections.get("data", {})
    for side in ("train", "validation"):
        names = [str(source["path"]) for source in sources.sources(section, side)]
        if names:
            parts.append(f"{side} data <code>{escape(', '.join(names))}</code>")
    if sources.fraction(section):
        parts.append(f"validation on {sources.fraction(section):g} of the training rows")
    rows = "".join(f"<br>{escape(text)}" for text in _rows(s))
    return f'<p>{"; ".join(parts)}.<span class="soft">{rows}</span></p>'


def _samples(samples: list[dict], most: int = 10) -> str:
    """Sample answers. Those of training steps stand side by side: first, middle and last, one prompt per row."""
    if not samples:
        return ""
    if "completions" in samples[0]:
        return _completions(samples[:most])
    if "step" not in samples[0] or "prompt" not in samples[0]:
        head = [k for k in samples[0] if k != "where"]
        rows = [[_cell(sample.get(k)) for k in head] for sample in samples[:most]]
        return f"<h3>Samples</h3>{html_table(head, rows, 99, 'samples')}"
    held_out = [r for r in samples if r["split"] != "train"]
    answers = {(r["prompt"], r["step"]): r for r in held_out or samples}
    steps = sorted({step for _, step in answers})
    shown = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    prompts = list(dict.fromkeys(prompt for prompt, _ in answers))
    if not held_out:  # other prompts at every step: what they have in common is only the column
        columns = [[r for r in samples if r["step"] == step][:most] for step in shown]
        rows = [[f"{r['prompt']}\n{_answer(r)}" for r in row] for row in zip(*columns, strict=False)]
        return f"<h3>Samples</h3>{html_table([f'step {n}' for n in shown], rows, 99, 'samples')}"
    rows = [
        [prompt, *(_answer(answers[prompt, step]) if (prompt, step) in answers else "" for step in shown)]
        for prompt in prompts[:most]
    ]
    head = ["held-out prompt", *(f"answer at step {n}" for n in shown)]
    return f"<h3>Samples, side by side</h3>{html_table(head, rows, 99, 'samples')}"


def _completions(rows: list[dict]) -> str:
    """Several answers to each prompt: from best to worst where they are ranked, else a column per model."""
    ranked = "ranks" in rows[0]
    models = list(dict.fromkeys(m for row in rows for m in row.get("models", [])))
    table = []
    for row in rows:
        answers = [a if isinstance(a, str) else chat_template.as_text(a) for a in row["completions"]]
        by = row.get("models") or [""] * len(answers)
        if ranked:
            tags = row.get("tags") or [[]] * len(answers)
            order = sorted(zip(row["ranks"], answers, by, tags, strict=True), key=lambda four: four[0])
            said = [(f"{rank:g}. {a}", ", ".join([*([m] if m else []), *t])) for rank, a, m, t in order]
            cells = ["\n".join(text + (f" [{more}]" if more else "") for text, more in said)]
        else:
            cells = ["\n\n".join(a for a, m in zip(answers, by, strict=True) if m == name) for name in models]
        table.append([chat_template.as_text(row["prompt"]), *cells])
    head = ["prompt", *(["answers, best first: model and tags"] if ranked else models)]
    return f"<h3>Samples, side by side</h3>{html_table(head, table, 99, 'samples')}"


def _answer(row: dict) -> str:
    tags = f", {', '.join(row['tags'])}" if row.get("tags") else ""
    end = "" if row.get("ended", True) else ", not ended"
    return f"{row['completion'].strip()}\n[score {row['score']:.2f}, KL {row['kl']:.1f}{end}{tags}]"


def _cell(value) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _details(s: Seen) -> str:
    """Settings, data fingerprints, versions: everything that says how the stage was made."""
    out = []

    def fold(title, value):
        if value:
            text = escape(json.dumps(value, indent=2, ensure_ascii=False, default=str))
            out.append(f"<details><summary>{title}</summary><pre>{text}</pre></details>")

    fold("settings in the recipe", s.record.get("sections"))
    fold("every training argument as used", s.final.get("args"))
    fold("data: SHA-256, bytes, rows", {"sources": s.record.get("data"), "rows": s.final.get("rows")})
    known = ("seed", "world_size", "started", "finished", "seconds", "git_commit", "versions")
    fold("versions, seed, times", {k: s.final[k] for k in known if k in s.final})
    nested = {k: v for k, v in s.metrics.items() if isinstance(v, (dict, list))}
    fold("tables among the metrics", nested)
    return "".join(out)
