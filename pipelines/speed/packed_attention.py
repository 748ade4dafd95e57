"""Attention within each sequence of a pack: no padding, no dense mask, exactly the losses of separate sequences.

Everything but attention is token-wise and does not care for the seams of a pack. A GPU that computes in half precision
takes the seams as they are (`varlen`). Elsewhere attention un-flattens the row into a few right-padded blocks of
similar length and runs PyTorch's causal SDPA on each. That is exact (a causal query never sees the padding behind it),
needs no flash-attn, and works on any device.

    enable_packed_attention(model)                       # once
    loss = model(**PackedCollator()(rows)).loss          # each step
"""

from __future__ import annotations

import functools
import logging
import types
from dataclasses import dataclass, field

import torch
from torch import nn

from pipelines.errors import CannotPack, SetupError
from pipelines.speed import varlen
from pipelines.speed.packing import OnHost, pack, packed_positions

logger = logging.getLogger(__name__)

NAME = "packed_sdpa"
# Launching one more SDPA call costs about as much as the attention of this many query-key pairs per head.
BLOCK_COST = 128 * 128
# The longest sequences whose attention is computed by products where that is faster: it holds length^2 scores.
PRODUCTS_UP_TO = 256


@dataclass
class Seams:
    """Where the sequences of one packed row begin, for all layers of a forward."""

    cu: torch.Tensor  # (sequences + 1,) int32
    longest: int  # tokens of the longest
    on_host: OnHost | None = None
    branches: torch.Tensor | None = None  # (tokens,), see `pack_branches`
    kernel: torch.dtype | None = None  # what `varlen` computes in; None: blocks
    shared: varlen.Shared | None = None  # `branches` for the kernel

    @functools.cached_property
    def rows(self) -> PackedRows:
        """The blocks that the row un-flattens into."""
        return PackedRows.of(self.cu, self.branches, self.on_host)


@dataclass
class PackedRows:
    """How one packed row un-flattens into right-padded blocks; the same for all layers of a forward."""

    blocks: list[tuple[int, int]]  # (sequences, length) of each block
    slots: torch.Tensor  # (padded tokens,) token that fills each slot; padding repeats a token of its sequence
    places: torch.Tensor  # (tokens,) slot of each token
    lengths: torch.Tensor  # (sequences,) in block order
    branches: torch.Tensor | None = None  # (padded tokens,) branch of each slot's token, see `pack_branches`
    masks: dict[int, torch.Tensor] = field(default_factory=dict)  # of blocks with branches, by their first slot

    @classmethod
    def of(
        cls, cu_seq_lens: torch.Tensor, branches: torch.Tensor | None = None, on_host: OnHost | None = None
    ) -> PackedRows:
        """The blocks for these seams (sequences + 1,), once per forward. Without `on_host` the host waits for them."""
        device = cu_seq_lens.device
        lengths = cu_seq_lens.to("cpu", torch.int64).diff() if on_host is None else torch.tensor(on_host.lengths)
        starts = lengths.cumsum(0) - lengths
        order = lengths.argsort(descending=True, stable=True)
        lengths, starts = lengths[order], starts[order]
        blocks = _blocks(lengths.tolist())
        widths = torch.tensor([length for count, length in blocks for _ in range(count)])
        base = widths.cumsum(0) - widths  # first slot of each sequence
        within = packed_positions(base, widths)
        slots = starts.repeat_interleave(widths) + torch.minimum(within, (lengths - 1).repeat_interleave(widths))
        places = torch.empty(int(lengths.sum()), dtype=torch.int64)
        real = within < lengths.repeat_interleave(widths)
        places[slots[real]] = real.nonzero()[:, 0]
        together = torch.cat([slots, places, lengths]).to(device)  # in one copy
        slots, places, lengths = together.split([len(slots), len(places), len(lengths)])
        branches = None if branches is None else branches[slots]
        return cls(blocks, slots, places, lengths, branches)

    def branch_mask(self, slot: int, count: int, length: int) -> torch.Tensor:
        """Who sees whom in the block of `count` sequences that begins at `slot`: (count, 1, length, length), True
        attends.
        """
        if slot not in self.masks:
            own = self.branches[slot : slot + count * length].unflatten(0, (count, length))
            seen = (own[:, None, :] == 0) | (own[:, None, :] == own[:, :, None])
            self.masks[slot] = seen.tril()[:, None]
        return self.masks[slot]


def _blocks(lengths: list[int]) -> list[tuple[int, int]]:
    """Split descending lengths into blocks of the least total cost: count x length^2 each, plus a call.

    Cuts are only tried where the length falls into the next of 16 classes, so that the search is tiny.
    """
    longest = lengths[0]
    cuts = [0]
    for i in range(1, len(lengths)):
        if (lengths[i] - 1) * 16 // longest < (lengths[i - 1] - 1) * 16 // longest:
            cuts.append(i)
    cuts.append(len(lengths))
    best = [(0, 0)] + [(0, 0)] * (len(cuts) - 1)  # (cost, where the last block begins) up to each cut
    for end in range(1, len(cuts)):
        best[end] = min(
            (best[begin][0] + BLOCK_COST + (cuts[end] - cuts[begin]) * lengths[cuts[begin]] ** 2, begin)
            for begin in range(end)
        )
    blocks, end = [], len(cuts) - 1
    while end:
        begin = best[end][1]
        blocks.append((cuts[end] - cuts[begin], lengths[cuts[begin]]))
        end = begin
    return blocks[::-1]


class _Unflatten(torch.autograd.Function):
    """(tokens, …) -> (slots, …). Padding receives no gradient (no valid query saw it), so backward is a
    gather."""

    @staticmethod
    def forward(ctx, x, slots, places):
        ctx.save_for_backward(places)
        return x.index_select(0, slots)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Flatten(torch.autograd.Function):
    """(slots, …) -> (tokens, …); the inverse, so the padding's gradient is zero."""

    @staticmethod
    def forward(ctx, x, places):
        ctx.save_for_backward(places)
        ctx.slots = x.size(0)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx, grad):
        out = grad.new_zeros(ctx.slots, *grad.shape[1:])
        return out.index_copy_(0, ctx.saved_tensors[0], grad), None


def packed_sdpa_attention(module, query, key, value, attention_mask, **kwargs):
    """transformers' attention interface: query (batch, heads, tokens, d) -> (batch, tokens, heads, d), None.

    Without `cu_seq_lens_q` this is transformers' own SDPA (generation, left padding, encoders). With it each
    sequence attends to itself only.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    cu, seams = kwargs.pop("cu_seq_lens_q", None), kwargs.pop("seams", None)
    if cu is None:
        if attention_mask is not None and attention_mask.numel() == 0:  # the stand-in of _before_forward
            reason = "its model does not hand it `cu_seq_lens_q`, so sequences would see each other"
            raise CannotPack(type(module).__name__, reason)
        if key.dtype == query.dtype:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        with torch.autocast(key.device.type, enabled=False):  # a cache of float32 (`KVBuffer`)
            output, _ = sdpa_attention_forward(module, query.float(), key, value, attention_mask, **kwargs)
        return output.to(query.dtype), None
    unsupported = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if unsupported:
        raise CannotPack(type(module).__name__, f"packed SDPA attention cannot do {', '.join(unsupported)}")
    seams = Seams(cu, kwargs.get("max_length_q", 0)) if seams is None else seams
    if query.size(0) != 1 or query.size(2) != key.size(2):
        raise SetupError(
            f"a packed forward takes one row, no KV cache; but the queries are {tuple(query.shape)} and the keys "
            f"{tuple(key.shape)} (batch, heads, tokens, d)."
        )
    causal = kwargs.pop("is_causal", None)
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if seams.kernel is not None:
        dropout, window = kwargs.get("dropout") or 0.0, kwargs.get("sliding_window")
        reason = varlen.why_not_layer(query, key, value, dropout, window, seams.longest)
        if reason is None:
            parts = (x[0].transpose(0, 1) for x in (query, key, value))  # (tokens, heads, d)
            where = cu if seams.shared is None else seams.shared
            output = varlen.attention(*parts, where, seams.longest, seams.kernel, causal, kwargs.get("scaling"))
            return output[None], None
        varlen.log_blocks(type(module).__name__, reason)
    return _attention_in_blocks(module, query, key, value, seams, causal, **kwargs), None


@torch.compiler.disable
def _attention_in_blocks(module, query, key, value, seams: Seams, causal: bool, **kwargs) -> torch.Tensor:
    """(1, heads, tokens, d) -> (1, tokens, heads, d), a call of SDPA for each block of the row."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rows = seams.rows
    if query.size(2) != rows.places.numel():
        raise SetupError(f"cu_seq_lens_q ends at {rows.places.numel()}, but there are {query.size(2)} tokens.")
    window = kwargs.get("sliding_window")

    # one block of equal lengths is a view; anything else is gathered into blocks, back to back
    together = [x[0].transpose(0, 1) for x in (query, key, value)]  # (tokens, heads, d)
    straight = len(rows.blocks) == 1 and rows.slots.numel() == rows.places.numel()
    if not straight:
        together = [_Unflatten.apply(x, rows.slots, rows.places) for x in together]
    sizes = [count * length for count, length in rows.blocks]
    outputs, slot, sequence = [], 0, 0
    # split, unlike a slice, has a backward that does not fill the rest with zeros
    for (count, length), size, *parts in zip(rows.blocks, sizes, *(x.split(sizes) for x in together), strict=True):
        q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in parts)
        lengths = rows.lengths[sequence : sequence + count]
        mask = _block_mask(lengths, length, causal, window)
        if rows.branches is not None:
            assert causal and mask is None  # `enable_packed_scores` lets nothing else share
            mask = rows.branch_mask(slot, count, length)
        if _products_pay(query, length):
            out = _attention_by_products(q, k, v, mask, causal, **kwargs)
        else:
            out, _ = sdpa_attention_forward(module, q, k, v, mask, is_causal=causal, **kwargs)
        outputs.append(out.flatten(0, 1))  # (slots, heads, d)
        slot, sequence = slot + size, sequence + count
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return (output if straight else _Flatten.apply(output, rows.places))[None]


def _products_pay(query: torch.Tensor, length: int) -> bool:
    """On CPU, PyTorch's bfloat16 kernel goes backward 2 to 6 times slower than the products written out (measured)."""
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and length <= PRODUCTS_UP_TO


def _attention_by_products(query, key, value, mask, causal, scaling=None, dropout=0.0, **_):
    """softmax(Q Kᵀ · scaling) V, written out; shapes as `sdpa_attention_forward`.

    Args:
        query, key, value: (b, heads, length, d), of key and value perhaps fewer heads.
        mask: (b or 1, 1, length, length), True attends; or None: what `causal` says.
    """
    from transformers.integrations.sdpa_attention import repeat_kv

    groups, length = query.size(1) // key.size(1), query.size(2)
    if mask is None and causal:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    scores = query @ repeat_kv(key, groups).transpose(-1, -2)
    scores = scores.mul_(query.size(-1) ** -0.5 if scaling is None else scaling)
    if mask is not None:
        scores = scores.add_(torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, -torch.inf))
    weights = nn.functional.dropout(scores.softmax(-1), dropout)  # a softmax of bfloat16 sums in float32
    return (weights @ repeat_kv(value, groups)).transpose(1, 2)


@torch.compiler.disable
def _before_forward(backbone, args, kwargs):
    """Prepare a packed forward once for all layers. Without `cu_seq_lens_q`, nothing changes."""
    seams = kwargs.get("cu_seq_lens_q")
    if seams is None:
        return None
    kwargs = dict(kwargs)
    on_host = kwargs.pop("on_host", None)
    if kwargs.get("past_key_values") is not None or kwargs.get("cache") is not None:
        raise SetupError(
            "a packed forward cannot continue a KV cache: drop past_key_values (cache since transformers 5.24)."
        )
    branches, longest = kwargs.pop("branches", None), kwargs.get("max_length_q")
    if longest is None:
        longest = max(seams.diff().tolist() if on_host is None else on_host.lengths)
    ids = kwargs.get("input_ids", args[0] if args else None)
    if on_host is not None and ids is not None and ids.numel() != sum(on_host.lengths):
        raise SetupError(f"the sequences of the pack have {sum(on_host.lengths)} tokens, the row {ids.numel()}.")
    dtype, kernel = backbone.dtype, None
    if torch.is_autocast_enabled(seams.device.type):
        dtype = torch.get_autocast_dtype(seams.device.type)
    known = branches is None or on_host is not None and on_host.groups
    if known and varlen.why_not(seams.device, dtype) is None:
        kernel = dtype
    shared = varlen.Shared.of(on_host.groups, seams.device) if kernel and branches is not None else None
    kwargs |= {"max_length_q": longest, "seams": Seams(seams, longest, on_host, branches, kernel, shared)}
    kwargs["use_cache"] = False  # a cache mixes the sequences up
    # Left alone, transformers would build a tokens x tokens mask from the positions. It passes 4-D masks on
    # as they are; an empty one cannot be used by mistake.
    kwargs["attention_mask"] = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=seams.device)
    if kwargs.get("position_ids") is None:
        kwargs["position_ids"] = packed_positions(seams[:-1].long(), seams.long().diff())[None]
    return args, kwargs


def _block_mask(lengths: torch.Tensor, width: int, causal: bool, window: int | None) -> torch.Tensor | None:
    """The mask (sequences or 1, 1, width, width) of a block where causality alone does not do; True
    attends."""
    if causal and (window is None or width <= window):
        return None
    at = torch.arange(width, device=lengths.device)
    if causal:
        return ((at <= at[:, None]) & (at > at[:, None] - window))[None, None]
    if window is not None:
        raise CannotPack("this encoder", "packed SDPA attention has no bidirectional sliding window")
    return (at < lengths[:, None])[:, None, None, :].expand(-1, -1, width, -1)


def enable_packed_attention(model) -> None:
    """Make `model` (a transformers model, or PEFT around one) attend within each sequence of a packed batch.

    Batches without `cu_seq_lens_q` are computed as by SDPA, so generation and evaluation are unchanged. A
    model already on flash-attention is left alone: transformers' own path takes the same batch there.

    Raises:
        CannotPack: the architecture cannot be packed this way (attention outside transformers' interface,
            encoder-decoder, recurrent or chunked layers).
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind, config = type(model).__name__, model.config.get_text_config()
    if "flash" in (config._attn_implementation or ""):
        logger.info("%s keeps %s, which packs by itself.", kind, config._attn_implementation)
        return
    reason = None
    layers = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if config.is_encoder_decoder:
        reason = "it is an encoder-decoder"
    elif layers:
        reason = f"it has layers of type {', '.join(sorted(layers))}, which would mix the sequences"
    elif not model._supports_sdpa:
        reason = "its attention cannot run on PyTorch's SDPA"
    elif not model._can_set_attn_implementation():
        reason = "its attention does not go through transformers' attention interface"
    if reason:
        raise CannotPack(kind, reason)

    before = config._attn_implementation
    AttentionInterface.register(NAME, packed_sdpa_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    if model.config.get_text_config()._attn_implementation != NAME:
        raise CannotPack(kind, "it did not accept packed attention")
    backbone = model.base_model
    if not any(hook is _before_forward for hook in backbone._forward_pre_hooks.values()):
        hook = backbone.register_forward_pre_hook(_before_forward, with_kwargs=True)
        reason = _why_not_exact(backbone)
        if reason:
            hook.remove()
            model.set_attn_implementation(before)
            raise CannotPack(kind, reason)
        if before != "sdpa":
            logger.warning("%s: packed sequences are attended to by SDPA, not by %s.", kind, before)


def _why_not_exact(backbone) -> str | None:
    """Whatever else an architecture does between tokens shows on two short sequences, packed and apart; or None."""
    weight = backbone.get_input_embeddings().weight
    # not loaded yet, or ZeRO-3's (embeddings that new tokens enlarged are not cut up yet)
    if any(w.device.type == "meta" or hasattr(w, "ds_id") for w in backbone.parameters()):
        return None
    device, rows = weight.device, weight.size(0)
    ids = [[(7 * i + 3) % rows for i in range(n)] for n in (4, 3)]
    batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in pack(ids).items() if k != "labels"}
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        with torch.no_grad():
            packed = backbone(**batch, use_cache=False)[0][0].float()
            apart = [backbone(input_ids=torch.tensor([x], device=device), use_cache=False)[0][0] for x in ids]
    except CannotPack as error:
        return error.reason
    except (SetupError, TypeError) as error:  # a forward that does not know such arguments
        return str(error)
    finally:
        for module, training in modes:
            module.training = training
    apart = torch.cat(apart).float()
    slack = (1e-3 if _exact(backbone) else 5e-2) * apart.abs().max().item()
    return None if torch.allclose(packed, apart, rtol=0, atol=slack) else "its tokens see beyond their own sequence"


def _exact(backbone) -> bool:
    """Whether it computes in float32 throughout: a quantized base has float32 embeddings, and products in half
    precision.
    """
    weights = {weight.dtype for weight in backbone.parameters()}
    products = {getattr(module, "compute_dtype", None) for module in backbone.modules()} - {None}
    return weights | products <= {torch.float32, torch.float64}


def enable_packed_scores(model) -> bool:
    """As `enable_packed_attention`, for a sequence classifier with a `score` head (before PEFT or DDP wrap it).

    A batch of `pack_branches` then gives logits (members, labels), each read at a member's last token; any other batch
    what it gave before. Returns whether members may share their beginning: not under flash-attention, nor where a
    window of attention would be counted over other branches.

    Raises:
        CannotPack: as `enable_packed_attention`, or the model reads its score elsewhere (encoders).
    """
    from transformers.modeling_outputs import SequenceClassifierOutputWithPast

    if not hasattr(model, "score"):
        raise CannotPack(type(model).__name__, "it has no `score` head")
    enable_packed_attention(model)
    model.unpacked_forward = model.forward  # an attribute, so that deepcopy binds it to the copy
    wanted = ("input_ids", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "branches")
    wanted += ("on_host",)

    @functools.wraps(type(model).forward)
    def forward(self, *args, last=None, **kwargs):
        if last is None:
            return self.unpacked_forward(*args, **kwargs)
        packed = {name: kwargs[name] for name in wanted if name in kwargs}  # PEFT adds some that backbones do not know
        hidden = self.base_model(**packed, use_cache=False).last_hidden_state[0]
        return SequenceClassifierOutputWithPast(logits=self.score(hidden[last]))

    model.forward = types.MethodType(forward, model)
    config = model.config.get_text_config()
    return config._attn_implementation == NAME and getattr(config, "sliding_window", None) is None
