"""The model card (README.md) of a finished stage."""

from __future__ import annotations

import math
import os
from pathlib import Path

import yaml

from pipelines.data import sources
from pipelines.files import FINISHED, read_json
from pipelines.recipe.stage import Stage

NO_RESULTS = ("train_", "steps", "parameters", "pairs", "eval_tokens", "eval_hidden_words")  # counts, and not held-out


def card(stage: Stage, final: dict) -> str:
    """The model card: what the model is, what it was made from, how it did, what it must not be used for.

    Its front matter is the hub's (https://huggingface.co/docs/hub/model-cards): task, base model, data sets, results.
    """
    record_, metrics = final["record"], final["metrics"]
    scalars = {k: v for k, v in metrics.items() if isinstance(v, (int, float, str))}
    ancestors, origin = _origin(stage)
    local = origin is not None and (origin.startswith("…/") or Path(os.path.expanduser(origin)).is_dir())
    if local and origin.startswith(("/", "~")):
        origin = f"…/{Path(origin).name}"  # a place on one machine tells others nothing
    task, auto = stage.spec.hub_task, stage.spec.auto_class
    hub_data = [source["hub"] for source in record_["data"].values() if "hub" in source]
    front: dict = {"library_name": "transformers", "tags": ["finetune-pipelines", stage.kind]}
    if task:
        front["pipeline_tag"] = task
    if origin and not local:
        front |= {"base_model": origin, "base_model_relation": "finetune"}
    if hub_data:
        front["datasets"] = hub_data
    results = _results(stage, metrics) if task else []
    if results:
        held_out = sources.sources(stage.sections.get("data", {}), "validation")
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
        f"Made by the stage `{stage.name}` (kind `{stage.kind}`) of `{final['recipe']}` on {final['finished'][:10]}.",
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
            f"| `{path}` | {info.get('bytes', '–')} bytes | `{info.get('sha256') or info.get('revision') or 'latest'}` "
            "|"
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
    ]
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
