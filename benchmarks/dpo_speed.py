"""DPO on rankings: ours, each answer encoded once behind one copy of its prompt, against TRL's `DPOTrainer` on all
their pairs.

    python benchmarks/dpo_speed.py                    # the demo's rankings (K = 4), a small GPT-2, fp32 on the CPU

Both sides train the same model on the same rankings with the same loss, in one process and in turn, batch by batch: TRL
gets every pair that a ranking decides as a row of `chosen` and `rejected`, and both read the reference's log-probs as
they were computed before the first step, ours for each answer and TRL's (`precompute_ref_log_probs`) for each pair.
Reported are CPU seconds (of all threads) of loss, backward and clipped AdamW step per decided pair, medians over the
batches, as a ratio; the same of the reference's pass; and how far losses and weights are apart, where rankings weigh as
many pairs as each other.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from pipelines.data import train_tokenizer
from pipelines.models import chat_template
from pipelines.speed import fast_model, packed_attention
from pipelines.training.preferences import collate_rankings, enable_answer_logprobs, rankings_loss, table
from pipelines.training.rankings import decided

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rankings", type=Path, default=ROOT / "data/bay/rankings.jsonl.gz", help="prompt, completions, ranks"
    )
    parser.add_argument("--batch", type=int, default=16, help="rankings per step")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--ties", action="store_true", help="rankings with ties too, not only those of all six pairs")
    args = parser.parse_args()

    import torch
    from datasets import Dataset
    from transformers import GPT2Config, GPT2LMHeadModel
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    with gzip.open(args.rankings, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rows = [row for row in rows if len(decided(row["ranks"])) == 6 or (args.ties and decided(row["ranks"]))]
    rows = rows[: args.batch * args.steps]
    tokenizer = train_tokenizer.train_bpe((c for row in rows for c in [row["prompt"], *row["completions"]]), 1536)
    features = []
    for row in rows:
        pairs = [chat_template.encode_answer(tokenizer, row["prompt"], c) for c in row["completions"]]
        prompts, answers = (list(side) for side in zip(*pairs, strict=True))
        features.append({"prompts": prompts, "answers": answers, "ranks": row["ranks"]})
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=256,
        n_layer=4,
        n_embd=256,
        n_head=4,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    torch.manual_seed(0)
    models = [GPT2LMHeadModel(config).train() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    fast_model.fast_gelu(models[0])  # as the stage does
    packed_attention.enable_packed_attention(models[0])
    enable_answer_logprobs(models[0])
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-4, fused=True) for model in models]
    settings = SimpleNamespace(
        ranking_loss="pairs", loss_type=["sigmoid"], loss_weights=None, beta=0.1, label_smoothing=0.0
    )
    trl = DPOTrainer(
        model=models[1],
        args=DPOConfig(
            output_dir=tempfile.mkdtemp(),
            bf16=False,
            use_cpu=True,
            report_to=[],
            gradient_checkpointing=False,
            precompute_ref_log_probs=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=tokenizer,
    )
    collate_pairs = DataCollatorForPreference(tokenizer.pad_token_id)
    batches = [features[start : start + args.batch] for start in range(0, len(features), args.batch)]

    def pairs_of(batch: list[dict]) -> list[dict]:
        return [
            {
                "prompt_ids": f["prompts"][i],
                "chosen_ids": f["answers"][i],
                "rejected_ids": f["answers"][j],
            }
            for f in batch
            for i, j in decided(f["ranks"])
        ]

    def timed(work, *given):
        began = time.process_time()
        out = work(*given)
        return out, time.process_time() - began

    @torch.no_grad()
    def our_reference(batch: list[dict]):
        return models[0](answers=collate_rankings(batch, True, True))

    @torch.no_grad()
    def their_reference(batch: list[dict]):
        return trl.compute_ref_log_probs(models[1], collate_pairs(pairs_of(batch)))

    references = [[timed(work, batch) for batch in batches] for work in (our_reference, their_reference)]

    def ours(number: int):
        batch = collate_rankings(batches[number], True, True)
        ratios = models[0](answers=batch) - references[0][number][0]
        return rankings_loss(ratios, **table(batches[number]), lengths=batch["lengths"], args=settings)

    def theirs(number: int):
        chosen, rejected = references[1][number][0]
        inputs = collate_pairs(pairs_of(batches[number]))
        return trl.compute_loss(models[1], inputs | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected})

    def step(side: int, loss_of, number: int) -> float:
        loss = loss_of(number)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(models[side].parameters(), 1.0)
        optimizers[side].step()
        optimizers[side].zero_grad()
        return loss.item()

    seconds, apart = ([], []), []
    for number in range(len(batches)):
        losses = []
        for side, loss_of in enumerate((ours, theirs)):
            loss, took = timed(step, side, loss_of, number)
            losses.append(loss)
            seconds[side].append(took)
        apart.append(abs(losses[0] - losses[1]))
    pairs = sum(len(decided(f["ranks"])) for f in features)
    own, trls = (statistics.median(s[2:]) for s in seconds)  # the first two warm up
    before = [statistics.median(took for _, took in side[2:]) for side in references]
    weights = models[1].state_dict()
    furthest = max((models[0].state_dict()[k] - w).abs().max().item() for k, w in weights.items())
    print(
        f"{len(features)} rankings, {pairs / len(features):.1f} pairs each; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads"
    )
    rate = [pairs / len(batches) / took for took in (own, trls)]
    print(
        f"  a step: ours {own:.3f} CPU s ({rate[0]:.0f} pairs per CPU second), TRL's DPOTrainer {trls:.3f} "
        f"({rate[1]:.0f}): {trls / own:.2f}x"
    )
    print(f"  the reference's pass: {before[0]:.3f} and {before[1]:.3f} CPU s a batch: {before[1] / before[0]:.2f}x")
    print(f"  after {len(batches)} steps: losses at most {max(apart):.1e} apart, weights {furthest:.1e}")


if __name__ == "__main__":
    main()
