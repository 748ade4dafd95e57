"""Sampling answers: exact inverse-CDF sampling from per-prompt random streams, so that runs repeat.

Each prompt draws its uniforms from a generator seeded for it alone. Its answer then depends neither on the
prompts beside it in the batch, nor on how many processes share the work, nor on what was sampled before
(resuming!), up to rounding of the logits.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache, DynamicLayer

from pipelines import launch
from pipelines.generation import fixed_step
from pipelines.speed import packed_attention
from pipelines.speed.cpu_products import packed_products
from pipelines.speed.half_products import half_products

logger = logging.getLogger(__name__)

CHECK = 8  # tokens after which an accelerator is asked which rows have ended: asking makes the host wait for it
BLOCK = 128  # the vocabulary is summed in blocks of this many tokens before the cumulative sum


@torch.no_grad()
def generate(
    model,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    eos_token_ids: list[int],
    seeds: list,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    batch_size: int = 64,
) -> tuple[list[list[int]], list[Tensor]]:
    """Sample one answer to each of `prompts` (token ids); returns `(responses, logprobs)` in the same order.

    A response ends with the first of `eos_token_ids` (included) or after `max_new_tokens`. `logprobs[i]` is a
    float32 CPU tensor with the log-prob of every token of `responses[i]` under softmax(logits / temperature):
    the sampled distribution when `top_k` is 0 and `top_p` is 1, and the one before truncation otherwise.
    `seeds[i]` is anything that `numpy.random.default_rng` takes. Prompts are decoded `batch_size` at a time,
    those of like length together.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's adapters stay inside
    responses: list = [None] * len(prompts)
    logprobs: list = [None] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with packed_products(model), half_where_it_pays(model):
        for start in range(0, len(prompts), batch_size):
            rows = by_length[start : start + batch_size]
            draw = Sampler(uniforms([seeds[i] for i in rows], max_new_tokens), temperature, top_k, top_p)
            decode = hf_decode if (reason := lean_obstacle(model)) else lean_decode
            if reason:
                _log_slow(type(model).__name__, reason)
            tokens, logps = decode(model, [prompts[i] for i in rows], max_new_tokens, eos_token_ids, draw)
            for i, ids, logp in zip(rows, tokens.tolist(), logps, strict=True):
                n = next((t + 1 for t, token in enumerate(ids) if token in eos_token_ids), len(ids))
                responses[i], logprobs[i] = ids[:n], logp[:n].clone()
    return responses, logprobs


def uniforms(seeds: list, steps: int) -> Tensor:
    """Float32 (len(seeds), steps) in [0, 1), each row from a generator of its own seed."""
    return torch.from_numpy(np.stack([np.random.default_rng(seed).random(steps, np.float32) for seed in seeds]))


class Sampler:
    """Draws the tokens of one batch: row b, step t uses `uniforms[b, t]` (B, T) in [0, 1)."""

    def __init__(self, uniforms: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0):
        self.uniforms, self.temperature, self.top_k, self.top_p = uniforms, temperature, top_k, top_p

    def __call__(self, logits: Tensor, step: int | Tensor, rows: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Tokens (b,) and their log-probs (b,) of logits (b, V) of the `rows` at `step`, perhaps a tensor (1,)."""
        self.uniforms = self.uniforms.to(logits.device)
        probabilities = torch.softmax(logits.float() / self.temperature, -1)
        kept = truncate(probabilities, self.top_k, self.top_p)
        tokens = inverse_cdf(kept, self.uniforms[rows, step])
        return tokens, probabilities.gather(-1, tokens[:, None]).squeeze(-1).log()


def inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """The token (b,) at which the cumulative sum of `weights` (b, V; ≥ 0, any scale) passes u (b,) of it.

    Exact, and an order of magnitude cheaper than `torch.multinomial`: sums of blocks first, then one block.
    """
    b, vocabulary = weights.shape
    size = min(BLOCK, vocabulary)
    whole = vocabulary // size * size
    sums = weights[:, :whole].unflatten(1, (-1, size)).sum(-1)
    if whole < vocabulary:
        sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], 1)
    cumulative = sums.cumsum(-1)  # (b, blocks)
    target = (u * cumulative[:, -1])[:, None]
    block = (cumulative <= target).sum(-1, keepdim=True).clamp(max=sums.shape[1] - 1)
    before = torch.where(block > 0, cumulative.gather(-1, (block - 1).clamp(min=0)), 0.0)
    columns = block * size + torch.arange(size, device=weights.device)
    inside = weights.gather(-1, columns.clamp(max=vocabulary - 1)).masked_fill(columns >= vocabulary, 0.0)
    place = (inside.cumsum(-1) <= target - before).sum(-1, keepdim=True).clamp(max=size - 1)
    # Rounding may run past the last possible token of the block: then take its likeliest.
    place = torch.where(inside.gather(-1, place) > 0, place, inside.argmax(-1, keepdim=True))
    return columns.gather(-1, place).squeeze(-1)


def truncate(weights: Tensor, top_k: int, top_p: float) -> Tensor:
    """`weights` (b, V), 0 but for the `top_k` largest and, of these, the largest that hold `top_p`."""
    if 0 < top_k < weights.shape[-1]:
        least = weights.topk(top_k, -1).values[:, -1:]
        weights = weights.masked_fill(weights < least, 0.0)
    if top_p < 1.0:
        ordered, order = weights.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        outside = before >= top_p * ordered.sum(-1, keepdim=True)
        weights = weights.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), 0.0)
    return weights


def can_decode_lean(model) -> bool:
    """Whether `lean_decode` can do this architecture: attention over an ordinary KV cache in every layer."""
    return lean_obstacle(model) is None


def lean_obstacle(model) -> str | None:
    """Why `lean_decode` cannot do this architecture; None where it can."""
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    missing = {"attention_mask", "position_ids", "logits_to_keep"} - inspect.signature(model.forward).parameters.keys()
    if config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if getattr(model, "_is_stateful", False):
        return "it keeps a state instead of a cache"
    if layers:
        return f"it has layers of {', '.join(sorted(layers))}"
    if missing or cache_argument(model) is None:
        return f"its forward takes no {', '.join(sorted(missing) or ['cache'])}"
    return None


def cache_argument(model) -> str | None:
    """What `forward` calls the cache: `cache` since transformers 5.24, `past_key_values` before; None where it has
    none.
    """
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in parameters), None)


@functools.cache
def _log_slow(architecture: str, reason: str) -> None:
    logger.info("%s is decoded by transformers' own generate, not the fast way: %s", architecture, reason)


def lean_decode(model, prompts, max_new_tokens: int, eos_token_ids, draw: Sampler) -> tuple[Tensor, Tensor]:
    """Tokens and log-probs (b, T), both CPU; what follows an EOS is arbitrary.

    What `generate` of transformers does, less what costs: keys and values are written into buffers that never
    grow, rows that have ended are dropped as soon as they are a quarter of the batch, and nothing but the
    last logits is computed. On an accelerator the host waits for it every `CHECK` tokens and once at the end. On a GPU
    the step behind the first is recorded and replayed (`fixed_step`).
    """
    device, room = model.device, max(map(len, prompts)) + max_new_tokens
    ids, mask = left_padded(prompts, device)
    position = mask.cumsum(1).sub(1).clamp(min=0)
    mask = torch.cat([mask, mask.new_ones(len(ids), max_new_tokens)], 1)
    config = model.config.get_text_config()
    every = 1 if device.type == "cpu" else CHECK
    masks = device.type != "cpu" and takes_ready_masks(config)
    reason = fixed_step.obstacle(model, masks)
    if reason and device.type != "cpu":
        fixed_step.log_eager(type(model).__name__, reason)
    fixed, keys, fewer = None, 0, 3 if reason else 2  # recording costs more than a row too many
    wide = device.type == "cpu" and config._attn_implementation == packed_attention.NAME
    cache = Cache(layers=[KVBuffer(room, wide) for _ in range(config.num_hidden_layers)])
    ends = torch.tensor(list(eos_token_ids), device=device)
    tokens = torch.zeros(len(ids), max_new_tokens, dtype=torch.int64, device=device)
    logprobs = torch.zeros(len(ids), max_new_tokens, device=device)
    rows = torch.arange(len(ids), device=device)  # which row of the batch each row still decoding is
    ended = torch.zeros(len(ids), dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        seen = room - max_new_tokens + step
        if step and reason is None:
            if fixed is None or seen > keys:
                keys = min(-(-seen // fixed_step.KEYS) * fixed_step.KEYS, room)
                place, at = (torch.full((1,), x, device=device) for x in (seen - 1, step))
                for layer in cache.layers:
                    layer.fix(place, keys)
                kept = (mask, place, at, rows, ended, tokens, logprobs, ends, keys, {cache_argument(model): cache})
                fixed = fixed_step.Recorded(model, draw, fixed_step.State(ids, position, *kept))
            fixed()
        else:
            output = model(
                input_ids=ids,
                attention_mask=ready_mask(mask[:, :seen], ids.shape[1]) if masks else mask[:, :seen],
                position_ids=position,
                use_cache=True,
                logits_to_keep=1,
                **{cache_argument(model): cache},
            )
            chosen, logprob = draw(output.logits[:, -1], step, rows)
            tokens[rows, step], logprobs[rows, step] = chosen, logprob
            ended |= torch.isin(chosen, ends)
            ids, position = chosen[:, None], position[:, -1:] + 1
        if (step + 1) % every or step + 1 == max_new_tokens:
            continue
        left = [row for row, gone in enumerate(ended.tolist()) if not gone]
        if not left:
            break
        if len(left) * 4 <= len(rows) * fewer:
            left, fixed = torch.tensor(left, device=device), None
            cache.batch_select_indices(left)
            ids, position, mask, rows, ended = (x[left] for x in (ids, position, mask, rows, ended))
    found = torch.stack([tokens.double(), logprobs.double()]).cpu()  # both at once: exact, and one wait
    return found[0].long(), found[1].float()


def half_where_it_pays(model):
    """On a GPU, under autocast to bfloat16: `half_products`."""
    kind = model.device.type
    cast = kind == "cuda" and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
    if not cast or not launch.chosen_on_gpu("bf16_decoding"):
        return contextlib.nullcontext()
    _log_half(type(model).__name__)
    return half_products(model)


@functools.cache
def _log_half(architecture: str) -> None:
    text = "%s is decoded from bfloat16 copies of its linear maps (switch off with %s=bf16_decoding)"
    logger.info(text, architecture, launch.OFF_ON_GPU)


def takes_ready_masks(config) -> bool:
    """Whether the model attends as a mask (b, 1, queries, keys) says that is handed to it.

    transformers makes such masks of (b, keys) itself, but asks the device each time whether all of it is 1. Flash
    attention takes no mask, windows differ from layer to layer, and alibi is computed from the (b, keys) mask.
    """
    plain = config._attn_implementation in ("sdpa", packed_attention.NAME)
    windows = getattr(config, "sliding_window", None) is not None or "sliding_attention" in (
        getattr(config, "layer_types", None) or ()
    )
    return plain and not windows and not getattr(config, "alibi", False)


def ready_mask(mask: Tensor, queries: int) -> Tensor:
    """`mask` (b, keys) of the keys so far as (b, 1, queries, keys), True where the last `queries` of them may look."""
    keys = mask.shape[1]
    at = torch.arange(keys, device=mask.device)
    return (mask[:, None, None, :] > 0) & (at <= at[keys - queries :, None])


class KVBuffer(DynamicLayer):
    """Keys and values of one layer in buffers of a fixed size: appending writes in place.

    `wide` buffers are float32 whatever comes in: a CPU attends to a cache in bfloat16 four times slower.
    """

    def __init__(self, room: int, wide: bool = False):
        super().__init__()
        self.room, self.wide, self.used, self.buffers = room, wide, 0, None
        self.place, self.keys = None, 0  # see `fix`

    def fix(self, place: Tensor, keys: int) -> None:
        """From now on a new key is written at `place`, (1,) on the device, and `update` returns the first `keys`."""
        if self.place is None:
            for buffer in self.buffers:
                buffer[:, :, self.used :] = 0.0  # masked, they are multiplied by 0 all the same
        self.place, self.keys = place, keys

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append (b, heads, new, d) each; returns all so far as views of the buffers."""
        if self.buffers is None:
            self.buffers = [
                x.new_empty(*x.shape[:2], self.room, x.shape[3], dtype=torch.float32 if self.wide else x.dtype)
                for x in (key_states, value_states)
            ]
            self.is_initialized = True
        if self.place is not None:
            for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
                buffer.index_copy_(2, self.place, new.to(buffer.dtype))
            return tuple(buffer[:, :, : self.keys] for buffer in self.buffers)
        begin, self.used = self.used, self.used + key_states.shape[2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, begin : self.used] = new
        return tuple(buffer[:, :, : self.used] for buffer in self.buffers)

    def get_seq_length(self) -> int:
        return self.used

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows (ascending), moved to the front of the same buffers."""
        for i, buffer in enumerate(self.buffers):
            used = self.used if self.place is None else self.room
            buffer[: len(indices), :, :used] = buffer[indices, :, :used]
            self.buffers[i] = buffer[: len(indices)]


def hf_decode(model, prompts, max_new_tokens: int, eos_token_ids, draw: Sampler) -> tuple[Tensor, Tensor]:
    """Tokens and log-probs (b, T), both CPU, by transformers' own `generate`: any architecture it knows."""
    ids, mask = left_padded(prompts, model.device)
    chooser = Chooser(draw)
    config, model.generation_config = (
        model.generation_config,
        GenerationConfig(),
    )  # its penalties are not ours
    try:
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=list(eos_token_ids),
                pad_token_id=0,
            ),
            logits_processor=LogitsProcessorList([chooser]),
        )
    finally:
        model.generation_config = config
    return out[:, ids.shape[1] :].cpu(), torch.stack(chooser.logprobs, 1).cpu()


class Chooser(LogitsProcessor):
    """Makes greedy search pick the sampled token, and keeps its log-prob."""

    def __init__(self, draw: Sampler):
        self.draw, self.logprobs = draw, []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, logprobs = self.draw(scores, len(self.logprobs))
        self.logprobs.append(logprobs)
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens[:, None], 0.0)


def left_padded(sequences: list[list[int]], device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask (b, longest), both int64, padding on the left."""
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = 1
    return ids.to(device), mask.to(device)
