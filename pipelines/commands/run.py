"""`pipelines run RECIPE [STAGE …] [KEY=VALUE …]`: run the stages of a recipe that are due, on one process or many."""

from __future__ import annotations

from pipelines import launch
from pipelines.commands import command_line
from pipelines.errors import SetupError

ABOUT = """\
Run a recipe, or some of its stages. What is finished is skipped, what was stopped goes on from its last checkpoint.

Without --on a run takes all GPUs of this machine (data parallelism), or one process on the CPU where there are none.
`accelerate launch --config_file accelerate_configs/ddp.yaml -m pipelines RECIPE` is the same as --on ddp. Ctrl-C saves
and stops. Exit codes: 0 done, 1 training failed, 2 the recipe, data or command is wrong, 130 stopped.
"""
EXAMPLES = """
pipelines run recipes/demo.yaml   all stages that are due
pipelines run recipes/demo.yaml sft reward   only these
pipelines run recipes/demo.yaml --redo sft   again, with all that builds on it; old folders are kept
pipelines run recipes/demo.yaml --on cpu_2   two processes on the CPU
pipelines run recipes/qwen3_rlhf.yaml --on fsdp2 --gpus 4
pipelines run recipes/demo.yaml stages.sft.args.learning_rate=1e-4 output_dir=runs/hot
"""


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = command_line("run", ABOUT, EXAMPLES)
    parser.add_argument("recipe", help="a YAML file; see recipes/, or `pipelines init`")
    parser.add_argument("words", nargs="*", metavar="STAGE | KEY=VALUE", help="stages to run (default: all); overrides")
    parser.add_argument("--redo", action="append", default=[], metavar="STAGE", help="make this stage again")
    parser.add_argument(
        "--on",
        metavar="NAME",
        help="start the processes of this file in accelerate_configs/ (ddp, fsdp2, zero3, cpu_2, …), or of a path",
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="so many GPUs, one process on each (default: all)")
    args = parser.parse_intermixed_args(argv)
    if launch.launched():
        if args.on or args.gpus is not None:
            raise SetupError("--on and --gpus start a launcher, but one started this process: drop one of the two")
        return _run_here(args)
    if args.on or args.gpus is not None or launch.available() > 1:
        redo = [word for name in args.redo for word in ("--redo", name)]
        return launch.launch(args.on, args.gpus, [args.recipe, *args.words, *redo])
    return _run_here(args)


def _run_here(args) -> int:
    from pipelines.commands import run_here  # seconds of imports that a process which only starts the launcher spares

    return run_here.run(args.recipe, args.words, args.redo)
