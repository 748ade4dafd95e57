"""What a chain's PPO stage did, for people: its curve, how fluent a base model finds the answers, twenty of them.

    python benchmarks/rlhf_figures.py runs/smollm2_rlhf/policy --base HuggingFaceTB/SmolLM2-135M-Instruct

Reads `history.jsonl` and `samples.jsonl` of the stage: at least 100 held-out answers of the policy it started from and
of the one it made, to the same prompts. The perplexity is that of the answers' tokens under the base, after the very
text that the policy was given; for PPO's answers it should be at most 1.3 times that of the answers before. Of the
samples the ten that gained most and the ten that lost most are printed, so that the bad ones are among them.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines import files
from pipelines.generation.logprobs import collate, token_logprobs

COLUMNS = ("eval_score", "eval_kl", "eval_ref_perplexity", "eval_length", "eval_eos_rate")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", type=Path, help="the folder of a finished ppo stage")
    parser.add_argument("--base", help="a causal language model: the perplexity of the answers under it")
    args = parser.parse_args()
    curve(files.read_rows(args.stage / "history.jsonl"))
    samples = [row for row in files.read_rows(args.stage / "samples.jsonl") if row["split"] == "eval"]
    last = {row["prompt"]: row for row in samples if "first" in row and row["step"] == samples[-1]["step"]}
    if args.base:
        tokenizer, model = (kind.from_pretrained(args.base) for kind in (AutoTokenizer, AutoModelForCausalLM))
        before, after = (
            perplexity(model.eval(), tokenizer, [(row["prompt"], pick(row)) for row in last.values()])
            for pick in (lambda row: row["first"], lambda row: row)
        )
        print(f"\nperplexity under {args.base} of {len(last)} answers: {before:.2f} before, {after:.2f} after", end="")
        print(f" ({after / before:.2f} times)")
    gained = sorted(last.values(), key=lambda row: row["first"]["score"] - row["score"])
    print(f"\n{len(gained)} held-out answers; the ten that gained most, the ten that lost most\n")
    print("| prompt | before | score | after | score |\n| --- | --- | ---: | --- | ---: |")
    for row in [*gained[:10], *gained[-10:]]:
        cells = shown(row["prompt"]), shown(row["first"]["completion"]), shown(row["completion"])
        print(f"| {cells[0]} | {cells[1]} | {row['first']['score']:.2f} | {cells[2]} | {row['score']:.2f} |")


def curve(history: list[dict]) -> None:
    """Print a row for each evaluation."""
    rows = [row for row in history if "eval_score" in row and "eval_kl" in row]
    judges = sorted({key for row in rows for key in row if key.startswith("eval_reward/") and not key.endswith("_std")})
    names = [*COLUMNS, *(judges if len(judges) > 1 else [])]
    print(f"| update | {' | '.join(name.removeprefix('eval_') for name in names)} |\n|{' ---: |' * (len(names) + 1)}")
    for row in {row["step"]: row for row in rows}.values():
        print(f"| {row['step']} | {' | '.join(f'{row[name]:.3f}' if name in row else '' for name in names)} |")


@torch.no_grad()
def perplexity(model, tokenizer, answers: list[tuple[str, dict]]) -> float:
    """exp of the mean over all tokens of −log p of (prompt, {completion, ended}), EOS included where an answer
    ended.
    """
    nats, count = 0.0, 0
    for prompt, answer in answers:
        ids = tokenizer(answer["completion"], add_special_tokens=False)["input_ids"]
        ids += [tokenizer.eos_token_id] if answer["ended"] else []
        if ids:
            batch = collate([(tokenizer(prompt, add_special_tokens=False)["input_ids"], ids)], False, model.device)
            nats -= token_logprobs(model, batch, 1.0)[0].double().sum().item()
            count += len(ids)
    return math.exp(nats / max(count, 1))


def shown(text: str) -> str:
    """A text as a cell of a Markdown table: one line, without the chat template's marks."""
    for mark in ("<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n", "<|im_end|>"):
        text = text.replace(mark, "")
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    main()
