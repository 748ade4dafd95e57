"""One value for each item (window, row, ranking, question, prompt) of every measurement that is asked for, of every
model.
"""

from __future__ import annotations

import contextlib
import logging
from collections import defaultdict
from functools import partial

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import AutoConfig

from pipelines import files
from pipelines.data import plain_text
from pipelines.data.plain_text import tokenize
from pipelines.errors import ModelError, SetupError
from pipelines.evaluation import metrics
from pipelines.evaluation.batches import rows_of
from pipelines.evaluation.checks import NEEDS
from pipelines.evaluation.classes import class_values
from pipelines.evaluation.figures import Values
from pipelines.evaluation.judges import judge, ranked_values
from pipelines.evaluation.preferences import preference_values
from pipelines.evaluation.tasks import task_values
from pipelines.evaluation.texts import pair_losses, split_row, text_of_answer, text_values
from pipelines.generation import answers as generation_answers
from pipelines.generation import with_vllm
from pipelines.generation.answers import fitting, load, translations
from pipelines.kinds import of_kind
from pipelines.models import chat_template, loading, scorers

logger = logging.getLogger(__name__)


def measure(models: dict[str, str], settings, seed: int) -> Values:
    """Everything `settings` (an `EvaluateSection`) ask for, of `models` (name -> folder or hub id).

    Every process calls it and gets the same. The rows are shared out over the processes, tasks of lm-eval by models.
    Raises `SetupError` for a model that cannot do what is asked.
    """
    state, own, values = PartialState(), defaultdict(dict), {name: {} for name in models}
    rows, answers, continued, asked = [], {}, {}, [key for key in NEEDS if getattr(settings, key)]
    if settings.prompts:
        rows = rows_of(settings.prompts, "prompts", seed)
    for number, (name, path) in enumerate(models.items()):
        if not asked:
            break
        model, tokenizer = load(path, auto_class(name, path, asked, settings.use_vllm))
        if settings.text:
            values[name] |= text_values(name, model, tokenizer, settings, seed)
        if settings.labelled:
            values[name] |= class_values(name, path, model, tokenizer, settings, seed)
        if settings.preferences:
            values[name] |= preference_values(name, path, model, tokenizer, settings, seed)
        if settings.tasks and number % state.num_processes == state.process_index:
            own[name] |= task_values(model, tokenizer, settings)
        if rows:
            continued[name] = scorers.continues(tokenizer)
            count = max(settings.samples, settings.best_of or 0)
            seeds = [[(seed, i * count + k) for k in range(count)] for i in range(len(rows))]
            temperature = 1.0 if settings.temperature is None else settings.temperature
            answers[name] = answered(name, model, tokenizer, rows, seeds, temperature, settings)
        if settings.pairs:
            values[name] |= pair_values(name, path, model, tokenizer, settings, seed)
        del model
    for part in gather_object([dict(own)]) if state.num_processes > 1 else [own]:
        for name, found in part.items():
            values[name] |= found
    if rows:
        more = (settings.label, continued, settings.best_of, settings.oracle)
        for name, verdicts in judge(settings.judge, rows, answers, *more).items():
            values[name] |= verdicts
    if settings.rankings:
        for name, found in ranked_values(settings.rankings, list(models)).items():
            values.setdefault(name, {}).update(found)
    return values


def auto_class(name: str, path: str, asked: list[str], use_vllm: bool = False) -> str:
    """The class of transformers that does all that is `asked` (keys of `NEEDS`) of the model at `path`.

    Raises `SetupError` where the model is of another kind: some would load all the same, and give figures of nothing.
    """

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path!r} has no readable config ({str(error).strip().splitlines()[0]}). Give a folder with config.json "
            "and "
            "*.safetensors, or a hub id that is in the hub's cache or reachable."
        ) from error
    architecture = (config.architectures or ["?"])[0]
    if "ForSequenceClassification" in architecture:
        found, able = "AutoModelForSequenceClassification", ("labelled", "preferences")
    elif config.is_encoder_decoder:
        found, able = "AutoModelForSeq2SeqLM", ("pairs",)
    elif "ForMaskedLM" in architecture:
        found, able = "", ()
    else:
        found, able = "AutoModelForCausalLM", ("text", "tasks", "prompts", "pairs")
        if files.kind_of(path) in of_kind(implicit_reward=True):  # its log-probs and its reference's are a reward
            able += ("preferences",)
    if use_vllm and config.is_encoder_decoder:
        raise SetupError(f"{name}: use_vllm is for causal language models, and this is a {architecture}")
    for key in asked:
        if key not in able:
            raise SetupError(f"{name}: {key} needs {NEEDS[key]}, and this is a {architecture}")
    return found


def pair_values(name: str, path: str, model, tokenizer, settings, seed: int) -> dict[str, list[float]]:
    """What the model writes for each row of `settings.pairs` against the row's text: values of rows, BLEU and chrF of
    all; and the loss of that text.

    Every process calls it. An encoder-decoder finds before each source what its stage was trained with (task.prefix).
    """

    writes, temperature = settings.response_length, settings.temperature or 0.0
    if model.config.is_encoder_decoder:
        rows = rows_of(settings.pairs, "seq2seq", seed)
        references = [row["target"] for row in rows]
        context = loading.context_length(model, settings.max_length)
        limit = getattr(model.config, "max_position_embeddings", None)  # T5 has none: its positions are relative
        if limit and writes >= limit:
            raise SetupError(f"{name}: a response length of {writes} is more than it writes; use {limit - 1} or less")
        texts = [files.source_prefix(path) + row["source"] for row in rows]
        sources = tokenize(tokenizer, texts)["input_ids"]
        long = [i for i, ids in enumerate(sources) if len(ids) > context]
        if long:
            logger.warning(
                "%s: %d of %d sources are cut to %d tokens (the first: %s)",
                name,
                len(long),
                len(rows),
                context,
                rows[long[0]]["where"],
            )
        for i in long:
            sources[i] = tokenize(tokenizer, texts[i], truncation=True, max_length=context)["input_ids"]
        written = translations(
            model,
            tokenizer,
            sources,
            [(seed, i) for i in range(len(rows))],
            response_length=writes,
            temperature=temperature,
            batch_size=64,
        )
    else:
        rows = rows_of(settings.pairs, "sft", seed)
        references = [text_of_answer(row) for row in rows]
        asked = [{**row, "prompt": split_row(row)[0]} for row in rows]
        seeds = [[(seed, i)] for i in range(len(rows))]
        written = [group[0] for group in answered(name, model, tokenizer, asked, seeds, temperature, settings)]
    texts = [text for text, _ in written]
    found = {"ended": [float(ended) for _, ended in written]}
    for metric in (metrics.SacreBleu(), metrics.ChrF()):
        found |= {key: [value] for key, value in metric.compute(predictions=texts, references=references).items()}
    found |= metrics.chrf_rows(texts, references) | metrics.rouge_rows(texts, references)
    found |= pair_losses(name, path, model, tokenizer, settings, rows)
    return {f"pairs/{measure}": items for measure, items in found.items()}


def answered(name: str, model, tokenizer, rows: list[dict], seeds: list, temperature: float, settings):
    """`generation.answers` of a causal model to rows with `prompt` (and `tools`), the likeliest tokens at temperature
    0; `SetupError` where a prompt is too long.
    """
    prompts, tools = [row["prompt"] for row in rows], [row.get("tools") for row in rows]
    response_length = settings.response_length
    plain_text.report({}, f"{name}: prompts", rows, partial(chat_template.holds_control_text, tokenizer))
    short = set(range(len(prompts))) - set(fitting(model, tokenizer, prompts, response_length, tools))
    if short:
        raise SetupError(
            f"{name}: {len(short)} prompts leave no room for an answer of {response_length} tokens, the "
            f"first: {str(prompts[min(short)])[:80]!r}. Lower the response length or drop these prompts."
        )
    how = {"temperature": temperature} if temperature else {"top_k": 1}
    how |= {"response_length": response_length}
    writer = contextlib.nullcontext()
    if settings.use_vllm:
        encoded = generation_answers.encode_prompts(tokenizer, prompts, tools)
        ends = generation_answers.end_tokens(model, tokenizer)
        writer = with_vllm.writer(model, tokenizer, encoded, ends, **how)
    how |= {"keep_thoughts": settings.keep_thoughts, "batch_size": 64}
    found, some = [], max(1, 512 // max(map(len, seeds), default=1))
    silent = not PartialState().is_main_process
    with writer as how["write"]:
        for start in tqdm(
            range(0, len(prompts), some), f"{name}: writing", disable=silent, unit=f" times {some} prompts"
        ):
            part = slice(start, start + some)
            found += generation_answers.answers(model, tokenizer, prompts[part], seeds[part], tools=tools[part], **how)
    return found
