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

logger = logging.getLogger(__name__)


@dataclass
class Step:
    """What happens to one stage: `finished` (skipped), `resume`, `start` or `redo` (the old folder is kept aside)."""

    stage: Stage
    action: str
    record: dict


def plan(recipe: Recipe, names: list[str] = (), redo: list[str] = ()) -> list[Step]:
    """The steps for the stages `names` (all when empty). Raises `ChainError` with every reason why it cannot be done."""
    known = [s.name for s in recipe.stages]
    wrong = [n for n in [*names, *redo] if n not in known]
    if wrong:
        raise ChainError(
            "\n".join(f"no stage {n!r}{errors.meant(n, known)}; {recipe.file} has {', '.join(known)}" for n in wrong)
        )
    redo = set(redo)
    for stage in recipe.stages:  # what builds on a stage that is made again is made again too
        if redo & set(stage.parents):
            redo.add(stage.name)
    steps, refused, made = [], [], {}
    for stage in recipe.stages:
        chosen = not names or stage.name in names or stage.name in redo
        finished = files.read_json(stage.folder / files.FINISHED)
        started = files.read_json(stage.folder / files.STARTED)
        due = [p for p in stage.parents if made.get(p) is None]
        record = chain_record.record(stage, {p: made.get(p) or "not made yet" for p in stage.parents})
        if stage.name in redo and (finished or started):
            action, changed = "redo", []
        elif finished:
            action, changed = "finished", differences(finished["record"], record)
        elif started:
            action, changed = "resume", differences(started["record"], record)
        else:
            action, changed = "start", []
            if stage.folder.is_dir() and any(stage.folder.iterdir()) and chosen:
                refused.append(
                    f"{stage.name}: the folder {stage.folder} is not empty and was not made by this chain. "
                    "Choose another output_dir, or move the folder away."
                )
        made[stage.name] = identity(finished) if finished and action == "finished" else None
        if not chosen:
            continue
        if changed:
            parents = [c for c in changed if c.startswith("parents.")]
            why = "it builds on " + ", ".join(p.split(" ")[0].split(".")[1] for p in parents) + ", made again since" \
                if len(parents) == len(changed) else "; ".join(c for c in changed if c not in parents)  # fmt: skip
            refused.append(
                f"{stage.name}: {action} with other settings: {why}. "
                f"Put them back, or make it again with --redo {stage.name} (the old folder is kept aside)."
            )
        missing = [p for p in due if names and p not in names and p not in redo]
        if missing and action != "finished":
            refused.append(
                f"{stage.name}: it needs {', '.join(missing)}, not made yet. Run that first, or name it too."
            )
        steps.append(Step(stage, action, record))
    if refused:
        raise ChainError("\n".join(refused))
    return steps


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
    logger.info("the chain is complete: %s", recipe.output_dir)


def _run_stage(recipe: Recipe, stage: Stage, action: str, state) -> None:

    clock, started = time.monotonic(), files.now()
    record, earlier = None, 0.0
    if state.is_main_process:
        if action == "redo":
            _set_aside(stage.folder)
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
