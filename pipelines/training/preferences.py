"""Losses on the policy itself (DPO, KTO), and the log-probs of answers behind one copy of their prompt that they need.

With r = beta (log pi(y|x) - log pi_ref(y|x)), the implicit reward of an answer (Rafailov et al. 2023,
https://arxiv.org/abs/2305.18290), a ranking is learned from as all the pairs it decides, under any of the pair losses
of `trl.DPOTrainer`, or as a whole under the Plackett-Luce model (appendix A.3 there). For two answers both are TRL's
loss. Single answers that are desirable or not have the losses of `trl.KTOTrainer` (Ethayarajh et al. 2024,
https://arxiv.org/abs/2402.01306).
"""

from __future__ import annotations

import functools
import types

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pipelines.generation.logprobs import collate, has_plain_head, lay_out_groups, token_logprobs
from pipelines.speed.fast_model import is_cut_up


def collate_rankings(rankings: list[dict], packed: bool, share: bool) -> dict:
    """One batch of rankings {"prompts": K lists of ids, "answers": K lists of ids}, all answers of the first, then the
    next.

    As `generation.logprobs.collate` (inputs, states, labels), and `lengths` (answers,): tokens of each answer. With
    `packed` and `share` the answers of a ranking stand behind one copy of what their prompts have in common.
    """
    members = [
        (prompt, answer)
        for ranking in rankings
        for prompt, answer in zip(ranking["prompts"], ranking["answers"], strict=True)
    ]
    lengths = torch.tensor([len(answer) for _, answer in members])
    if not (packed and share):
        return {**collate(members, packed, "cpu"), "lengths": lengths}
    inputs, states = lay_out_groups([list(zip(r["prompts"], r["answers"], strict=True)) for r in rankings])
    labels = torch.tensor([token for _, answer in members for token in answer])
    return {"inputs": inputs, "states": states, "labels": labels, "lengths": lengths}


def enable_answer_logprobs(model) -> None:
    """Let `model(answers=batch)` give the summed log-prob (answers,) of each answer of a batch of `collate_rankings`.

    The model's own forward does it, so that DDP, FSDP and autocast see a forward like any other; without `answers` it
    is what it was.
    """
    if not is_cut_up(model):  # looked at now: in FSDP's shards it cannot be, nor in the middle of their forward
        has_plain_head(model)
    model.forward_without_answers = model.forward  # an attribute, so that deepcopy binds it to the copy

    @functools.wraps(type(model).forward)
    def forward(self, *args, answers=None, **kwargs):
        if answers is None:
            return self.forward_without_answers(*args, **kwargs)
        logprobs, _ = token_logprobs(self, answers, 1.0)
        numbers = torch.arange(len(answers["lengths"]), device=logprobs.device)
        owner = numbers.repeat_interleave(answers["lengths"], output_size=len(logprobs))
        return logprobs.new_zeros(len(numbers)).index_add(0, owner, logprobs)

    model.forward = types.MethodType(forward, model)


def pair_loss(name: str, better: Tensor, worse: Tensor, lengths: tuple[Tensor, Tensor], args) -> Tensor:
    """`trl.DPOTrainer`'s loss `name` of pairs, from the log-ratios to the reference of their two answers (any shapes).

    `lengths` are the tokens of the two answers, which `ipo` and `sigmoid_norm` divide by (as TRL does, by the
    completion's tokens); `args` has `beta` and `label_smoothing`.
    """
    beta, epsilon = args.beta, args.label_smoothing
    delta = better - worse
    if name == "sigmoid":
        return -logsigmoid(beta * delta)
    if name == "hinge":
        return torch.relu(1 - beta * delta)
    if name == "ipo":
        return (better / lengths[0] - worse / lengths[1] - 1 / (2 * beta)) ** 2
    if name == "sigmoid_norm":
        return -logsigmoid(beta * (better / lengths[0] - worse / lengths[1]))
    if name == "robust":
        right, flipped = logsigmoid(beta * delta), logsigmoid(-beta * delta)
        return ((epsilon - 1) * right + epsilon * flipped) / (1 - 2 * epsilon)
    if name == "apo_zero":
        return 1 - torch.sigmoid(beta * better) + torch.sigmoid(beta * worse)
    if name == "apo_down":
        return torch.sigmoid(beta * better) + 1 - torch.sigmoid(beta * delta)
    if name == "nca_pair":
        return -logsigmoid(beta * better) - 0.5 * logsigmoid(-beta * better) - 0.5 * logsigmoid(-beta * worse)
    assert name == "bco_pair", name
    return -logsigmoid(beta * better) - logsigmoid(-beta * worse)


PAIR_LOSSES = ("sigmoid", "hinge", "ipo", "sigmoid_norm", "robust", "apo_zero", "apo_down", "nca_pair", "bco_pair")


def plackett_luce(rewards: Tensor, ranks: Tensor) -> Tensor:
    """-log P(ranking) (...,) of K answers with rewards and ranks (..., K) under Plackett and Luce.

    A rank of nan stands for no answer.
    The best answer is drawn first, then the best of the rest (appendix A.3 of 2305.18290). Of answers that share a rank
    each is drawn against those that are worse, and none against its equals; a ranking without ties is exact.
    """
    worse = ranks[..., None, :] > ranks[..., :, None]
    drawn_from = worse | torch.eye(ranks.shape[-1], dtype=torch.bool, device=ranks.device)
    among = rewards[..., None, :].masked_fill(~drawn_from, -torch.inf).logsumexp(-1)
    return torch.where(worse.any(-1), among - rewards, 0.0).sum(-1)


def table(rankings: list[dict]) -> dict[str, Tensor]:
    """`places` and `ranks` (R, K): numbers and ranks of the answers of R rankings, as `collate_rankings` lays them.

    K is that of the longest; where a ranking has fewer answers its rank is nan, and its place 0.
    """
    most, start = max(len(ranking["ranks"]) for ranking in rankings), 0
    places = torch.zeros(len(rankings), most, dtype=torch.int64)
    ranks = torch.full((len(rankings), most), torch.nan)
    for row, ranking in enumerate(rankings):
        count = len(ranking["ranks"])
        places[row, :count] = torch.arange(start, start + count)
        ranks[row, :count] = torch.tensor(ranking["ranks"], dtype=torch.float32)
        start += count
    return {"places": places, "ranks": ranks}


def over_pairs(values: Tensor, ranks: Tensor) -> Tensor:
    """The mean over rankings of the mean of `values` (R, K, K) over the pairs `[better, worse]` that each decides."""
    decides = ranks[:, :, None] < ranks[:, None, :]
    return (torch.where(decides, values, 0.0).sum((1, 2)) / decides.sum((1, 2))).mean()


def rankings_loss(logratios: Tensor, places: Tensor, ranks: Tensor, lengths: Tensor, args) -> Tensor:
    """The mean over rankings of `plackett_luce`, or of the mean of `pair_loss` over the pairs that a ranking decides.

    Args:
        logratios: (answers,) log pi - log pi_ref, in the order of `collate_rankings`.
        places, ranks: (R, K), see `table`.
        lengths: (answers,) tokens of each answer.
        args: `ranking_loss`, `loss_type`, `loss_weights`, `beta`, `label_smoothing`.
    """
    own = logratios[places]
    if args.ranking_loss == "plackett_luce":
        return plackett_luce(args.beta * own, ranks).mean()
    names = [args.loss_type] if isinstance(args.loss_type, str) else args.loss_type
    weights = args.loss_weights or [1.0] * len(names)
    tokens = lengths[places].clamp(min=1)
    first, second = (own[:, :, None], tokens[:, :, None]), (own[:, None, :], tokens[:, None, :])
    pairs = first[0], second[0], (first[1], second[1]), args
    return over_pairs(sum(w * pair_loss(name, *pairs) for name, w in zip(names, weights, strict=True)), ranks)


def kto_losses(logratios: Tensor, desirable: Tensor, kl: Tensor, args) -> Tensor:
    """`trl.KTOTrainer`'s weighted loss (answers,) of each answer; their mean is its loss.

    Args:
        logratios: (answers,) log pi - log pi_ref.
        desirable: (answers,) bool.
        kl: scalar, the reference point z0 of `loss_type: kto`, which has no gradient.
        args: `loss_type`, `beta`, `desirable_weight`, `undesirable_weight`.
    """
    signs = torch.where(desirable, 1.0, -1.0)
    weights = torch.where(desirable, args.desirable_weight, args.undesirable_weight)
    centre = kl if args.loss_type == "kto" else 0.0
    return weights * (1 - torch.sigmoid(args.beta * signs * (logratios - centre)))


def mismatched(prompts: list[tuple[int, ...]], seed: int) -> list[int]:
    """For each answer the number of one that was given to another prompt: a permutation, drawn by `seed`.

    `prompts` are the ids of the prompts, one for each answer. Answers to the same prompt lie together on a circle, and
    each gets the one as many places further on as the largest group has members; only where a single prompt has more
    than half of all answers some of its own remain.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(number)
    some = list(groups.values())
    circle = [number for at in np.random.default_rng(seed).permutation(len(some)) for number in some[at]]
    step = max(map(len, some))
    partner = dict(zip(circle, circle[step:] + circle[:step], strict=True))
    return [partner[number] for number in range(len(prompts))]
