"""Tokenizers and models in and out: from a config, a folder or a hub id, and never with silently random parts.

Architectures differ in where positions begin, what is tied, what a head is called; here and in `chat_template.py` and
`packed_attention.py` that is found out from the model at hand, never from its name. tests/test_families.py runs each
family.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import re
from pathlib import Path

import peft
import torch
import transformers
from accelerate import PartialState
from safetensors.torch import load_file
from torch.nn import Embedding, Linear
from transformers import AutoConfig, AutoTokenizer
from transformers.pytorch_utils import Conv1D
from trl import get_quantization_config

from pipelines import files, launch
from pipelines.errors import ModelError

logger = logging.getLogger(__name__)


def native_bf16(device: str) -> bool:
    """Whether devices of this kind compute in bfloat16 themselves here; others emulate it, slowly."""

    if device == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def described(model) -> str:
    """In words, the type of a loaded model's weights and what computes its attention, as it really is."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    attention = getattr(model.config.get_text_config(), "_attn_implementation", None) or "of its own"
    return f"{str(model.dtype).removeprefix('torch.')} weights, attention {attention.removeprefix('packed_')}"


def load_tokenizer(section):
    """The tokenizer of a `model:` section: its own folder, or the model's."""

    path = section.tokenizer_name_or_path or section.model_name_or_path
    if not (Path(path) / "tokenizer_config.json").is_file():
        path = adapter_base(path) or path  # an adapter without a tokenizer has its base's
    # model_revision pins the model's own repository; a tokenizer from elsewhere has other revisions
    revision = "main" if section.tokenizer_name_or_path else section.model_revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=section.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"no tokenizer in {path!r} ({_first_line(error)}). {_remedy(error)} Or set model.tokenizer_name_or_path to "
            "a folder or hub id that has one."
        ) from error
    # A v4-era folder opened wrongly yields a vocabulary of one or two tokens, without a word.
    if len(tokenizer) < 10:
        raise ModelError(f"the tokenizer in {path!r} has only {len(tokenizer)} tokens: its vocabulary was not read")
    # Two warnings about what is right here: texts are measured before they are cut, dropped or packed, and spaces are
    # not cleaned up after a BPE in any case.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    if type(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)).__name__ == "BPE":
        tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def load_model(section, auto_class: str, tokenizer=None, *, new_head: bool = False, **settings):
    """The model of a `model:` section as `transformers.<auto_class>`, float32 unless `dtype` says otherwise.

    With `section.config` alone a new model is built, its vocabulary and special tokens taken from `tokenizer`; beside
    a path, a config without `model_type` changes values of the loaded one, and one with it is not used (and logged),
    so that a public base model can be swapped into a recipe for a new one by a single override.
    `settings` are config values (num_labels=1, …). Weights missing in the checkpoint raise `ModelError`; with
    `new_head` those outside the backbone and its pooler may be missing, for this stage to train. Their names are left
    in `model.new_weights`. With `load_in_4bit` or `load_in_8bit` the backbone is quantized, and
    `model.full_precision()` loads the same model unquantized (see `merge`).
    """

    auto = getattr(transformers, auto_class)
    overrides = dict(section.config or {})
    dtype = section.dtype if section.dtype in (None, "auto") else getattr(torch, section.dtype)
    attention = _attention(section)
    if section.model_name_or_path is None:
        special = _special(tokenizer)
        if overrides.get("vocab_size", 0) >= special.get("vocab_size", 0):  # padded to a rounder number, for speed
            special.pop("vocab_size", None)
        for key in special.keys() & overrides.keys():
            if special[key] != overrides[key]:
                raise ModelError(
                    f"model.config.{key} is {overrides[key]}, but the tokenizer's is {special[key]}. Leave it out: it "
                    "is "
                    "taken from the tokenizer."
                )
        kind = overrides.pop("model_type")
        config = transformers.AutoConfig.for_model(kind, **{**_absent(kind, special), **overrides, **special})
        for key, value in settings.items():
            setattr(config, key, value)
        try:
            return auto.from_config(config, dtype=torch.float32 if dtype in (None, "auto") else dtype, **attention)
        except (ValueError, ImportError) as error:
            raise ModelError(f"model.config: {_first_line(error)}") from error
    files.refuse_edited(section.model_name_or_path, quick=True)  # the chain, chat and evaluate have read every byte
    if "model_type" in overrides:
        logger.warning("model.config describes a new model and is not used: %s is", section.model_name_or_path)
        overrides = {}
    if adapter_base(section.model_name_or_path):
        return _base_with_adapter(
            dataclasses.replace(section, config=overrides), auto_class, tokenizer, new_head, settings
        )
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # missing weights are this function's own business, below
    where = {"revision": section.model_revision, "trust_remote_code": section.trust_remote_code}
    try:
        quantized = _quantization(section, auto, where)
        model, info = auto.from_pretrained(
            section.model_name_or_path,
            dtype=dtype or torch.float32,
            output_loading_info=True,
            use_safetensors=True,
            **where,
            **quantized,
            **overrides,
            **settings,
            **attention,
        )
    except ModelError:
        raise
    except (OSError, ImportError, ValueError) as error:
        raise ModelError(
            f"{section.model_name_or_path!r} cannot be loaded ({_first_line(error)}). {_remedy(error)}"
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    new = sorted({*info["missing_keys"], *(k for k, *_ in info.get("mismatched_keys", ()))})
    random = [key for key in new if not (new_head and _in_head(model, key))]
    if random:
        raise ModelError(
            f"{section.model_name_or_path!r} lacks weights that {auto_class} needs, they would be random: "
            f"{', '.join(random[:6])}{' …' if len(random) > 6 else ''}. Use a model of this kind"
            + (" (a finished reward stage, for a reward model)." if "score.weight" in random else ".")
        )
    if new:
        logger.info("new weights to be trained: %s", ", ".join(new))
    model.new_weights = new
    _materialize(model)
    # Loading for ZeRO-3 notes old names (LayerNorm.gamma) although none was met; the model would be saved under them.
    model._weight_conversions = [c for c in getattr(model, "_weight_conversions", None) or () if c.was_used()]
    if quantized:
        for module in model.modules():  # on a CPU it would repack the weights in place, and lossily, at each evaluation
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        whole = dataclasses.replace(section, load_in_4bit=False, load_in_8bit=False)
        model.full_precision = functools.partial(
            load_model, whole, auto_class, tokenizer, new_head=new_head, **settings
        )
    return model


def adapter_base(path: str) -> str | None:
    """The model that the adapter in the folder `path` was trained on; None where the folder holds no adapter alone."""
    file = Path(path) / "adapter_config.json"
    if not file.is_file():
        return None
    base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{file}: it does not name the model that the adapter belongs to (base_model_name_or_path)")
    if base.startswith(files.HERE):
        raise ModelError(
            f"{file}: the adapter was trained on the folder {base}, whose place is not published: set "
            "base_model_name_or_path to where it lies here, or use the merged model beside the adapter"
        )
    return os.path.normpath(Path(path) / base) if base.startswith("../") else base


def config_of(path: str, revision: str = "main", trust_remote_code: bool = False):
    """The config of a model (of an adapter: of its base); raises `ModelError` where it cannot be read."""
    try:
        return AutoConfig.from_pretrained(
            adapter_base(path) or path, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"{path!r} cannot be loaded ({_first_line(error)}). {_remedy(error)}") from error


def _base_with_adapter(section, auto_class: str, tokenizer, new_head: bool, settings: dict):
    """The model of a folder that holds a PEFT adapter alone: its base, with the adapter merged into it."""
    folder = section.model_name_or_path
    if section.load_in_4bit or section.load_in_8bit or launch.sharded():
        raise ModelError(
            f"{folder} is an adapter, which is merged into its base at full precision on one device: merge it once "
            "without shards and load_in_4bit (peft's merge_and_unload, then save_pretrained) and name the merged folder"
        )
    config = peft.PeftConfig.from_pretrained(folder)
    if config.is_prompt_learning:
        raise ModelError(
            f"{folder} is a {config.peft_type.value} adapter, which no weights can be merged with: use LoRA"
        )
    base = dataclasses.replace(
        section, model_name_or_path=adapter_base(folder), model_revision=config.revision or "main"
    )
    model = load_model(base, auto_class, tokenizer, new_head=True, **settings)
    weights = load_file(Path(folder) / "adapter_model.safetensors")
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    given = [len(weight) for name, weight in weights.items() if name.endswith(f"{embedding}.weight")]
    rows = config.trainable_token_indices or []
    rows = [row for part in (rows.values() if isinstance(rows, dict) else [rows]) for row in part]
    wanted = max([*given, *(row + 1 for row in rows)], default=0)  # tokens that were added for the adapter
    if wanted > vocabulary(model):
        model.resize_token_embeddings(wanted)
    config.inference_mode, config.task_type = True, None  # peft's classes for tasks refuse models of another one
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
    new = model.new_weights
    try:
        adapted = peft.PeftModel(model, config)
        known = peft.get_peft_model_state_dict(adapted, save_embedding_layers=bool(given)).keys()
        if strange := sorted(weights.keys() - known) or sorted(known - weights.keys()):
            raise ModelError(
                f"{folder}: the adapter does not fit {auto_class} of {base.model_name_or_path}: "
                f"{', '.join(strange[:3])}"
            )
        peft.set_peft_model_state_dict(adapted, weights)
        model = adapted.merge_and_unload()
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"{folder}: the adapter does not fit its base ({_first_line(error)})") from error
    brought = {name.removeprefix("base_model.model.") for name in weights}
    model.new_weights = [name for name in new if name not in brought]
    if model.new_weights and not new_head:
        raise ModelError(
            f"{folder}: neither the adapter nor its base has weights that {auto_class} needs, they would be random: "
            f"{', '.join(model.new_weights[:6])}"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    logger.info("the adapter in %s is merged into its base %s", folder, base.model_name_or_path)
    return model


def _materialize(model) -> None:
    """Give memory to new weights, which transformers leaves without where FSDP will take them from the first process.

    Accelerate tells weights apart by their address: those without would all be one.
    """

    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.device.type == "meta":
                module._parameters[name] = torch.nn.Parameter(torch.zeros_like(weight, device="cpu"))


def _attention(section) -> dict:
    """Keywords for the attention that is asked for. What only GPUs train with is left out on a CPU, and logged."""

    name = section.attn_implementation
    if name and re.search("flash|flex", name) and PartialState().device.type == "cpu":
        logger.warning(
            "model.attn_implementation: training with %s needs a GPU; on this CPU: the model's default", name
        )
        return {}
    return {"attn_implementation": name} if name else {}


def _in_head(model, key: str) -> bool:
    """Whether a weight lies outside the backbone, or in the pooler between backbone and head."""
    prefix = model.base_model_prefix + "."
    return model.base_model is not model and (not key.startswith(prefix) or ".pooler." in key)


def heads(model) -> list[str]:
    """Names of the modules with weights beside the backbone: `score`, `classifier`, `lm_head` …"""
    children = model.named_children() if model.base_model is not model else ()
    return [name for name, child in children if child is not model.base_model and any(True for _ in child.parameters())]


def last_layer(model):
    """The linear layer that gives the scores of a sequence classifier, whatever its architecture calls it."""

    return [m for name in heads(model) for m in model.get_submodule(name).modules() if isinstance(m, Linear)][-1]


def _quantization(section, auto, where: dict) -> dict:
    """Keywords for `from_pretrained`; empty where nothing is to be quantized.

    Embeddings and heads stay as they are: they are trained, or too small or too sensitive to be worth it.
    """

    if not (section.load_in_4bit or section.load_in_8bit):
        return {}
    if not section.use_peft:
        raise ModelError("model.load_in_4bit and load_in_8bit: quantized weights cannot be trained; set use_peft: true")
    if launch.sharded():
        raise ModelError(
            "model.load_in_4bit and load_in_8bit: quantized weights are not cut into shards here. Use plain data "
            "parallelism (ddp.yaml), where each process holds all of them, or LoRA without quantization on shards"
        )
    gpu = torch.cuda.is_available()
    if section.dtype in (None, "auto"):  # what 4-bit weights are multiplied in
        section = dataclasses.replace(section, dtype="bfloat16" if gpu and native_bf16("cuda") else "float32")
    config = get_quantization_config(section)
    with torch.device("meta"):  # no weights: only to see which modules it has
        plain = auto.from_config(AutoConfig.from_pretrained(section.model_name_or_path, **where))
    config.llm_int8_skip_modules = [*heads(plain), "pooler"]
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device() if gpu else "cpu"}}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _remedy(error: Exception) -> str:
    """What to do about a model or tokenizer that cannot be loaded."""
    if isinstance(error, ImportError):
        return "Install what it names, or choose another model or attn_implementation."
    if "trust_remote_code" in str(error):
        return (
            "It brings its own Python code: read that, then set model.trust_remote_code: true (and pin model_revision)."
        )
    if "gated" in str(error).lower() or "401" in str(error):
        return (
            "The model is gated or private: ask for access on its page at huggingface.co, then run `hf auth login` (or "
            "set HF_TOKEN) with a token of that account."
        )
    return (
        "A local path must hold a model (config.json, *.safetensors); a hub id needs network access (unset "
        "HF_HUB_OFFLINE) or the hub's cache: `hf download ID` on a machine with network, then copy the folder."
    )


def vocabulary(model) -> int:
    """The number of token ids that a model knows, also where ZeRO-3 has left its embeddings without a shape."""
    weight = model.get_input_embeddings().weight
    return getattr(weight, "ds_shape", weight.shape)[0]


def _absent(kind: str, special: dict) -> dict:
    """None for special tokens that a new model's tokenizer lacks and whose default is another, larger vocabulary's."""
    if "vocab_size" not in special or kind not in transformers.CONFIG_MAPPING:
        return {}
    usual = transformers.CONFIG_MAPPING[kind]()
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: None for name in names if (getattr(usual, name, None) or 0) >= special["vocab_size"]}


def _special(tokenizer) -> dict:
    if tokenizer is None:
        return {}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "cls", "sep")}
    known = {k: v for k, v in ids.items() if v is not None and k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"vocab_size": len(tokenizer), **known}


def positions(model) -> int | None:
    """The most tokens that a model reads; None where nothing bounds them (relative positions, recurrence)."""

    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if limit is not None and limit < 1:  # XLNet says -1
        return None
    # RoBERTa and its kin count positions from the padding id + 1, which they tell by their table's padding row.
    tables = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
    offset = max(
        (t.padding_idx + 1 for t in tables if isinstance(t, Embedding) and t.padding_idx is not None), default=0
    )
    return limit and limit - offset


def context_length(model, asked: int | None = None) -> int:
    """Longest sequence in tokens: what the model's positions allow, or less where asked; raises when asked for more."""
    limit = positions(model)
    if asked is None:
        return min(limit or 1024, 1024)
    if limit and asked > limit:
        raise ModelError(f"args.max_length {asked} is more than the model's {limit} positions; use {limit} or less")
    return asked
