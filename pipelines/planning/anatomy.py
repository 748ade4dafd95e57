"""What a model consists of, from its config alone: it is built without memory and run on fake tensors.

Parameters are counted and activations traced on the architecture itself, whichever it is, with the changes that our
trainers make to it. A 70B model takes a second and no memory.
"""

from __future__ import annotations

import copy
import logging
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.initialization import no_init_weights
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.pytorch_utils import Conv1D

from pipelines.errors import SetupError
from pipelines.generation.logprobs import can_share, disable_dropout
from pipelines.planning import costs
from pipelines.speed import fast_model, packed_attention

logger = logging.getLogger(__name__)

MASKLESS = "sdpa_without_mask"


@dataclass(frozen=True)
class Anatomy:
    """Counts of one model. `products`: weights that every token is multiplied with (looked-up embeddings are not)."""

    architecture: str
    parameters: int
    trainable: int
    products: int
    vocabulary: int  # rows of the output embeddings, 0 where there are none
    hidden: int
    layers: int  # encoder and decoder together
    attention: int  # query heads x head size
    kv: int  # key-value heads x head size
    largest: int  # parameters of the largest layer
    outside: int  # parameters outside the layers: embeddings and head
    widest: int  # most outputs of a linear map in the layers
    linear: int  # weights in the layers' linear maps: what 4 bits can hold
    tied: bool  # whether the head is the input embeddings
    fusable: bool  # whether `fast_model.fuse_loss` takes its head


@contextmanager
def _fake():
    """Fake tensors inside; quiet about what cannot be traced, which the caller reports."""
    names = ("torch._subclasses.fake_tensor", "transformers")
    before = [(logging.getLogger(name), logging.getLogger(name).level) for name in names]
    for log, _ in before:
        log.setLevel(logging.CRITICAL)
    try:
        with FakeTensorMode():
            yield
    finally:
        for log, level in before:
            log.setLevel(level)


def _build(config, auto_class: str, adapt=None, dtype=torch.float32):
    """The model without memory (on the device `meta`); `adapt` may wrap it (LoRA)."""
    with torch.device("meta"), no_init_weights():
        model = getattr(transformers, auto_class).from_config(copy.deepcopy(config), dtype=dtype)
        model.tie_weights()
        return adapt(model) if adapt else model


def _on_fake_tensors(model):
    """The model's weights and buffers as fake tensors of the CPU, under `_fake`: autocast treats them as real ones."""
    made: dict[int, torch.Tensor] = {}  # tied weights stay one
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                fake = made.get(id(weight))
                if fake is None:
                    empty = torch.empty(weight.shape, dtype=weight.dtype)
                    fake = made[id(weight)] = nn.Parameter(empty, requires_grad=weight.requires_grad)
                module._parameters[name] = fake
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return model


def examine(config, auto_class: str, adapt=None) -> Anatomy:
    """Counts of `transformers.<auto_class>` of `config`."""
    model = _build(config, auto_class, adapt)
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    text = plain.config.get_text_config()
    lists = [m for m in plain.modules() if isinstance(m, nn.ModuleList) and any(True for _ in m.parameters())]
    inner = {id(child) for m in lists for child in m.modules() if child is not m}
    blocks = [block for m in lists if id(m) not in inner for block in m]
    count = sum(p.numel() for p in plain.parameters())
    looked_up = {id(m.weight): m.weight.numel() for m in plain.modules() if isinstance(m, nn.Embedding)}
    head = plain.get_output_embeddings()
    tied = looked_up.get(id(head.weight), 0) if head is not None else 0
    layers = max(getattr(text, "num_hidden_layers", 0) or 0, len(blocks))
    in_blocks = sum(p.numel() for p in {id(p): p for b in blocks for p in b.parameters()}.values())
    shared = in_blocks * (layers / max(len(blocks), 1) - 1)  # ALBERT: one block, passed several times
    heads = getattr(text, "num_attention_heads", 1)
    size = getattr(text, "head_dim", None) or getattr(text, "d_kv", None) or text.hidden_size // heads
    maps = [m for b in blocks for m in b.modules() if isinstance(m, (nn.Linear, Conv1D))]
    outputs = [m.nf if isinstance(m, Conv1D) else m.out_features for m in maps]
    return Anatomy(
        architecture=type(plain).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        products=int(count - sum(looked_up.values()) + tied + shared),
        vocabulary=head.weight.shape[0] if head is not None else 0,
        hidden=text.hidden_size,
        layers=layers,
        attention=heads * size,
        kv=(getattr(text, "num_key_value_heads", None) or heads) * size,
        largest=max((sum(p.numel() for p in b.parameters()) for b in blocks), default=count),
        outside=count - in_blocks,
        widest=max(outputs, default=0),
        linear=sum(m.weight.numel() for m in maps),
        tied=bool(tied),
        fusable=type(head) is nn.Linear
        and not text.is_encoder_decoder
        and all(getattr(text, key, None) in (None, off) for key, off in fast_model.LOGIT_CHANGES.items()),
    )


def layout(config, auto_class: str, branches: bool) -> str:
    """How our trainers lay the sequences of a batch of this architecture: "padded", "packed" end to end, or "shared".

    Shared: packed, and answers to one prompt, of which a row of `branches` is made, stand behind one copy of it
    (`packing.pack_branches`).
    """
    model = _build(config, auto_class)
    try:
        if auto_class == "AutoModelForSequenceClassification":
            packed_attention.enable_packed_scores(model)
        else:
            packed_attention.enable_packed_attention(model)
    except SetupError:
        return "padded"
    return "shared" if branches and can_share(model) else "packed"


def activations(
    config,
    auto_class: str,
    rows: int,
    length: int,
    *,
    precision: str = "fp32",
    mask: str | None = None,
    decoder_length: int = 0,
    dropout: bool = True,
    fast_gelu: bool = True,
    adapt=None,
) -> tuple[float, bool]:
    """`(bytes that one forward of the backbone keeps for its backward, whether they were traced)`.

    Args:
        rows, length: the batch; `decoder_length` the targets' length of an encoder-decoder.
        precision: "fp32", "autocast" (float32 weights, bf16 products: the casts of the weights are kept too) or
            "bf16" (bf16 weights).
        mask: what of it is kept too: "padding" (rows, length), "branches" (rows, length, length; see
            `packing.pack_branches`) or None.

    Models that cannot be run without numbers get `costs.korthikanti`.
    """
    try:
        kept = _trace(config, auto_class, rows, length, precision, mask, decoder_length, dropout, fast_gelu, adapt)
        return kept, True
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        anatomy = examine(config, auto_class)
        size = 4 if precision == "fp32" else 2
        logger.info("%s cannot be traced (%s): formula instead", anatomy.architecture, str(error).splitlines()[0])
        tokens = rows * (length + decoder_length)
        casts = anatomy.products * 2 if precision == "autocast" else 0
        return costs.korthikanti(tokens, anatomy.hidden, anatomy.layers, size) + casts, False


def _trace(config, auto_class, rows, length, precision, mask, decoder_length, dropout, fast_gelu, adapt) -> float:
    with _fake():
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        model = _on_fake_tensors(_build(config, auto_class, adapt, dtype))
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        if mask != "padding" and plain._can_set_attn_implementation():
            # Traced, transformers makes a causal mask even where a run needs none.
            AttentionInterface.register(MASKLESS, sdpa_attention_forward)
            AttentionMaskInterface.register(MASKLESS, lambda *args, **kwargs: None)
            plain.set_attn_implementation(MASKLESS)
        if fast_gelu:
            fast_model.fast_gelu(plain)
        model.train()
        if not dropout:
            disable_dropout(model)
        own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
        kept: dict[int, tuple[int, torch.Tensor]] = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = (storage.nbytes(), tensor)
            return tensor

        inputs = {"input_ids": torch.zeros(rows, length, dtype=torch.int64)}
        if mask == "padding":
            inputs["attention_mask"] = torch.ones(rows, length, dtype=torch.int64)
        elif mask == "branches":
            inputs["attention_mask"] = torch.ones(rows, 1, length, length, dtype=torch.bool)
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.zeros(rows, decoder_length, dtype=torch.int64)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"),
        ):
            plain.base_model(**inputs, use_cache=False)
        return float(sum(size for size, _ in kept.values()))
