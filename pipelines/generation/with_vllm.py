"""vLLM in place of our own decoding, through TRL's `VLLMGeneration`: for rollouts of ppo, `sample` and `evaluate`.

vLLM loads the model from its folder, computes in the precision that we train in, and has random streams of its own.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from torch import nn

from pipelines.errors import SetupError
from pipelines.models import loading

MISSING = "vLLM is not installed here: `pip install trl[vllm]` (NVIDIA GPUs), or leave it out"
SHARE = 0.8  # of the GPU's memory, where nothing is trained beside


def problems(section: dict) -> Iterator[tuple[str, str, object]]:
    """What is wrong with the use of vLLM that a recipe's section asks for: `(key, message, value)`."""
    if section.get("use_vllm") and importlib.util.find_spec("vllm") is None:
        yield "use_vllm", MISSING, True


def start(policy: nn.Module, tokenizer, accelerator: Accelerator, *, longest: int, eos_token_ids: list[int], **how):
    """TRL's engine around the policy: `sync_weights()` and `generate(prompts, None, 1)`.

    Args:
        longest: tokens of the longest prompt.
        how: arguments of `VLLMGeneration`; `max_completion_length` among them.
    """
    if importlib.util.find_spec("vllm") is None:
        raise SetupError(f"use_vllm: {MISSING}")
    check_folder(policy)
    from trl.generation import vllm_generation  # late: needs vLLM, which takes seconds

    computed = {"bf16": "bfloat16", "fp16": "float16"}.get(accelerator.mixed_precision)
    computed = computed or str(next(policy.parameters()).dtype).removeprefix("torch.")
    engine = vllm_generation.LLM
    # TRL passes no dtype on, and vLLM would make float16 or bfloat16 of float32.
    vllm_generation.LLM = functools.partial(engine, dtype=computed)
    try:
        return vllm_generation.VLLMGeneration(
            policy,
            accelerator,
            tokenizer,
            max_model_length=longest + how["max_completion_length"],
            trust_remote_code=foreign(policy),
            generation_kwargs={"stop_token_ids": eos_token_ids},
            **how,
        )
    except (ValueError, RuntimeError, ImportError, OSError, AssertionError) as error:
        raise SetupError(f"use_vllm: vLLM cannot start with {policy.name_or_path}: {error}") from error
    finally:
        vllm_generation.LLM = engine


def plain(model: nn.Module) -> nn.Module:
    """The transformers model within PEFT's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def foreign(model: nn.Module) -> bool:
    """Whether the model is of Python code that came with its weights: then `model.trust_remote_code` was set."""
    return type(plain(model)).__module__.startswith("transformers_modules")


def check_folder(policy: nn.Module) -> None:
    """Raise SetupError where vLLM would load another model from the policy's folder than the policy."""
    path = policy.name_or_path
    if loading.adapter_base(path):
        raise SetupError(f"use_vllm: {path} holds an adapter alone, and vLLM loads whole models: merge it first")
    ours = plain(policy).config.get_text_config().vocab_size
    theirs = loading.config_of(path, trust_remote_code=foreign(policy)).get_text_config().vocab_size
    if ours != theirs:
        raise SetupError(
            f"use_vllm: the policy has {ours} tokens, and {path}, from which vLLM loads it, has {theirs}: tokens were "
            "added here. Add them in an earlier stage (its model.chat_template), or leave use_vllm out"
        )


@contextlib.contextmanager
def writer(
    model: nn.Module,
    tokenizer,
    prompts: list[list[int]],
    eos_token_ids: list[int],
    *,
    response_length: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Iterator[Callable[[list[list[int]]], list[list[int]]]]:
    """Within it vLLM answers any of `prompts` (token ids), one answer each; the model leaves the device meanwhile."""
    device = model.device
    model.to("cpu")
    _free()
    engine = start(
        model,
        tokenizer,
        Accelerator(),
        longest=max(map(len, prompts)),
        eos_token_ids=eos_token_ids,
        gpu_memory_utilization=SHARE,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        max_completion_length=response_length,
        logprobs=None,
    )
    try:
        yield lambda some: [list(ids) for ids in engine.generate(some, None, 1)[1]]
    finally:
        engine = None  # what comes next needs its memory
        _free()
        model.to(device)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
