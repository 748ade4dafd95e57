"""Linear maps whose float32 weights are held in bfloat16, as autocast would cast them for each product.

Autocast keeps the casts of trained weights for a forward, and of frozen ones none: each forward, so each decoded token,
casts them again. Held as they are cast, the same products give the same numbers, bit for bit.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def _cast(modules) -> list[tuple[nn.Module, dict]]:
    """Let the linear maps among `modules` hold bfloat16 copies of their weights; `(module, weights before)` of each."""
    changed = []
    for module in modules:
        weight = getattr(module, "weight", None)
        if type(module) not in (nn.Linear, Conv1D) or "forward" in vars(module):
            continue
        if type(weight) is nn.Parameter and weight.dtype == torch.float32 and not hasattr(weight, "ds_id"):
            changed.append((module, dict(module._parameters)))
            for name, value in module._parameters.items():
                if value is not None:
                    half = value.detach().to(torch.bfloat16)
                    module._parameters[name] = nn.Parameter(half, requires_grad=False)
    return changed


@contextmanager
@torch.no_grad()
def half_products(model: nn.Module):
    """While open, the linear maps of `model` read bfloat16 copies of their weights. Only within autocast to bfloat16.

    For inference: changes of the weights are not seen. Costs half the memory of the weights in linear maps. Quantized,
    sharded and hooked layers, and heads in float32, are left as they are.
    """
    changed = _cast(model.modules())
    try:
        yield
    finally:
        for module, weights in changed:
            module._parameters |= weights


@torch.no_grad()
def hold_half(model: nn.Module) -> nn.Module:
    """Let the linear maps of a frozen model's backbone, and its language-model head, hold bfloat16; in place.

    It then works only within autocast to bfloat16, where it computes what it did before. Heads that give scores,
    embeddings and norms stay float32.
    """
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    backbone = getattr(model, "base_model", model)
    _cast([*backbone.modules(), *([] if output is None else [output])])
    return model
