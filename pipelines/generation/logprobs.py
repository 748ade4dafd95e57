"""Log-probabilities, entropies, values and scores of answers whose tokens are known, without logits of a whole batch.

Sequences of a batch are laid end to end in one row (`pipelines.speed.packing`) where the architecture can, and
right-padded where it cannot. Heads are applied to answer positions only and logits are never kept
(`pipelines.speed.fused_head`), so nothing of the vocabulary's size exists for prompts or padding.
"""

from __future__ import annotations

import functools
import itertools
import logging

import torch
from torch import Tensor, nn

from pipelines.errors import CannotPack
from pipelines.speed.fast_model import fast_gelu, float32_head, has_plain_logits, is_cut_up
from pipelines.speed.fused_head import in_head, linear_logprobs
from pipelines.speed.packed_attention import NAME, enable_packed_attention
from pipelines.speed.packing import alike, pack, pack_branches

logger = logging.getLogger(__name__)

KEPT = 2**26  # elements of the probabilities that a micro-batch may keep for its backward (256 MB in fp32)


def plain_model(model: nn.Module) -> nn.Module:
    """The transformers model itself: what PEFT has wrapped, adapters inside its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def make_ready(model: nn.Module) -> bool:
    """Dropout off, fast GELU, and packing where the architecture can; returns whether it can. In place.

    Neither changes what the model computes (GELU to rounding) nor what is saved of it.
    """
    disable_dropout(model)
    fast_gelu(model)
    float32_head(plain_model(model))
    try:
        enable_packed_attention(model)
    except CannotPack as error:
        logger.warning("%s cannot be packed (%s): its batches are padded instead.", error.model, error.reason)
        return False
    return True


def disable_dropout(model: nn.Module) -> None:
    """Turn every dropout off, also those that attention modules hold as a number; the config keeps its own.

    With dropout the log-prob of a token differs from forward to forward, and the ratio of an unchanged policy
    from 1.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def lay_out(sequences: list[list[int]], packed: bool, device) -> tuple[dict, Tensor]:
    """Model inputs for token sequences, and where each begins in the flattened hidden states.

    Returns `(inputs, starts)`: keyword arguments of a backbone, packed (1, tokens) or right-padded (b,
    longest), and int64 (b,) on the CPU.
    """
    lengths = torch.tensor([len(ids) for ids in sequences])
    if packed:
        inputs = pack(sequences)
        del inputs["labels"]
        starts = lengths.cumsum(0) - lengths
    else:
        width = int(lengths.max())
        ids = torch.zeros(len(sequences), width, dtype=torch.int64)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
        position_ids = torch.arange(width).expand_as(ids)
        mask = (position_ids < lengths[:, None]).long()
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}
        starts = torch.arange(len(sequences)) * width
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    return inputs | {"use_cache": False}, starts


def collate(answers: list[tuple[list[int], list[int]]], packed: bool, device, share: int = 0) -> dict:
    """One batch of (prompt ids, answer ids) pairs.

    `inputs`: see `lay_out`. `states` (N,): where in the flattened hidden states the state before each answer
    token is; `labels` (N,): that token. N counts all answer tokens, answer after answer. `share`, what `can_share`
    gives (0: do not): neighbouring answers to one prompt stand behind one copy of it, where `sharing_pays`.
    """
    labels = torch.tensor([token for _, answer in answers for token in answer]).to(device)
    groups = [list(run) for _, run in itertools.groupby(answers, lambda pair: pair[0])] if packed and share else []
    pays = [sharing_pays(len(group[0][0]), [len(answer) for _, answer in group], share) for group in groups]
    if any(pays):
        inputs, states = lay_out_groups(_where_it_pays(groups, pays))
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        return {"inputs": inputs, "states": states.to(device), "labels": labels}
    # nothing is read behind an answer's last token, so it need not go through the model
    inputs, starts = lay_out([prompt + answer[:-1] for prompt, answer in answers], packed, device)
    states = [
        torch.arange(start + len(prompt) - 1, start + len(prompt) + len(answer) - 1)
        for start, (prompt, answer) in zip(starts.tolist(), answers, strict=True)
    ]
    return {"inputs": inputs, "states": torch.cat(states).to(device), "labels": labels}


def _where_it_pays(groups: list[list], pays: list[bool]) -> list[list]:
    """`groups`, those that do not pay as groups of one."""
    parts = ([group] if good else [[member] for member in group] for group, good in zip(groups, pays, strict=True))
    return [group for part in parts for group in part]


def lay_out_groups(groups: list[list[tuple[list[int], list[int]]]]) -> tuple[dict, Tensor]:
    """Groups of (prompt ids, answer ids) laid end to end, each behind one copy of what its members begin with.

    Returns keyword arguments of a packed backbone on the CPU, and where in its flattened hidden states the state before
    each answer token is, answer after answer (N,).
    """
    members = [[prompt + answer[:-1] for prompt, answer in group] for group in groups]
    states, start = [], 0
    for group, own in zip(groups, members, strict=True):
        common = alike(own) if len(own) > 1 else 0
        branch = start + common
        for (prompt, answer), member in zip(group, own, strict=True):
            places = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
            states.append(torch.where(places < common, start + places, branch + places - common))
            branch += len(member) - common
        start = branch
    inputs = pack_branches(members)
    del inputs["last"]
    return inputs | {"use_cache": False}, torch.cat(states)


def can_share(model: nn.Module) -> int:
    """The width of the hidden states where the answers of a packed batch may stand behind one copy of their prompt,
    else 0: not under flash-attention, nor where a window of attention would be counted over other answers.
    """
    config = plain_model(model).config.get_text_config()
    able = config._attn_implementation == NAME and getattr(config, "sliding_window", None) is None
    return config.hidden_size if able else 0


def sharing_pays(prompt: int, lengths: list[int], width: int) -> bool:
    """Whether answers of `lengths` tokens behind one copy of their prompt are less work than each behind its own.

    A token costs about 24 `width`² operations in a layer, a pair of positions that attention looks at 4 `width`; behind
    one copy it looks at every pair of the group and masks those of other answers, else at half of those of an answer.
    """
    saved = 6 * width * (len(lengths) - 1) * prompt
    pairs = (prompt + sum(lengths)) ** 2 - sum((prompt + n) ** 2 for n in lengths) / 2
    return len(lengths) > 1 and saved > pairs


def answer_nats(model: nn.Module, answers: list[tuple[list[int], list[int]]], packed: bool = False) -> list[float]:
    """-log p of each answer given its prompt, of `(prompt ids, answer ids)`, under a causal model."""
    logprobs, _ = token_logprobs(model, collate(answers, packed, model.device), 1.0)
    sums = [-part.double().sum() for part in logprobs.split([len(answer) for _, answer in answers])]
    return torch.stack(sums).tolist()


def states_of(model: nn.Module, batch: dict) -> Tensor:
    """Last hidden states (N, H) before each answer token."""
    return plain_model(model).base_model(**batch["inputs"]).last_hidden_state.flatten(0, 1)[batch["states"]]


def token_logprobs(
    model: nn.Module,
    batch: dict,
    temperature: float,
    entropy: bool = False,
    grad_entropy: bool = False,
    hidden: Tensor | None = None,
):
    """Log-probs (N,) of the answer tokens under softmax(logits / temperature), and its entropies (N,).

    Both float32. Entropies only where asked for, else None; differentiable only with `grad_entropy`. `hidden`
    (N, H) are the states before the tokens where they are there already; a head that is more than a product
    does not use them.
    """
    model = plain_model(model)
    if has_plain_head(model):
        head = model.get_output_embeddings()
        hidden = states_of(model, batch) if hidden is None else hidden

        def found(hidden, weight, bias):
            keep = len(hidden) * len(weight) <= KEPT and torch.is_grad_enabled() and not grad_entropy
            return linear_logprobs(hidden, weight, batch["labels"], bias, temperature, entropy, keep)

        return in_head(head, found, hidden)
    if "cu_seq_lens_q" in batch["inputs"]:
        logits = model(**batch["inputs"], logits_to_keep=batch["states"]).logits[0].float() / temperature
    else:
        logits = model(**batch["inputs"]).logits.flatten(0, 1)[batch["states"]].float() / temperature
    every = logits.log_softmax(-1)
    logprobs = every.gather(-1, batch["labels"][:, None]).squeeze(-1)
    return logprobs, -(every.exp() * every).sum(-1) if entropy else None


def has_plain_head(model: nn.Module) -> bool:
    """Whether logits are just the output embedding applied to the last hidden state (no soft-capping …).

    Found out once per model on four tokens, whatever its config says. A head that PEFT has wrapped since, for the rows
    of new tokens, can only be reached through the model.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        _log_own_logits(type(model).__name__)
        return False
    if not hasattr(model, "_has_plain_head"):
        # Accelerate's autocast around `forward` may be running: it cannot be entered twice, it would never end. Nor can
        # DeepSpeed's hooks around the whole model.
        forward = getattr(model, "_original_forward", model.forward if is_cut_up(model) else model)
        model._has_plain_head = head.weight.is_floating_point() and has_plain_logits(model, forward)
        if not model._has_plain_head:
            _log_own_logits(type(model).__name__)
    return model._has_plain_head


@functools.cache
def _log_own_logits(architecture: str) -> None:
    logger.warning("%s: log-probs from its own logits (slower, more memory).", architecture)


def token_values(critic: nn.Module, batch: dict) -> Tensor:
    """The critic's value (N,), float32, of the state before each answer token."""
    return plain_model(critic).score(states_of(critic, batch)).squeeze(-1).float()


@torch.no_grad()
def sequence_scores(model: nn.Module, sequences: list[list[int]], packed: bool, device, group: int = 1) -> Tensor:
    """Scores (b,) of a one-label sequence classifier, read at the last real token of each sequence.

    Each `group` of neighbours are answers to one prompt, which they share where it can be and pays. A model with a
    `tag_heads.TagPenalty` in `tag_penalty` takes it off.
    """
    groups = [sequences[i : i + group] for i in range(0, len(sequences), group)]
    width = can_share(model) if packed and group > 1 else 0
    pays = [width > 0 and len(g) > 1 and _begins_long(g, width) for g in groups]
    if any(pays):
        inputs = pack_branches(_where_it_pays(groups, pays))
        last = inputs.pop("last")
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()} | {"use_cache": False}
    else:
        inputs, starts = lay_out(sequences, packed, device)
        last = starts + torch.tensor([len(ids) for ids in sequences]) - 1
    if not hasattr(model, "score"):  # an encoder (BERT …): its own head knows where to look
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0].float()
    hidden = model.base_model(**inputs).last_hidden_state.flatten(0, 1)
    states = hidden[last.to(device)]
    scores = model.score(states)[:, 0].float()
    return scores - model.tag_penalty(states) if hasattr(model, "tag_penalty") else scores


def _begins_long(group: list[list[int]], width: int) -> bool:
    """Whether sharing what these sequences begin with pays."""
    common = alike(group)
    return sharing_pays(common, [len(ids) - common for ids in group], width)


def within(model: nn.Module, function, *args):
    """`function(model, *args)`, in which a model of `shard_frozen` is whole."""
    return model.within(function, *args) if hasattr(model, "within") else function(model, *args)
