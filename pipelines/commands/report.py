"""`pipelines report RUN`: one HTML file that shows a run: its chain, curves, samples, settings and costs."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from pipelines.commands import command_line
from pipelines.errors import SetupError
from pipelines.report.page import PAGE, WATTS, write
from pipelines.report.run_folder import read

EXAMPLES = """
pipelines report runs/demo
pipelines report runs/demo --watch   again every 10 seconds while it runs; the page reloads itself
pipelines report runs/demo --price-per-hour 2.5
"""


def main(argv: list[str]) -> int:
    """`report RUN [--watch [SECONDS]] [--out FILE] [--watts W] [--price-per-hour P]`; returns the exit code."""
    about = "Write one HTML file that shows a run: chain, curves, samples, settings, costs."
    parser = command_line("report", about, EXAMPLES)
    parser.add_argument("run", type=Path, help="a run's folder (the recipe's output_dir)")
    parser.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=10.0,
        metavar="SECONDS",
        help="write again every 10 (or so many) seconds "
        "until every stage is finished; the page reloads itself while the run is running",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"where to write (RUN/{PAGE})")
    parser.add_argument(
        "--watts", type=float, help=f"power per process (assumed: {WATTS['cpu']:g} W CPU, {WATTS['gpu']:g} W GPU)"
    )
    parser.add_argument(
        "--price-per-hour", type=float, metavar="P", help="price of one process for an hour; adds a cost column"
    )
    args = parser.parse_args(argv)
    if args.watch is not None and args.watch <= 0:
        raise SetupError(f"--watch {args.watch:g}: the seconds between two writes must be above 0")
    if not args.run.is_dir():
        raise SetupError(f"{args.run}: no such folder; give the output_dir of a recipe, e.g. runs/demo")
    settings = {"every": args.watch or 0, "watts": args.watts, "price": args.price_per_hour}
    out = args.out
    if out is None and not os.access(args.run, os.W_OK):
        out = Path(f"{args.run.resolve().name}-{PAGE}")  # of a finished run that nobody may change
    print(write(args.run, out, **settings))
    for stage in read(args.run):
        for problem in stage.problems:
            print(f"{stage.name}: {problem}", file=sys.stderr)
    try:
        while args.watch and any(s.state not in ("finished", "damaged") for s in read(args.run)):
            time.sleep(args.watch)
            write(args.run, out, **settings)
    except KeyboardInterrupt:
        return 130
    return 0
