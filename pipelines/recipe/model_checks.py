"""What can be wrong with the models that a recipe names or describes, found without loading any weights."""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import torch
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import modeling_auto

from pipelines import files, ranges
from pipelines.errors import ModelError, SetupError, meant
from pipelines.kinds import CLASSIFIER, KINDS, LANGUAGE_MODEL, of_kind
from pipelines.models import hub
from pipelines.models.config import ModelSection
from pipelines.models.loading import adapter_base, config_of, load_tokenizer
from pipelines.ppo.config import has_critic
from pipelines.recipe import schema
from pipelines.recipe.stage import Stage, resolve

Found = Iterator[tuple[str, str, object]]  # (key path below the stage, what is wrong, value)
HUB_ID = r"(?=.{1,96}$)[A-Za-z0-9_][\w.-]*(/[\w.-]+)?"
TEMPLATES = ("chatml", "plain")  # chat templates that are there by name; any other is a path
LORA = ("use_peft", "lora_", "use_rslora", "use_dora", "load_in_4bit", "load_in_8bit")  # quantized only under adapters
BITS4 = ("bnb_", "use_bnb_")
MAPPINGS = {  # which architectures a class loads
    LANGUAGE_MODEL: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    CLASSIFIER: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


def problems(stage: Stage, kinds: dict[str, str]) -> Found:
    """What is wrong with the `model:` section and what it names."""
    model, spec = stage.sections.get("model", {}), stage.spec
    path, config, template = (model.get(key) for key in ("model_name_or_path", "config", "chat_template"))
    if path is None and config is None:
        message = "needs `model_name_or_path` (a hub id, a folder or stage:NAME) or, for a new model, `config`"
        yield "model", message, None
    if template is not None and template not in TEMPLATES and not os.path.isfile(resolve(template, Path())):
        message = f"is neither {' nor '.join(TEMPLATES)} nor a file{meant(template, TEMPLATES)}"
        yield "model.chat_template", f"{message}; paths count from where the command is given", template
    yield from _adapter_keys(stage.kind, model)
    yield from _installed(model, stage.sections.get("args", {}))
    if path is not None:
        yield from of_model(stage, kinds, "model.model_name_or_path", path, spec.auto_class)
    tokenizer = model.get("tokenizer_name_or_path")
    if tokenizer is not None:
        yield from _tokenizer(stage, kinds, "model.tokenizer_name_or_path", tokenizer)
    if isinstance(config, dict) and path is None:
        yield from _new_model(stage, dict(config))
    elif isinstance(config, dict) and "model_type" not in config:
        yield from ((f"model.config.{key}", text, value) for key, text, value in _numbers(config, {}))
    yield from _fits_base(stage)
    yield from _ready(stage)


def of_model(
    stage: Stage, kinds: dict[str, str], key: str, path: str, auto_class: str, finished: bool = False
) -> Found:
    """What is wrong with the model at `path`, which is to be loaded as transformers' `auto_class`.

    `finished`: it is used as it is, so that a classifier must have its head.
    """
    if path.startswith("stage:"):
        kind = kinds.get(path.removeprefix("stage:").split("/")[0])
        if kind in KINDS and not KINDS[kind].leaves_model:
            yield key, f"that stage is of kind {kind} and leaves no model", path
        elif path.endswith("/critic"):
            earlier = stage.earlier.get(path.removeprefix("stage:").split("/")[0])
            if earlier is not None and not leaves_critic(earlier):
                yield key, "that stage leaves no critic", path
        elif kind in KINDS and (wrong := _other_kind(kind, auto_class, finished)):
            yield key, wrong, path
        return
    folder = Path(resolve(path, Path()))
    if not path.strip():
        yield (
            key,
            "must name a model: a hub id, a folder or stage:NAME (the folder where the command is given: .)",
            path,
        )
        return
    if not os.path.isdir(folder):
        if path.startswith(("/", ".", "~")) or not re.fullmatch(HUB_ID, path):
            file = os.path.isfile(folder)
            what = "is a file, not the folder of a model" if file else "no such folder, and not a hub id"
            yield key, what + ("" if file else " (name or owner/name) either"), path
        return
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        yield key, "this folder holds no model (no config.json)", path
    elif (folder / "adapter_config.json").is_file():
        yield from _adapter_folder(stage, kinds, key, path, auto_class)
    else:
        yield from ((key, message, path) for message in _wrong_config(folder, auto_class, finished))


def leaves_critic(stage: Stage) -> bool:
    """Whether the stage leaves a critic that is a model of its own, as far as its recipe tells."""
    args, reward = stage.sections.get("args", {}), stage.sections.get("reward", {})
    return stage.kind == "ppo" and has_critic(args.get("advantage")) and reward.get("critic") != "shared"


def _adapter_folder(stage: Stage, kinds: dict[str, str], key: str, path: str, auto_class: str) -> Found:
    """What is wrong with a folder that holds an adapter alone: it is merged into its base, which must be at hand."""
    try:
        base = adapter_base(str(Path(resolve(path, Path()))))
    except (ModelError, OSError, ValueError) as error:
        yield key, str(error), path
        return
    for _, message, _ in of_model(stage, kinds, key, base, auto_class):
        yield key, f"is an adapter on {base}, and there: {message}", path


def named_models(
    stage: Stage, kinds: dict[str, str], at: str, models: list[str] | str, able: tuple[str, ...], what: str
) -> Found:
    """What is wrong with finished models that a section names: each must be as a stage of one of the kinds `able`
    leaves it.
    """
    if isinstance(models, list) and len(set(models)) < len(models):
        yield at, "names a model twice", models
    for i, name in enumerate([models] if isinstance(models, str) else models):
        key = at if isinstance(models, str) else f"{at}[{i}]"
        kind = kinds.get(name.removeprefix("stage:")) if name.startswith("stage:") else None
        if kind in KINDS and kind not in able:
            yield key, f"must be a {what} ({', '.join(able)}), this stage is of kind {kind}", name
        elif not name.startswith("stage:"):
            made = files.kind_of(resolve(name, Path()))  # only a record tells what dpo made from any language model
            usable = [made] if made in able else [kind for kind in able if not KINDS[kind].implicit_reward]
            classes = dict.fromkeys(KINDS[kind].auto_class for kind in usable)
            found = [list(of_model(stage, kinds, key, name, auto_class, finished=True)) for auto_class in classes]
            yield from min(found, key=len)  # none is wrong where one of the classes fits


def _other_kind(kind: str, auto_class: str, finished: bool) -> str | None:
    """Why what a stage of this kind leaves cannot be loaded as `auto_class`."""
    theirs = KINDS[kind].auto_class
    if theirs == auto_class or (not finished and theirs != "AutoModelForSeq2SeqLM" and auto_class == CLASSIFIER):
        return None
    if not finished and auto_class == "AutoModelForMaskedLM" and theirs == CLASSIFIER:
        return None
    able = ", ".join(of_kind(auto_class=auto_class))
    return f"that stage is of kind {kind}, whose model cannot be used here: take one of kind {able}"


def _wrong_config(folder: Path, auto_class: str, finished: bool) -> Iterator[str]:
    """Why the model in a folder cannot be loaded as `auto_class`, as far as its config.json tells."""
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type, names = raw.get("model_type"), raw.get("architectures") or []
        own_code = "auto_map" in raw
    except (OSError, ValueError, AttributeError) as error:
        yield f"its config.json cannot be read: {error}"
        return
    if own_code:  # trust_remote_code decides, when it is loaded
        return
    mapping = MAPPINGS[auto_class]
    if model_type not in transformers.CONFIG_MAPPING:
        yield f"transformers knows no model_type {model_type!r}, which its config.json names"
    elif model_type not in mapping:
        yield f"is a {model_type} model, which cannot be loaded as {auto_class}: take a model of that kind"
    elif _only_encodes(raw, model_type) and auto_class == LANGUAGE_MODEL:
        yield f"is a {model_type} encoder, which does not write text: take a causal language model"
    elif names and auto_class != CLASSIFIER and all("Classification" in name for name in names):
        yield f"is a classifier ({names[0]}): take a model with a head for language"
    elif finished and auto_class == CLASSIFIER and not any("Classification" in name for name in names):
        yield f"is no classifier or reward model ({', '.join(names)}): its score head would be random"


def _only_encodes(config: dict, model_type: str) -> bool:
    """Whether a model reads both ways, although transformers has a class that loads it as a causal one."""
    both = model_type in MAPPINGS[LANGUAGE_MODEL] and model_type in MAPPINGS["AutoModelForMaskedLM"]
    return both and not (config.get("is_decoder") or config.get("causal") or model_type in ("xlnet", "reformer"))


def _tokenizer(stage: Stage, kinds: dict[str, str], key: str, path: str) -> Found:
    """What is wrong with the folder of a tokenizer."""
    if path.startswith("stage:"):
        kind = kinds.get(path.removeprefix("stage:").split("/")[0])
        if kind in KINDS and not KINDS[kind].leaves_model:
            yield key, f"that stage is of kind {kind} and leaves no tokenizer", path
        return
    folder = Path(resolve(path, Path()))
    if os.path.isdir(folder) and path.strip():
        files = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model")
        if not any((folder / name).is_file() for name in files):
            yield key, "this folder holds no tokenizer (no tokenizer.json)", path
    elif path.startswith(("/", ".", "~")) or not re.fullmatch(HUB_ID, path):
        yield key, "no such folder, and not a hub id (name or owner/name) either", path


@functools.cache
def _tokenizer_at(path: str):
    """The tokenizer in a folder; raises `ModelError`."""
    return load_tokenizer(ModelSection(model_name_or_path=path))


def _ready(stage: Stage) -> Found:
    """What is wrong with a tokenizer that is at hand, and with the chat template that it gets."""
    model, ready = stage.sections.get("model", {}), getattr(stage.module, "ready", None)
    key = "tokenizer_name_or_path" if model.get("tokenizer_name_or_path") else "model_name_or_path"
    path = resolve(model.get(key) or "stage:", Path())
    template = resolve(model.get("chat_template"), Path())
    if template and template not in TEMPLATES:
        if not os.path.isfile(template):
            return  # reported already
        try:
            jinja2.Environment().parse(Path(template).read_text(encoding="utf-8"))
        except (jinja2.TemplateError, OSError, UnicodeDecodeError) as error:
            yield "model.chat_template", f"is no Jinja template: {error}", model["chat_template"]
            return
    if (model.get(key) or "stage:").startswith("stage:") or not os.path.isdir(path) or model.get("trust_remote_code"):
        return
    try:
        tokenizer = copy.deepcopy(_tokenizer_at(path))
    except ModelError as error:
        yield f"model.{key}", str(error), None
        return
    if ready and not (model.get("load_in_4bit") and model.get("load_in_8bit")):
        try:
            ready(stage, tokenizer)
        except (SetupError, jinja2.TemplateError) as error:
            yield "model.chat_template", str(error), model.get("chat_template")


def _adapter_keys(kind: str, model: dict) -> Found:
    """Keys of adapters that would be ignored, or exclude each other."""
    for key, value in model.items():
        if key.startswith((*LORA, *BITS4)) and not KINDS[kind].adapters:
            message = f"adapters are for {', '.join(of_kind(adapters=True))}; this stage trains all weights"
            yield f"model.{key}", message, value
        elif key.startswith(LORA) and not model.get("use_peft"):
            yield f"model.{key}", "is used only with `use_peft: true`", value
        elif key.startswith(BITS4) and not model.get("load_in_4bit"):
            yield f"model.{key}", "is used only with `load_in_4bit: true`", value
    if model.get("load_in_4bit") and model.get("load_in_8bit"):
        yield "model.load_in_8bit", "and load_in_4bit cannot both be true: keep one", True


def _new_model(stage: Stage, config: dict) -> Found:
    """What is wrong with the config of a new model: unknown keys, numbers, shapes that do not fit."""
    architecture = config.pop("model_type", None)
    if architecture is None:
        yield "model.config.model_type", "a new model needs `model_type`, e.g. gpt2, llama, bert, t5", None
        return
    keys, types = schema.model_config_keys(str(architecture))
    if not keys:
        message = f"transformers knows no such model{meant(architecture, types)}"
        yield "model.config.model_type", message, architecture
        return
    mapping = MAPPINGS[stage.spec.auto_class]
    if architecture not in mapping:
        message = f"a {architecture} model has no {stage.spec.auto_class}, which {stage.kind} trains"
        yield "model.config.model_type", f"{message}; usual are {_usual(mapping)}", architecture
        return
    if stage.spec.auto_class == LANGUAGE_MODEL and _only_encodes(config, architecture):
        message = f"is an encoder, which does not write text; usual are {_usual(mapping)} (kind mlm trains encoders)"
        yield "model.config.model_type", message, architecture
        return
    wrong = [
        (key, f"unknown key of {architecture}'s config{meant(key, keys)}", config[key]) for key in config.keys() - keys
    ]
    defaults = transformers.CONFIG_MAPPING[architecture]().to_dict()
    wrong += _numbers(config, defaults)
    yield from ((f"model.config.{key}", message, value) for key, message, value in wrong)
    if not wrong:
        try:
            build(architecture, json.dumps(_with_vocabulary(stage, config)), stage.spec.auto_class)
        except SetupError as error:
            named = [key for key in config if key in str(error)]
            at = f"model.config.{named[0]}" if named else "model.config"
            yield at, str(error), config[named[0]] if named else None


def _usual(mapping) -> str:
    return ", ".join(name for name in ("gpt2", "llama", "qwen3", "bert", "roberta", "t5", "bart") if name in mapping)


def _with_vocabulary(stage: Stage, config: dict) -> dict:
    """`config` with the vocabulary that a tokenizer trained here will have at most."""
    words = stage.sections.get("tokenizer", {})
    return {"vocab_size": words.get("vocab_size", 8192), **config} if words.get("train") else config


def _numbers(config: dict, defaults: dict) -> list[tuple[str, str, object]]:
    """Numbers of a model's config that no model can have; what is the default of its class is right."""
    own = {key: value for key, value in config.items() if key not in defaults or defaults[key] != value}
    return list(ranges.problems(own, table=ranges.of_config))


@functools.cache
def build(architecture: str, config: str, auto_class: str) -> None:
    """Build a new model without memory and run a few tokens through it; raises `SetupError` where shapes do not fit.

    `config` is JSON, so that stages with the same model build it once.
    """
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with torch.device("meta"), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings = transformers.AutoConfig.for_model(architecture, **json.loads(config))
            model = getattr(transformers, auto_class).from_config(settings, attn_implementation="eager").eval()
            ids = torch.zeros((1, 4), dtype=torch.long)
            both = "decoder_input_ids" in inspect.signature(model.forward).parameters
    except Exception as error:  # whatever a config or a constructor raises for values that do not fit
        raise SetupError(f"no such {architecture} model can be built: {_reason(error)}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    try:
        with torch.device("meta"), torch.no_grad():
            model(input_ids=ids, **({"decoder_input_ids": ids} if both else {}))
    except Exception as error:  # without values not every model can run: only what tells of shapes counts
        if re.search(r"shape|size|dimension|broadcast", str(error)):
            raise SetupError(f"no such {architecture} model can run: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What an exception says, in one line; of one that transformers wraps, the cause."""
    return " ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__


def base_config(stage: Stage, path: str | None = None):
    """The config of the model at `path` (default: that the stage starts from), None where it cannot be known here."""
    model = stage.sections.get("model", {})
    config, path = dict(model.get("config") or {}), path or model.get("model_name_or_path")
    try:
        if path is None:
            return transformers.AutoConfig.for_model(config.pop("model_type"), **config)
        if path.startswith("stage:"):
            earlier = stage.earlier.get(path.removeprefix("stage:").split("/")[0])
            return base_config(earlier) if earlier and "/" not in path else None
        folder = resolve(path, Path())
        return config_of(folder) if os.path.isdir(folder) or hub.cached(path) else None
    except Exception:  # reported where the model itself is checked
        return None


def _fits_base(stage: Stage) -> Found:
    """Lengths and keys that the model which the stage starts from cannot have."""
    config, args, model = base_config(stage), stage.sections.get("args", {}), stage.sections.get("model", {})
    if config is None:
        return
    changes = (
        model.get("config")
        if model.get("model_name_or_path") and "model_type" not in (model.get("config") or {})
        else {}
    )
    known, _ = schema.model_config_keys(config.model_type)
    for key in (changes or {}).keys() - known:
        yield f"model.config.{key}", f"unknown key of {config.model_type}'s config{meant(key, known)}", changes[key]
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if config.is_encoder_decoder:  # T5's n_positions is no limit: its positions are relative
        limit = getattr(config, "max_position_embeddings", None)
    for key in ("max_length", "ptx_length", "max_source_length", "max_target_length", "response_length"):
        longest = limit and (limit - 1 if key == "response_length" else limit)
        if longest and (args.get(key) or 0) > longest:
            yield f"args.{key}", f"is more than the model's {limit} positions; use {longest} or less", args[key]


BNB = "pip install -e '.[quantization]'"
OPTIMIZERS = (  # names of optimizers, the module that they need and where it comes from; the others need none
    ("torch_(8|4)bit", "torchao", "pip install torchao"),
    ("galore", "galore_torch", "pip install git+https://github.com/jiaweizzhao/GaLore"),
    ("lomo", "lomo_optim", "pip install lomo-optim"),
    ("grokadamw", "grokadamw", "pip install grokadamw"),
    ("schedule_free", "schedulefree", "pip install schedulefree"),
    ("apollo", "apollo_torch", "pip install git+https://github.com/zhuhanqing/APOLLO"),
    ("stable_adamw", "optimi", "pip install torch-optimi"),
    ("anyprecision", "torchdistx", "take adamw_torch_fused"),
    ("xla", "torch_xla", "it is for TPUs"),
    ("npu", "torch_npu", "it is for Ascend NPUs"),
    ("bnb|8bit|paged|lion|ademamix", "bitsandbytes", BNB),
)


def _installed(model: dict, args: dict) -> Found:
    """What a setting needs must be installed: found out here, not after the stages before it have run."""
    installed = importlib.util.find_spec
    quantized = next((key for key in ("load_in_4bit", "load_in_8bit") if model.get(key)), None)
    if quantized and not installed("bitsandbytes"):
        yield f"model.{quantized}", f"needs bitsandbytes: {BNB}", True
    optimizer = str(args.get("optim", ""))
    needed = next(((m, how) for pattern, m, how in OPTIMIZERS if re.search(pattern, optimizer)), None)
    if needed and not installed(needed[0]):
        yield "args.optim", f"needs {needed[0]}: {needed[1]}", optimizer
    attention = model.get("attn_implementation") or ""
    package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(attention)
    if "/" in attention:  # `kernels` downloads attention from the hub, flash attention too
        package = "kernels"
    elif attention and attention not in ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()):
        known = ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys())
        yield "model.attn_implementation", f"must be one of {', '.join(known)}{meant(attention, known)}", attention
    if package and not installed(package) and not installed("kernels"):
        message = f"needs the package {package}; drop the key (packed batches need no flash attention)"
        yield "model.attn_implementation", message, attention
    if args.get("use_liger_kernel") and not installed("liger_kernel"):
        message = "needs the package liger-kernel; drop the key (the loss is fused without it)"
        yield "args.use_liger_kernel", message, True


def _named(stage: Stage) -> list[tuple[str, str, str]]:
    """`(key path, hub id or folder, file that must be there)` of all models that a stage names but for earlier
    stages.
    """
    sections = stage.sections
    model, reward, evaluate = (sections.get(name, {}) for name in ("model", "reward", "evaluate"))
    named = [("model.model_name_or_path", model.get("model_name_or_path"), "config.json")]
    named += [("model.tokenizer_name_or_path", model.get("tokenizer_name_or_path"), "tokenizer_config.json")]
    for section, key in (("reward", "models"), ("sample", "models"), ("evaluate", "models")):
        paths = sections.get(section, {}).get(key) or []
        named += [(f"{section}.{key}[{i}]", path, "config.json") for i, path in enumerate(paths)]
    critic = reward.get("critic")
    named += [("reward.critic", None if critic in ("shared", "none") else critic, "config.json")]
    scored = [(key, evaluate.get(key) or "") for key in ("judge", "oracle")]
    named += [(f"evaluate.{key}", None if ":" in judge else judge, "config.json") for key, judge in scored]
    named += [(at, model_of(judge), "config.json") for at, judge in judges(stage)]
    return [(key, path, file) for key, path, file in named if path and not path.startswith("stage:")]


def judges(stage: Stage) -> list[tuple[str, Any]]:
    """`(key path, judge as in the recipe)` of each judge of a rank stage."""
    given = stage.sections.get("rank", {}).get("judge")
    many = isinstance(given, list)
    items = given if isinstance(given, list) else [] if given is None else [given]
    return [(f"rank.judge[{i}]" if many else "rank.judge", judge) for i, judge in enumerate(items)]


def model_of(judge) -> str | None:
    """The model that a judge loads here; None for one behind an endpoint, and for what is no judge."""
    model = judge.get("model") if isinstance(judge, dict) and not judge.get("endpoint") else judge
    return model if isinstance(model, str) else None


def hub_ids(stage: Stage) -> list[tuple[str, str, str, str]]:
    """`(key path, id, revision, file that must be there)` of all models of a stage that are looked for on the hub."""
    found = []
    for key, path, file in _named(stage):
        if re.fullmatch(HUB_ID, path) and not os.path.isdir(path):
            pinned = stage.sections.get("model", {}).get("model_revision")
            found.append((key, path, pinned if pinned and key == "model.model_name_or_path" else "main", file))
    return found


def without_weights(stage: Stage) -> Found:
    """Folders of models that hold no weights."""
    for key, path, file in _named(stage):
        folder = Path(resolve(path, Path()))
        described = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
        if file == "config.json" and described and not any((folder / name).is_file() for name in WEIGHTS):
            message = "this folder holds no weights (*.safetensors)"
            if any(folder.glob("pytorch_model*.bin")):
                message += "; pickled ones are not read: load them once with from_pretrained and save_pretrained them"
            yield key, message, path


def hub_problems(stage: Stage) -> Found:
    """Hub ids of models that are neither cached nor can be downloaded."""
    for key, path, revision, file in hub_ids(stage):
        if reason := hub.unreachable(path, revision, file):
            yield key, reason, path


def left_out(stage: Stage) -> list[str]:
    """What cannot be checked without asking the hub, one line each."""
    ids = [(key, path) for key, path, revision, file in hub_ids(stage) if not hub.cached(path, revision, file)]
    return [f"stages.{stage.name}.{key}: {path} is not in the hub's cache" for key, path in ids]
