"""Lets stages of a run answer prompts that no stage saw, and the world's oracle judge the answers.

    python data/bay/judge.py runs/demo [--stages base sft policy] [--samples 4] [--show 10]

The oracle knows the facts of the invented world. It evaluates; nothing is ever trained on it. Shares are given with a
95 % bootstrap interval over the prompts, the same prompts for every stage.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import world  # noqa: E402  beside this file

from pipelines.evaluation.figures import interval, wins  # noqa: E402
from pipelines.evaluation.judges import mean_verdict  # noqa: E402
from pipelines.generation import answers  # noqa: E402


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of recipes/demo.yaml")
    parser.add_argument("--stages", nargs="+", default=["base", "sft", "policy"])
    parser.add_argument("--prompts", type=Path, default=HERE / "heldout_prompts.jsonl")
    parser.add_argument("--samples", type=int, default=4, help="answers per prompt")
    parser.add_argument("--length", type=int, default=40, help="longest answer in tokens")
    parser.add_argument("--show", type=int, default=10, help="prompts to print with their answers")
    args = parser.parse_args()

    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    stage_table(args.run)
    stages = [stage for stage in args.stages if (args.run / stage / "stage.json").is_file()]
    if not stages:
        sys.exit(f"error: no finished stage of {', '.join(args.stages)} in {args.run}; run recipes/demo.yaml first")
    prompts = [json.loads(line)["prompt"] for line in open(args.prompts, encoding="utf-8")]
    seeds = [[(0, i * args.samples + k) for k in range(args.samples)] for i in range(len(prompts))]
    found = {
        stage: answers.answers(
            *answers.load(str(args.run / stage)), prompts, seeds, response_length=args.length, temperature=1.0
        )
        for stage in stages
    }
    verdicts = {
        stage: [mean_verdict([world.oracle(p, text) for text, _ in group]) for p, group in zip(prompts, groups)]
        for stage, groups in found.items()
    }
    print(
        f"\nThe oracle on {len(prompts)} held-out prompts, {args.samples} sampled answers each (share, 95 % interval)\n"
    )
    print(f"  {'stage':<10}" + "".join(f"{name:>24}" for name in ("relevant", "accurate", "polite", "score")))
    for stage in stages:
        cells = [interval([v[name] for v in verdicts[stage]]) for name in ("relevant", "accurate", "polite", "score")]
        print(f"  {stage:<10}" + "".join(f"{f'{m:.3f} [{low:.3f}, {high:.3f}]':>24}" for m, low, high in cells))
    for better, worse in zip(stages[1:], stages):
        a, b = ([v["score"] for v in verdicts[stage]] for stage in (better, worse))
        mean, low, high = interval(wins(a, b))
        print(f"  {better} is preferred to {worse} in {mean:.1%} of the prompts [{low:.1%}, {high:.1%}], ties split")
    print()
    for i in random.Random(1).sample(range(len(prompts)), min(args.show, len(prompts))):
        print(f"  {prompts[i]}")
        for stage, groups in found.items():
            text = groups[i][0][0]
            print(f"    {stage:<8} {world.oracle(prompts[i], text).score:.2f}  {' '.join(text.split())}")


def stage_table(run: Path) -> None:
    """What each finished stage of the run measured on its own held-out data."""
    shown = ("perplexity", "accuracy", "masked_accuracy", "f1_macro", "score", "kl", "eos_rate")
    print(f"\n  {'stage':<10}{'kind':<10}{'seconds':>8}   held-out metrics")
    for path in sorted(run.glob("*/stage.json"), key=lambda p: json.loads(p.read_text())["finished"]):
        record = json.loads(path.read_text())
        metrics = {k.removeprefix("eval_"): v for k, v in record["metrics"].items() if isinstance(v, (int, float))}
        text = "  ".join(f"{k} {metrics[k]:.3f}" for k in shown if k in metrics)
        print(f"  {record['stage']:<10}{record['kind']:<10}{record['seconds']:>8.0f}   {text}")


if __name__ == "__main__":
    main()
