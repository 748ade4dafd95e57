"""`python -m pipelines evaluate MODEL …`: what models are worth, with intervals, and against each other.

Six measurements, each done where it is asked for; the stage of kind `evaluate` does the same inside a chain:

    text       perplexity of a text, and bits per byte, which compare across tokenizers
    labelled   classifiers: accuracy, macro F1, Matthews correlation and confusion matrix
    pairs      what a model writes for prompts or sources against given texts: BLEU, chrF, ROUGE
    tasks      tasks of lm-eval, with or without examples before each question
    prompts    answers to prompts, judged by a Python function or a reward model
    rankings   win rates from people's rankings of answers by several models

Every figure is a mean over items (windows, rows, questions, prompts) with a 95 % bootstrap interval, but for those of a
whole corpus: macro F1 and Matthews, computed anew for each resample, and BLEU and chrF, which have no interval. Models see
the same items, so differences and win rates are paired: their intervals come from resampling the items, not the models' means.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import logging
import math
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from pipelines import SetupError

logger = logging.getLogger(__name__)

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # module:function, as opposed to a model
Values = dict[str, dict[str, list]]  # model -> measure -> one value for each item: a number, or the name of a class
CLASSES = ("labelled/label", "labelled/guess")  # the measures that are names of classes
NEEDS = {
    "text": "a causal language model", "tasks": "a causal language model", "prompts": "a causal language model",
    "pairs": "a causal language model or an encoder-decoder", "labelled": "a sequence classifier",
}  # fmt: skip


# --- figures and their uncertainty -------------------------------------------------------------------------------


def resamples(count: int, times: int = 2000):
    """Rows drawn with replacement, `times` times: index arrays (100, count), the same for the same count (pairing!)."""
    rng = np.random.default_rng(0)
    for _ in range(times // 100):  # in parts: the indices of all resamples would be large
        yield rng.integers(count, size=(100, count))


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean of the values and its 95 % percentile bootstrap interval (Efron 1979); the same for the same values."""
    values = np.asarray(values, float)
    low, high = np.quantile(np.concatenate([values[i].mean(1) for i in resamples(len(values))]), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def spread(scores: np.ndarray) -> tuple[float, float, float]:
    """The first score, that of the rows themselves, with the 95 % percentile interval of the rest, those of resamples."""
    return float(scores[0]), *(float(x) for x in np.quantile(scores[1:], [0.025, 0.975]))


def class_ids(of: dict[str, list]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """`(names of the classes that occur, labels (rows,), guesses (rows,))` of a model's values; ids count the names."""
    names, ids = np.unique([of[key] for key in CLASSES], return_inverse=True)
    return names.tolist(), *ids.reshape(2, -1)


def resampled_classes(of: dict[str, list]) -> dict[str, np.ndarray]:
    """Accuracy, macro F1 and Matthews of the rows, followed by those of each resample: arrays (1 + resamples,)."""
    from pipelines.metrics import class_scores

    _, labels, guesses = class_ids(of)
    parts = [class_scores(labels[i], guesses[i]) for i in [np.arange(len(labels))[None], *resamples(len(labels))]]
    return {measure: np.concatenate([part[measure] for part in parts]) for measure in parts[0]}


def confusion(values: Values) -> dict[str, dict[str, list]]:
    """For each classifier `labels` and `counts`: `counts[i][j]` rows of class i were taken for class j."""
    from pipelines.metrics import ConfusionMatrix

    found = {}
    for model, of in values.items():
        if CLASSES[0] in of:
            names, labels, guesses = class_ids(of)
            table = ConfusionMatrix().compute(predictions=guesses, references=labels, num_classes=len(names))
            found[model] = {"labels": names, "counts": table["confusion_matrix"]}
    return found


def wins(a: list[float], b: list[float]) -> list[float]:
    """1 where `a` is the better of the two, 0 where `b` is, 0.5 where they are equal."""
    return [(x > y) + 0.5 * (x == y) for x, y in zip(a, b, strict=True)]


def figures(values: Values) -> dict[str, tuple[float, float, float]]:
    """Every figure as `(value, low, high)`: "MODEL/MEASURE", and "LATER over EARLIER/MEASURE" for what is paired.

    nats become perplexity; `score` becomes a win rate too, which for `score/A/B` (rankings) is all there is.
    """
    classified = {name: resampled_classes(of) for name, of in values.items() if CLASSES[0] in of}
    values = {name: {m: items for m, items in of.items() if m not in CLASSES} for name, of in values.items()}
    found, names = {}, list(values)
    for name in names:
        for measure, scores in classified.get(name, {}).items():
            found[f"{name}/labelled/{measure}"] = spread(scores)
        for measure, items in values[name].items():
            if measure.startswith("rank/"):
                continue
            middle = interval(items)
            if measure == "nats":
                measure, middle = "perplexity", tuple(math.exp(min(x, 700)) for x in middle)
            found[f"{name}/{measure}"] = middle
    for i, later in enumerate(names):
        for earlier in names[:i]:
            pair, (a, b) = f"{later} over {earlier}", (values[later], values[earlier])
            if later in classified and earlier in classified:
                for measure, scores in classified[later].items():
                    found[f"{pair}/labelled/{measure}"] = spread(scores - classified[earlier][measure])
            for measure in a:
                if measure == f"rank/{earlier}":
                    found[f"{pair}/ranked_win_rate"] = interval(a[measure])
                elif (
                    measure in b and measure not in ("nats", "bits_per_byte") and 1 < len(a[measure]) == len(b[measure])
                ):
                    if measure == "score":
                        found[f"{pair}/win_rate"] = interval(wins(a[measure], b[measure]))
                    found[f"{pair}/{measure}"] = interval([x - y for x, y in zip(a[measure], b[measure], strict=True)])
    return found


def named(found: dict[str, tuple[float, float, float]]) -> dict[str, dict[str, float]]:
    """The figures for programs: value, low and high of each by name."""
    return {name: dict(zip(("value", "low", "high"), three, strict=True)) for name, three in found.items()}


def table(found: dict[str, tuple[float, float, float]]) -> str:
    """The figures for people: a line for each, models first, then what is between two of them."""
    shown = {
        name: f"{value:.1%} [{low:.1%}, {high:.1%}]" if name.endswith("win_rate") else f"{value:.3f} [{low:.3f}, {high:.3f}]"
        for name, (value, low, high) in found.items()
    }  # fmt: skip
    width = max(map(len, shown), default=0)
    lines = [f"  {name:<{width}}  {'+' if ' over ' in name and value[0] not in '-+' and 'win_rate' not in name else ''}{value}" for name, value in shown.items()]  # fmt: skip
    return "\n".join(["", "  value [95 % interval]; A over B: paired differences, and win rates with ties split", *lines, ""])  # fmt: skip


def matrices(values: Values) -> str:
    """The confusion matrices for people; empty where no classifier was measured."""
    lines = []
    for model, of in confusion(values).items():
        cells = [["", *of["labels"]], *([name, *map(str, row)] for name, row in zip(of["labels"], of["counts"]))]
        width = max(len(cell) for row in cells for cell in row)
        lines += [f"  {model}: rows of each class, and what they were taken for"]
        lines += ["  " + "  ".join(cell.rjust(width) for cell in row) for row in cells] + [""]
    return "\n".join(["", *lines]) if lines else ""


# --- measurements ------------------------------------------------------------------------------------------------


def measure(models: dict[str, str], settings, seed: int) -> Values:
    """Everything `settings` (an `EvaluateSection`) ask for, of `models` (name -> folder or hub id).

    Every process calls it and gets the same. Answering is shared out by prompts, the rest by models. Raises `SetupError`
    for a model that cannot do what is asked.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    from pipelines import data, sampling

    state, own, values = PartialState(), defaultdict(dict), {name: {} for name in models}
    prompts, answers, asked = [], {}, [key for key in NEEDS if getattr(settings, key)]
    if settings.prompts:
        prompts = [row["prompt"] for row in data.stream({"train": settings.prompts}, "train", "prompts", seed)]
    for number, (name, path) in enumerate(models.items()):
        if not asked:
            break
        model, tokenizer = sampling.load(path, auto_class(name, path, asked))
        if number % state.num_processes == state.process_index:
            if settings.text:
                texts = [row["text"] for row in data.stream({"train": settings.text}, "train", "text", seed)]
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
    from transformers import AutoConfig

    from pipelines.models import ModelError

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
    import torch

    from pipelines import chat, models
    from pipelines.stages import classify

    kind = model.config.problem_type or classify.SINGLE
    if kind != classify.SINGLE or model.config.num_labels < 2:
        raise SetupError(
            f"{name}: labelled needs one class of several for each text; this model has {model.config.num_labels} "
            f"output(s), {kind}"
        )
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    rows = _rows(settings.labelled, "labelled", seed)
    labels = [classify.class_id(row, names) for row in rows]
    context = models.context_length(model, settings.max_length)
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        chat.ensure_pad(tokenizer)
    chat.fit_model(model, tokenizer)
    classify.read_by_model(model, tokenizer)
    tokenizer.padding_side = "right"  # causal models read the score at the last token before the padding
    features, long = classify.encode(tokenizer, rows, context)
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
    from pipelines import artifact, metrics, models, sampling

    writes, temperature = settings.response_length, settings.temperature or 0.0
    if model.config.is_encoder_decoder:
        rows = _rows(settings.pairs, "seq2seq", seed)
        references = [row["target"] for row in rows]
        context = models.context_length(model, settings.max_length)
        limit = getattr(model.config, "max_position_embeddings", None)  # T5 has none: its positions are relative
        if limit and writes >= limit:
            raise SetupError(f"{name}: a response length of {writes} is more than it writes; use {limit - 1} or less")
        texts = [artifact.prefix(path) + row["source"] for row in rows]
        sources = tokenizer(texts)["input_ids"]
        long = [i for i, ids in enumerate(sources) if len(ids) > context]
        if long:
            logger.warning("%s: %d of %d sources are cut to %d tokens (the first: %s)", name, len(long), len(rows), context, rows[long[0]]["where"])  # fmt: skip
        for i in long:
            sources[i] = tokenizer(texts[i], truncation=True, max_length=context)["input_ids"]
        written = sampling.translations(
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
    from pipelines import sampling

    short = set(range(len(prompts))) - set(sampling.fitting(model, tokenizer, prompts, response_length))
    if short:
        raise SetupError(
            f"{name}: {len(short)} prompts leave no room for an answer of {response_length} tokens, the "
            f"first: {str(prompts[min(short)])[:80]!r}. Lower the response length or drop these prompts."
        )
    how = {"temperature": temperature} if temperature else {"top_k": 1}
    return sampling.answers(model, tokenizer, prompts, seeds, response_length=response_length, batch_size=64, **how)


def _rows(path: str, kind: str, seed: int) -> list[dict]:
    from pipelines import data

    rows = list(data.stream({"train": path}, "train", kind, seed))
    if not rows:
        raise data.DataError(f"{path}: no rows")
    return rows


def text_values(model, tokenizer, texts: list[str], max_length: int | None, batch_size: int) -> dict[str, list[float]]:
    """`nats` per token in each window of the texts laid end to end, an EOS after each, and `bits_per_byte` likewise.

    Windows do not overlap; the first token of each is not predicted. As in the pretrain stage, but for the last, shorter
    window, which counts here. Perplexity is exp of the mean; windows weigh alike.
    """
    import torch

    from pipelines import models
    from pipelines.ppo.forward import collate, token_logprobs

    ids = [
        t for text in texts for t in [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ]
    size = models.context_length(model, max_length)
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


def judge(who: str, prompts: list, answers: dict[str, list[list[tuple[str, bool]]]]) -> Values:
    """For every model and field of the verdicts, the mean over its answers to each prompt; `score` is what wins.

    `who` is a function `module:name` taking (prompt, answer) and giving a number or named numbers, or a reward model.
    `answers[model][prompt]` are pairs (text, whether it came to its end).
    """
    if not FUNCTION.fullmatch(who):
        return {name: {"score": reward_scores(who, prompts, groups)} for name, groups in answers.items()}
    module, _, name = who.partition(":")
    function, found = getattr(importlib.import_module(module), name), {}
    for model, groups in answers.items():
        fields = defaultdict(list)
        for prompt, group in zip(prompts, groups, strict=True):
            for field, mean in mean_verdict([function(prompt, text) for text, _ in group]).items():
                fields[field].append(mean)
        if "score" not in fields:
            raise SetupError(f"judge {who} gives {', '.join(fields)}, but no `score` to compare models by")
        found[model] = dict(fields)
    return found


def mean_verdict(verdicts: list) -> dict[str, float]:
    """The mean of each field over verdicts: numbers (their field is `score`), mappings or named tuples of numbers."""
    named = [v._asdict() if hasattr(v, "_asdict") else v if isinstance(v, dict) else {"score": v} for v in verdicts]
    return {field: sum(float(v[field]) for v in named) / len(named) for field in named[0]}


def reward_scores(path: str, prompts: list, groups: list[list[tuple[str, bool]]]) -> list[float]:
    """Mean score of each prompt's answers by the reward model at `path`; every process scores its share."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    from pipelines import chat, models
    from pipelines.ppo.forward import sequence_scores
    from pipelines.sections import ModelSection

    state, section = PartialState(), ModelSection(model_name_or_path=path)
    tokenizer = models.load_tokenizer(section)
    model = models.load_model(section, "AutoModelForSequenceClassification", num_labels=1).to(state.device).eval()
    logger.info("judge %s: on %s, %s", path, state.device.type, models.described(model))
    encoded = []
    for i, group in enumerate(groups):
        for text, ended in group:
            prompt, answer = chat.encode_answer(tokenizer, prompts[i], text)
            encoded.append((i, prompt + (answer if ended else answer[:-1])))  # as PPO scores what broke off: no EOS
    encoded = sorted(encoded, key=lambda item: len(item[1]))[state.process_index :: state.num_processes]
    found = []
    for start in range(0, len(encoded), 64):
        where, sequences = zip(*encoded[start : start + 64], strict=True)
        with torch.no_grad():
            found += zip(where, sequence_scores(model, list(sequences), False, state.device).tolist(), strict=True)
    scores = defaultdict(list)
    for i, score in gather_object(found) if state.num_processes > 1 else found:
        scores[i].append(score)
    return [sum(scores[i]) / len(scores[i]) for i in range(len(groups))]


def ranked_values(path: str, names: list[str]) -> Values:
    """How often answers of one model were ranked above those of another to the same prompt: `rank/OTHER` of each model.

    One value for each ranking that holds answers of both, ties counted half. Models that are not in `names` are added.
    """
    from pipelines import data

    values: Values = {name: defaultdict(list) for name in names}
    rows = list(data.stream({"train": path}, "train", "rankings", 0))
    if not any("models" in row for row in rows):
        raise data.DataError(f"{path}: no row says who wrote its answers (column `models`)")
    for row in rows:
        by_model = defaultdict(list)
        for model, rank in zip(row.get("models", []), row["ranks"]):
            by_model[model].append(rank)
        for a, ours in by_model.items():
            for b, theirs in by_model.items():
                if a != b:
                    won = [(x < y) + 0.5 * (x == y) for x in ours for y in theirs]
                    values.setdefault(a, defaultdict(list))[f"rank/{b}"].append(sum(won) / len(won))
    return {name: dict(found) for name, found in values.items()}


# --- the verb ----------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="pipelines evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="folders (runs/demo/sft) or hub ids; later over earlier"
    )
    parser.add_argument("--text", help="perplexity: a file with text (.txt, .jsonl with the column text, …)")
    parser.add_argument("--labelled", help="classifiers: a file with text and label (name or id of a class)")
    parser.add_argument("--pairs", help="a file with prompt and completion, or source and target: BLEU, chrF, ROUGE")
    parser.add_argument("--tasks", nargs="+", help="lm-eval's names, or paths of task files (.yaml)")
    parser.add_argument("--shots", type=int, help="examples before each question (default: what the task says)")
    parser.add_argument("--limit", type=int, help="only so many questions of each task")
    parser.add_argument("--prompts", help="a file with the column prompt: every model answers, the judge judges")
    parser.add_argument("--judge", help="package.module:function (prompt, answer) -> number, or a reward model")
    parser.add_argument("--samples", type=int, default=1, help="answers to each prompt")
    parser.add_argument("--temperature", type=float, help="0: the likeliest (default: 1 for prompts, 0 for pairs)")
    parser.add_argument("--response-length", type=int, default=128, help="longest answer in tokens")
    parser.add_argument("--rankings", help="people's rankings with the column models: win rates")
    parser.add_argument("--max-length", type=int, help="window in tokens, or where texts and sources are cut")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--json", type=Path, help="write the figures and intervals to this file too")
    args = parser.parse_args(argv)
    settings = {k: v for k, v in vars(args).items() if v is not None and k not in ("seed", "json")}
    if wrong := list(problems(settings)):
        raise SetupError("\n".join(f"{key}: {message}" for key, message, _ in wrong))
    from pipelines import artifact, launch
    from pipelines.sections import EvaluateSection

    state = launch.start()
    short = {path: Path(path).name for path in args.models}
    names = short if len(set(short.values())) == len(short) else {path: path for path in short}
    values = measure({names[path]: path for path in args.models}, EvaluateSection(**settings), args.seed)
    found = figures(values)
    if state.is_main_process:
        print(table(found) + matrices(values))
        if args.json:
            tables = {f"{name}/labelled/confusion_matrix": of for name, of in confusion(values).items()}
            artifact.write_json(args.json, named(found) | tables)
    return 0


def problems(section: dict):
    """What is wrong with the settings, files and packages that are not there included: `(key, message, value)`."""
    from pipelines import data

    asked = [key for key in NEEDS if section.get(key)]
    if not asked and not section.get("rankings"):
        yield f"{', '.join(NEEDS)}, rankings", "nothing to measure: give at least one of them", None
    if not section.get("models") and asked:
        what = "classifier" if asked == ["labelled"] else "language model"
        yield "models", f"needs at least one {what}: stage:NAME, a folder or a hub id", None
    if "labelled" in asked and len(asked) > 1:
        yield "labelled", f"is for classifiers, {asked[0]} for models that write: measure them apart", None
    if bool(section.get("prompts")) != bool(section.get("judge")):
        yield "judge", "goes with prompts: models answer the one, the other judges", section.get("judge")
    if (section.get("temperature") or 0) < 0:
        yield "temperature", "must be 0 or above", section["temperature"]
    for key in ("samples", "response_length", "batch_size", "max_length", "limit"):
        if section.get(key) is not None and section[key] <= 0:
            yield key, "must be above 0", section[key]
    if section.get("tasks") and importlib.util.find_spec("lm_eval") is None:
        yield "tasks", "need lm-eval: pip install 'finetune-pipelines[evaluate]'", None
    paths = [(key, section[key]) for key in ("text", "labelled", "pairs", "prompts", "rankings") if section.get(key)]
    paths += [("tasks", task) for task in section.get("tasks") or [] if task.endswith(".yaml")]
    for key, path in paths:
        local = path.endswith(".yaml") or data.is_local(path)
        if local and not path.startswith("stage:") and not data.files(path):
            yield key, f"no such file (looked in {Path.cwd()})", path
