"""What lies beside a model: `stage.json` (written last, so its presence means finished) and the model card."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import subprocess
from pathlib import Path

import yaml

from pipelines import data
from pipelines.stage import Stage, resolve
from pipelines.stages import NO_MODEL

STARTED, FINISHED = "started.json", "stage.json"
HISTORY = "history.jsonl"  # every logged step of a finished stage
LOG = "log.jsonl"  # the same while it runs, beside its checkpoints
PACKAGES = ["torch", "transformers", "trl", "accelerate", "datasets", "peft", "tokenizers", "bitsandbytes", "deepspeed"]

# What the hub calls the task of a kind, and the class that loads its model; other kinds' cards leave both out.
CARD_TASKS = {
    "pretrain": ("text-generation", "AutoModelForCausalLM"),
    "sft": ("text-generation", "AutoModelForCausalLM"),
    "ppo": ("text-generation", "AutoModelForCausalLM"),
    "mlm": ("fill-mask", "AutoModelForMaskedLM"),
    "reward": ("text-classification", "AutoModelForSequenceClassification"),
    "classify": ("text-classification", "AutoModelForSequenceClassification"),
    "seq2seq": ("text2text-generation", "AutoModelForSeq2SeqLM"),
}
NO_RESULTS = ("train_", "steps", "parameters", "pairs", "eval_tokens", "eval_hidden_words")  # counts, and not held-out

# Settings that cannot change what is learned: a stage that differs only in these is the same stage.
HARMLESS = (
    "logging_", "log_", "save_steps", "save_strategy", "save_total_limit", "report_to", "run_name", "disable_tqdm",
    "dataloader_", "per_device_eval", "use_cpu", "ddp_", "gradient_checkpointing", "eval_accumulation", "diagnosis",
)  # fmt: skip


def write_json(path: Path, value) -> None:
    """Replace `path` in one step: after a crash it holds the old text or the new one, never half of it."""
    _replace(path, [json.dumps(value, indent=2, ensure_ascii=False, default=str)])


def write_rows(path: Path, rows) -> None:
    """As `write_json`, one JSON object a line."""
    _replace(path, (json.dumps(row, ensure_ascii=False) for row in rows))


def _replace(path: Path, lines) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with open(part, "w", encoding="utf-8") as stream:
        stream.writelines(line + "\n" for line in lines)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, path)


def read_json(path: Path) -> dict | None:
    """The file's content, or None where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_log(folder: Path) -> tuple[list[dict], int | None, float]:
    """`(entries, steps to come in all, seconds spent)` of a stage that is not finished, from its checkpoints' folder.

    What was logged after the checkpoint that a session resumed from is dropped; a line half written is left alone.
    """
    entries, total, seconds, last = [], None, 0.0, 0.0
    path = folder / LOG
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []:
        if not line.endswith("\n"):
            break
        entry = json.loads(line)
        moment = entry.pop("time")
        if "max_steps" in entry:  # a session begins
            entries = [e for e in entries if e["step"] <= entry["step"]]
            total, last = entry["max_steps"], moment
        else:
            entries.append(entry)
        seconds += moment - last
        last = moment
    return entries, total, seconds


def begun_in(folder: Path) -> str | None:
    """The precision in which the stage that left its log in `folder` began to train; None where none has."""
    path = folder / LOG
    first = path.read_text(encoding="utf-8").splitlines(keepends=True)[:1] if path.is_file() else []
    return json.loads(first[0]).get("precision") if first and first[0].endswith("\n") else None


def record(stage: Stage, parents: dict[str, str]) -> dict:
    """Everything that decides what the stage learns: its settings, seed, data and what it builds on.

    `parents` maps the stages it refers to to their identity; two equal records mean the same training.
    """
    sections = {name: dict(section) for name, section in sorted(stage.sections.items()) if section}
    sections["args"] = {**stage.module.DEFAULTS, **sections.get("args", {})}
    value = {
        "kind": stage.kind,
        "seed": stage.seed,
        "sections": sections,
        "data": _inputs(stage),
        "base": _base(stage.sections.get("model", {}).get("model_name_or_path")),
        "parents": parents,
    }
    return json.loads(json.dumps(value, default=str))


def _inputs(stage: Stage) -> dict[str, dict]:
    """Fingerprints of the stage's `data:` and of the files named by its module's `FILES`, (section, key) pairs.

    A file of an earlier stage is called `stage:NAME/FILE`, so that a run folder may move.
    """
    found = data.fingerprint(stage.data)
    for section, key in getattr(stage.module, "FILES", ()):
        path = resolve(stage.sections.get(section, {}).get(key), stage.folder.parent)
        found |= data.fingerprint({"train": path}) if path else {}
    root = f"{stage.folder.parent}/"
    return {f"stage:{path.removeprefix(root)}" if path.startswith(root) else path: of for path, of in found.items()}


def prefix(folder: str) -> str:
    """What the stage in `folder` was trained to find before every source, so that it gets it later too; "" for others."""
    made = read_json(Path(folder) / FINISHED) or {}
    return made.get("record", {}).get("sections", {}).get("task", {}).get("prefix", "")


def _base(path: str | None) -> dict | None:
    """Identity of a base model that no stage made: its folder's config and weights, or its hub id."""
    if path is None or path.startswith("stage:"):
        return None
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return {"hub": path}
    config = folder / "config.json"
    return {
        "folder": str(path),
        "config": hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else None,
        "weights": {p.name: p.stat().st_size for p in sorted(folder.glob("*.safetensors"))},
    }


def identity(finished: dict) -> str:
    """What a finished stage is called by those that build on it: changes whenever it is made again."""
    return hashlib.sha256(json.dumps([finished["record"], finished["finished"]]).encode()).hexdigest()[:16]


def differences(old: dict, new: dict) -> list[str]:
    """Paths of the fields in which two records differ, `HARMLESS` ones left out: `sections.args.learning_rate (…)`."""
    total = new.get("sections", {}).get("args", {}).get("global_batch_size")
    found = []

    def walk(a, b, path):
        if isinstance(a, dict) and isinstance(b, dict | None) or isinstance(b, dict) and a is None:
            a, b = a or {}, b or {}
            for key in sorted(a.keys() | b.keys()):
                harmless = path == "sections.args" and (
                    key.startswith(HARMLESS)
                    or (total and key in ("per_device_train_batch_size", "gradient_accumulation_steps"))
                )
                if not harmless:
                    walk(a.get(key), b.get(key), f"{path}.{key}".lstrip("."))
        elif a != b and not (a in (None, {}) and b in (None, {})):
            found.append(f"{path.removeprefix('sections.')} ({_short(a)} then, {_short(b)} now)")

    walk(old, new, "")
    return found


def _short(value) -> str:
    text = json.dumps(value, default=str) if value is not None else "unset"
    return text if len(text) < 60 else text[:57] + "…"


def finish(stage: Stage, made_from: dict, metrics: dict, started: str, seconds: float, world: int) -> None:
    """Write the log (`history.jsonl`), the card of a model and, last of all, `stage.json`."""
    with open(stage.folder / HISTORY, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(entry) + "\n" for entry in metrics.get("history", []))
    final = {
        "stage": stage.name,
        "kind": stage.kind,
        "recipe": stage.recipe,
        "record": made_from,
        "rows": stage.report,
        "metrics": {k: v for k, v in metrics.items() if k != "history"},
        "args": stage.resolved,
        "seed": stage.seed,
        "world_size": world,
        "started": started,
        "finished": now(),
        "seconds": round(seconds, 1),
        "git_commit": git_commit(),
        "versions": versions(),
    }
    if stage.kind not in NO_MODEL:
        (stage.folder / "README.md").write_text(card(stage, final), encoding="utf-8")
    write_json(stage.folder / FINISHED, final)


def versions() -> dict[str, str]:
    """Versions of the libraries that did the work, as far as installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str:
    """The commit of the checkout this code runs from (with "+changes"), or "not a checkout"."""
    here = Path(__file__).resolve().parent
    run = lambda *a: subprocess.run(["git", *a], cwd=here, capture_output=True, text=True)  # noqa: E731
    try:
        head = run("rev-parse", "HEAD")
        if head.returncode:
            return "not a checkout"
        return head.stdout.strip() + ("+changes" if run("status", "--porcelain", "--", str(here)).stdout else "")
    except FileNotFoundError:
        return "not a checkout"


def now() -> str:
    """UTC time to the microsecond, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat()


def card(stage: Stage, final: dict) -> str:
    """The model card: what the model is, what it was made from, how it did, what it must not be used for.

    Its front matter is the hub's (https://huggingface.co/docs/hub/model-cards): task, base model, data sets, results.
    """
    record_, metrics = final["record"], final["metrics"]
    scalars = {k: v for k, v in metrics.items() if isinstance(v, (int, float, str))}
    ancestors, origin = _origin(stage)
    task, auto = CARD_TASKS.get(stage.kind, (None, None))
    hub_data = [source["hub"] for source in record_["data"].values() if "hub" in source]
    front: dict = {"library_name": "transformers", "tags": ["finetune-pipelines", stage.kind]}
    if task:
        front["pipeline_tag"] = task
    if origin and not Path(origin).expanduser().is_dir():
        front |= {"base_model": origin, "base_model_relation": "finetune"}
    if hub_data:
        front["datasets"] = hub_data
    results = _results(stage, metrics) if task else []
    if results:
        held_out = data.sources(stage.sections.get("data", {}), "validation")
        name = Path(str(held_out[0]["path"])).name if held_out else "held-out rows of the training data"
        where = {"name": name, "type": hub_data[-1] if hub_data else "local"}
        index = {"task": {"type": task}, "dataset": where, "metrics": results}
        front["model-index"] = [{"name": stage.name, "results": [index]}]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {stage.name}",
        "",
        f"Made by the stage `{stage.name}` (kind `{stage.kind}`) of `{stage.recipe}` on {final['finished'][:10]}.",
        f"Built on: {' ← '.join(f'`{name}`' for name in [*ancestors, origin or 'a new model'])}.",
        "",
    ]
    if auto:
        lines += [
            "```python",
            f"from transformers import {auto}, AutoTokenizer",
            "",
            f'model = {auto}.from_pretrained("…")  # this folder, or its hub id',
            'tokenizer = AutoTokenizer.from_pretrained("…")',
            "```",
            "",
        ]
    lines += [
        "## Data",
        "",
        "| source | size | SHA-256 or revision |",
        "| --- | --- | --- |",
        *[
            f"| `{path}` | {info.get('bytes', '–')} bytes | `{info.get('sha256') or info.get('revision') or 'latest'}` |"
            for path, info in record_["data"].items()
        ],
        "",
        *[f"- {key}: {_words(value)}" for key, value in final["rows"].items()],
        "",
        "## Results",
        "",
        "`eval_` marks figures on held-out rows; a reward model's accuracy, margin and calibration are held-out too.",
        "",
        "| metric | value |",
        "| --- | --- |",
        *[f"| {k} | {v:.4g} |" if isinstance(v, float) else f"| {k} | {v} |" for k, v in scalars.items()],
        "",
        "## Limits",
        "",
        "The model repeats what its data says, errors and tone included; it was measured only by the figures above,",
        "on held-out rows of the same source where there are any. Check it on your own data before you rely on it.",
        "",
        "## How it was made",
        "",
        f"The stage as it stands in the recipe (seed {final['seed']}, {final['world_size']} process(es), "
        f"{final['seconds']} s, commit {final['git_commit']}):",
        "",
        "```yaml",
        yaml.safe_dump({"kind": stage.kind, **record_["sections"]}, sort_keys=False, allow_unicode=True).strip(),
        "```",
        "",
        f"Versions: {', '.join(f'{k} {v}' for k, v in final['versions'].items())}.",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _origin(stage: Stage) -> tuple[list[str], str | None]:
    """`(stages it descends from, nearest first, what the first of them began with: a hub id, a folder or None)`."""
    ancestors, model = [], stage.sections.get("model", {})
    while str(model.get("model_name_or_path")).startswith("stage:"):
        name = model["model_name_or_path"].removeprefix("stage:").split("/")[0]
        ancestors.append(name)
        parent = read_json(stage.folder.parent / name / FINISHED) or {}
        model = parent.get("record", {}).get("sections", {}).get("model", {})
    return ancestors, model.get("model_name_or_path")


def _results(stage: Stage, metrics: dict) -> list[dict]:
    """The held-out figures as the hub's `metrics:`; none without validation data."""
    if not stage.sections.get("data", {}).get("validation"):
        return []
    return [
        {"type": key.removeprefix("eval_"), "value": value}
        for key, value in metrics.items()
        if isinstance(value, (int, float)) and not key.startswith(NO_RESULTS) and math.isfinite(value)
    ]


def _words(value) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
