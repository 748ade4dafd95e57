"""Tokenizers and models in and out: from a config, a folder or a hub id, and never with silently random parts."""

from __future__ import annotations

import contextlib
import logging

logger = logging.getLogger(__name__)


class ModelError(ValueError):
    """A model or tokenizer that cannot be used as asked, with the fix."""


def load_tokenizer(section):
    """The tokenizer of a `model:` section: its own folder, or the model's."""
    from transformers import AutoTokenizer

    path = section.tokenizer_name_or_path or section.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=section.model_revision, trust_remote_code=section.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no tokenizer in {path!r} ({str(error).splitlines()[0]}). Set model.tokenizer_name_or_path to a folder or "
            "hub id that has one; a hub id needs network access or the hub's cache."
        ) from error
    # A v4-era folder opened wrongly yields a vocabulary of one or two tokens, without a word.
    if len(tokenizer) < 10:
        raise ModelError(f"the tokenizer in {path!r} has only {len(tokenizer)} tokens: its vocabulary was not read")
    return tokenizer


def load_model(section, auto_class: str, tokenizer=None, *, allow_new: tuple[str, ...] = (), **settings):
    """The model of a `model:` section as `transformers.<auto_class>`, float32 unless `dtype` says otherwise.

    With `section.config` alone a new model is built, its vocabulary and special tokens taken from `tokenizer`; beside
    a path, a config without `model_type` changes values of the loaded one, and one with it is not used (and said so),
    so that a public base model can be swapped into a recipe for a new one by a single override.
    `settings` are config values (num_labels=1, …). Weights missing in the checkpoint raise `ModelError`, except those
    whose name starts with one of `allow_new` (a task head that this stage is to train).
    """
    import torch
    import transformers

    auto = getattr(transformers, auto_class)
    overrides = dict(section.config or {})
    dtype = section.dtype if section.dtype in (None, "auto") else getattr(torch, section.dtype)
    attention = {"attn_implementation": section.attn_implementation} if section.attn_implementation else {}
    if section.model_name_or_path is None:
        special = _special(tokenizer)
        if overrides.get("vocab_size", 0) >= special.get("vocab_size", 0):  # padded to a rounder number, for speed
            special.pop("vocab_size", None)
        for key in special.keys() & overrides.keys():
            if special[key] != overrides[key]:
                raise ModelError(
                    f"model.config.{key} is {overrides[key]}, but the tokenizer's is {special[key]}. Leave it out: it is "
                    "taken from the tokenizer."
                )
        config = transformers.AutoConfig.for_model(overrides.pop("model_type"), **{**overrides, **special})
        for key, value in settings.items():
            setattr(config, key, value)
        return auto.from_config(config, dtype=torch.float32 if dtype in (None, "auto") else dtype, **attention)
    if "model_type" in overrides:
        logger.warning("model.config describes a new model and is not used: %s is", section.model_name_or_path)
        overrides = {}
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # missing weights are this function's own business, below
    try:
        model, info = auto.from_pretrained(
            section.model_name_or_path,
            revision=section.model_revision,
            trust_remote_code=section.trust_remote_code,
            dtype=dtype or torch.float32,
            output_loading_info=True,
            use_safetensors=True,
            **overrides,
            **settings,
            **attention,
        )
    except OSError as error:
        raise ModelError(
            f"{section.model_name_or_path!r} cannot be loaded ({str(error).splitlines()[0]}). A local path must hold a "
            "model (config.json, *.safetensors); a hub id needs network access or the hub's cache, and a gated model "
            "`hf auth login`."
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    new = sorted({*info["missing_keys"], *(k for k, *_ in info.get("mismatched_keys", ()))})
    random = [k for k in new if not k.startswith(allow_new)] if allow_new else new
    if random:
        raise ModelError(
            f"{section.model_name_or_path!r} lacks weights that {auto_class} needs, they would be random: "
            f"{', '.join(random[:6])}{' …' if len(random) > 6 else ''}. Use a model of this kind"
            + (" (a finished reward stage, for a reward model)." if "score.weight" in random else ".")
        )
    if new:
        logger.info("new weights to be trained: %s", ", ".join(new))
    return model


def adapt(model, section, task: str, new_tokens: list[int] | None = None):
    """`model` with LoRA adapters where `use_peft` asks for them (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    `task` is peft's: "CAUSAL_LM", or "SEQ_CLS", which trains the score head too. The embeddings of `new_tokens` are
    trained as well: adapters alone would leave a chat template's tokens at their initial values.
    """
    if not section.use_peft:
        return model
    import peft
    from transformers.pytorch_utils import Conv1D
    from trl import get_peft_config

    from pipelines import launch

    if launch.sharded():
        raise ModelError(
            "model.use_peft: adapters run on one process or plain data parallelism (ddp.yaml), not on shards"
        )
    config = get_peft_config(section)
    config.task_type = task
    if section.lora_target_modules == ["all-linear"]:
        config.target_modules = "all-linear"  # peft's shorthand, known only as a string
    config.trainable_token_indices = new_tokens or None
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
    try:
        model = peft.get_peft_model(model, config)
    except ValueError as error:  # it knows no default targets for this architecture, or none of those named
        raise ModelError(f"model.use_peft: {error} Set model.lora_target_modules, e.g. all-linear.") from error
    trained, total = model.get_nb_trainable_parameters()
    logger.info("LoRA: %d of %d parameters are trained", trained, total)
    return model


@contextlib.contextmanager
def whole(*weights):
    """Within it, weights that ZeRO-3 has cut up are whole; what the first process makes of them all processes get."""
    if not any(hasattr(weight, "ds_id") for weight in weights):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(weights), modifier_rank=0):
        yield


def vocabulary(model) -> int:
    """The number of token ids that a model knows, also where ZeRO-3 has left its embeddings without a shape."""
    weight = model.get_input_embeddings().weight
    return getattr(weight, "ds_shape", weight.shape)[0]


def _special(tokenizer) -> dict:
    if tokenizer is None:
        return {}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "cls", "sep")}
    known = {k: v for k, v in ids.items() if v is not None and k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"vocab_size": len(tokenizer), **known}


def context_length(model, asked: int | None = None) -> int:
    """Longest sequence in tokens: what the model's positions allow, or less where asked; raises when asked for more."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    # RoBERTa and its kin count positions from the padding id + 1.
    if limit and config.model_type in ("roberta", "xlm-roberta", "camembert", "longformer"):
        limit -= (config.pad_token_id or 0) + 1
    if asked is None:
        return min(limit or 1024, 1024)
    if limit and asked > limit:
        raise ModelError(f"args.max_length {asked} is more than the model's {limit} positions; use {limit} or less")
    return asked
