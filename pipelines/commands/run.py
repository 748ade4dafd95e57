"""`pipelines run RECIPE [STAGE …] [KEY=VALUE …]`: run the stages of a recipe that are due, on one process or many."""

from __future__ import annotations

import argparse
import logging
import os
import warnings

from pipelines import launch
from pipelines.chain import chain
from pipelines.commands import split_words
from pipelines.errors import ChainError, Interrupted, NotFinite, SetupError
from pipelines.recipe import recipe
from pipelines.recipe.problems import RecipeError
from pipelines.recipe.stage import Recipe
from pipelines.report import page

logger = logging.getLogger(__name__)

EXAMPLES = """\
examples
  pipelines run recipes/demo.yaml                          all stages that are due; finished ones are skipped
  pipelines run recipes/demo.yaml sft reward               only these
  pipelines run recipes/demo.yaml --redo sft               again, with all that builds on it (old folders are kept)
  pipelines run recipes/demo.yaml stages.sft.args.learning_rate=1e-4 output_dir=runs/hot
  pipelines run recipes/demo.yaml --on cpu_2               two processes on the CPU
  pipelines run recipes/qwen3_rlhf.yaml --on fsdp2 --gpus 4
  accelerate launch --config_file accelerate_configs/ddp.yaml -m pipelines recipes/demo.yaml      the same by Accelerate

Without --on a run takes all GPUs of this machine (data parallelism), or one process on the CPU where there are none.
Ctrl-C saves and stops; the same command goes on from there. Exit codes: 0 done, 1 training failed, 2 the recipe, data
or command is wrong, 130 stopped.
"""


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="pipelines run",
        description="Run a recipe, or some of its stages.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="a YAML file; see recipes/, or `pipelines init`")
    parser.add_argument("words", nargs="*", metavar="STAGE | KEY=VALUE", help="stages to run (default: all); overrides")
    parser.add_argument("--redo", action="append", default=[], metavar="STAGE", help="make this stage again")
    parser.add_argument("--on", metavar="NAME", help="start the processes of this file in accelerate_configs/ (ddp, fsdp2, "
                        "zero3, cpu_2, …), or of a path")  # fmt: skip
    parser.add_argument("--gpus", type=int, metavar="N", help="so many GPUs, one process on each (default: all)")
    args = parser.parse_intermixed_args(argv)
    if launch.launched():
        if args.on or args.gpus:
            raise SetupError("--on and --gpus start a launcher, but one started this process: drop one of the two")
        return run(args)
    if args.gpus is not None and args.gpus < 1:
        raise SetupError(f"--gpus {args.gpus}: must be 1 or more")
    if args.on or args.gpus or launch.available() > 1:
        redo = [word for name in args.redo for word in ("--redo", name)]
        return launch.launch(args.on, args.gpus, [args.recipe, *args.words, *redo])
    return run(args)


def run(args) -> int:
    """Run the recipe in this process, one of those that Accelerate started."""
    configure_logging()
    names, overrides = split_words(args.words)
    first = int(os.environ.get("RANK", "0")) == 0
    try:
        loaded = recipe.load(args.recipe, overrides, read_data=first, ask_hub=first)
    except RecipeError:
        if first:
            raise
        return 2
    timeouts = [s.sections["args"]["ddp_timeout"] for s in loaded.stages if "ddp_timeout" in s.sections.get("args", {})]
    launch.start(max(timeouts, default=1800))  # before anything else creates Accelerate's state
    try:
        run_and_report(loaded, names, args.redo)
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
    except Exception:
        logger.warning("%s could not be drawn; the run is not affected", folder / page.PAGE, exc_info=True)


def configure_logging() -> None:
    """One line per event, from the first process only; warnings from every process."""
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logging.getLogger("pipelines").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # bars are for long work; the trainers have theirs
    # TRL still sets gradient_checkpointing, which transformers renamed: nothing the user could do about it
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated")
