"""A recipe run in this process: the only one, or one of those that a launcher started. The verb is in `run.py`."""

from __future__ import annotations

import logging
import os
import warnings

from pipelines import launch
from pipelines.chain import chain
from pipelines.commands import split_words
from pipelines.errors import ChainError, Interrupted, NotFinite
from pipelines.files import storage_error
from pipelines.planning.dialogue_rows import check_dialogues
from pipelines.recipe import recipe
from pipelines.recipe.problems import RecipeError
from pipelines.recipe.stage import Recipe
from pipelines.report import page

logger = logging.getLogger(__name__)


def run(file: str, words: list[str], redo: list[str]) -> int:
    """Run the recipe `file` with `words` (stages, overrides) and the stages `redo`; returns the exit code."""
    configure_logging()
    names, overrides = split_words(words)
    first = int(os.environ.get("RANK", "0")) == 0
    try:
        loaded = recipe.load(file, overrides, read_data=first, ask_hub=first)
        if first:
            check_dialogues(loaded)
    except RecipeError:
        if first:
            raise
        return 2
    timeouts = [s.sections["args"]["ddp_timeout"] for s in loaded.stages if "ddp_timeout" in s.sections.get("args", {})]
    launch.start(max(timeouts, default=1800))  # before anything else creates Accelerate's state
    try:
        run_and_report(loaded, names, redo)
    except (Interrupted, KeyboardInterrupt) as stop:
        launch.last_words(str(stop) or "stopped; the same command goes on from the last checkpoint")
        return 130
    except NotFinite as error:
        launch.last_words(f"error: {error}")
        return 1
    except RuntimeError as error:
        if not launch.lost(error):
            raise
        launch.last_words(
            f"error: process {os.environ.get('RANK')} lost the others, or the network to them: "
            f"{str(error).splitlines()[0]}\nThe same command (on every machine) goes on from the last checkpoint."
        )
        return 1
    return 0


def run_and_report(loaded: Recipe, names: list[str], redo: list[str]) -> None:
    """Run the stages that are due and write the report, of a run that was stopped or failed, too."""
    worked = True
    try:
        chain.run(loaded, names, redo)
    except ChainError:  # nothing was run
        worked = False
        raise
    finally:
        if worked and int(os.environ.get("RANK", "0")) == 0:
            draw(loaded.output_dir)


def draw(folder) -> None:
    """Write the run's report. It is no part of the training: where it fails, the error is shown and the run goes on."""
    try:
        logger.info("report: %s", page.write(folder, running=False))
    except Exception as error:
        if (problem := storage_error(error)) is not None:
            logger.warning("the report is not written: %s", problem)
            return
        logger.warning("%s could not be drawn; the run is not affected", folder / page.PAGE, exc_info=True)


def configure_logging() -> None:
    """One line per event, from the first process only; warnings from every process."""
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logging.getLogger("pipelines").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # bars are for long work; the trainers have theirs
    # TRL still sets gradient_checkpointing, which transformers renamed: nothing the user could do about it
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated")
    # the stage's record has compared every setting; the Trainer takes a fraction (eval_steps: 0.1) for a change
    same = lambda record: "do not match the ones in the `trainer_state.json`" not in record.getMessage()
    logging.getLogger("transformers.trainer_utils").addFilter(same)
