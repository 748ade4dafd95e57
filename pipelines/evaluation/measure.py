"""One value for each item (window, row, question, prompt) of every measurement that is asked for, of every model."""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections import defaultdict

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import AutoConfig

from pipelines import errors, files
from pipelines.data import mixing
from pipelines.data.labels import SINGLE, class_id, encode
from pipelines.errors import ModelError, SetupError
from pipelines.evaluation import metrics
from pipelines.evaluation.checks import NEEDS
from pipelines.evaluation.figures import CLASSES, Values
from pipelines.evaluation.judges import judge, ranked_values
from pipelines.generation import answers as generation_answers
from pipelines.generation.answers import fitting, load, translations
from pipelines.generation.logprobs import collate, token_logprobs
from pipelines.models import loading, tokenizer_setup

logger = logging.getLogger(__name__)


def measure(models: dict[str, str], settings, seed: int) -> Values:
    """Everything `settings` (an `EvaluateSection`) ask for, of `models` (name -> folder or hub id).

    Every process calls it and gets the same. Answering is shared out by prompts, the rest by models. Raises `SetupError`
    for a model that cannot do what is asked.
    """

    state, own, values = PartialState(), defaultdict(dict), {name: {} for name in models}
    prompts, answers, asked = [], {}, [key for key in NEEDS if getattr(settings, key)]
    if settings.prompts:
        prompts = [row["prompt"] for row in mixing.stream({"train": settings.prompts}, "train", "prompts", seed)]
    for number, (name, path) in enumerate(models.items()):
        if not asked:
            break
        model, tokenizer = load(path, auto_class(name, path, asked))
        if number % state.num_processes == state.process_index:
            if settings.text:
                texts = [row["text"] for row in mixing.stream({"train": settings.text}, "train", "text", seed)]
                own[name] |= text_values(model, tokenizer, texts, settings.max_length, settings.batch_size)
            if settings.tasks:
                own[name] |= task_values(model, tokenizer, settings)
            if settings.labelled:
                own[name] |= class_values(name, model, tokenizer, settings, seed)
        if prompts:
            count = settings.samples
            seeds = [[(seed, i * count + k) for k in range(count)] for i in range(len(prompts))]
            temperature = 1.0 if settings.temperature is None else settings.temperature
            answers[name] = answered(name, model, tokenizer, prompts, seeds, settings.response_length, temperature)
        if settings.pairs:
            values[name] |= pair_values(name, path, model, tokenizer, settings, seed)
        del model
    for part in gather_object([dict(own)]) if state.num_processes > 1 else [own]:
        for name, found in part.items():
            values[name] |= found
    if prompts:
        for name, verdicts in judge(settings.judge, prompts, answers).items():
            values[name] |= verdicts
    if settings.rankings:
        for name, found in ranked_values(settings.rankings, list(models)).items():
            values.setdefault(name, {}).update(found)
    return values


def auto_class(name: str, path: str, asked: list[str]) -> str:
    """The class of transformers that does all that is `asked` (keys of `NEEDS`) of the model at `path`.

    Raises `SetupError` where the model is of another kind: some would load all the same, and give figures of nothing.
    """

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path!r} has no readable config ({str(error).strip().splitlines()[0]}). Give a folder with config.json and "
            "*.safetensors, or a hub id that is in the hub's cache or reachable."
        ) from error
    architecture = (config.architectures or ["?"])[0]
    if "ForSequenceClassification" in architecture:
        found, able = "AutoModelForSequenceClassification", ("labelled",)
    elif config.is_encoder_decoder:
        found, able = "AutoModelForSeq2SeqLM", ("pairs",)
    elif "ForMaskedLM" in architecture:
        found, able = "", ()
    else:
        found, able = "AutoModelForCausalLM", ("text", "tasks", "prompts", "pairs")
    for key in asked:
        if key not in able:
            raise SetupError(f"{name}: {key} needs {NEEDS[key]}, and this is a {architecture}")
    return found


def class_values(name: str, model, tokenizer, settings, seed: int) -> dict[str, list[str]]:
    """The class of every row of `settings.labelled` and the one that the classifier gives it, by name (`CLASSES`)."""

    kind = model.config.problem_type or SINGLE
    if kind != SINGLE or model.config.num_labels < 2:
        raise SetupError(
            f"{name}: labelled needs one class of several for each text; this model has {model.config.num_labels} "
            f"output(s), {kind}"
        )
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    rows = _rows(settings.labelled, "labelled", seed)
    labels = [class_id(row, names) for row in rows]
    context = loading.context_length(model, settings.max_length)
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        tokenizer_setup.ensure_pad(tokenizer)
    tokenizer_setup.fit_model(model, tokenizer)
    tokenizer_setup.read_by_model(model, tokenizer)
    tokenizer.padding_side = "right"  # causal models read the score at the last token before the padding
    features, long = encode(tokenizer, rows, context)
    if long:
        logger.warning("%s: %d of %d texts are cut to %d tokens (the first: %s)", name, len(long), len(rows), context, long[0])  # fmt: skip
    guesses = [0] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(features[i]["input_ids"]))
    for start in range(0, len(rows), settings.batch_size):
        some = order[start : start + settings.batch_size]
        batch = tokenizer.pad([features[i] for i in some], return_tensors="pt").to(model.device)
        with torch.no_grad():
            for i, guess in zip(some, model(**batch).logits.argmax(-1).tolist(), strict=True):
                guesses[i] = guess
    return dict(zip(CLASSES, ([names[i] for i in labels], [names[i] for i in guesses]), strict=True))


def pair_values(name: str, path: str, model, tokenizer, settings, seed: int) -> dict[str, list[float]]:
    """What the model writes for each row of `settings.pairs` against the row's text: values of rows, BLEU and chrF of all.

    Every process calls it. An encoder-decoder finds before each source what its stage was trained with (task.prefix).
    """

    writes, temperature = settings.response_length, settings.temperature or 0.0
    if model.config.is_encoder_decoder:
        rows = _rows(settings.pairs, "seq2seq", seed)
        references = [row["target"] for row in rows]
        context = loading.context_length(model, settings.max_length)
        limit = getattr(model.config, "max_position_embeddings", None)  # T5 has none: its positions are relative
        if limit and writes >= limit:
            raise SetupError(f"{name}: a response length of {writes} is more than it writes; use {limit - 1} or less")
        texts = [files.source_prefix(path) + row["source"] for row in rows]
        sources = tokenizer(texts)["input_ids"]
        long = [i for i, ids in enumerate(sources) if len(ids) > context]
        if long:
            logger.warning("%s: %d of %d sources are cut to %d tokens (the first: %s)", name, len(long), len(rows), context, rows[long[0]]["where"])  # fmt: skip
        for i in long:
            sources[i] = tokenizer(texts[i], truncation=True, max_length=context)["input_ids"]
        written = translations(
            model, tokenizer, sources, [(seed, i) for i in range(len(rows))], response_length=writes,
            temperature=temperature, batch_size=64,
        )  # fmt: skip
    else:
        rows = _rows(settings.pairs, "sft", seed)
        prompts = [row["messages"][:-1] if "messages" in row else row["prompt"] for row in rows]
        references = [row["messages"][-1]["content"] if "messages" in row else row["completion"] for row in rows]
        seeds = [[(seed, i)] for i in range(len(rows))]
        written = [group[0] for group in answered(name, model, tokenizer, prompts, seeds, writes, temperature)]
    texts = [text for text, _ in written]
    found = {"ended": [float(ended) for _, ended in written]}
    for metric in (metrics.SacreBleu(), metrics.ChrF()):
        found |= {key: [value] for key, value in metric.compute(predictions=texts, references=references).items()}
    found |= metrics.chrf_rows(texts, references) | metrics.rouge_rows(texts, references)
    return {f"pairs/{measure}": items for measure, items in found.items()}


def answered(name: str, model, tokenizer, prompts: list, seeds: list, response_length: int, temperature: float):
    """`sampling.answers` of a causal model, the likeliest tokens at temperature 0; `SetupError` where a prompt is too long."""

    short = set(range(len(prompts))) - set(fitting(model, tokenizer, prompts, response_length))
    if short:
        raise SetupError(
            f"{name}: {len(short)} prompts leave no room for an answer of {response_length} tokens, the "
            f"first: {str(prompts[min(short)])[:80]!r}. Lower the response length or drop these prompts."
        )
    how = {"temperature": temperature} if temperature else {"top_k": 1}
    return generation_answers.answers(
        model, tokenizer, prompts, seeds, response_length=response_length, batch_size=64, **how
    )


def _rows(path: str, kind: str, seed: int) -> list[dict]:

    rows = list(mixing.stream({"train": path}, "train", kind, seed))
    if not rows:
        raise errors.DataError(f"{path}: no rows")
    return rows


def text_values(model, tokenizer, texts: list[str], max_length: int | None, batch_size: int) -> dict[str, list[float]]:
    """`nats` per token in each window of the texts laid end to end, an EOS after each, and `bits_per_byte` likewise.

    Windows do not overlap; the first token of each is not predicted. As in the pretrain stage, but for the last, shorter
    window, which counts here. Perplexity is exp of the mean; windows weigh alike.
    """

    ids = [
        t for text in texts for t in [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ]
    size = loading.context_length(model, max_length)
    windows = [ids[i : i + size] for i in range(0, len(ids), size)]
    windows = [w for w in windows if len(w) > 1]
    nats = []
    for start in range(0, len(windows), batch_size):
        some = windows[start : start + batch_size]
        with torch.no_grad():
            batch = collate([(w[:1], w[1:]) for w in some], False, model.device)
            logprobs, _ = token_logprobs(model, batch, 1.0)
        nats += [-part.double().mean().item() for part in logprobs.split([len(w) - 1 for w in some])]
    per_byte = len(ids) / sum(len(text.encode()) for text in texts) / math.log(2)
    return {"nats": nats, "bits_per_byte": [n * per_byte for n in nats]}


def task_values(model, tokenizer, settings) -> dict[str, list[float]]:
    """One value for each question and metric of every task of lm-eval, "TASK/METRIC"."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # Reading the index of all its tasks takes seconds; a path needs none of it.
    known = TaskManager(include_defaults=any(not task.endswith(".yaml") for task in settings.tasks))
    with contextlib.redirect_stdout(io.StringIO()):
        results = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size), tasks=settings.tasks,
            num_fewshot=settings.shots, limit=settings.limit, bootstrap_iters=0, task_manager=known,
        )  # fmt: skip
    found: dict[str, list[float]] = {}
    for task, samples in results["samples"].items():
        for way in dict.fromkeys(sample["filter"] for sample in samples):  # ways to read the answer, usually one
            some = [sample for sample in samples if sample["filter"] == way]
            for metric in some[0]["metrics"]:
                items = [sample[metric] for sample in some]
                if not all(isinstance(item, (int, float)) for item in items):
                    # No mean over questions (a corpus-wide F1, …): lm-eval's own figure, without an interval.
                    items = [results["results"][task][f"{metric},{way}"]]
                found[f"{task}/{metric}{'' if way == 'none' else f',{way}'}"] = [float(item) for item in items]
    return found
