"""Attention within each sequence of a pack by PyTorch's own kernel for sequences of any length, on GPUs that have it.

It takes the seams as they are: no padding, no gathering, one launch for the whole pack. Answers behind one copy of
their prompt are sequences of their own with more keys than queries: each has a copy of the prompt's keys and values
before its own (`Shared`). Where it cannot be used `why_not` says so in a few words, and the blocks of
`packed_attention` do the same, as they do on CPUs.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from pipelines import launch

try:
    from torch.nn.attention import varlen
except ImportError:  # PyTorch before 2.10
    varlen = None

logger = logging.getLogger(__name__)

LARGEST_HEAD = 256  # of flash attention


@dataclass
class Shared:
    """The sequences of a pack for the kernel where answers share their prompts: each prompt, and each answer."""

    seams: torch.Tensor  # (sequences + 1,) int32, of the queries
    longest: int  # queries of the longest
    key_seams: torch.Tensor  # (sequences + 1,) int32
    longest_keys: int
    places: torch.Tensor  # (keys,) tokens of the row whose keys and values are taken

    @classmethod
    def of(cls, groups: tuple[tuple[int, ...], ...], device: torch.device) -> Shared:
        """For groups of (tokens of the prompt, tokens of each answer behind it), as they lie in the row."""
        queries, keys, places, start = [], [], [], 0
        for shared, *own in groups:
            prompt = range(start, start + shared)
            start += shared
            for length in own if shared == 0 else (0, *own):  # none: the prompt itself
                queries.append(length or shared)
                keys.append(shared + length)
                places += [*prompt, *range(start, start + length)]
                start += length
        lengths = torch.tensor([queries, keys])
        seams = torch.cat([lengths.new_zeros(2, 1), lengths.cumsum(1)], 1).flatten()
        together = torch.cat([seams, torch.tensor(places)]).to(device)  # in one copy
        seams, places = together.split([len(seams), len(places)])
        seams, key_seams = seams.to(torch.int32).chunk(2)
        return cls(seams, max(queries), key_seams, max(keys), places)


class _Copies(torch.autograd.Function):
    """x[places] of (tokens, heads, d), whose gradients are summed in float32: a prompt has one for each answer."""

    @staticmethod
    def forward(ctx, x, places):
        ctx.save_for_backward(places)
        ctx.tokens = len(x)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx, grad):
        total = grad.new_zeros(ctx.tokens, *grad.shape[1:], dtype=torch.float32)
        return total.index_add_(0, ctx.saved_tensors[0], grad.float()).to(grad.dtype), None


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
        seams: (sequences + 1,) int32, where the sequences begin, and the end; or `Shared`, of a causal model.
        longest: tokens of the longest of them.
        dtype: bfloat16 or float16, what is computed in.
    """
    query, key, value = (x.to(dtype) for x in (query, key, value))
    key_seams, longest_keys = seams, longest
    if isinstance(seams, Shared):  # the last query is at the last key, as the kernel has it where there are more keys
        key, value = (_Copies.apply(x, seams.places) for x in (key, value))
        key_seams, longest_keys, longest, seams = seams.key_seams, seams.longest_keys, seams.longest, seams.seams
    return varlen.varlen_attn(
        query,
        key,
        value,
        seams,
        key_seams,
        longest,
        longest_keys,
        scale=scaling,
        window_size=(-1, 0 if causal else -1),
        enable_gqa=query.size(1) != key.size(1),
    )


@functools.cache
def _trial(kind: str, index: int, dtype: torch.dtype) -> str | None:
    """Why the kernel fails on short sequences, forward and backward, on this device; None where it gives what SDPA
    gives for each. One is alone, two share their beginning.
    """
    device, sequences = torch.device(kind, index), (([0, 1, 2, 3, 4], 0), ([5, 6, 7], 0), ([5, 6, 8, 9], 2))
    draw = torch.Generator().manual_seed(0)
    shapes = [(10, heads, 16) for heads in (4, 2, 2)]
    with torch.enable_grad(), torch.autocast(kind, enabled=False):
        drawn = [torch.randn(shape, generator=draw).to(device, dtype) for shape in shapes]
        seams, found = Shared.of(((0, 5), (2, 1, 2)), device), []
        for kernel in (True, False):
            inputs = [x.clone().requires_grad_() for x in drawn]
            try:
                out = attention(*inputs, seams, 5, dtype, True, None) if kernel else _by_sdpa(*inputs, sequences)
                found.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
            except (RuntimeError, NotImplementedError) as error:
                return str(error).splitlines()[0]
    apart = max((a.float() - b.float()).abs().max() / b.float().abs().max() for a, b in zip(*found, strict=True))
    return None if apart < 5e-2 else f"it gave other numbers than SDPA here (by {apart:.0%})"


def _by_sdpa(query, key, value, sequences: tuple[tuple[list[int], int], ...]) -> torch.Tensor:
    """As `attention`, causal, one sequence of tokens after the other, without so many outputs at their beginning."""
    groups = query.size(1) // key.size(1)
    rows = [query, *(x.repeat_interleave(groups, 1) for x in (key, value))]
    out = []
    for tokens, shared in sequences:
        parts = (x[tokens].transpose(0, 1)[None] for x in rows)
        out.append(scaled_dot_product_attention(*parts, is_causal=True)[0, :, shared:])
    return torch.cat(out, 1).transpose(0, 1)


@functools.cache
def log_blocks(layer: str, reason: str) -> None:
    """Say once why the layers of a GPU attend by the blocks of a CPU."""
    logger.info("%s: packed sequences are attended to in blocks, not by varlen_attn: %s", layer, reason)
