"""Models on shards: a weight made whole for a moment, embeddings as FSDP can take them."""

from __future__ import annotations

import contextlib
import dataclasses
import os

import torch
from transformers.integrations import deepspeed as known_to_transformers


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
def on_each_process():
    """Within it every process loads whole models, as those that train nothing need them: sample, evaluate, judges.

    Launched for shards, transformers leaves new weights without memory, for FSDP to fill them later, or cuts
    weights up for ZeRO-3 while the settings of an earlier stage are still held; and adapters are not merged.
    """
    asked = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    before = {name: os.environ.pop(name) for name in asked if name in os.environ}
    zero = known_to_transformers._hf_deepspeed_config_weak_ref
    known_to_transformers.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        os.environ.update(before)
        known_to_transformers._hf_deepspeed_config_weak_ref = zero


def float32_sums(accelerator) -> None:
    """FSDP2 in half precision: gradients are summed in float32, and outputs stay what they are.

    Accelerate's plugin would sum gradients in half precision and cast every output to it, losses and log-probs too.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if policy is not None and plugin.fsdp_version == 2:
        plugin.mixed_precision_policy = dataclasses.replace(policy, reduce_dtype=torch.float32, output_dtype=None)


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
