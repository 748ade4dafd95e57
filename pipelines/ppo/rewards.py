"""Rewards: functions to name in `reward.functions`, a classifier or an adapter as a reward model, and what it reads."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipelines.errors import SetupError
from pipelines.models.adapters import on_base_of
from pipelines.models.chat_template import encode_answer


def length_penalty(prompts, completions, completion_ids, **columns) -> list[float]:
    """Minus the number of tokens of each answer: with a weight of 0.01, a hundred tokens cost 1."""
    return [-float(len(ids)) for ids in completion_ids]


COMBINE = ("sum", "mean", "min", "uncertainty")


def combined(scores: Tensor, how: str, uncertainty_coef: float = 0.0) -> Tensor:
    """One score (B,) of the scores (B, M) of M reward models: an ensemble against over-optimisation.

    Coste et al. 2023, https://arxiv.org/abs/2310.02743. `mean`; `min`: the most sceptical model's; `uncertainty`: the
    mean less `uncertainty_coef` times the deviation over the models, so that an answer about which they disagree is
    worth less. (They take the variance: the deviation keeps the coefficient free of the scores' scale.)
    """
    if how == "mean":
        return scores.mean(1)
    if how == "min":
        return scores.amin(1)
    assert how == "uncertainty", how
    return scores.mean(1) - uncertainty_coef * disagreement(scores)


def disagreement(scores: Tensor) -> Tensor:
    """The standard deviation (B,), over the M models, of their scores (B, M) of an answer."""
    return scores.std(1, unbiased=False)


@torch.no_grad()
def log_odds(model: nn.Module, label: str) -> nn.Module:
    """A classifier of two labels as a reward model, in place: its score is the log-odds of `label`.

    The logits are linear in the last features, so their difference is one linear head (H,) -> 1.
    """
    ids = {str(name): i for i, name in model.config.id2label.items()}
    if label not in ids or len(ids) != 2:
        raise SetupError(f"reward.label: {label!r} must be one of a classifier's two labels; it has {', '.join(ids)}")
    name = next((n for n in ("score", "classifier") if type(getattr(model, n, None)) is nn.Linear), None)
    if name is None:
        raise SetupError(
            f"reward.label: the head of {type(model).__name__} is not one linear layer; score it in a reward function"
        )
    old, sign = getattr(model, name), torch.tensor([1.0 if i == ids[label] else -1.0 for i in range(2)])
    new = nn.Linear(old.in_features, 1, bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
    new.weight.copy_((sign[:, None].to(old.weight) * old.weight).sum(0, keepdim=True))
    if old.bias is not None:
        new.bias.copy_((sign.to(old.bias) * old.bias).sum(0, keepdim=True))
    setattr(model, name, new)
    model.config.num_labels = model.num_labels = 1
    model.config.problem_type = None  # as a critic it is saved, and a classification of one label is no valid config
    model.config.id2label, model.config.label2id = {0: label}, {label: 0}
    return model


def read_anew(
    tokenizer, answers: list, prompts: list, completions: list[str], ends: list[int], tools: list
) -> list[tuple[list[int], list[int]]]:
    """`(prompt ids, answer ids)` that a reward model reads: `answers` as they are, or under its own `tokenizer`.

    `prompts` and `completions` are the same as text, `tools` those of each prompt or None; an answer that does not end
    with one of `ends` was cut off, and then has no EOS for the reward model either.
    """
    if tokenizer is None:
        return answers
    out = []
    for prompt, completion, (_, response), its_tools in zip(prompts, completions, answers, tools, strict=True):
        prompt_ids, answer_ids = encode_answer(tokenizer, prompt, completion, its_tools)
        out.append((prompt_ids, answer_ids if response[-1] in ends else answer_ids[:-1]))
    return out


def from_adapter(policy, folder: str | Path):
    """A reward model that is an adapter, as a PEFT model on the policy's own base: no second network in memory.

    Args:
        policy: the PEFT model whose base is shared (`adapters.on_base_of`).
        folder: the adapter of a sequence classifier of one label, trained from the base that `policy` adapts, as a
            reward stage with `use_peft` leaves it in `adapter/`.

    The adapter and its head can be trained: a critic starts so. As a reward model take its `get_base_model()`.
    """
    import peft

    weights = load_file(Path(folder) / "adapter_model.safetensors")
    heads = [key for key in weights if key.endswith("score.weight")]
    config = peft.PeftConfig.from_pretrained(str(folder))
    if len(heads) != 1 or len(weights[heads[0]]) != 1 or config.trainable_token_indices:
        raise SetupError(
            f"{folder} is not an adapter with one score on unchanged tokens: reward.share_base cannot use it"
        )
    config.inference_mode = False
    model = on_base_of(policy)
    base = policy.get_base_model().name_or_path
    model.config._name_or_path = model.name_or_path = config.base_model_name_or_path = base
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())  # bitsandbytes has Linear
    model = peft.get_peft_model(model, config)
    peft.set_peft_model_state_dict(model, weights)
    other = peft.get_peft_model_state_dict(model, save_embedding_layers=False).keys() ^ weights.keys()
    if other:
        raise SetupError(f"{folder} does not fit the policy's base: {', '.join(sorted(other)[:3])}")
    model.config._name_or_path = str(Path(folder).parent)  # what a reward is called in logs
    return model
