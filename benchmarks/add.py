"""recipes/add.yaml over several seeds: the share of held-out sums that each method gets right, and its CPU seconds.

    python benchmarks/add.py --seeds 1 2 3 --output runs/add_seeds

One process, one thread, into a new folder: stages that are finished already would cost nothing. Other settings of the
recipe stand behind, as on the command line of `pipelines run`.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pipelines import files  # noqa: E402  after the number of threads
from pipelines.chain import chain  # noqa: E402
from pipelines.recipe.recipe import load  # noqa: E402


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", default="runs/add_seeds", help="a new folder")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE, as of `pipelines run`")
    args = parser.parse_args()
    right: dict[tuple[str, str], list[float]] = {}
    spent: dict[str, list[float]] = {}
    for seed in args.seeds:
        recipe = load("recipes/add.yaml", [*args.overrides, f"seed={seed}", f"output_dir={args.output}/{seed}"])
        for stage in recipe.stages:
            began = time.process_time()
            chain.run(recipe, [stage.name])
            spent.setdefault(stage.name, []).append(time.process_time() - began)
        for measured, how in (("scores", "likeliest answer"), ("sampled", "drawn")):
            figures = files.read_record(recipe[measured].folder / files.FINISHED)["metrics"]["figures"]
            for name in ("sft", "ppo", "rloo", "grpo"):
                right.setdefault((name, how), []).append(figures[f"{name}/score"]["value"])
    print(f"{datetime.date.today()}, {platform.processor() or platform.machine()}, one process and thread")
    print(f"| | {' | '.join(f'seed {seed}' for seed in args.seeds)} | mean | CPU seconds |")
    print(f"| --- |{' ---: |' * (len(args.seeds) + 2)}")
    for (name, how), shares in right.items():
        each = " | ".join(f"{100 * share:.1f} %" for share in shares)
        print(
            f"| {name}, {how} | {each} | {100 * statistics.mean(shares):.1f} % | {statistics.mean(spent[name]):.0f} |"
        )


if __name__ == "__main__":
    main()
