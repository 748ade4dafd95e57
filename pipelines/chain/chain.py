"""Which stages of a recipe are finished, stale or due; runs the due ones in file order."""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import broadcast_object_list

from pipelines import errors, files, launch
from pipelines.chain import record as chain_record
from pipelines.chain.record import differences, finish, identity
from pipelines.errors import ChainError
from pipelines.files import CHAIN, lock
from pipelines.recipe.stage import Recipe, Stage
from pipelines.training.checkpoints import last_checkpoint

logger = logging.getLogger(__name__)


@dataclass
class Step:
    """What happens to one stage: `finished` (skipped), `resume`, `start` or `redo` (the old folder is kept aside)."""

    stage: Stage
    action: str
    record: dict


def plan(recipe: Recipe, names: list[str] = (), redo: list[str] = ()) -> list[Step]:
    """The steps for the stages `names` (all when empty). Raises `ChainError` with every reason why it cannot be done."""
    _known(recipe, [*names, *redo])
    redo = _with_what_builds_on_it(recipe, redo)
    steps, refused, made = [], [], {}
    for stage in recipe.stages:
        record = chain_record.record(stage, {p: made.get(p) or "not made yet" for p in stage.parents})
        action, changed, finished = _look(stage, record, again=stage.name in redo)
        missing = [p for p in stage.parents if made.get(p) is None and names and p not in names and p not in redo]
        made[stage.name] = identity(finished) if action == "finished" else None
        if names and stage.name not in names and stage.name not in redo:
            continue
        if action == "start" and _is_of_others(stage.folder):
            refused.append(
                f"{stage.name}: the folder {stage.folder} is not empty and was not made by this chain. "
                "Choose another output_dir, or move the folder away."
            )
        if changed:
            refused.append(_changed(stage, action, changed))
        if missing and action != "finished":
            refused.append(
                f"{stage.name}: it needs {', '.join(missing)}, not made yet. Run that first, or name it too."
            )
        steps.append(Step(stage, action, record))
    if refused:
        raise ChainError("\n".join(refused))
    return steps


def _known(recipe: Recipe, names: list[str]) -> None:
    """Raises `ChainError` for names that are no stages of the recipe."""
    known = [s.name for s in recipe.stages]
    wrong = [n for n in names if n not in known]
    if wrong:
        raise ChainError(
            "\n".join(f"no stage {n!r}{errors.meant(n, known)}; {recipe.file} has {', '.join(known)}" for n in wrong)
        )


def _with_what_builds_on_it(recipe: Recipe, redo: list[str]) -> set[str]:
    """The stages `redo` and all that build on them."""
    found = set(redo)
    for stage in recipe.stages:
        if found & set(stage.parents):
            found.add(stage.name)
    return found


def _look(stage: Stage, record: dict, again: bool) -> tuple[str, list[str], dict | None]:
    """`(action, what changed since, the record of the finished stage)`, from what lies in the stage's folder."""
    finished = files.read_json(stage.folder / files.FINISHED)
    started = files.read_json(stage.folder / files.STARTED)
    if again and (finished or started):
        return "redo", [], finished
    if finished:
        return "finished", differences(finished["record"], record), finished
    if not started:
        return "start", [], None
    changed = differences(started["record"], record)
    if changed and not _can_resume(stage):
        return "start", [], None  # it failed before anything was kept: nothing was trained under the old settings
    return "resume", changed, None


def _can_resume(stage: Stage) -> bool:
    """Whether there is work of an earlier session: a whole checkpoint, or answers that were sampled."""
    return last_checkpoint(stage.checkpoints) is not None or (stage.checkpoints / "answers.jsonl").is_file()


def _is_of_others(folder: Path) -> bool:
    """Whether a folder holds something that no stage of ours has begun."""
    return folder.is_dir() and any(folder.iterdir()) and not (folder / files.STARTED).is_file()


def _changed(stage: Stage, action: str, changed: list[str]) -> str:
    """Why a stage with other settings than those it was made from is refused."""
    parents = [c for c in changed if c.startswith("parents.")]
    if len(parents) == len(changed):
        why = f"it builds on {', '.join(p.split(' ')[0].split('.')[1] for p in parents)}, made again since"
    else:
        why = "; ".join(c for c in changed if c not in parents)
    return (
        f"{stage.name}: {action} with other settings: {why}. "
        f"Put them back, or make it again with --redo {stage.name} (the old folder is kept aside)."
    )


def run(recipe: Recipe, names: list[str] = (), redo: list[str] = ()) -> None:
    """Run the stages that are due on the processes Accelerate started. Every process calls it."""

    state = launch.start()
    with lock(recipe.output_dir, state.is_main_process):
        # One process looks at the disk and all follow: by the time another looks, it may have changed.
        word: list = [None]
        if state.is_main_process:
            try:
                word[0] = [(s.stage.name, s.action) for s in plan(recipe, names, redo)]
            except ChainError as error:
                word[0] = error
        broadcast_object_list(word)
        if isinstance(word[0], ChainError):
            raise word[0]
        if state.is_main_process:
            stages = [{"name": s.name, "kind": s.kind, "parents": s.parents} for s in recipe.stages]
            files.write_json(recipe.output_dir / CHAIN, {"recipe": str(recipe.file), "stages": stages})
        for name, action in word[0]:
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


def _run_stage(recipe: Recipe, stage: Stage, action: str, state) -> None:

    clock, started = time.monotonic(), files.now()
    record, earlier = None, 0.0
    if state.is_main_process:
        if action == "redo":
            _set_aside(stage.folder)
        if action == "start" and stage.checkpoints.is_dir():
            shutil.rmtree(stage.checkpoints)
            logger.info("%s: an earlier start failed before its first checkpoint: it begins anew", stage.name)
        earlier = files.read_log(stage.checkpoints)[2]  # seconds of the sessions that were stopped
        parents = {p: identity(files.read_json(recipe[p].folder / files.FINISHED)) for p in stage.parents}
        record = chain_record.record(stage, parents)
        before = files.read_json(stage.folder / files.STARTED) or {}
        started = before.get("started", started)
        files.write_json(stage.folder / files.STARTED, {"record": record, "started": started})
        logger.info("%s: %s (%s)", stage.name, {"redo": "start again"}.get(action, action), stage.kind)
    state.wait_for_everyone()
    metrics = stage.module.run(stage)
    state.wait_for_everyone()
    if state.is_main_process:
        seconds = earlier + time.monotonic() - clock
        finish(stage, record, metrics, started, seconds, state.num_processes)
        _clean(stage)
        shown = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items() if isinstance(v, (int, float)))
        logger.info("%s: done in %.0f s: %s", stage.name, time.monotonic() - clock, shown)
    state.wait_for_everyone()
    launch.reset()


def _clean(stage: Stage) -> None:
    """What only served to resume goes, after `stage.json` said that the stage is finished."""

    shutil.rmtree(stage.checkpoints, ignore_errors=True)
    (stage.folder / files.STARTED).unlink(missing_ok=True)


def _set_aside(folder: Path) -> None:
    """Move a folder that is made again to `.replaced/NAME-TIME`: nothing is lost."""
    aside = folder.parent / ".replaced" / f"{folder.name}-{files.now().replace(':', '')[:17]}"
    aside.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(aside)
    logger.warning("the old %s is kept in %s", folder, aside)
