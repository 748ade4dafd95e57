"""Checkpoints that are whole or not used, and what a Trainer forgets between two launches.

trainer saves  →  every process's files are on disk  →  `seal`: their names, sizes and checksums in `complete`
next launch    →  `newest_whole`: verify, set aside what is damaged, take the newest that is not
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers.trainer import TRAINER_STATE_NAME

from pipelines import files

logger = logging.getLogger(__name__)

COMPLETE = "complete"  # in a checkpoint, written when every process has written its part: `files.contents` of all
COUNTS = "counts.json"  # in a checkpoint: what the Trainer has counted and not logged yet, of every process
DAMAGED = ".damaged"  # beside the stages' folders: checkpoints that were set aside

# What the Trainer, and TRL's, add up between two log entries or over a whole run, and start anew in each launch.
TOTALS = ("_total_loss_scalar", "_globalstep_last_logged", "_total_train_tokens")


def step_of(checkpoint: Path) -> int:
    """The step at which a checkpoint was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def all_of(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first, whole or not."""
    found = [p for p in folder.glob("checkpoint-*") if p.is_dir() and p.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was saved to its end; None when there is none. Its files are not looked at."""
    return next((str(p) for p in all_of(folder) if (p / COMPLETE).is_file()), None)


def seal(checkpoint: Path) -> None:
    """Mark a checkpoint as whole: all its files are on disk, and listed with their checksums. Every process
    calls it.
    """
    state = PartialState()
    state.wait_for_everyone()
    if state.is_main_process:
        files.follow_umask(checkpoint)
    state.wait_for_everyone()
    mine = _inside(checkpoint)[state.process_index :: state.num_processes]
    parts = gather_object([files.contents(checkpoint, mine, sync=True)])
    if state.is_main_process:
        listed = {n: {"bytes": of["bytes"], "xxh3": of["xxh3"]} for part in parts for n, of in part.items()}
        files.write_json(checkpoint / COMPLETE, {"files": dict(sorted(listed.items()))})


def _inside(checkpoint: Path) -> list[str]:
    """Names of the files of a checkpoint, largest first."""
    found = [p for p in checkpoint.rglob("*") if p.is_file() and p.name != COMPLETE]
    return [str(p.relative_to(checkpoint)) for p in sorted(found, key=lambda p: (-p.stat().st_size, p))]


def damage(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint that was saved to its end; empty where nothing is, or it has no marker.

    Every process calls it, and none but the first looks for the marker: the others may not see yet what it has just
    written.
    """
    state = PartialState()
    asked: list = [None]
    if state.is_main_process:
        asked[0] = _marker(checkpoint) if (checkpoint / COMPLETE).is_file() else ({}, [])
    broadcast_object_list(asked)
    listed, wrong = asked[0]
    names = sorted(listed, key=lambda name: (-listed[name]["bytes"], name))[state.process_index :: state.num_processes]
    parts = gather_object([files.damage(checkpoint, {name: listed[name] for name in names})])
    return wrong + [line for part in parts for line in part]


def _marker(checkpoint: Path) -> tuple[dict[str, dict], list[str]]:
    """`(files listed in the marker, what is wrong with the marker)`."""
    text = (checkpoint / COMPLETE).read_bytes()
    if not text and not (checkpoint / COUNTS).exists():
        if not (checkpoint / TRAINER_STATE_NAME).is_file():
            return {}, [f"{TRAINER_STATE_NAME} is missing"]
        logger.warning("%s was saved without checksums, by an earlier version: it cannot be verified", checkpoint)
        return {}, []
    try:
        listed = json.loads(text)["files"]
        for of in listed.values():
            int(of["bytes"]), str(of["xxh3"])
        return listed, [] if COUNTS in listed else [f"{COUNTS} is not listed in {COMPLETE}"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}, [f"{COMPLETE}, the list of its files, cannot be read"]


def newest_whole(name: str, folder: Path, with_best: bool = False) -> str | None:
    """The checkpoint from which the stage `name` goes on, None where it begins. Every process calls it.

    What was not saved to its end is deleted; what is damaged is set aside beside the stage's folder, with a word.

    Args:
        with_best: the run loads its best model at the end, so that a checkpoint is worth nothing without the one that
            it holds for the best.
    """
    state = PartialState()
    steps: list = [None]
    if state.is_main_process:
        for torn in [p for p in all_of(folder) if not (p / COMPLETE).is_file()]:
            logger.warning("%s: %s is incomplete (stopped while saving)", name, torn.name)
            shutil.rmtree(torn)
        steps[0] = [step_of(p) for p in all_of(folder)]
    broadcast_object_list(steps)
    found = [folder / f"checkpoint-{step}" for step in steps[0]]
    broken = {checkpoint.name: wrong for checkpoint in found if (wrong := damage(checkpoint))}
    word: list = [None]
    if state.is_main_process:
        if with_best:
            for checkpoint in found:
                best = None if checkpoint.name in broken else _best_of(checkpoint)
                if best and (best in broken or not (folder / best).is_dir()):
                    broken[checkpoint.name] = [f"it is whole, but the best model until then is in {best}, which is not"]
        kept = [checkpoint for checkpoint in found if checkpoint.name not in broken]
        word[0] = str(kept[0]) if kept else None
        for checkpoint in found:
            if checkpoint.name in broken:
                home = folder.parent.parent / DAMAGED
                aside = files.set_aside(checkpoint, home, f"{folder.parent.name}-{checkpoint.name}")
                shown = "; ".join(broken[checkpoint.name][:3])
                logger.warning("%s: %s is not used: %s (kept in %s)", name, checkpoint.name, shown, aside)
        if broken and not kept:
            logger.warning("%s: no whole checkpoint is left: it begins again", name)
    broadcast_object_list(word)
    return word[0]


def _best_of(checkpoint: Path) -> str | None:
    """The name of the checkpoint that held the best model when this one was saved."""
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    return f"checkpoint-{state['best_global_step']}" if state.get("best_global_step") else None


def save_counts(trainer, checkpoint: Path) -> None:
    """Write what `trainer` has counted and not logged yet. Every process calls it; a run that goes on counts on."""
    trainer.read_figures()
    mine = {name: getattr(trainer, name) for name in TOTALS if hasattr(trainer, name)}
    if hasattr(trainer, "_tr_loss"):
        mine["loss"] = trainer._tr_loss.item()
    pending = getattr(trainer, "_metrics", None)
    if isinstance(pending, dict):  # TRL's, by mode and name
        mine["metrics"] = {mode: {k: list(v) for k, v in of.items()} for mode, of in pending.items()}
    mine["training"] = trainer.model.training
    parts = gather_object([mine])
    if PartialState().is_main_process:
        files.write_json(checkpoint / COUNTS, {"processes": parts})


def load_counts(trainer, checkpoint: Path) -> None:
    """Go on counting where `save_counts` left off: figures of a run do not depend on how often it was stopped."""
    path = checkpoint / COUNTS
    if not path.is_file():
        logger.warning("%s holds no counts, by an earlier version: mean losses and tokens count from here", checkpoint)
        return
    parts = json.loads(path.read_text(encoding="utf-8"))["processes"]
    same_world = len(parts) == PartialState().num_processes
    mine = parts[PartialState().process_index if same_world else 0]
    for name in TOTALS:
        if name in mine:
            setattr(trainer, name, mine[name])
    if "loss" in mine:  # at another number of processes: each takes the mean, so that theirs is the same
        loss = mine["loss"] if same_world else sum(p["loss"] for p in parts) / len(parts)
        trainer._tr_loss = torch.tensor(loss, device=trainer._tr_loss.device, dtype=trainer._tr_loss.dtype)
        trainer._initial_global_step = trainer._initial_num_input_tokens_seen = 0
    for mode, of in mine.get("metrics", {}).items():
        for key, values in of.items():
            trainer._metrics[mode][key] = list(values)
    trainer.model.train(mine["training"])


def bytes_to_save(trainer) -> int:
    """About how many bytes the next checkpoint takes: weights, and the state of the optimizer (AdamW's before it has
    one).
    """
    model = trainer.model
    trained = [p for p in model.parameters() if p.requires_grad]
    saved = trained if any(hasattr(m, "peft_config") for m in model.modules()) else list(model.parameters())
    count = lambda p: getattr(p, "ds_numel", p.numel()) * p.element_size()  # ZeRO-3 leaves empty ones on each process
    weights = sum(map(count, saved))
    state = getattr(getattr(trainer.optimizer, "optimizer", trainer.optimizer), "state", None) or {}
    held = [v for of in state.values() for v in (of.values() if isinstance(of, dict) else ()) if torch.is_tensor(v)]
    return weights + (sum(v.numel() * v.element_size() for v in held) or 2 * sum(map(count, trained)))
