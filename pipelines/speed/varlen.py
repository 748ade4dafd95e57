"""Attention within each sequence of a pack by PyTorch's own kernel for sequences of any length, on GPUs that have it.

It takes the seams as they are: no padding, no gathering, one launch for the whole pack. Where it cannot be used
`why_not` says so in a few words, and the blocks of `packed_attention` do the same, as they do on CPUs.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch.nn.functional import scaled_dot_product_attention

from pipelines import launch

try:
    from torch.nn.attention import varlen
except ImportError:  # PyTorch before 2.10
    varlen = None

logger = logging.getLogger(__name__)

LARGEST_HEAD = 256  # of flash attention


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot be used for products of this dtype on this device; None where it can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "it needs an NVIDIA GPU"
    if not launch.chosen_on_gpu("varlen"):
        return f"{launch.OFF_ON_GPU} says so"
    if varlen is None:
        return f"PyTorch {torch.__version__} has none"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it cannot compute in {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the card is older than Ampere"
    return _trial(device.type, device.index or 0, dtype)


def why_not_layer(query, key, value, dropout: float, window: int | None, longest: int) -> str | None:
    """Why the kernel cannot attend in this layer, which is (…, heads, tokens, d); None where it can."""
    size = query.size(-1)
    if size % 8 or size > LARGEST_HEAD or value.size(-1) != size:
        return f"head size {size}"
    if query.size(1) % key.size(1):
        return f"{query.size(1)} query heads on {key.size(1)}"
    if dropout:
        return f"attention dropout {dropout:g}"
    if window is not None and longest > window:
        return f"a sliding window of {window}"
    return None


def attention(query, key, value, seams, longest: int, dtype, causal: bool, scaling: float | None) -> torch.Tensor:
    """Each sequence attends to itself: query (tokens, heads, d), key and value of perhaps fewer heads -> as the query.

    Args:
        seams: (sequences + 1,) int32, where the sequences begin, and the end.
        longest: tokens of the longest of them.
        dtype: bfloat16 or float16, what is computed in.
    """
    query, key, value = (x.to(dtype) for x in (query, key, value))
    return varlen.varlen_attn(
        query,
        key,
        value,
        seams,
        seams,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0 if causal else -1),
        enable_gqa=query.size(1) != key.size(1),
    )


@functools.cache
def _trial(kind: str, index: int, dtype: torch.dtype) -> str | None:
    """Why the kernel fails on two short sequences, forward and backward, on this device; None where it gives what
    SDPA gives for each.
    """
    device, lengths = torch.device(kind, index), (5, 3)
    draw = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), heads, 16) for heads in (4, 2, 2)]
    with torch.enable_grad(), torch.autocast(kind, enabled=False):
        drawn = [torch.randn(shape, generator=draw).to(device, dtype) for shape in shapes]
        seams = torch.tensor([0, 5, 8], dtype=torch.int32).to(device)
        found = []
        for kernel in (True, False):
            inputs = [x.clone().requires_grad_() for x in drawn]
            try:
                out = attention(*inputs, seams, 5, dtype, True, None) if kernel else _by_sdpa(*inputs, lengths)
                found.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
            except (RuntimeError, NotImplementedError) as error:
                return str(error).splitlines()[0]
    apart = max((a.float() - b.float()).abs().max() / b.float().abs().max() for a, b in zip(*found, strict=True))
    return None if apart < 5e-2 else f"it gave other numbers than SDPA here (by {apart:.0%})"


def _by_sdpa(query, key, value, lengths) -> torch.Tensor:
    """As `attention`, causal, one sequence after the other."""
    groups = query.size(1) // key.size(1)
    rows = [query, *(x.repeat_interleave(groups, 1) for x in (key, value))]
    parts = zip(*(x.transpose(0, 1)[None].split(lengths, 2) for x in rows), strict=True)
    return torch.cat([scaled_dot_product_attention(*part, is_causal=True) for part in parts], 2)[0].transpose(0, 1)


@functools.cache
def log_blocks(layer: str, reason: str) -> None:
    """Say once why the layers of a GPU attend by the blocks of a CPU."""
    logger.info("%s: packed sequences are attended to in blocks, not by varlen_attn: %s", layer, reason)
