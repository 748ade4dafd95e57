"""Rankings as token ids (of reward, dpo and kto alike), and as batches, their loss and scores for the reward model.

A ranking of K answers is one element of a batch: the prompt and each answer are encoded once, and the loss is the mean
of -log sigmoid(r_better - r_worse) over the pairs that the ranking decides (Ouyang et al. 2022, section 3.4,
https://arxiv.org/abs/2203.02155).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.nn.functional import softplus
from trl.trainer.utils import pad

from pipelines.data import mixing, plain_text
from pipelines.errors import DataError
from pipelines.models import chat_template
from pipelines.speed.packing import pack_branches

logger = logging.getLogger(__name__)

TIES = "rankings decide nothing (all ranks equal)"


def decided(ranks: list[float]) -> list[tuple[int, int]]:
    """The pairs `(better, worse)` of positions that a ranking decides: 1 is best, equals decide nothing."""
    return [(i, j) for i, a in enumerate(ranks) for j, b in enumerate(ranks) if a < b]


def encode_answers(
    stage,
    side: str,
    rows: list[dict],
    tokenizer,
    context: int,
    useful: Callable[[dict], bool] = lambda row: bool(decided(row["ranks"])),
    useless: str = TIES,
    shortest_prompt: int = 0,
) -> list[tuple[dict, list[tuple[list[int], list[int]]]]]:
    """`(row, [(prompt ids, answer ids) of each of its completions])` of the rows that can be learned from.

    A row of which any answer with its prompt is longer than `context` is dealt with as `data.too_long` says: left out,
    or cut at the prompt's beginning, and where that does not do at the answer's. What is left out is counted, logged
    and recorded in the stage's report.

    Args:
        useful: whether there is anything to learn from a row.
        useless: in words, "N of M" of which rows it is not so.
        shortest_prompt: tokens that must be left of a prompt; a row in which they are not is left out.

    Raises:
        DataError: no row is left, or one is too long and the recipe makes that an error.
    """
    too_long, found, long = stage.section("data").too_long, [], []
    kept = [row for row in rows if useful(row)]
    if not kept:
        raise DataError(f"{side}: {len(rows)} of {len(rows)} {useless}: there is nothing to learn from")
    for row in kept:
        with chat_template.naming(row):
            tools = row.get("tools")
            pairs = [chat_template.encode_answer(tokenizer, row["prompt"], c, tools) for c in row["completions"]]
        if max(len(prompt) + len(answer) for prompt, answer in pairs) > context:
            long.append(row["where"])
            if too_long == "drop" or max(len(answer) for _, answer in pairs) > context - shortest_prompt:
                continue
            pairs = [(cut(prompt, len(answer), context), answer[-context:]) for prompt, answer in pairs]
        found.append((row, pairs))
    limit = f"{context} tokens"
    mixing.report_length(stage, side, len(rows), len(found), long, limit, too_long, "cut at their beginning")
    plain_text.report(stage.report, side, rows, partial(chat_template.holds_control_text, tokenizer))
    if len(kept) < len(rows):
        stage.report[side]["undecided"] = len(rows) - len(kept)
        logger.warning("%s: %d of %d %s: left out", side, len(rows) - len(kept), len(rows), useless)
    return found


def cut(prompt: list[int], behind: int, context: int) -> list[int]:
    """The prompt without its beginning, where it has no room in `context` before `behind` tokens."""
    return prompt[max(len(prompt) + behind - context, 0) :]


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
