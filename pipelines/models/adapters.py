"""LoRA adapters: put on a model, on a base that others share, and merged at full precision."""

from __future__ import annotations

import copy
import functools
import logging
import os
import re
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers.pytorch_utils import Conv1D
from trl import get_peft_config

from pipelines import files
from pipelines.errors import ModelError
from pipelines.models import tokenizer_setup
from pipelines.models.loading import heads, load_model

logger = logging.getLogger(__name__)


def adapt(model, section, task: str, new_tokens: list[int] | None = None):
    """`model` with LoRA adapters where `use_peft` asks for them (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    `task` is peft's: "CAUSAL_LM", or "SEQ_CLS", which trains the head, and a pooler that is new, too. The embeddings of
    `new_tokens` are trained as well, and their rows of an output embedding that is not tied to them: adapters alone
    would leave a chat template's tokens at their initial values. On 4-bit or 8-bit weights this is QLoRA (Dettmers et
    al. 2023, https://arxiv.org/abs/2305.14314): everything that is not quantized is float32.
    """
    if not section.use_peft:
        return model

    if new_tokens and any(hasattr(weight, "ds_id") for weight in model.parameters()):
        raise ModelError(
            f"model.use_peft: {len(new_tokens)} tokens are new, and PEFT cannot train single rows of embeddings that "
            "ZeRO-3 "
            "has cut up. Use zero2.yaml or fsdp2.yaml, model.chat_template: plain, or a model that knows its "
            "template's "
            "tokens (any finished sft stage)."
        )
    if hasattr(model, "full_precision"):
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # args decide about that
    config: Any = get_peft_config(section)
    config.task_type = task
    if section.lora_target_modules == ["all-linear"]:
        config.target_modules = "all-linear"  # peft's shorthand, known only as a string
    if task == "SEQ_CLS":
        prefix = model.base_model_prefix + "."
        inner = {key.rpartition(".")[0] for key in getattr(model, "new_weights", []) if key.startswith(prefix)}
        whole = [*heads(model), *sorted(inner)]
        config.modules_to_save = [*(config.modules_to_save or []), *whole]
        config.exclude_modules = rf"(.*\.)?({'|'.join(map(re.escape, whole))})(\..*)?"  # trained whole, not adapted
    whole = config.modules_to_save
    config.modules_to_save = _embeddings_once(model, whole)
    config.ensure_weight_tying = config.modules_to_save is not whole
    rows = _rows_to_train(model, new_tokens, config.modules_to_save or []) if new_tokens else {}
    config.trainable_token_indices = rows or None
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
    try:
        model = peft.get_peft_model(model, config)
    except ValueError as error:  # it knows no default targets for this architecture, or none of those named
        raise ModelError(f"model.use_peft: {error} Set model.lora_target_modules, e.g. all-linear.") from error
    trained, total = model.get_nb_trainable_parameters()
    logger.info("LoRA: %d of %d parameters are trained", trained, total)
    return model


def on_base_of(policy):
    """A sequence classifier of one score on the very weights that the adapters of `policy` sit on; its head is 0 as
    yet.

    The layers that hold weights, with what quantization keeps beside them, are the same objects in both models; the
    modules around them are each model's own. So adapters put into one are not seen by the other, and nothing has to be
    switched: both can be run, checkpointed and trained in any order.
    """

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


def _embeddings_once(model, whole: list[str] | None) -> list[str] | None:
    """`whole` with tied embeddings, where either is in it, named once, by the head: so peft trains one weight
    for both.
    """
    names = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not whole or head is None or head.weight is not embedding.weight:
        return whole
    theirs = {end for module in (embedding, head) for end in (names[module], names[module].rpartition(".")[2])}
    kept = [name for name in whole if name not in theirs]
    return whole if len(kept) == len(whole) else [*kept, names[head]]


def _rows_to_train(model, tokens: list[int], whole: list[str]) -> dict[str, list[int]]:
    """Which rows of which embeddings learn these tokens: the input's, and the output's where it has its own.

    Modules that are trained `whole` (model.lora_modules_to_save) learn them in any case.
    """
    names = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    saved = {module for module, name in names.items() if name.rpartition(".")[2] in whole or name in whole}
    tied = head is not None and head.weight is embedding.weight
    rows = {} if embedding in saved or (tied and head in saved) else {names[embedding]: tokens}
    if head is not None and not tied and head not in saved:
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
    tokenizer_setup.fit_model(whole, tokenizer)
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


def save(model, folder: Path, run: Path) -> None:
    """Write the adapter of `model` to `folder`, inside of the folder `run`, as peft reads it.

    What it calls its base tells nothing of this machine: a hub id, a relative path as the recipe has it, the way from
    `folder` to another stage of the run, or of any other absolute path the name alone (see `loading.adapter_base`).
    """
    base = model.get_base_model()
    place = model.peft_config[model.active_adapter].base_model_name_or_path or base.name_or_path
    inside = Path(place).is_absolute() and Path(place).is_relative_to(run)
    name = os.path.relpath(place, folder) if inside else files.portable(place)
    base.config._name_or_path = name  # for peft's model card
    model.save_pretrained(folder, selected_adapters=[model.active_adapter])
    config, card = folder / "adapter_config.json", folder / files.CARD
    files.write_json(config, {**files.read_json(config), "base_model_name_or_path": name})
    if place:
        files.write_text(card, card.read_text(encoding="utf-8").replace(place, name))


def structure(model):
    """A copy of a model that is not yet cut into shards (which cannot be copied), its weights without memory.

    `filled` makes it whole again on one process.
    """

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

    found = {
        id(empty): torch.nn.Parameter(weights[name], requires_grad=empty.requires_grad)
        for name, empty in model.named_parameters()
    }
    return copy.deepcopy(model, found)


def adapters_in_float32(model) -> None:
    """Undo TRL's cast of the adapters on quantized weights to bfloat16: Adam's small steps are lost in
    rounding there.
    """

    if any(hasattr(module, "full_precision") for module in model.modules()):
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.float()
