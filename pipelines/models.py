"""Tokenizers and models in and out: from a config, a folder or a hub id, and never with silently random parts.

Architectures differ in where positions begin, what is tied, what a head is called; here and in `chat.py` and
`packing.py` that is found out from the model at hand, never from its name. tests/test_families.py runs each family.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
import re

logger = logging.getLogger(__name__)


class ModelError(ValueError):
    """A model or tokenizer that cannot be used as asked, with the fix."""


def unreachable(repo: str, revision: str = "main", file: str = "config.json") -> str | None:
    """Why the hub id `repo` cannot be loaded on this machine, with the fix; None where it can. Needs no torch, at most 3 s.

    What is in the hub's cache is not asked for. Gated and private repositories answer 401 or 403, unknown ones 401 or 404.
    """
    from urllib.parse import quote

    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(repo, file, revision=revision), str):
        return None
    elsewhere = (
        f"give a local folder, or `hf download {repo}` where there is network and copy the hub's cache (HF_HOME)"
    )
    if constants.HF_HUB_OFFLINE:
        return f"is no local folder and not in the hub's cache, and HF_HUB_OFFLINE is set: unset it, {elsewhere}"
    if _ask(constants.ENDPOINT) is None:
        return f"is no local folder and not in the hub's cache, and {constants.ENDPOINT} gives no answer: {elsewhere}"
    code, reason = _ask(f"{constants.ENDPOINT}/{repo}/resolve/{quote(revision, safe='')}/{file}") or (0, "")
    if code in (401, 403) and "gated" in reason.lower():
        return (
            f"is gated: ask for access at {constants.ENDPOINT}/{repo}, then `hf auth login` (or set HF_TOKEN) with a "
            "token of that account"
        )
    if code in (401, 403, 404):
        what = f"has no revision {revision!r}" if reason == "RevisionNotFound" else f"is no public model with a {file}"
        return f"{what} at {constants.ENDPOINT}: check the spelling; a private one needs `hf auth login` (or HF_TOKEN)"
    return None


@functools.cache
def _ask(url: str) -> tuple[int, str] | None:
    """Status and the hub's error code of a HEAD request; None where no answer comes in 1.2 s (looking a name up included)."""
    import threading
    import urllib.error
    import urllib.request

    from huggingface_hub.utils import build_hf_headers

    answer = []

    def ask():
        try:
            request = urllib.request.Request(url, method="HEAD", headers=build_hf_headers())
            with urllib.request.urlopen(request, timeout=1) as response:  # noqa: S310  the hub's own address
                answer.append((response.status, ""))
        except urllib.error.HTTPError as error:
            answer.append((error.code, error.headers.get("X-Error-Code", "")))
        except OSError:
            pass  # no network: no answer

    thread = threading.Thread(target=ask, daemon=True)  # a name server that is away blocks for longer than any timeout
    thread.start()
    thread.join(1.2)
    return answer[0] if answer else None


def native_bf16(device: str) -> bool:
    """Whether devices of this kind compute in bfloat16 themselves here; others emulate it, slowly."""
    import torch

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
    from transformers import AutoTokenizer

    path = section.tokenizer_name_or_path or section.model_name_or_path
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
    return tokenizer


def load_model(section, auto_class: str, tokenizer=None, *, new_head: bool = False, **settings):
    """The model of a `model:` section as `transformers.<auto_class>`, float32 unless `dtype` says otherwise.

    With `section.config` alone a new model is built, its vocabulary and special tokens taken from `tokenizer`; beside
    a path, a config without `model_type` changes values of the loaded one, and one with it is not used (and said so),
    so that a public base model can be swapped into a recipe for a new one by a single override.
    `settings` are config values (num_labels=1, …). Weights missing in the checkpoint raise `ModelError`; with
    `new_head` those outside the backbone and its pooler may be missing, for this stage to train. Their names are left
    in `model.new_weights`. With `load_in_4bit` or `load_in_8bit` the backbone is quantized, and
    `model.full_precision()` loads the same model unquantized (see `merge`).
    """
    import torch
    import transformers

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
                    f"model.config.{key} is {overrides[key]}, but the tokenizer's is {special[key]}. Leave it out: it is "
                    "taken from the tokenizer."
                )
        config = transformers.AutoConfig.for_model(overrides.pop("model_type"), **{**overrides, **special})
        for key, value in settings.items():
            setattr(config, key, value)
        try:
            return auto.from_config(config, dtype=torch.float32 if dtype in (None, "auto") else dtype, **attention)
        except (ValueError, ImportError) as error:
            raise ModelError(f"model.config: {_first_line(error)}") from error
    if "model_type" in overrides:
        logger.warning("model.config describes a new model and is not used: %s is", section.model_name_or_path)
        overrides = {}
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


def _materialize(model) -> None:
    """Give memory to new weights, which transformers leaves without where FSDP will take them from the first process.

    Accelerate tells weights apart by their address: those without would all be one.
    """
    import torch

    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.device.type == "meta":
                module._parameters[name] = torch.nn.Parameter(torch.zeros_like(weight, device="cpu"))


def _attention(section) -> dict:
    """Keywords for the attention that is asked for. What only GPUs train with is left out on a CPU, and said."""
    from accelerate import PartialState

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
    from torch.nn import Linear

    return [m for name in heads(model) for m in model.get_submodule(name).modules() if isinstance(m, Linear)][-1]


def _quantization(section, auto, where: dict) -> dict:
    """Keywords for `from_pretrained`; empty where nothing is to be quantized.

    Embeddings and heads stay as they are: they are trained, or too small or too sensitive to be worth it.
    """
    import torch
    from transformers import AutoConfig
    from trl import get_quantization_config

    from pipelines import launch

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
        return "It brings Python code of its own: read that, then set model.trust_remote_code: true (and pin model_revision)."
    if "gated" in str(error).lower() or "401" in str(error):
        return (
            "The model is gated or private: ask for access on its page at huggingface.co, then run `hf auth login` (or "
            "set HF_TOKEN) with a token of that account."
        )
    return (
        "A local path must hold a model (config.json, *.safetensors); a hub id needs network access (unset "
        "HF_HUB_OFFLINE) or the hub's cache: `hf download ID` on a machine with network, then copy the folder."
    )


def adapt(model, section, task: str, new_tokens: list[int] | None = None):
    """`model` with LoRA adapters where `use_peft` asks for them (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    `task` is peft's: "CAUSAL_LM", or "SEQ_CLS", which trains the head, and a pooler that is new, too. The embeddings of
    `new_tokens` are trained as well, and their rows of an output embedding that is not tied to them: adapters alone
    would leave a chat template's tokens at their initial values. On 4-bit or 8-bit weights this is QLoRA (Dettmers et
    al. 2023, https://arxiv.org/abs/2305.14314): everything that is not quantized is float32.
    """
    if not section.use_peft:
        return model
    import peft
    from transformers.pytorch_utils import Conv1D
    from trl import get_peft_config

    if new_tokens and any(hasattr(weight, "ds_id") for weight in model.parameters()):
        raise ModelError(
            f"model.use_peft: {len(new_tokens)} tokens are new, and PEFT cannot train single rows of embeddings that ZeRO-3 "
            "has cut up. Use zero2.yaml or fsdp2.yaml, model.chat_template: plain, or a model that knows its template's "
            "tokens (any finished sft stage)."
        )
    if hasattr(model, "full_precision"):
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # args decide about that
    config = get_peft_config(section)
    config.task_type = task
    if section.lora_target_modules == ["all-linear"]:
        config.target_modules = "all-linear"  # peft's shorthand, known only as a string
    if task == "SEQ_CLS":
        prefix = model.base_model_prefix + "."
        inner = {key.rpartition(".")[0] for key in getattr(model, "new_weights", []) if key.startswith(prefix)}
        whole = [*heads(model), *sorted(inner)]
        config.modules_to_save = [*(config.modules_to_save or []), *whole]
        config.exclude_modules = rf"(.*\.)?({'|'.join(map(re.escape, whole))})(\..*)?"  # trained whole, not adapted
    config.trainable_token_indices = _rows_to_train(model, new_tokens) if new_tokens else None
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
    try:
        model = peft.get_peft_model(model, config)
    except ValueError as error:  # it knows no default targets for this architecture, or none of those named
        raise ModelError(f"model.use_peft: {error} Set model.lora_target_modules, e.g. all-linear.") from error
    trained, total = model.get_nb_trainable_parameters()
    logger.info("LoRA: %d of %d parameters are trained", trained, total)
    return model


def on_base_of(policy):
    """A sequence classifier of one score on the very weights that the adapters of `policy` sit on; its head is 0 as yet.

    The layers that hold weights, with what quantization keeps beside them, are the same objects in both models; the
    modules around them are each model's own. So adapters put into one are not seen by the other, and nothing has to be
    switched: both can be run, checkpointed and trained in any order.
    """
    import torch
    import transformers

    base, kind = policy.get_base_model(), "AutoModelForSequenceClassification"
    config = copy.deepcopy(base.config)
    config.num_labels = 1
    with torch.device("meta"):  # only its shell is used
        model = getattr(transformers, kind).from_config(config, dtype=base.dtype)
    layers = [module for module in policy.modules() if next(module.children(), None) is None]
    kept = {id(x): x for x in (*layers, *policy.parameters(), *policy.buffers())}
    bare = copy.deepcopy(policy, kept | {id(base.config): model.config}).unload()
    setattr(model, model.base_model_prefix, bare.base_model)
    model.score = torch.nn.Linear(model.score.in_features, 1, bias=False, device=base.device, dtype=base.dtype)
    torch.nn.init.zeros_(model.score.weight)
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"):  # what peft asks
        setattr(model, name, getattr(base, name, False))
    if hasattr(base, "full_precision"):
        section = base.full_precision.args[0]
        model.full_precision = functools.partial(load_model, section, kind, new_head=True, num_labels=1)
    return model


def _rows_to_train(model, tokens: list[int]) -> dict[str, list[int]]:
    """Which rows of which embeddings learn these tokens: the input's, and the output's where it has its own."""
    names = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = {names[embedding]: tokens}
    if head is not None and head.weight is not embedding.weight:
        if head.bias is None:
            rows[names[head]] = tokens
        else:  # peft's layer for single rows knows no bias
            logger.warning("LoRA: the output embeddings of new tokens stay at their initial values (they have a bias)")
    return rows


def merge(model, tokenizer):
    """The plain model, on the CPU, that a model with adapters amounts to; `model` stays as it is.

    Weights of 4 or 8 bits are not merged into: rounding the sum would lose much of what was learned. Their base is
    loaded once more at full precision (so much memory is needed beside the quantized model) and merged there.
    """
    import peft
    import torch
    from transformers.pytorch_utils import Conv1D

    from pipelines import chat

    base = model.get_base_model()
    if not hasattr(base, "full_precision"):
        # A GPU that holds the training may not hold a second copy of the model.
        here = {
            id(weight): torch.nn.Parameter(weight.detach().to("cpu", copy=True), requires_grad=weight.requires_grad)
            for weight in model.parameters()
        }
        return copy.deepcopy(model, here).cpu().merge_and_unload()
    logger.info("merging into the base at full precision")
    whole = base.full_precision()
    chat.fit_model(whole, tokenizer)
    found = whole.state_dict()
    for name, value in base.state_dict().items():  # what was not quantized: the rows of new tokens, a new head's start
        name = re.sub(r"(base_layer|original_module)\.", "", name)
        if name in found and value.is_floating_point() and value.shape == found[name].shape:
            found[name].copy_(value)
    config = copy.deepcopy(model.peft_config["default"])
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in whole.modules())  # bitsandbytes has Linear
    adapted = peft.get_peft_model(whole, config)
    peft.set_peft_model_state_dict(adapted, peft.get_peft_model_state_dict(model))
    return adapted.merge_and_unload()


def structure(model):
    """A copy of a model that is not yet cut into shards (which cannot be copied), its weights without memory.

    `filled` makes it whole again on one process.
    """
    import torch

    empty = {
        id(weight): torch.nn.Parameter(
            torch.empty(getattr(weight, "ds_shape", weight.shape), dtype=weight.dtype, device="meta"),
            requires_grad=weight.requires_grad,
        )
        for weight in model.parameters()
    }
    return copy.deepcopy(model, empty)


def filled(model, weights: dict):
    """A copy of a `structure` with its `weights`, by name; those that are tied take the one under their first name."""
    import torch

    found = {
        id(empty): torch.nn.Parameter(weights[name], requires_grad=empty.requires_grad)
        for name, empty in model.named_parameters()
    }
    return copy.deepcopy(model, found)


def adapters_in_float32(model) -> None:
    """Undo TRL's cast of the adapters on quantized weights to bfloat16: Adam's small steps are lost in rounding there."""
    import torch

    if any(hasattr(module, "full_precision") for module in model.modules()):
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.float()


@contextlib.contextmanager
def whole(*weights):
    """Within it, weights that ZeRO-3 has cut up are whole; what the first process makes of them all processes get."""
    if not any(hasattr(weight, "ds_id") for weight in weights):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(weights), modifier_rank=0):
        yield


@contextlib.contextmanager
def embeddings_for_fsdp(model):
    """Within it, a model whose embeddings Accelerate's FSDP2 cannot cut up by themselves seems to have none.

    It expects them to lie beside the blocks, and their weight to be no one's but the output layer's. BERT counts them
    as a block, T5 and BART give their weight to several modules, PEFT wraps them to train some of their rows. They then
    are cut up with whatever lies outside of the blocks.
    """
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if embedding is None:
        yield
        return
    weight, blocks = embedding._parameters.get("weight"), list(getattr(model, "_no_split_modules", None) or ())
    others = [m for m in model.modules() if m is not embedding and m is not model.get_output_embeddings()]
    shared = any(weight is theirs for m in others for theirs in m._parameters.values())
    around = {type(m).__name__ for m in others if any(embedding is part for part in m.modules())}.intersection(blocks)
    if weight is not None and not shared and not around:
        yield
        return
    hidden = {
        "get_input_embeddings": lambda: None,
        "get_output_embeddings": lambda: None,
        "_no_split_modules": [name for name in blocks if name not in around],
    }
    if weight is None:  # what PEFT wraps, transformers does not find; frozen weights need not stay tied
        hidden["tie_weights"] = lambda: None
    before = {name: value for name, value in vars(model).items() if name in hidden}
    vars(model).update(hidden)
    try:
        yield
    finally:
        for name in hidden:
            del vars(model)[name]
        vars(model).update(before)


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


def positions(model) -> int | None:
    """The most tokens that a model reads; None where nothing bounds them (relative positions, recurrence)."""
    from torch.nn import Embedding

    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
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
