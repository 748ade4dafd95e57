"""Held-out pair accuracy of a reward model by epoch: rankings as we learn them, against TRL's trainer on their pairs.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/reward_accuracy.py                # the demo's rankings
    python benchmarks/reward_accuracy.py --rankings FILE.jsonl.gz --epochs 6    # any: prompt, completions, ranks

Both sides train the same small GPT-2 from the same random weights, with the same optimizer, on as many pairs a step and
an epoch. Ours gets whole rankings, each answer encoded once; TRL's `RewardTrainer` gets the pairs that they decide,
shuffled, so that an answer comes up in several steps of an epoch: InstructGPT (2203.02155, section 3.4) saw reward
models overfit by that. One prompt in five is held out. Accuracies have 95 % intervals over the held-out prompts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from pipelines.data import mixing, train_tokenizer
from pipelines.evaluation.figures import interval
from pipelines.models import chat_template
from pipelines.training.rankings import RankingCollator, decided, ranking_loss

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rankings", default=str(ROOT / "data/bay/rankings.jsonl.gz"), help="prompt, completions, ranks"
    )
    parser.add_argument("--rows", type=int, help="only so many rankings")
    parser.add_argument("--batch", type=int, default=16, help="rankings per step")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--context", type=int, default=256, help="longer answers are cut at their beginning")
    args = parser.parse_args()

    import numpy as np
    import torch
    from datasets import Dataset
    from transformers import GPT2Config, GPT2ForSequenceClassification
    from trl import RewardConfig, RewardTrainer
    from trl.trainer.reward_trainer import DataCollatorForPreference

    section = {"train": {"path": args.rankings, "rows": args.rows}, "validation": 0.2}
    sides = mixing.load(section, "rankings", 0)
    tokenizer = train_tokenizer.train_bpe(
        (c for row in sides[0] for c in [str(row["prompt"]), *row["completions"]]), 2048
    )
    train, held_out = (
        [
            {
                "ids": [
                    sum(chat_template.encode_answer(tokenizer, r["prompt"], c), [])[-args.context :]
                    for c in r["completions"]
                ],
                "ranks": r["ranks"],
            }
            for r in rows
            if decided(r["ranks"])
        ]
        for rows in sides
    )
    pairs = [(f["ids"][i], f["ids"][j]) for f in train for i, j in decided(f["ranks"])]
    per_step = round(len(pairs) * args.batch / len(train))
    print(f"{len(train)} rankings with {len(pairs)} pairs; {len(held_out)} held out; {per_step} pairs a step")

    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=args.context,
        n_layer=2,
        n_embd=args.width,
        n_head=4,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    torch.manual_seed(0)
    models = [GPT2ForSequenceClassification(config) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    quiet = RewardConfig(
        output_dir=tempfile.mkdtemp(), bf16=False, use_cpu=True, report_to=[], gradient_checkpointing=False
    )
    unused = Dataset.from_list([{"chosen_ids": [1], "rejected_ids": [2]}])
    trl = RewardTrainer(model=models[1], args=quiet, train_dataset=unused, processing_class=tokenizer)
    collate, collate_pairs = RankingCollator(tokenizer.pad_token_id), DataCollatorForPreference(tokenizer.pad_token_id)

    def ours(order):
        rows = order.permutation(len(train))
        for start in range(0, len(train) - args.batch + 1, args.batch):
            inputs = collate([train[i] for i in rows[start : start + args.batch]])
            scores = models[0](input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0]
            yield ranking_loss(scores[inputs["better"]], scores[inputs["worse"]], inputs["weight"])

    def theirs(order):
        rows = order.permutation(len(pairs))
        for start in range(0, len(pairs) - per_step + 1, per_step):
            some = [pairs[i] for i in rows[start : start + per_step]]
            yield trl.compute_loss(models[1], collate_pairs([{"chosen_ids": a, "rejected_ids": b} for a, b in some]))

    def accuracy(model):
        shares = []
        for start in range(0, len(held_out), 32):
            some = held_out[start : start + 32]
            batch = collate(some)
            with torch.no_grad():
                scores = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
            for row, own in zip(some, scores.split([len(row["ids"]) for row in some])):
                shares.append(np.mean([(own[i] > own[j]).item() for i, j in decided(row["ranks"])]))
        return interval(shares)

    names = ("rankings, each answer once (ours)", "shuffled pairs (TRL's RewardTrainer)")
    optimizers = [torch.optim.AdamW(model.parameters(), args.learning_rate, fused=True) for model in models]
    spent = [0.0, 0.0]
    for epoch in range(args.epochs):
        for side, losses in enumerate((ours, theirs)):
            models[side].train()
            began, seen = time.process_time(), []
            for loss in losses(np.random.default_rng(epoch)):
                loss.backward()
                torch.nn.utils.clip_grad_norm_(models[side].parameters(), 1.0)
                optimizers[side].step()
                optimizers[side].zero_grad()
                seen.append(loss.item())
            spent[side] += time.process_time() - began
            models[side].eval()
            mean, low, high = accuracy(models[side])
            print(
                f"  epoch {epoch + 1}  {names[side]:<38} training loss {np.mean(seen):.3f}  "
                f"held-out accuracy {mean:.3f} [{low:.3f}, {high:.3f}]  {spent[side]:.0f} CPU-s so far",
                flush=True,
            )


if __name__ == "__main__":
    main()
