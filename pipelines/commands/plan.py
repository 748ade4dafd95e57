"""`pipelines plan RECIPE`: will it fit, how long will it take, for every stage before anything runs."""

from __future__ import annotations

import argparse

from pipelines import errors
from pipelines.commands import command_line, split_words
from pipelines.errors import PlanError
from pipelines.planning import devices, setups, tables
from pipelines.planning.job import describe
from pipelines.planning.planner import Planner
from pipelines.recipe import recipe

ABOUT = """\
Will it fit, how long will it take: said for every stage before anything runs.

No weights are read: models come from their config (a local folder, the hub or its cache, or what an earlier stage will
make), are counted and traced without numbers, and the rest are formulae (docs/planning.md). What does not fit is tried
again with one change after the other, and the changes that make it fit are named.
"""
EXAMPLES = """
pipelines plan recipes/demo.yaml policy --calibrate   this CPU, measured for a second
pipelines plan recipes/tldr_pythia1b.yaml --on zero2 --gpus 8 --gpu h100
pipelines plan recipes/qwen3_rlhf.yaml --gpus 1 --gpu a100 --price-per-hour 1.5
"""


def parser() -> argparse.ArgumentParser:
    """The verb's command line."""
    out = command_line("plan", ABOUT, EXAMPLES)
    out.add_argument("recipe", nargs="?", help="a YAML file; see recipes/")
    out.add_argument("words", nargs="*", metavar="STAGE | KEY=VALUE", help="stages to plan (default: all); overrides")
    out.add_argument("--gpus", type=int, help="number of GPUs, one process each (default: the config file's, or 1)")
    out.add_argument("--gpu", help=f"one of {', '.join(devices.DEVICES)} (default with --gpus: h100)")
    out.add_argument("--processes", type=int, help="without GPUs: processes on this machine's CPU")
    out.add_argument(
        "--on",
        "--config_file",
        "--config-file",
        dest="config_file",
        metavar="NAME",
        help="what `run --on` or `accelerate launch --config_file` will get: a file of accelerate_configs/, or a path",
    )
    out.add_argument("--price-per-hour", type=float, help="of one GPU (or of the machine without GPUs)")
    out.add_argument(
        "--mfu", type=float, default=devices.MFU, help="share of the peak FLOP/s reached (default %(default)s)"
    )
    out.add_argument("--calibrate", action="store_true", help="measure this CPU for a second, to say how long")
    return out


def main(argv: list[str]) -> int:
    """Print the plan of a recipe; returns 1 where a stage does not fit."""
    args = parser().parse_intermixed_args(argv)
    if not args.recipe:
        raise PlanError("plan needs a recipe; see recipes/")
    names, overrides = split_words(args.words)
    loaded = recipe.load(args.recipe, overrides, read_data=False)
    known = [stage.name for stage in loaded.stages]
    for name in names:
        if name not in known:
            raise PlanError(f"no stage {name!r} in {args.recipe}{errors.meant(name, known)}; it has {', '.join(known)}")
    if args.gpu:
        devices.device(args.gpu)  # what is wrong with the command is reported before models are looked at
    if args.config_file:
        setups.launcher(args.config_file)
    chosen = [stage for stage in loaded.stages if not names or stage.name in names]
    found = []
    for stage in chosen:
        if stage.spec.leaves_model:
            job = describe(stage)
            found.append(tables.outlook(Planner(job), setups.setup_of(job, args), args.mfu, args.calibrate))
    if found:
        print(tables.report(found, args.price_per_hour))
    if left_out := [f"{stage.name} ({stage.kind})" for stage in chosen if not stage.spec.leaves_model]:
        print(f"not planned, for they train nothing: {', '.join(left_out)}")
    return 0 if all(one.fits for one in found) else 1
