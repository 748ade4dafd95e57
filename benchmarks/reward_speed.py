"""Reward training on rankings: ours, each answer encoded once, against TRL's `RewardTrainer` on all their pairs.

    python benchmarks/reward_speed.py                    # the demo's rankings (K = 4), a small GPT-2, fp32 on the CPU

Both sides train the same model on the same rankings with the same loss, in one process and in turn, batch by batch: TRL
gets every pair that a ranking decides as a row of `chosen` and `rejected`. Reported is the time of loss, backward and
clipped AdamW step per decided pair, medians over the batches, as a ratio; and how far the two losses are apart.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from pipelines.data import train_tokenizer
from pipelines.models import chat_template
from pipelines.speed import fast_model, packed_attention
from pipelines.training.rankings import RankingCollator, decided, ranking_loss

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rankings", type=Path, default=ROOT / "data/bay/rankings.jsonl.gz", help="prompt, completions, ranks"
    )
    parser.add_argument("--batch", type=int, default=16, help="rankings per step")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()

    import torch
    from datasets import Dataset
    from transformers import GPT2Config, GPT2ForSequenceClassification
    from trl import RewardConfig, RewardTrainer
    from trl.trainer.reward_trainer import DataCollatorForPreference

    with gzip.open(args.rankings, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][: args.batch * args.steps]
    tokenizer = train_tokenizer.train_bpe((c for row in rows for c in [row["prompt"], *row["completions"]]), 1536)
    features = [
        {
            "ids": [sum(chat_template.encode_answer(tokenizer, row["prompt"], c), []) for c in row["completions"]],
            "ranks": row["ranks"],
        }
        for row in rows
    ]
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=256,
        n_layer=4,
        n_embd=256,
        n_head=4,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    torch.manual_seed(0)
    models = [GPT2ForSequenceClassification(config) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    fast_model.fast_gelu(models[0])  # as the stage does
    packed_attention.enable_packed_scores(models[0])
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-4, fused=True) for model in models]
    trl = RewardTrainer(
        model=models[1],
        args=RewardConfig(
            output_dir=tempfile.mkdtemp(), bf16=False, use_cpu=True, report_to=[], gradient_checkpointing=False
        ),
        train_dataset=Dataset.from_list([{"chosen_ids": [1], "rejected_ids": [2]}]),
        processing_class=tokenizer,
    )
    collate, collate_pairs = (
        RankingCollator(tokenizer.pad_token_id, packed=True),
        DataCollatorForPreference(tokenizer.pad_token_id),
    )

    def ours(batch: list[dict]):
        inputs = collate(batch)
        packed = {k: v for k, v in inputs.items() if k not in ("better", "worse", "weight", "margin", "tags")}
        scores = models[0](**packed, use_cache=False).logits[:, 0]
        return ranking_loss(scores[inputs["better"]], scores[inputs["worse"]], inputs["weight"])

    def theirs(batch: list[dict]):
        pairs = [
            {"chosen_ids": f["ids"][i], "rejected_ids": f["ids"][j]} for f in batch for i, j in decided(f["ranks"])
        ]
        return trl.compute_loss(models[1], collate_pairs(pairs))

    seconds, apart, pairs = ([], []), [], 0
    for start in range(0, len(features), args.batch):
        batch = features[start : start + args.batch]
        pairs += sum(len(decided(f["ranks"])) for f in batch)
        losses = []
        for side, loss_of in enumerate((ours, theirs)):
            began = time.perf_counter()
            loss = loss_of(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(models[side].parameters(), 1.0)
            optimizers[side].step()
            optimizers[side].zero_grad()
            seconds[side].append(time.perf_counter() - began)
            losses.append(loss.item())
        apart.append(abs(losses[0] - losses[1]))
    own, trls = (statistics.median(s[2:]) for s in seconds)  # the first two warm up
    print(
        f"{len(features)} rankings, {pairs / len(features):.1f} pairs each; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads"
    )
    print(
        f"  ours {1000 * own:.0f} ms a step, TRL's RewardTrainer {1000 * trls:.0f} ms: {trls / own:.2f}x the pairs per "
        "second"
    )
    print(f"  losses of the first batch: {apart[0]:.3f} apart (TRL weighs pairs alike, we weigh rankings alike)")


if __name__ == "__main__":
    main()
