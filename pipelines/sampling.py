"""Several answers of a model to each of many prompts, shared out over the processes: for labellers and for judges."""

from __future__ import annotations

import logging

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from pipelines import chat, models
from pipelines.ppo import checks
from pipelines.ppo.rollout import generate
from pipelines.sections import ModelSection

logger = logging.getLogger(__name__)


def load(path: str):
    """`(model, tokenizer)` of a folder or hub id, ready to answer: bf16 where a GPU has it, else float32."""
    device = PartialState().device
    half = device.type == "cuda" and torch.cuda.is_bf16_supported()
    section = ModelSection(model_name_or_path=path, dtype="bfloat16" if half else None)
    return models.load_model(section, "AutoModelForCausalLM").to(device).eval(), models.load_tokenizer(section)


def fitting(model, tokenizer, prompts: list, response_length: int) -> list[int]:
    """Positions of the prompts that leave room for an answer in what the model reads."""
    context = models.positions(model)
    lengths = [len(chat.encode_prompt(tokenizer, prompt)) for prompt in prompts]
    return [i for i, n in enumerate(lengths) if context is None or n + response_length <= context]


def answers(model, tokenizer, prompts: list, seeds: list[list], batch_size: int = 64, **settings) -> list[list[tuple]]:
    """To each prompt one answer per seed of it, `(text, ended)`; the same on every process, at any number of them.

    `ended` is False where the answer broke off at `response_length` tokens. `settings`: response_length, temperature,
    top_k, top_p. Every process calls this with the same arguments and writes its share, long prompts spread evenly.
    """
    state, ends = PartialState(), checks.end_tokens(model, tokenizer)
    encoded = [chat.encode_prompt(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    mine = [(i, k) for i in order[state.process_index :: state.num_processes] for k in range(len(seeds[i]))]
    responses, _ = generate(
        model,
        [encoded[i] for i, _ in mine],
        seeds=[seeds[i][k] for i, k in mine],
        eos_token_ids=ends,
        max_new_tokens=settings.pop("response_length"),
        batch_size=batch_size,
        **settings,
    )
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    found = [(i, k, t.strip(), r[-1] in ends) for (i, k), t, r in zip(mine, texts, responses, strict=True)]
    out: list[list] = [[None] * len(group) for group in seeds]
    for i, k, text, ended in gather_object(found) if state.num_processes > 1 else found:
        out[i][k] = (text, ended)
    return out
