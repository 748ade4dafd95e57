"""Several answers of a model to each of many prompts, shared out over the processes: for labellers and for judges."""

from __future__ import annotations

import logging

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import LogitsProcessorList

from pipelines import IGNORE_INDEX
from pipelines.errors import SetupError
from pipelines.generation.decode import Chooser, Sampler, generate, uniforms
from pipelines.models import chat_template, loading, sharding, thoughts, tokenizer_setup
from pipelines.models.config import ModelSection

logger = logging.getLogger(__name__)


def load(path: str, auto_class: str = "AutoModelForCausalLM"):
    """`(model, tokenizer)` of a folder or hub id, ready to answer: bfloat16 where a GPU has it, else float32."""
    device = PartialState().device
    half = device.type == "cuda" and loading.native_bf16("cuda")
    section = ModelSection(model_name_or_path=path, dtype="bfloat16" if half else None)
    with sharding.on_each_process():
        model, tokenizer = loading.load_model(section, auto_class), loading.load_tokenizer(section)
    tokenizer_setup.fit_vocabulary(model, tokenizer)
    length_as_asked(model)
    logger.info("%s: on %s, %s", path, device.type, loading.described(model))
    return model.to(device).eval(), tokenizer


def fitting(model, tokenizer, prompts: list, response_length: int, tools: list | None = None) -> list[int]:
    """Positions of the prompts that leave room for an answer in what the model reads; `tools` of each, or None."""
    context = loading.positions(model)
    lengths = [len(ids) for ids in encode_prompts(tokenizer, prompts, tools)]
    return [i for i, n in enumerate(lengths) if context is None or n + response_length <= context]


def encode_prompts(tokenizer, prompts: list, tools: list | None = None) -> list[list[int]]:
    """Ids of each prompt, with its `tools` where there are any; `TemplateError` quotes the prompt that is refused."""
    found = []
    for prompt, its_tools in zip(prompts, tools or [None] * len(prompts), strict=True):
        with chat_template.naming({"where": f"prompt {chat_template.as_text(prompt)[:60]!r}"}):
            found.append(chat_template.encode_prompt(tokenizer, prompt, its_tools))
    return found


def answers(
    model,
    tokenizer,
    prompts: list,
    seeds: list[list],
    batch_size: int = 64,
    keep_thoughts: bool = False,
    tools: list | None = None,
    write=None,
    **settings,
) -> list[list[tuple]]:
    """To each prompt one answer per seed of it, `(text, ended)`; the same on every process, at any number of them.

    `ended` is False where the answer broke off at `response_length` tokens. `settings`: response_length, temperature,
    top_k, top_p. Every process calls this with the same arguments and writes its share, long prompts spread evenly.
    `write`, of `with_vllm.writer`, writes instead of the model; it knows the settings and does without the seeds.
    What a model thinks before an answer (`<think>`) is left out unless `keep_thoughts`.
    """
    state, ends = PartialState(), end_tokens(model, tokenizer)
    encoded = encode_prompts(tokenizer, prompts, tools)
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    mine = [(i, k) for i in order[state.process_index :: state.num_processes] for k in range(len(seeds[i]))]
    if write is not None:
        responses = write([encoded[i] for i, _ in mine]) if mine else []
    else:
        responses, _ = generate(
            model,
            [encoded[i] for i, _ in mine],
            seeds=[seeds[i][k] for i, k in mine],
            eos_token_ids=ends,
            max_new_tokens=settings.pop("response_length"),
            batch_size=batch_size,
            **settings,
        )
    if keep_thoughts:
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    else:
        texts, _ = thoughts.split(tokenizer, responses)
    found = [(i, k, t.strip(), r[-1] in ends) for (i, k), t, r in zip(mine, texts, responses, strict=True)]
    out: list[list] = [[None] * len(group) for group in seeds]
    for i, k, text, ended in gather_object(found) if state.num_processes > 1 else found:
        out[i][k] = (text, ended)
    return out


@torch.no_grad()
def translations(
    model,
    tokenizer,
    sources: list[list[int]],
    seeds: list,
    *,
    response_length: int,
    temperature: float,
    batch_size: int,
) -> list[tuple]:
    """What an encoder-decoder writes for each source (token ids), `(text, ended)`; the same on every process.

    Temperature 0 takes the likeliest: greedily, or with the beams that the model's generation config names. Above 0
    every source draws from its own seed. Every process calls this with the same arguments and writes its share.
    """
    state = PartialState()
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    mine, found = order[state.process_index :: state.num_processes], []
    silent = not state.is_main_process
    for start in tqdm(range(0, len(mine), batch_size), "writing", disable=silent, unit=" batches", mininterval=0.5):
        rows = mine[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [sources[i] for i in rows]}, return_tensors="pt").to(model.device)
        how = {"do_sample": False, "max_new_tokens": response_length}
        if temperature:
            draw = Sampler(uniforms([seeds[i] for i in rows], response_length), temperature)
            how |= {"num_beams": 1, "logits_processor": LogitsProcessorList([Chooser(draw)])}
        texts, ends = read_generated(tokenizer, model.generate(**batch, **how).cpu().numpy())
        found += zip(rows, texts, ends.tolist(), strict=True)
    out: list = [None] * len(sources)
    for i, text, ended in gather_object(found) if state.num_processes > 1 else found:
        out[i] = (text, ended)
    return out


def read_generated(tokenizer, ids):
    """`(texts, whether each ended (rows,))` of generated ids (rows, tokens), an array padded with PAD or -100."""

    ids = np.where(ids == IGNORE_INDEX, tokenizer.pad_token_id, ids)
    texts = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return texts, (ids == tokenizer.eos_token_id)[:, 1:].any(1)  # the first may be EOS: decoding may start with it


def length_as_asked(model) -> None:
    """Forget the `max_length` of the model's generation config: every answer's length is asked for, and transformers
    warns of two.
    """
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.max_length = None


def end_tokens(model, tokenizer) -> list[int]:
    """Token ids that end an answer: the tokenizer's EOS and those of the model's generation config."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    configured = configured if isinstance(configured, list) else [configured]
    ids = {tokenizer.eos_token_id, *configured} - {None}
    if not ids:
        raise SetupError("the tokenizer has no EOS token: an answer could never end")
    return sorted(ids)
