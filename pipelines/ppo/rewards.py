"""Ready-made rewards: functions to name in `reward.functions`, and a classifier as a reward model."""

from __future__ import annotations

import torch
from torch import nn

from pipelines import SetupError


def length_penalty(prompts, completions, completion_ids, **columns) -> list[float]:
    """Minus the number of tokens of each answer: with a weight of 0.01, a hundred tokens cost 1."""
    return [-float(len(ids)) for ids in completion_ids]


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
    return model
