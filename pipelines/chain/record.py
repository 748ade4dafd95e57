"""What lies beside a model: `stage.json`, written last, so its presence means finished; and what identifies a
training.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
from pathlib import Path

from pipelines import files
from pipelines.chain.model_card import card
from pipelines.data import fingerprint
from pipelines.files import CARD, FINISHED, HISTORY, STARTED, portable, write_json
from pipelines.recipe.stage import Stage, resolve

PACKAGES = ["torch", "transformers", "trl", "accelerate", "datasets", "peft", "tokenizers", "bitsandbytes", "deepspeed"]

UNUSED = (CARD, HISTORY)  # what people may edit: nothing is built on it

# Settings that cannot change what is learned: a stage that differs only in these is the same stage.
HARMLESS = (
    "logging_",
    "log_",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "report_to",
    "run_name",
    "disable_tqdm",
    "dataloader_",
    "per_device_eval",
    "use_cpu",
    "ddp_",
    "gradient_checkpointing",
    "eval_accumulation",
    "diagnosis",
)


def settings(stage: Stage) -> dict:
    """What the recipe says of a stage: its kind, seed and sections, the defaults of its kind filled in."""
    sections = {name: dict(section) for name, section in sorted(stage.sections.items()) if section}
    sections["args"] = {**stage.module.DEFAULTS, **sections.get("args", {})}
    return json.loads(json.dumps({"kind": stage.kind, "seed": stage.seed, "sections": sections}, default=str))


def record(stage: Stage, parents: dict[str, str]) -> dict:
    """Everything that decides what the stage learns: its settings, seed, data and what it builds on.

    `parents` maps the stages it refers to to their identity; two equal records mean the same training.
    """
    value = {
        **settings(stage),
        "data": _inputs(stage),
        "base": _base(stage.sections.get("model", {}).get("model_name_or_path")),
        "parents": parents,
    }
    return json.loads(json.dumps(value, default=str))


def _inputs(stage: Stage) -> dict[str, dict]:
    """Fingerprints of the stage's `data:` and of the files named by its kind's `files`.

    A file of an earlier stage is called `stage:NAME/FILE`, so that a run folder may move.
    """
    found = fingerprint.fingerprint(stage.data)
    for section, key in stage.spec.files:
        path = resolve(stage.sections.get(section, {}).get(key), stage.folder.parent)
        found |= fingerprint.fingerprint({"train": path}) if path else {}
    root = f"{stage.folder.parent}/"
    return {f"stage:{path.removeprefix(root)}" if path.startswith(root) else path: of for path, of in found.items()}


def _base(path: str | None) -> dict | None:
    """Identity of a base model that no stage made: its folder's config and weights, or its hub id."""
    if path is None or path.startswith("stage:"):
        return None
    folder = Path(os.path.expanduser(path))
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
    old, new = portable(old), portable(new)
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
    files.write_rows(stage.folder / HISTORY, metrics.get("history", []))
    run = stage.folder.parent
    final = {
        "stage": stage.name,
        "kind": stage.kind,
        "recipe": Path(stage.recipe).name if Path(stage.recipe).is_absolute() else stage.recipe,
        "record": portable(made_from, run),
        "rows": portable(stage.report, run),
        "metrics": {k: v for k, v in metrics.items() if k != "history"},
        "args": portable(stage.resolved, run),
        "seed": stage.seed,
        "world_size": world,
        "started": started,
        "finished": files.now(),
        "seconds": round(seconds, 1),
        "git_commit": git_commit(),
        "versions": versions(),
    }
    if stage.spec.leaves_model:
        files.write_text(stage.folder / CARD, card(stage, final))
    files.follow_umask(stage.folder)
    for path in stage.folder.glob("logs/**/events.out.tfevents.*"):  # TensorBoard names them after this machine
        name = re.sub(r"(tfevents\.\d+)\..*?(\.\d+\.\d+)$", r"\1\2", path.name)
        path.rename(path.with_name(name))
    final["files"] = files.contents(stage.folder, written(stage.folder), sync=True)
    final["checksum"] = own_checksum(final)
    write_json(stage.folder / FINISHED, final)


def written(folder: Path) -> list[str]:
    """The files of a stage that `stage.json` vouches for: all but logs, checkpoints and itself."""
    inside = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    kept = [p for p in inside if p.parts[0] not in ("logs", "checkpoints") and p.name not in (STARTED, FINISHED)]
    return [p.as_posix() for p in kept if not any(part.startswith(".") for part in p.parts)]


def own_checksum(final: dict) -> str:
    """Of the content of a `stage.json`, its own field left out."""
    text = json.dumps({k: v for k, v in final.items() if k != "checksum"}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def stage_damage(folder: Path, final: dict, quick: bool = False, everything: bool = False) -> list[str]:
    """What of a finished stage is no longer what it wrote, as `files.damage` words it; one made without checksums
    passes.

    Args:
        quick: see `files.damage`.
        everything: also what nothing is built on: model card, history, the record itself, files that were added.
    """
    listed = final.get("files", {})
    wrong = files.damage(folder, {n: of for n, of in listed.items() if everything or n not in UNUSED}, quick)
    if everything and listed:
        wrong += [f"{name} was added" for name in written(folder) if name not in listed]
        if final.get("checksum") != own_checksum(final):
            wrong.append(f"{FINISHED} was edited")
    return wrong


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
