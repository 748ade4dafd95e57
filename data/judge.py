"""Lets stages of a run answer prompts that no stage saw, and the world's oracle judge the answers.

    python data/judge.py runs/demo [--stages base sft policy] [--samples 2] [--show 10]

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
sys.path[:0] = [str(HERE), str(HERE.parent)]

import world  # noqa: E402  beside this file


def answers(folder: Path, prompts: list[str], samples: int, length: int) -> list[list[str]]:
    """`samples` sampled answers (temperature 1) of the model in `folder` to each prompt, cut at EOS or `length` tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pipelines import chat
    from pipelines.ppo.rollout import generate

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if torch.cuda.is_available():
        model.cuda()
    encoded = [chat.encode_prompt(tokenizer, p) for p in prompts for _ in range(samples)]
    with torch.no_grad():
        ids, _ = generate(
            model, encoded, max_new_tokens=length, eos_token_ids=[tokenizer.eos_token_id],
            seeds=[(0, i) for i in range(len(encoded))], temperature=1.0, top_k=0, top_p=1.0, batch_size=64,
        )  # fmt: skip
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [texts[i : i + samples] for i in range(0, len(texts), samples)]


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean of per-prompt values and its 95 % bootstrap interval."""
    rng = random.Random(0)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(500))
    return sum(values) / len(values), means[12], means[487]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of recipes/demo.yaml")
    parser.add_argument("--stages", nargs="+", default=["base", "sft", "policy"])
    parser.add_argument("--prompts", type=Path, default=HERE / "heldout_prompts.jsonl")
    parser.add_argument("--samples", type=int, default=2, help="answers per prompt")
    parser.add_argument("--length", type=int, default=40, help="longest answer in tokens")
    parser.add_argument("--show", type=int, default=10, help="prompts to print with their answers")
    args = parser.parse_args()

    stage_table(args.run)
    stages = [stage for stage in args.stages if (args.run / stage / "stage.json").is_file()]
    if not stages:
        sys.exit(f"error: no finished stage of {', '.join(args.stages)} in {args.run}; run recipes/demo.yaml first")
    prompts = [json.loads(line)["prompt"] for line in open(args.prompts, encoding="utf-8")]
    found = {stage: answers(args.run / stage, prompts, args.samples, args.length) for stage in stages}
    verdicts = {
        stage: [[world.oracle(p, t) for t in group] for p, group in zip(prompts, texts)]
        for stage, texts in found.items()
    }
    print(
        f"\nThe oracle on {len(prompts)} held-out prompts, {args.samples} sampled answers each (share, 95 % interval)\n"
    )
    print(f"  {'stage':<10}" + "".join(f"{name:>24}" for name in ("relevant", "accurate", "polite", "score")))
    for stage in stages:
        cells = [interval(per_prompt(verdicts[stage], name)) for name in ("relevant", "accurate", "polite", "score")]
        print(f"  {stage:<10}" + "".join(f"{f'{m:.3f} [{low:.3f}, {high:.3f}]':>24}" for m, low, high in cells))
    for better, worse in zip(stages[1:], stages):
        a, b = per_prompt(verdicts[better], "score"), per_prompt(verdicts[worse], "score")
        mean, low, high = interval([(x > y) + 0.5 * (x == y) for x, y in zip(a, b)])
        print(f"  {better} is preferred to {worse} in {mean:.1%} of the prompts [{low:.1%}, {high:.1%}], ties split")
    print()
    for i in random.Random(1).sample(range(len(prompts)), min(args.show, len(prompts))):
        print(f"  {prompts[i]}")
        for stage, texts in found.items():
            print(f"    {stage:<8} {verdicts[stage][i][0].score:.2f}  {' '.join(texts[i][0].split())}")


def per_prompt(verdicts: list[list], name: str) -> list[float]:
    """The mean of one field of the verdicts over the answers to each prompt."""
    return [sum(float(getattr(v, name)) for v in group) / len(group) for group in verdicts]


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
