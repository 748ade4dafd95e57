"""Which stages of a recipe are finished, stale or due; runs the due ones in file order."""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import broadcast_object_list

from pipelines import errors, files, launch
from pipelines.chain import record as chain_record
from pipelines.chain.record import differences, finish, identity, stage_damage
from pipelines.errors import ChainError, RecordError, SetupError, StorageError
from pipelines.files import CHAIN, lock
from pipelines.recipe.stage import Recipe, Stage
from pipelines.training.checkpoints import last_checkpoint

logger = logging.getLogger(__name__)


@dataclass
class Step:
    """What happens to one stage: `finished` (skipped), `resume`, `start`, `redo` (the old folder is kept aside), or
    nothing,
    because its record is `damaged`."""

    stage: Stage
    action: str
    record: dict


def plan(recipe: Recipe, names: Sequence[str] = (), redo: Collection[str] = ()) -> list[Step]:
    """The steps for the stages `names` (all when empty). Raises `ChainError` with every reason why it cannot
    be done.
    """
    steps, refused = survey(recipe, names, redo)
    if refused:
        raise ChainError("\n".join(refused))
    return steps


def survey(recipe: Recipe, names: Sequence[str] = (), redo: Collection[str] = ()) -> tuple[list[Step], list[str]]:
    """`(the steps for the stages `names`, every reason why they cannot be done)`. Raises `ChainError` for a
    wrong name.
    """
    known = [s.name for s in recipe.stages]
    wrong = [n for n in [*names, *redo] if n not in known]
    if wrong:
        raise ChainError(
            "\n".join(f"no stage {n!r}{errors.meant(n, known)}; {recipe.file} has {', '.join(known)}" for n in wrong)
        )
    redo = with_children(recipe, redo)
    begun = _begun_redo(recipe, redo)
    steps: list[Step] = []
    refused: list[str] = []
    made: dict[str, str | None] = {}
    broken: dict[str, list[str]] = {}
    for stage in recipe.stages:
        chosen = not names or stage.name in names or stage.name in redo
        finished, started, wrong = _records(stage)
        record = chain_record.record(stage, {p: made.get(p) or "not made yet" for p in stage.parents})
        old = (finished or started or {}).get("record")
        changed = differences(old, record) if old else []
        if stage.name in redo and (finished or started or wrong) and (stage.name not in begun or changed or wrong):
            action, changed, wrong = "redo", [], []
        elif wrong:
            action = "damaged"
        elif finished:
            action = "finished"
            wrong = [
                f"{stage.name}: {_edited(stage, line)}" for line in stage_damage(stage.folder, finished, quick=True)
            ]
        elif started and changed and not _can_resume(stage):
            action, changed = (
                "start",
                [],
            )  # it failed before anything was kept: nothing was trained under the old settings
        elif started:
            action = "resume"
        else:
            action = "start"
        made[stage.name] = identity(finished) if action == "finished" else None
        broken[stage.name] = wrong
        if not chosen:
            continue
        if action == "start" and _is_of_others(stage.folder):
            refused.append(
                f"{stage.name}: the folder {stage.folder} is not empty and was not made by this chain. "
                "Choose another output_dir, or move the folder away."
            )
        for name in [*stage.parents, stage.name]:
            refused += [line for line in broken.get(name, ()) if line not in refused]
        if changed and action in ("finished", "resume"):
            refused.append(
                f"{stage.name}: {action} with other settings: "
                f"{_why(recipe, changed, (finished or started)['started'])}. "
                f"Put them back, or make it again with --redo {stage.name} (the old folder is kept aside)."
            )
        missing = [
            p
            for p in stage.parents
            if names and made.get(p) is None and not broken.get(p) and p not in names and p not in redo
        ]
        if missing and action != "finished":
            refused.append(
                f"{stage.name}: it needs {', '.join(missing)}, not made yet. Run that first, or name it too."
            )
        steps.append(Step(stage, action, record))
    return steps, refused


def with_children(recipe: Recipe, redo: Collection[str]) -> set[str]:
    """`redo`, and what builds on a stage that is made again."""
    out = set(redo)
    for stage in recipe.stages:
        if out & set(stage.parents):
            out.add(stage.name)
    return out


def _records(stage: Stage) -> tuple[dict | None, dict | None, list[str]]:
    """`(stage.json, started.json, what is wrong with them)`."""
    found, wrong = [], []
    for name in (files.FINISHED, files.STARTED):
        try:
            found.append(files.read_record(stage.folder / name))
        except RecordError as error:
            found.append(None)
            wrong.append(f"{stage.name}: {error}")
    return found[0], found[1], wrong


def _edited(stage: Stage, line: str) -> str:
    return (
        f"{stage.folder / line}: changed since the stage was finished. Put the file back, make the stage again with "
        f"--redo {stage.name} (the old folder is kept aside), or use the changed files by the path of a copy"
    )


def _why(recipe: Recipe, changed: list[str], started: str) -> str:
    """What is different from then, in words: settings, and stages that it builds on."""
    settings = [c for c in changed if not c.startswith("parents.")]
    parents = [c.split(" ")[0].removeprefix("parents.") for c in changed if c.startswith("parents.")]
    known = [stage.name for stage in recipe.stages]
    return "; ".join(settings + [f"it builds on {_fate(recipe[p], started)}" for p in parents if p in known]) or (
        f"it built on {', '.join(parents)}, which the recipe does not have any more"
    )


def _fate(parent: Stage, started: str) -> str:
    """What became of a stage since another one was started on it."""
    if not parent.folder.is_dir():
        return f"{parent.name}, whose folder is gone ({parent.folder})"
    finished, begun, wrong = _records(parent)
    if wrong:
        return f"{parent.name}, whose record is damaged"
    if finished is None:
        return f"{parent.name}, " + ("which is being made again" if begun else f"whose {files.FINISHED} is gone")
    if finished["finished"] > started:
        return f"{parent.name}, made again since"
    return f"{parent.name}, whose {files.FINISHED} was edited since"


def _begun_redo(recipe: Recipe, redo: set[str]) -> set[str]:
    """Of the stages that are asked to be made again, those that an earlier launch of the same command has set aside."""
    before = files.read_record(recipe.output_dir / files.REDO) if redo else None
    if before is None or set(before["asked"]) != redo:
        return set()
    return set(before["aside"])


def _can_resume(stage: Stage) -> bool:
    """Whether there is work of an earlier session: a whole checkpoint, or answers that were sampled."""
    return last_checkpoint(stage.checkpoints) is not None or (stage.checkpoints / "answers.jsonl").is_file()


def _is_of_others(folder: Path) -> bool:
    """Whether a folder holds something that no stage of ours has begun."""
    return folder.is_dir() and any(folder.iterdir()) and not (folder / files.STARTED).is_file()


def run(recipe: Recipe, names: Sequence[str] = (), redo: Collection[str] = ()) -> None:
    """Run the stages that are due on the processes Accelerate started. Every process calls it.

    Raises `ChainError` where it cannot be done, before anything is changed; `StorageError` where nothing can be
    written.
    """
    state = launch.start()
    with lock(recipe.output_dir, state.is_main_process) as writable:
        # One process looks at the disk and all follow: by the time another looks, it may have changed.
        steps = _on_main(state, lambda: _prepare(recipe, names, redo, writable))
        for name, action in steps:
            if action == "finished":
                logger.info("%s: finished, skipped (%s)", name, recipe[name].folder)
            else:
                _run_stage(recipe, recipe[name], action, state)
        if state.is_main_process:
            logger.info("%s: %s", _outcome(recipe), recipe.output_dir)


def _outcome(recipe: Recipe) -> str:
    """What there is of the chain after a run: all of it, or what is still to come or to be made again."""
    try:
        left = [step.stage.name for step in plan(recipe) if step.action != "finished"]
    except ChainError as error:
        return f"done what was asked for; the rest of the chain is not up to date:\n{error}\nin"
    return f"done what was asked for; still to come: {', '.join(left)}" if left else "the chain is complete"


def _on_main(state, function):
    """What `function` gives on the first process, or the error that it raises there, on every process."""
    word: list = [None]
    if state.is_main_process:
        try:
            word[0] = function()
        except (SetupError, StorageError) as error:
            word[0] = error
        except OSError as error:
            word[0] = files.storage_error(error)
            if word[0] is None:
                raise
    broadcast_object_list(word)
    if isinstance(word[0], Exception):
        raise word[0]
    return word[0]


def _prepare(recipe: Recipe, names: Sequence[str], redo: Collection[str], writable: bool) -> list[tuple[str, str]]:
    """The steps as (stage, action), after what a run notes of itself is written."""
    steps = [(s.stage.name, s.action) for s in plan(recipe, names, redo)]
    due = [name for name, action in steps if action != "finished"]
    if not writable:
        if due:
            raise StorageError(
                f"{recipe.output_dir} cannot be written to, and {', '.join(due)} must be made there: change its "
                "rights, "
                "or choose another output_dir=… on the command line"
            )
        return steps
    for name in [name for name, action in steps if action == "finished"]:
        _clean(recipe[name])  # of a run that was killed before it could
    again = with_children(recipe, redo)
    if again:
        aside = again - {name for name, action in steps if action == "redo"}
        note = {"asked": sorted(again), "open": sorted(again & set(due)), "aside": sorted(aside)}
        if note["open"]:
            files.write_json(recipe.output_dir / files.REDO, note)
        else:  # killed just before it was crossed off
            (recipe.output_dir / files.REDO).unlink(missing_ok=True)
    path = recipe.output_dir / CHAIN
    try:
        files.read_record(path)
    except RecordError as error:
        damaged = files.set_aside(path, recipe.output_dir / ".damaged", path.name)
        logger.warning("%s It is kept in %s and written again.", str(error).partition(":")[0], damaged)
    stages = [{"name": s.name, "kind": s.kind, "parents": s.parents} for s in recipe.stages]
    files.write_json(path, {"recipe": str(recipe.file), "stages": stages})
    return steps


def _run_stage(recipe: Recipe, stage: Stage, action: str, state) -> None:
    clock = time.monotonic()
    record, started, earlier = _on_main(state, lambda: _begin(recipe, stage, action))
    state.wait_for_everyone()
    metrics = stage.module.run(stage)
    state.wait_for_everyone()
    if state.is_main_process:
        seconds = earlier + time.monotonic() - clock
        finish(stage, record, metrics, started, seconds, state.num_processes)
        _clean(stage)
        _redone(recipe, stage)
        shown = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items() if isinstance(v, (int, float)))
        logger.info("%s: done in %.0f s: %s", stage.name, time.monotonic() - clock, shown)
    state.wait_for_everyone()
    launch.reset()


def _begin(recipe: Recipe, stage: Stage, action: str) -> tuple[dict, str, float]:
    """`(record, time it was first started, seconds of the launches that were stopped)`, with `started.json` written."""
    parents = {}
    for name in stage.parents:
        final = files.read_record(recipe[name].folder / files.FINISHED)
        wrong = stage_damage(recipe[name].folder, final)  # every byte: this is what the stage is made of
        if wrong:
            raise RecordError("\n".join(f"{stage.name}: {_edited(recipe[name], line)}" for line in wrong))
        parents[name] = identity(final)
    if action == "redo":
        aside = files.set_aside(stage.folder, stage.folder.parent / ".replaced", stage.folder.name)
        logger.warning("the old %s is kept in %s", stage.folder, aside)
        note = files.read_record(recipe.output_dir / files.REDO)
        files.write_json(recipe.output_dir / files.REDO, {**note, "aside": sorted({*note["aside"], stage.name})})
    if action == "start" and stage.checkpoints.is_dir():
        shutil.rmtree(stage.checkpoints)
        logger.info("%s: an earlier start failed before its first checkpoint: it begins anew", stage.name)
    earlier = files.read_log(stage.checkpoints)[2]
    record = chain_record.record(stage, parents)
    started = (files.read_record(stage.folder / files.STARTED) or {}).get("started", files.now())
    files.write_json(stage.folder / files.STARTED, {"record": record, "started": started})
    logger.info("%s: %s (%s)", stage.name, {"redo": "start again"}.get(action, action), stage.kind)
    return record, started, earlier


def _redone(recipe: Recipe, stage: Stage) -> None:
    """Cross a finished stage off the `--redo` that has begun; after the last one the same command begins a new one."""
    path = recipe.output_dir / files.REDO
    note = files.read_record(path)
    if note is None:
        return
    note["open"] = [name for name in note["open"] if name != stage.name]
    if note["open"]:
        files.write_json(path, note)
    else:
        path.unlink()


def _clean(stage: Stage) -> None:
    """What only served to resume goes, after `stage.json` records that the stage is finished."""

    shutil.rmtree(stage.checkpoints, ignore_errors=True)
    (stage.folder / files.STARTED).unlink(missing_ok=True)
    _remove_unfinished(stage)


def _remove_unfinished(stage: Stage) -> None:
    """Files that a killed run had not written whole (`files.replacing`) go; nobody writes in these folders now."""
    for folder in (stage.folder, stage.folder.parent / ".tokens" / stage.name):
        for path in folder.rglob(".*"):
            if re.fullmatch(r"\..+\.\d+", path.name) and path.is_file():
                path.unlink()
