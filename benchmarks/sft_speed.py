"""Fine-tuning speed on rows of very different lengths: ours against TRL's padded and packed batches, in one
run.

    python benchmarks/sft_speed.py                       # tiny GPT-2, lengths of mean 90 and at most 256
    python benchmarks/sft_speed.py --precision bf16 --answers 0.5

"rows" is what one step of a process holds: for padded batches so many examples, for packed ones so many packs
of 256 tokens. Candidates are processes that step in turn (see pretrain_speed.py), all in the fast environment
and without dropout, so that only the handling of the batch differs. Reported are useful tokens (padding is
none) per second of wall and CPU time, relative to TRL's padded batches of 8. Before training each computes
the mean loss of the same 64 rows in its own way of batching: these must be equal.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from pretrain_speed import ROOT, SIZES, Candidate, Metronome, environment, hf_model, machine, take_turns

from pipelines.speed.fast_model import fast_model
from pipelines.speed.packed_attention import enable_packed_attention
from pipelines.speed.packing import PackedCollator, plan_packs

CANDIDATES = {  # name: (kind, rows)
    "TRL padded, 8 rows": ("padded", 8),
    "TRL padded, 24 rows": ("padded", 24),
    "TRL packed (bfd), 8 rows": ("packed", 8),
    "TRL packed (bfd), 24 rows": ("packed", 24),
    "ours, 8 rows": ("ours", 8),
    "ours, 24 rows": ("ours", 24),
}
MAX_LENGTH = 256


def rows_of(count: int, vocabulary: int, answers: float) -> list[dict]:
    """Token rows with log-normal lengths (mean about 90, cut at 256); the last share `answers` of each is
    learned."""
    import random

    rng = random.Random(0)
    lengths = [max(8, min(MAX_LENGTH, round(rng.lognormvariate(4.2, 0.8)))) for _ in range(count)]
    rows = []
    for n in lengths:
        ids = [rng.randrange(4, vocabulary) for _ in range(n)]
        learned = max(1, round(n * answers))
        rows.append({"input_ids": ids, "completion_mask": [0] * (n - learned) + [1] * learned})
    return rows


def run(size: str, precision: str, kind: str, rows: int, answers: float) -> None:
    """One candidate: a TRL trainer that steps when told."""
    import tempfile

    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    sys.path.insert(0, str(ROOT))
    vocabulary = SIZES[size][3]
    model = hf_model(size, 0.0)
    data, probe = rows_of(4_000, vocabulary, answers), rows_of(64, vocabulary, answers)

    class Counting(SFTTrainer):
        """TRL's trainer, with a note of each step's tokens."""

        def training_step(self, model, inputs, *rest):
            mask = inputs.get("attention_mask")
            self.work = int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
            self.loss = super().training_step(model, inputs, *rest)
            return self.loss

    class Ours(Counting):
        """What the sft stage runs: the model computes its own fused loss over packed rows."""

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    class Wait(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            mean = mean_loss(trainer)
            self.metronome = Metronome()
            self.metronome.tick(mean)  # the first "step" reports the loss of the probe

        def on_step_end(self, args, state, control, **kwargs):
            self.metronome.tick(trainer.loss, trainer.work)

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            max_steps=10**6,
            per_device_train_batch_size=rows,
            per_device_eval_batch_size=rows,
            max_length=MAX_LENGTH,
            packing=kind == "packed",
            bf16=precision == "bf16",
            activation_checkpointing=False,
            use_cpu=True,
            learning_rate=1e-4,
            logging_steps=500,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=kind != "ours",
            dataset_kwargs={"skip_prepare_dataset": True} if kind == "ours" else None,
        )
        extra, cls = {}, Counting
        if kind == "ours":

            def packed(part):
                plan = plan_packs([len(row["input_ids"]) for row in part], MAX_LENGTH)
                joined = [{k: sum((part[i][k] for i in pack), []) for k in part[0]} for pack in plan]
                lengths = [[len(part[i]["input_ids"]) for i in pack] for pack in plan]
                return [{**row, "seq_lengths": n} for row, n in zip(joined, lengths, strict=True)]

            fast_model(model)
            enable_packed_attention(model)
            data, probe = packed(data), packed(probe)
            extra, cls = {"data_collator": PackedCollator()}, Ours
        trainer = cls(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(data).with_format("numpy" if kind == "ours" else None),
            eval_dataset=Dataset.from_list(probe),
            processing_class=words(PreTrainedTokenizerFast),
            callbacks=[Wait()],
            **extra,
        )
        torch.manual_seed(0)
        trainer.train()


def words(cls):
    """A tokenizer, which TRL wants although the rows are tokenised already."""
    from tokenizers import Tokenizer, models

    names = {"<eos>": 0, "<pad>": 1, "<unk>": 2}
    backend = Tokenizer(models.WordLevel(names, "<unk>"))
    return cls(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def mean_loss(trainer) -> float:
    """Mean over the targets of the probe rows, in the trainer's own batches."""
    import torch

    total, targets = 0.0, 0
    for batch in trainer.get_eval_dataloader():
        n = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))) * n
        targets += n
    return total / targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--answers", type=float, default=1.0, help="share of each row that is learned")
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each candidate")
    parser.add_argument("--warm", type=int, default=2)
    parser.add_argument("--per-turn", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", help="comma-separated parts of candidates' names")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, rows = args.child.split(":")
        return run(args.size, args.precision, kind, int(rows), args.answers)

    print(f"{args.size}, {args.precision}, {args.threads} threads, {args.steps} steps each")
    print(machine())
    candidates = []
    for name, (kind, rows) in CANDIDATES.items():
        if args.only and not any(part in name for part in args.only.split(",")):
            continue
        command = [sys.executable, str(Path(__file__)), "--size", args.size, "--precision", args.precision]
        command += ["--answers", str(args.answers), "--child", f"{kind}:{rows}"]
        candidates.append(Candidate(name, command, environment(True, args.threads)))
    try:
        probes = [candidate.step(1)[0][2] for candidate in candidates]
        take_turns(candidates, args.warm, args.steps, args.per_turn)
    finally:
        for candidate in candidates:
            candidate.close()
    rates = []
    for c in candidates:
        tokens, wall, cpu = (sum(t[i] for t in c.times) for i in (3, 0, 1))
        rates.append((tokens / wall, tokens / cpu, tokens / len(c.times)))
    print(f"{'':28}{'tokens/step':>12}{'tokens/s':>10}{'per CPU s':>10}{'x wall':>8}{'x CPU':>8}{'loss':>10}")
    for c, (wall, cpu, each), probe in zip(candidates, rates, probes, strict=True):
        relative = f"{wall / rates[0][0]:8.2f}{cpu / rates[0][1]:8.2f}"
        print(f"{c.name:28}{each:12.0f}{wall:10.0f}{cpu:10.0f}{relative}{probe:10.6f}")
    print(f"largest difference of the probe losses: {max(probes) - min(probes):.1e}")


if __name__ == "__main__":
    main()
