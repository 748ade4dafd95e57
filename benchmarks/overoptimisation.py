"""Over-optimisation on the demo world: the oracle's score against KL, for one reward model and for three combined.

    pipelines run recipes/demo.yaml base sft samples rankings
    python benchmarks/overoptimisation.py runs/demo --output runs/overoptimisation --seeds 1 2 3

All reward models learn from the same 500 rankings of sft's answers: one from all of them, three from two thirds each
(drawn by their seeds). Then RLOO (no critic: cheaper, and one part less that could matter), with little to hold it near
sft, against the one, and against the three by `mean`, `min` and `uncertainty`. The oracle is a reward of weight 0: it
watches on held-out prompts, and nothing is trained on it. One process, one thread; what is finished is not made again.
Prints a table and writes `--figure`, both of means over the seeds.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.append(str(Path(__file__).resolve().parents[1]))

from data.bay import world  # noqa: E402  after the number of threads
from pipelines import files  # noqa: E402
from pipelines.chain import chain  # noqa: E402
from pipelines.recipe.recipe import load  # noqa: E402
from pipelines.report.charts import HEIGHT, WIDTH, Series, chart  # noqa: E402

RUNS = {"one model": "sum", "mean of three": "mean", "least of three": "min", "mean less deviation": "uncertainty"}
REWARD = ["num_train_epochs=4", "eval_steps=0.5", "save_steps=0.5"]
POLICY = [
    *("advantage=rloo", "num_generations=4", "num_ppo_epochs=1", "max_steps=80", "learning_rate=3e-4", "kl_coef=0.01"),
    *("eval_on_start=true", "eval_steps=8", "save_steps=0.5", "diagnosis=off"),
]
LEVELS = (2, 5, 10, 20, 40)
END = {"kl": 0, "proxy": 2, "oracle": 2, "length": 1}
COLUMNS = {"kl": "eval_kl", "proxy": "eval_score", "oracle": "eval_reward/oracle_score", "length": "eval_length"}


def oracle_score(prompts: list[str], completions: list[str], **columns) -> list[float]:
    """The oracle as a reward function, to be given the weight 0."""
    return [world.oracle(prompt, completion).score for prompt, completion in zip(prompts, completions, strict=True)]


def made(stage: str, folder: Path, seed: int, args: list[str], overrides: list[str]) -> Path:
    """The folder of one stage of the demo's recipe, trained with these `args` and other settings."""
    settings = [*overrides, *(f"args.{value}" for value in args)]
    settings = [f"seed={seed}", f"output_dir={folder}", *(f"stages.{stage}.{value}" for value in settings)]
    chain.run(load("recipes/demo.yaml", settings), [stage])
    return folder / stage


def reward_model(folder: Path, seed: int, demo: Path, share: float) -> Path:
    """A reward model of a `share` of the rankings."""
    rankings = f"{{path: {demo}/rankings/rankings.jsonl, rows: 500, weight: {share}}}"
    start = f"model.model_name_or_path={demo}/sft"
    return made("reward", folder, seed, REWARD, [start, f"data.train={rankings}"])


def curve(folder: Path, seed: int, demo: Path, models: list[Path], combine: str) -> list[dict[str, float]]:
    """The held-out evaluations of a policy trained against `models`."""
    reward = {"models": list(map(str, models)), "combine": combine, "weights": [1] * len(models) + [0]}
    reward["functions"] = ["benchmarks.overoptimisation:oracle_score"]
    overrides = [
        f"model.model_name_or_path={demo}/sft",
        f"reward={reward}",
        "data.validation=data/bay/heldout_prompts.jsonl",
    ]
    history = files.read_rows(made("policy", folder, seed, POLICY, overrides) / files.HISTORY)
    steps = {row["step"]: row for row in history if "eval_kl" in row}  # the last is evaluated twice
    return [{name: row[key] for name, key in COLUMNS.items()} for row in steps.values()]


def mean(curves: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """The curve of means over the seeds, evaluation by evaluation."""
    return [
        {name: statistics.fmean(row[name] for row in rows) for name in COLUMNS} for rows in zip(*curves, strict=True)
    ]


def at(curve: list[dict[str, float]], kl: float, name: str = "oracle") -> str:
    """The value of a figure where a curve first comes to `kl`, between two evaluations on the straight line."""
    for a, b in itertools.pairwise(curve):
        if a["kl"] <= kl < b["kl"]:
            return f"{a[name] + (b[name] - a[name]) * (kl - a['kl']) / (b['kl'] - a['kl']):.2f}"
    return "–"


def table(curves: dict[str, list[dict[str, float]]]) -> str:
    """The oracle's score at some KL, and all figures at the end, in Markdown."""
    head = ["", *(f"oracle at KL {kl}" for kl in LEVELS), "at the end: KL", "proxy", "oracle", "tokens"]
    rows = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for name, curve in curves.items():
        cells = [*(at(curve, kl) for kl in LEVELS), *(f"{curve[-1][key]:.{n}f}" for key, n in END.items())]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def picture(curves: dict[str, list[dict[str, float]]]) -> str:
    """The oracle's score and the reward's over the square root of the KL, as an SVG that stands alone."""
    parts = [f'<rect width="{2 * WIDTH + 60}" height="{HEIGHT + 60}" fill="#fff" rx="6"/>']
    for panel, (key, y) in enumerate((("oracle", "score of the oracle"), ("proxy", "reward in training, held-out"))):
        lines = [
            Series(name, [(math.sqrt(max(row["kl"], 0.0)), row[key]) for row in curve], "both", color)
            for color, (name, curve) in enumerate(curves.items())
        ]
        drawn = chart(lines, "square root of the KL to sft (nats per answer)", y).partition("</svg>")[0]
        place = f'x="{20 + panel * (WIDTH + 20)}" y="40" width="{WIDTH}" height="{HEIGHT}"'
        parts.append(drawn.replace("<svg", f"<svg {place}", 1) + "</svg>")
    for color, name in enumerate(curves):
        x = 30 + 185 * color
        parts.append(f'<g class="c{color}"><circle cx="{x}" cy="22" r="4"/><text x="{x + 10}" y="26">{name}</text></g>')
    colours = ("#2a6fdb", "#d9662b", "#17845f", "#8a4fc7")
    style = "".join(f".c{i} path{{stroke:{c}}}.c{i} circle{{fill:{c}}}" for i, c in enumerate(colours))
    style += (
        "path{fill:none;stroke-width:2}circle{stroke:none}.grid{stroke:#d9dee5}.axis{stroke:#5b6470}text{fill:#5b6470}"
    )
    size = f'viewBox="0 0 {2 * WIDTH + 60} {HEIGHT + 60}" font-family="system-ui, sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>{"".join(parts)}</svg>\n'


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="a run of recipes/demo.yaml with finished sft and rankings")
    parser.add_argument("--output", type=Path, default=Path("runs/overoptimisation"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--figure", type=Path, default=Path("docs/pictures/overoptimisation.svg"))
    args = parser.parse_args()
    curves: dict[str, list[list[dict[str, float]]]] = {name: [] for name in RUNS}
    for seed in args.seeds:
        home = args.output / str(seed)
        one = [reward_model(home / "all", seed, args.demo, 1)]
        three = [reward_model(home / f"two_thirds_{i}", 10 * seed + i, args.demo, 0.67) for i in (1, 2, 3)]
        for name, how in RUNS.items():
            began = time.process_time()
            curves[name].append(curve(home / how, seed, args.demo, one if how == "sum" else three, how))
            print(f"seed {seed}, {name}: {time.process_time() - began:.0f} CPU seconds", flush=True)
    means = {name: mean(found) for name, found in curves.items()}
    files.write_text(args.figure, picture(means))
    print(table(means))


if __name__ == "__main__":
    main()
