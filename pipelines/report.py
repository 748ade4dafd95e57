"""`python -m pipelines report RUN`: one HTML file that shows a run: its chain, curves, samples, settings and costs.

It is written from the files that the chain leaves (`chain.json`, and per stage `stage.json`, `history.jsonl`,
`samples.jsonl`; for a running stage `started.json` and the log beside its checkpoints). It needs no network and no
script: the charts are SVG (`svg.py`), and a Content-Security-Policy forbids everything but the page's own style.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from pipelines import SetupError, artifact, chain, chat, data, svg
from pipelines.svg import Series, number

PAGE = "report.html"
WATTS = {"cpu": 50.0, "gpu": 400.0}  # assumed per process where --watts says nothing

# What is charted, in this order: (title, unit, keys in the log). Two keys are two lines; what is not here goes below
# "more curves".
CURVES = [
    ("loss", "nats per token or pair", ("loss", "eval_loss")),
    ("perplexity", "exp(loss)", ("eval_perplexity",)),
    ("pseudo-perplexity of hidden words", "exp(loss)", ("eval_pseudo_perplexity",)),
    ("accuracy", "share", ("accuracy", "eval_accuracy")),
    ("macro F1", "0 to 1", ("eval_f1_macro",)),
    ("margin between better and worse", "score", ("margin", "eval_margin")),
    ("BLEU", "0 to 100", ("eval_bleu",)),
    ("chrF", "0 to 100", ("eval_chrf",)),
    ("ROUGE-L", "0 to 1", ("eval_rougeL",)),
    ("reward", "score", ("objective/scores", "eval_score")),
    ("KL to the reference", "nats per answer", ("objective/kl", "eval_kl")),
    ("length of answers", "tokens", ("response_length", "eval_length")),
    ("answers that end with EOS", "share", ("eos_rate", "eval_eos_rate")),
    ("entropy of the policy", "nats per token", ("policy/entropy_avg",)),
    ("explained variance of the critic", "share, 1 is perfect", ("val/explained_variance",)),
    ("policy clipped", "share of tokens", ("policy/clipfrac_avg",)),
]
SHARES = ("accuracy", "eos_rate")  # their axis goes from 0 to 1
NO_CURVE = ("epoch", "step", "episode", "total_flos", "num_tokens", "eval_num_tokens", "optimizer_steps")
HEADLINE = [  # the figure that stands for a stage: the first of these that it has
    ("eval_score", "score"), ("eval_perplexity", "perplexity"), ("eval_pseudo_perplexity", "pseudo-perplexity"),
    ("eval_bleu", "BLEU"), ("eval_chrf", "chrF"), ("eval_rougeL", "ROUGE-L"), ("accuracy", "accuracy"),
    ("eval_accuracy", "accuracy"), ("eval_f1_micro", "micro F1"), ("eval_mse", "mse"), ("eval_loss", "loss"),
    ("train_loss", "training loss"),
]  # fmt: skip


@dataclass
class Seen:
    """What the run's folder tells about one stage. `state` is finished, running, stopped or due."""

    name: str
    kind: str
    parents: list[str]
    state: str
    record: dict = field(default_factory=dict)
    final: dict = field(default_factory=dict)  # stage.json
    history: list[dict] = field(default_factory=list)
    samples: list[dict] = field(default_factory=list)
    values: dict = field(default_factory=dict)  # values.json of an evaluation: model to measure to one value per item
    total: int | None = None  # steps to come in all, of a stage that is not finished
    seconds: float = 0.0

    @property
    def step(self) -> int:
        return max((e.get("step", 0) for e in self.history), default=0)

    @property
    def metrics(self) -> dict:
        return self.final.get("metrics", {})


def read(run: Path, running: bool | None = None) -> list[Seen]:
    """The stages of a run's folder in the recipe's order. `running`: whether a run works there (None: look at its lock).

    Raises `SetupError` for a folder in which no chain was started.
    """
    listed = {s["name"]: s for s in (artifact.read_json(run / chain.CHAIN) or {}).get("stages", [])}
    found = [p.parent.name for p in run.glob("*/*.json") if p.name in (artifact.STARTED, artifact.FINISHED)]
    if not listed and not found:
        raise SetupError(
            f"{run}: no stage was started here. A report is made of a run's folder: the recipe's output_dir"
        )
    out = []
    for name in [*listed, *sorted(set(found) - set(listed), key=lambda n: _begun(run / n))]:
        folder = run / name
        final, started = (artifact.read_json(folder / n) or {} for n in (artifact.FINISHED, artifact.STARTED))
        record = (final or started).get("record", {})
        stage = Seen(
            name,
            record.get("kind") or listed[name]["kind"],
            list(record.get("parents", {})) or listed.get(name, {}).get("parents", []),
            "finished" if final else "stopped" if started else "due",
            record,
            final,
        )
        if final:
            stage.history, stage.seconds = _lines(folder / artifact.HISTORY), final["seconds"]
            stage.samples = _lines(folder / "samples.jsonl") or _lines(folder / "rankings.jsonl")
            stage.values = artifact.read_json(folder / "values.json") or {}
        elif started:
            stage.history, stage.total, stage.seconds = artifact.read_log(folder / "checkpoints")
            stage.samples = _lines(folder / "checkpoints" / "samples.jsonl")
        out.append(stage)
    open_ = [s for s in out if s.state == "stopped"]
    if open_ and (chain.busy(run) if running is None else running):
        # A run works on one stage at a time: on the one that was written to last.
        max(open_, key=lambda s: _touched(run / s.name)).state = "running"
    return out


def _begun(folder: Path) -> str:
    seen = artifact.read_json(folder / artifact.FINISHED) or artifact.read_json(folder / artifact.STARTED)
    return seen["started"]


def _touched(folder: Path) -> float:
    return max(
        p.stat().st_mtime for p in (folder / artifact.STARTED, folder / "checkpoints" / artifact.LOG) if p.exists()
    )


def _lines(path: Path) -> list[dict]:
    """The rows of a JSON lines file, without a last one that is still being written; none where there is no file."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []  # U+0085 ends no line in JSON
    return [json.loads(line) for line in lines]


# --- the page ----------------------------------------------------------------------------------------------------


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
    part = out.with_name(f".{out.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    os.replace(part, out)
    return out


def page(
    run: Path, stages: list[Seen], every: float = 0, watts: float | None = None, price: float | None = None
) -> str:
    """The HTML text."""
    running = any(s.state == "running" for s in stages)
    style = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    recipe = (artifact.read_json(run / chain.CHAIN) or {}).get("recipe") or next(
        (s.final["recipe"] for s in stages if s.final), ""
    )
    done = sum(s.state == "finished" for s in stages)
    seconds = sum(s.seconds for s in stages)
    made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    reload_ = f'<meta http-equiv="refresh" content="{every:g}">' if running and every else ""
    tiles = [(f"{done} of {len(stages)}", "stages finished"), (_time(seconds), "training in all")]
    for stage in stages:
        value, name = headline(stage)
        if value is not None and stage.state == "finished":
            tiles.append((number(value), f"{stage.name}: {name}"))
    return "".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"{reload_}<title>{escape(run.resolve().name)}: report</title><style>{style}</style></head><body>",
            f"<h1>{escape(run.resolve().name)}</h1>",
            f'<p class="soft">{escape(recipe)} · written {made}{" · running" if running else ""}</p>',
            _tiles(tiles),
            f"<section><h2>The chain</h2>{svg.picture([_node(s) for s in stages])}</section>",
            f"<section><h2>Time, energy and cost</h2>{_costs(stages, watts, price)}</section>",
            *(_stage(s, stages) for s in stages),
            "</body></html>\n",
        ]
    )


def headline(stage: Seen) -> tuple[float | None, str]:
    """`(value, name)` of the figure that stands for the stage: final, or the last one logged; (None, "") without any."""
    last = {k: v for entry in stage.history for k, v in entry.items()}
    for values in (stage.metrics, last):
        for key, name in HEADLINE:
            if isinstance(values.get(key), (int, float)):
                return values[key], name
    return None, ""


def _node(stage: Seen) -> svg.Node:
    value, name = headline(stage)
    state = {"finished": "✓ finished", "running": "▶ running", "stopped": "‖ stopped", "due": "○ due"}[stage.state]
    if stage.total:
        state += f", step {stage.step} of {stage.total}"
    elif stage.seconds:
        state += f" in {_time(stage.seconds)}"
    lines = [f"{stage.kind} · {name} {number(value)}" if value is not None else stage.kind, state]
    section = stage.record.get("sections", {}).get("data", {})
    names = [Path(str(s["path"])).name for s in data.sources(section, "train")]
    rows = [text.partition(": ")[2].split(", ")[0] for text in _rows(stage)[:1]]
    return svg.Node(stage.name, lines, stage.state, stage.parents, ", ".join(names), "".join(rows))


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
        row = [s.name, s.final.get("started", "")[:16].replace("T", " "), _time(s.seconds), processes or "?"]
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
    total = ["in all", "", _time(sum(s.seconds for s in stages)), "", "", "", number(energy)]
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
    return _table(head, [*rows, total + ([number(money)] if price else [])], 2) + f'<p class="note">{text}</p>'


def tokens_trained(stage: Seen) -> float | None:
    """Tokens that a finished stage trained on (PPO: sampled), padding not counted; None where it does not count them."""
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
    """Rows (packs, windows, answers of PPO) that a finished stage trained on in all its sessions; None for other stages."""
    args, steps = stage.final.get("args", {}), stage.metrics.get("steps")
    if not steps or "per_device_train_batch_size" not in args:
        return None
    each = args["per_device_train_batch_size"] * args.get("gradient_accumulation_steps", 1)
    return steps * each * stage.final["world_size"]


# --- one stage ---------------------------------------------------------------------------------------------------


def _stage(s: Seen, stages: list[Seen]) -> str:
    badge = f'<span class="badge {s.state}">{s.state}</span>'
    out = [
        f'<section id="{escape(s.name)}"><h2>{escape(s.name)} <span class="soft">{escape(s.kind)}</span>{badge}</h2>'
    ]
    if s.state == "due":
        return "".join([*out, f'<p class="soft">waits for {escape(", ".join(s.parents) or "its turn")}</p></section>'])
    if s.total:
        out.append(f"<p>step {s.step} of {s.total}, after {_time(s.seconds)}</p>")
    out.append(_made_from(s, stages))
    scalars = {
        k: v
        for k, v in s.metrics.items()
        if isinstance(v, (int, float)) and not k.endswith("_per_second") and not k.startswith(("tag_", "tagged_"))
    }
    for finding in s.metrics.get("diagnosis") or []:
        text = ", ".join(f"{k}: {v}" for k, v in finding.items()) if isinstance(finding, dict) else str(finding)
        out.append(f'<p class="stopped">⚠ {escape(text)}</p>')
    out.append(_tiles([(number(v), k.replace("eval_", "held-out ").replace("_", " ")) for k, v in scalars.items()]))
    main, more = _curves(s)
    out.append(_grid([*_special(s), *main]))
    out.append(_samples(s.samples))
    if more:
        out.append(f"<details><summary>more curves ({len(more)})</summary>{_grid(more)}</details>")
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
        if parent and parent.final and artifact.identity(parent.final) != identity:
            text += ' <b class="stopped">made again since</b>'
        parts.append(f"built on {text}")
    section = sections.get("data", {})
    for side in ("train", "validation"):
        names = [str(source["path"]) for source in data.sources(section, side)]
        if names:
            parts.append(f"{side} data <code>{escape(', '.join(names))}</code>")
    if data.fraction(section):
        parts.append(f"validation on {data.fraction(section):g} of the training rows")
    rows = "".join(f"<br>{escape(text)}" for text in _rows(s))
    return f'<p>{"; ".join(parts)}.<span class="soft">{rows}</span></p>'


def _curves(s: Seen) -> tuple[list[str], list[str]]:
    """The charts of `CURVES`, and those of everything else that was logged."""
    points: dict[str, list] = {}
    for entry in s.history:
        for key, value in entry.items():
            if isinstance(value, (int, float)) and "step" in entry:
                points.setdefault(key, []).append((entry["step"], value))
    main, used = [], set(NO_CURVE)
    for title, unit, keys in CURVES:
        used |= set(keys)
        bounds = {"low": 0, "high": 1} if any(key in SHARES for key in keys) else {}
        lines = [_line(key, points[key]) for key in keys if key in points]
        main.append(_titled(title, svg.chart(lines, "step", unit, **bounds)))
    more = []
    for key in points:
        trained = key.removeprefix("eval_")
        if key in used or trained in used or key.startswith("train_") or key.endswith(("_runtime", "_per_second")):
            continue
        used |= {trained, f"eval_{trained}"}
        both = [k for k in (trained, f"eval_{trained}") if k in points]
        more.append(_titled(trained, svg.chart([_line(k, points[k]) for k in both], "step", trained)))
    return [c for c in main if c], more


def _line(key: str, points: list) -> Series:
    held_out = key.startswith("eval_")
    return Series("held out", points, "both", 1) if held_out else Series("training", points)


def _special(s: Seen) -> list[str]:
    """Charts that only some kinds have: score distributions, calibration, reward against KL, the confusion matrix."""
    out, metrics = [], s.metrics
    if "histogram" in metrics:
        edges = metrics["histogram"]["edges"]
        bars = [
            Series(side, list(zip(edges, [*metrics["histogram"][side], 0], strict=True)), "steps", color)
            for color, side in enumerate(("chosen", "rejected"))
        ]
        out.append(_titled("scores of held-out answers", svg.chart(bars, "score", "answers, one per pair", low=0)))
    if "calibration" in metrics:
        table = metrics["calibration"]
        lines = [
            Series("people agreed", [(t["confidence"], t["accuracy"]) for t in table], "both"),
            Series("perfect", [(0.5, 0.5), (1.0, 1.0)], "dashed", 1),
        ]
        drawn = svg.chart(lines, "confidence of the reward model", "share of pairs", low=0.4, high=1)
        out.append(_titled("calibration", drawn))
    pairs = {
        name: [(e[kl], e[score]) for e in s.history if kl in e and score in e]
        for name, kl, score in (("training", "objective/kl", "objective/scores"), ("held out", "eval_kl", "eval_score"))
    }
    if any(pairs.values()):
        lines = [_line("eval_" if name == "held out" else "", points) for name, points in pairs.items()]
        drawn = svg.chart(lines, "KL to the reference, nats per answer", "mean score")
        out.append(_titled("reward against KL", drawn))
    scored = [r for r in s.samples if "score" in r and "step" in r]
    if scored:
        train, held_out = (
            [(r["step"], r["score"]) for r in scored if (r["split"] == "train") == side] for side in (True, False)
        )
        lines = [Series("training", train, "dots"), Series("held out", held_out, "dots", 1)]
        out.append(
            _titled(
                "scores of the sample answers", svg.chart(lines, "step (1: before any update)", "score of an answer")
            )
        )
    if "confusion_matrix" in metrics:
        out.append(_titled("confusion matrix, rows", _matrix(metrics["confusion_matrix"], metrics.get("labels"))))
    for model, of in metrics.get("confusion_matrices", {}).items():
        out.append(_titled(f"confusion matrix of {model}, rows", _matrix(of["counts"], of["labels"])))
    scores = {model: of["score"] for model, of in s.values.items() if of.get("score")}
    if scores:
        lines = _histogram(scores)
        out.append(_titled("scores of the models' answers", svg.chart(lines, "score", "share of answers", low=0)))
    if "figures" in metrics:
        rows = [
            [name, number(f["value"]), f"{number(f['low'])} to {number(f['high'])}"]
            for name, f in metrics["figures"].items()
        ]
        out.append(_titled("figures", _table(["", "value", "95 % interval"], rows, 1)))
    out.append(_titled("tags", _tags(metrics)))
    return [c for c in out if c]


def _histogram(scores: dict[str, list[float]], bins: int = 20) -> list[Series]:
    """An outline per name (four at most): the share of its scores in each of `bins` equal steps from least to largest."""
    every = [v for values in scores.values() for v in values]
    low, wide = min(every), (max(every) - min(every)) / bins or 1.0
    out = []
    for color, (name, values) in enumerate(list(scores.items())[:4]):
        counts = [0] * (bins + 1)  # the last one closes the outline
        for v in values:
            counts[min(int((v - low) / wide), bins - 1)] += 1
        out.append(Series(name, [(low + i * wide, n / len(values)) for i, n in enumerate(counts)], "steps", color))
    return out


def _tags(metrics: dict) -> str:
    """How often people gave each tag (`tagged_NAME`), and how well a reward model tells it (`tag_NAME_MEASURE`)."""
    given = {k.removeprefix("tagged_"): v for k, v in metrics.items() if k.startswith("tagged_")}
    told: dict[str, dict] = {}
    for key, value in metrics.items():
        if key.startswith("tag_"):
            name, _, measure = key.removeprefix("tag_").rpartition("_")
            told.setdefault(name, {})[measure] = value
    measures = list(dict.fromkeys(m for of in told.values() for m in of))
    rows = [[name, given[name]] for name in given] if given else []
    rows += [[name, *(number(of[m]) if m in of else "–" for m in measures)] for name, of in told.items()]
    return _table(["tag", *(["given"] if given else measures)], rows, 1) if rows else ""


def _matrix(counts: list[list[int]], labels: list[str] | None) -> str:
    """Rows are the true classes, columns the predicted ones; the shade is the share of the row."""
    names = labels or [str(i) for i in range(len(counts))]
    head = "".join(f'<th class="n">{escape(str(n))}</th>' for n in names)
    body = ""
    for name, row in zip(names, counts, strict=True):
        cells = "".join(
            f'<td style="background: color-mix(in srgb, var(--c0) {60 * n / max(1, sum(row)):.0f}%, transparent)">{n}</td>'
            for n in row
        )
        body += f"<tr><th>{escape(str(name))}</th>{cells}</tr>"
    return f'<div class="scroll"><table class="matrix"><tr><th>true ↓ predicted →</th>{head}</tr>{body}</table></div>'


def _samples(samples: list[dict], most: int = 10) -> str:
    """Sample answers. Those of training steps stand side by side: first, middle and last, one prompt per row."""
    if not samples:
        return ""
    if "completions" in samples[0]:
        return _completions(samples[:most])
    if "step" not in samples[0] or "prompt" not in samples[0]:
        head = [k for k in samples[0] if k != "where"]
        rows = [[_cell(sample.get(k)) for k in head] for sample in samples[:most]]
        return f"<h3>Samples</h3>{_table(head, rows, 99, 'samples')}"
    held_out = [r for r in samples if r["split"] != "train"]
    answers = {(r["prompt"], r["step"]): r for r in held_out or samples}
    steps = sorted({step for _, step in answers})
    shown = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    prompts = list(dict.fromkeys(prompt for prompt, _ in answers))
    if not held_out:  # other prompts at every step: what they have in common is only the column
        columns = [[r for r in samples if r["step"] == step][:most] for step in shown]
        rows = [[f"{r['prompt']}\n{_answer(r)}" for r in row] for row in zip(*columns, strict=False)]
        return f"<h3>Samples</h3>{_table([f'step {n}' for n in shown], rows, 99, 'samples')}"
    rows = [
        [prompt, *(_answer(answers[prompt, step]) if (prompt, step) in answers else "" for step in shown)]
        for prompt in prompts[:most]
    ]
    head = ["held-out prompt", *(f"answer at step {n}" for n in shown)]
    return f"<h3>Samples, side by side</h3>{_table(head, rows, 99, 'samples')}"


def _completions(rows: list[dict]) -> str:
    """Several answers to each prompt: from best to worst where they are ranked, else a column per model."""
    ranked = "ranks" in rows[0]
    models = list(dict.fromkeys(m for row in rows for m in row.get("models", [])))
    table = []
    for row in rows:
        answers = [a if isinstance(a, str) else chat.as_text(a) for a in row["completions"]]
        by = row.get("models") or [""] * len(answers)
        if ranked:
            tags = row.get("tags") or [[]] * len(answers)
            order = sorted(zip(row["ranks"], answers, by, tags, strict=True), key=lambda four: four[0])
            said = [(f"{rank:g}. {a}", ", ".join([*([m] if m else []), *t])) for rank, a, m, t in order]
            cells = ["\n".join(text + (f" [{more}]" if more else "") for text, more in said)]
        else:
            cells = ["\n\n".join(a for a, m in zip(answers, by, strict=True) if m == name) for name in models]
        table.append([chat.as_text(row["prompt"]), *cells])
    head = ["prompt", *(["answers, best first: model and tags"] if ranked else models)]
    return f"<h3>Samples, side by side</h3>{_table(head, table, 99, 'samples')}"


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


# --- pieces of HTML ----------------------------------------------------------------------------------------------


def _titled(title: str, body: str) -> str:
    return f"<div><h3>{escape(title)}</h3>{body}</div>" if body else ""


def _grid(charts: list[str]) -> str:
    return f'<div class="charts">{"".join(charts)}</div>' if charts else ""


def _tiles(tiles: list[tuple[str, str]]) -> str:
    return f'<div class="tiles">{"".join(f"<div><b>{escape(v)}</b><span>{escape(k)}</span></div>" for v, k in tiles)}</div>'


def _table(head: list[str], rows: list[list], numbers: int, style: str = "") -> str:
    """A table whose columns from `numbers` on are numbers; it scrolls sideways where the screen is narrow."""
    kind = lambda i: ' class="n"' if i >= numbers else ""
    top = "".join(f"<th{kind(i)}>{escape(str(h))}</th>" for i, h in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td{kind(i)}>{escape(str(v))}</td>" for i, v in enumerate(row)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table class="{style}"><tr>{top}</tr>{body}</table></div>'


def _time(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return (
        f"{hours} h {rest // 60:02d} min"
        if hours
        else f"{rest // 60} min {rest % 60:02d} s"
        if rest >= 60
        else f"{rest} s"
    )


# --- the command -------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """`report RUN [--watch [SECONDS]] [--out FILE] [--watts W] [--price-per-hour P]`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="pipelines report", description="Write one HTML file that shows a run: chain, curves, samples, settings."
    )
    parser.add_argument("run", type=Path, help="a run's folder (the recipe's output_dir)")
    parser.add_argument(
        "--watch", type=float, nargs="?", const=10.0, metavar="SECONDS", help="write again every 10 (or so many) seconds "
        "until every stage is finished; the page reloads itself while the run is running"
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"where to write (RUN/{PAGE})")
    parser.add_argument(
        "--watts", type=float, help=f"power per process (assumed: {WATTS['cpu']:g} W CPU, {WATTS['gpu']:g} W GPU)"
    )
    parser.add_argument(
        "--price-per-hour", type=float, metavar="P", help="price of one process for an hour; adds a cost column"
    )
    args = parser.parse_args(argv)
    if args.watch is not None and args.watch <= 0:
        raise SetupError(f"--watch {args.watch:g}: the seconds between two writes must be above 0")
    if not args.run.is_dir():
        raise SetupError(f"{args.run}: no such folder; give the output_dir of a recipe, e.g. runs/demo")
    settings = {"every": args.watch or 0, "watts": args.watts, "price": args.price_per_hour}
    print(write(args.run, args.out, **settings))
    try:
        while args.watch and any(s.state != "finished" for s in read(args.run)):
            time.sleep(args.watch)
            write(args.run, args.out, **settings)
    except KeyboardInterrupt:
        return 130
    return 0
