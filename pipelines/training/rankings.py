"""Rankings as batches, their loss and their scores: what the reward model learns from.

A ranking of K answers is one element of a batch: the prompt and each answer are encoded once, and the loss is the mean
of -log sigmoid(r_better - r_worse) over the pairs that the ranking decides (Ouyang et al. 2022, section 3.4,
https://arxiv.org/abs/2203.02155).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.nn.functional import softplus
from trl.trainer.utils import pad

from pipelines.speed.packing import pack_branches


def decided(ranks: list[float]) -> list[tuple[int, int]]:
    """The pairs `(better, worse)` of positions that a ranking decides: 1 is best, equals decide nothing."""
    return [(i, j) for i, a in enumerate(ranks) for j, b in enumerate(ranks) if a < b]


class RankingCollator:
    """Rankings {"ids": K lists of ids, "ranks": K numbers} -> one batch of all their answers.

    Gives `input_ids` and `attention_mask` (answers, longest), or with `packed` one row without padding, in which (with
    `share`) the answers to a prompt stand behind one copy of it (`pipelines.speed.packing.pack_branches`). For the P
    decided pairs of the batch `better` and `worse` (P,), numbers of its answers, `weight` (P,): every ranking weighs
    the same, and they sum to 1, and `margin` (P,), by how much the better one must be better. `tags` (answers, T) are
    the rows' own; T may be 0.
    """

    def __init__(self, pad_token_id: int, packed: bool = False, share: bool = True):
        self.pad_token_id, self.packed, self.share = pad_token_id, packed, share

    def __call__(self, features: list[dict]) -> dict:
        """One batch; the answers stand in the order of the rankings."""
        return self.inputs([f["ids"] for f in features]) | self.wanted(features)

    def wanted(self, features: list[dict]) -> dict:
        """What the loss needs beside the scores of the answers."""

        better, worse, weight, margin, start = [], [], [], [], 0
        for f in features:
            pairs = decided(f["ranks"])
            better += [start + i for i, _ in pairs]
            worse += [start + j for _, j in pairs]
            weight += [1 / (len(pairs) * len(features))] * len(pairs)
            worth = f.get("margin") or [0.0] * len(f["ids"])
            margin += [worth[i] - worth[j] for i, j in pairs]
            start += len(f["ids"])
        return {
            "better": torch.tensor(better),
            "worse": torch.tensor(worse),
            "weight": torch.tensor(weight),
            "margin": torch.tensor(margin),
            "tags": torch.tensor([answer for f in features for answer in f.get("tags") or [[]] * len(f["ids"])]),
        }

    def inputs(self, rankings: list[list[list[int]]]) -> dict:
        """What the model is given of the ids of the answers of each ranking."""

        if self.packed:
            return pack_branches(rankings, self.share)
        ids = [torch.tensor(answer) for answers in rankings for answer in answers]
        return {
            "input_ids": pad(ids, padding_value=self.pad_token_id),
            "attention_mask": pad([torch.ones_like(i) for i in ids], padding_value=0),
        }


def ranking_loss(better, worse, weight, center: float | None = None, margin=0.0):
    """Weighted mean of -log sigmoid(better - worse - margin) over scores (P,), plus `center` times that of their sums
    squared.

    With pairs only (K = 2) it is the loss of `trl.RewardTrainer`, centring and margin included.
    """

    loss = (weight * softplus(worse - better + margin)).sum()
    return loss + center * (weight * (better + worse) ** 2).sum() if center is not None else loss


def answer_logits(trainer, dataset, collate: RankingCollator) -> list:
    """What the model says of the answers of every ranking: float32 arrays (K, 1 + T), the same on every process.

    Each process reads its share; rankings go through in order of length, so that there is little padding.
    """

    args = trainer.args
    model = trainer.model_wrapped if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled else trainer.model
    order = np.argsort([max(map(len, r["ids"])) for r in dataset], kind="stable")
    mine = order[args.process_index :: args.world_size]
    was_training, found = model.training, []
    model.eval()
    # A sharded model needs every process in every forward, so each does as many batches as the first.
    for start in range(0, math.ceil(len(order) / args.world_size), args.per_device_eval_batch_size):
        chunk = [int(i) for i in mine[start : start + args.per_device_eval_batch_size]]
        rows = [dataset[i] for i in chunk or order[:1].tolist()]
        batch = trainer._prepare_input(collate.inputs([row["ids"] for row in rows]))
        with torch.no_grad(), trainer.compute_loss_context_manager():
            logits = model(**batch, use_cache=False).logits.float().cpu().numpy()
        parts = np.split(logits, np.cumsum([len(row["ids"]) for row in rows])[:-1])
        found += zip(chunk, parts, strict=False)  # no chunk: the row is there for the others alone
    model.train(was_training)
    found = gather_object(found) if args.world_size > 1 else found
    return [logits for _, logits in sorted(found, key=lambda item: item[0])]


def pair_scores(dataset, logits: list):
    """Scores of the better and the worse answer of every decided pair, two float32 arrays, from `answer_logits`."""

    pairs = [(own[a, 0], own[b, 0]) for row, own in zip(dataset, logits) for a, b in decided(row["ranks"])]
    return tuple(np.array(side, np.float32) for side in zip(*pairs))
