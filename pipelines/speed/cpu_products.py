"""Matrix products of few rows on a CPU: linear maps whose weights lie, for a while, as oneDNN wants to read them.

Decoding multiplies a handful of rows by every weight of the model, once per token. The products that PyTorch chooses
for it are made for many rows; oneDNN's, on weights laid out in blocks beforehand, took half the time for 4 to 32 rows
(AMD EPYC with AVX-512, float32 and bfloat16, `benchmarks/ppo_phases.py`). The layout is the one with which
`torch.compile` freezes linear layers.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@contextmanager
@torch.no_grad()
def packed_products(model: nn.Module):
    """While open, the linear maps of `model` that lie on a CPU read copies of their weights in blocks.

    For inference: no gradient passes, and changes of the weights are not seen. Half precision is used where autocast
    is on or the weights have it. Costs the memory of one copy of these weights. Quantized, sharded and hooked layers
    are left as they are. Results differ from the plain layers' in rounding.
    """
    changed = []
    try:
        for module in model.modules() if torch.backends.mkldnn.is_available() else ():
            if type(module) in (nn.Linear, Conv1D) and "forward" not in vars(module) and _can_be_packed(module.weight):
                module.forward = _product(module)
                changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


def _can_be_packed(weight: Tensor) -> bool:
    plain = type(weight) in (Tensor, nn.Parameter) and weight.device.type == "cpu" and weight.dim() == 2
    half = torch.ops.mkldnn._is_mkldnn_bf16_supported
    return plain and (_dtype(weight) == torch.float32 or _dtype(weight) == torch.bfloat16 and half())


def _dtype(weight: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype


def _product(module: nn.Module):
    """The forward of a Linear, or of GPT-2's Conv1D whose weight is (in, out): (…, in) -> (…, out)."""
    dtype, weight = _dtype(module.weight), module.weight.detach()
    rows = weight.T if isinstance(module, Conv1D) else weight
    blocks = torch.ops.mkldnn._reorder_linear_weight(rows.to(dtype).contiguous())
    bias = None if module.bias is None else module.bias.detach().to(dtype)

    def forward(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(dtype), blocks, bias, "none", [], "")

    return forward
