"""Faster parts put into a transformers model in place: the loss fused with the head, GELU in one kernel."""

from __future__ import annotations

import contextlib
import functools
import logging
import types

import torch
from transformers import masking_utils

from pipelines.speed.fused_head import in_head, linear_cross_entropy

logger = logging.getLogger(__name__)

# What a config says about logits that are more than linear(hidden), and the value at which it says nothing.
LOGIT_CHANGES = {
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "output_multiplier": 1.0,
    "lm_head_multiplier": 1.0,
    "logits_scaling": 1.0,
    "output_router_logits": False,
}
OTHER_LOGITS = "its logits are not head(last hidden states)"
OWN_LOSS = "%s keeps its own loss (slower, more memory): %s."


def _why_not_fused(model) -> str | None:
    """Why this model's loss cannot be computed from its last hidden states and its head, as far as its parts say; or
    None."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    if config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if type(head) is not torch.nn.Linear:
        return f"its head is a {type(head).__name__}"
    for name, neutral in LOGIT_CHANGES.items():
        if getattr(config, name, None) not in (None, neutral):
            return f"its config sets {name}"
    if model.base_model is model:
        return "it has no separate backbone"
    if head.weight.device.type == "meta":
        return "its weights are not loaded yet"
    return None


def is_cut_up(model) -> bool:
    """Whether ZeRO-3 has cut up weights of this model: it can compute nothing before DeepSpeed's engine has it."""
    return any(hasattr(weight, "ds_id") for weight in model.parameters())


@torch.no_grad()
def has_plain_logits(model, forward) -> bool:
    """Whether the logits of `forward`, the model's own, are its head applied to its last hidden states: anything else
    that it may do between them shows on four tokens.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    ids = torch.arange(4, device=head.weight.device)[None] % config.vocab_size
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with attention_for_any_device(config):
        own = forward(input_ids=ids, use_cache=False).logits.float()
        ours = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state).float()
    for module, training in modes:
        module.training = training
    return own.shape == ours.shape and torch.allclose(own, ours, rtol=1e-3, atol=1e-3 * own.abs().max().item())


@contextlib.contextmanager
def attention_for_any_device(config):
    """Within it a model attends by PyTorch's own functions: flash attention and kernels of the hub refuse a CPU, and
    float32 anywhere."""
    before = config._attn_implementation
    if before not in ("sdpa", "eager", "packed_sdpa"):
        config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        if config._attn_implementation != before:
            config._attn_implementation = before


def float32_head(model) -> None:
    """Let the `score` head of a sequence classifier compute in float32 outside of autocast, in place.

    One number for an answer, rounded to three digits by bfloat16, would be no score: differences between good answers
    are smaller. It costs nothing beside the model.
    """
    head = getattr(model, "score", None)
    if type(head) is torch.nn.Linear:
        head.forward = types.MethodType(float32_linear, head)


def float32_linear(head: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """(…, in) -> (…, out) in float32, whatever autocast says and the dtypes are."""
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.float()
        if hidden.device.type == "cuda" and len(head.weight) == 1:  # a matrix product may be TF32's, of three digits
            score = (hidden.float() * head.weight.float()).sum(-1, keepdim=True)
            return score if bias is None else score + bias
        return torch.nn.functional.linear(hidden.float(), head.weight.float(), bias)


def fuse_loss(model) -> bool:
    """Let `model(..., labels=...)` compute its loss with `linear_cross_entropy`; its `logits` are None then.

    Calls without labels (generation) and with TRL's `fused_lm_head` or `shift_labels` are the model's own.
    Labels are shifted as transformers does; `num_items_in_batch` is the divisor if given. Call it before
    wrapping the model (DDP, FSDP, PEFT's base model is fine); a second call does nothing.

    Args:
        model: a transformers `…ForCausalLM`.

    Returns:
        Whether it was done; if not, the reason is in the log and the model's own loss stays.
    """
    if getattr(model, "loss_is_fused", None) is None:
        reason = _why_not_fused(model)
        # what ZeRO-3 has cut up can only be looked at in the first forward
        model.logits_are_known = reason is not None or not is_cut_up(model)
        if reason is None and model.logits_are_known and not has_plain_logits(model, model):
            reason = OTHER_LOGITS
        model.loss_is_fused = reason is None
        if reason is None:
            _fuse(model)
        else:
            logger.warning(OWN_LOSS, type(model).__name__, reason)
    return model.loss_is_fused


@torch.compiler.disable  # with `torch_compile: true` the backbone is compiled around it: chunks would only recompile
def _loss_in_head(head: torch.nn.Linear, hidden: torch.Tensor, labels: torch.Tensor, divisor, on_host) -> torch.Tensor:
    targets = None if on_host is None else on_host.targets

    def loss(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, labels, bias, divisor=divisor, targets=targets)

    return in_head(head, loss, hidden)


def _fuse(model) -> None:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    model.unfused_forward = model.forward  # an attribute, so that deepcopy binds it to the copy

    @functools.wraps(type(model).forward)  # Trainer and generate read the signature
    def forward(self, *args, labels=None, num_items_in_batch=None, **kwargs):
        if labels is not None and not self.logits_are_known:
            self.logits_are_known, self.loss_is_fused = True, has_plain_logits(self, self.unfused_forward)
            if not self.loss_is_fused:
                logger.warning(OWN_LOSS, type(self).__name__, OTHER_LOGITS)
        head = self.get_output_embeddings()
        elsewhere = not self.loss_is_fused or kwargs.get("fused_lm_head") or kwargs.get("output_router_logits")
        elsewhere = elsewhere or kwargs.get("shift_labels") is not None
        plain = isinstance(head, torch.nn.Linear)  # PEFT may have wrapped the head since
        if labels is None or elsewhere or not plain:
            extra = {"labels": labels, "num_items_in_batch": num_items_in_batch}
            return self.unfused_forward(*args, **{k: v for k, v in extra.items() if v is not None}, **kwargs)
        kwargs["use_cache"] = False  # nothing generates from a forward with labels
        kwargs.pop("return_dict", None), kwargs.pop("logits_to_keep", None)
        on_host = kwargs.get("on_host")
        alone = head.weight.device.type != "cpu" and kwargs.get("position_ids") is None
        with one_sequence_per_row(self.base_model) if alone else contextlib.nullcontext():
            out = self.base_model(*args, **kwargs)
        hidden, labels = out.last_hidden_state[:, :-1], labels[:, 1:]
        if torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(hidden.device)
        loss = _loss_in_head(head, hidden, labels.to(hidden.device), num_items_in_batch, on_host)
        return CausalLMOutputWithPast(
            loss=loss, hidden_states=out.get("hidden_states"), attentions=out.get("attentions")
        )

    model.forward = types.MethodType(forward, model)


@contextlib.contextmanager
def one_sequence_per_row(backbone):
    """For forwards without `position_ids`, whose rows are whole windows or have seams: nothing is asked of the device.

    transformers looks for further sequences in the positions that it has just made itself, and for padding to warn of;
    each time an accelerator has to be waited for.
    """
    find, warn = masking_utils.find_packed_sequence_indices, "warn_if_padding_and_no_attention_mask"
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    vars(backbone)[warn] = lambda *_: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find
        del vars(backbone)[warn]


@contextlib.contextmanager
def masks_made(device: torch.device):
    """Within it padding is masked without a look at whether there is any, for which an accelerator had to be waited."""
    names = ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa") if device.type != "cpu" else ()
    before = {name: getattr(masking_utils, name) for name in names if hasattr(masking_utils, name)}

    def unless_padded(real):
        return lambda padding_mask, *args, **kwargs: padding_mask is None and real(padding_mask, *args, **kwargs)

    vars(masking_utils).update({name: unless_padded(real) for name, real in before.items()})
    try:
        yield
    finally:
        vars(masking_utils).update(before)


def fast_model(model) -> None:
    """What makes a causal language model train faster at the same function, in place; before wrapping it.

    `fuse_loss` and `fast_gelu`.
    """
    fast_gelu(model)
    fuse_loss(model.get_base_model() if hasattr(model, "get_base_model") else model)


def fast_gelu(model) -> None:
    """GPT-2's tanh-GELU, eight Python operations over the widest activation, becomes PyTorch's single one, in place.

    Equal to 1e-6.
    """
    from transformers.activations import FastGELUActivation, NewGELUActivation

    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) in (NewGELUActivation, FastGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
