"""Judges of answers: a Python function, a reward model, or people's rankings."""

from __future__ import annotations

import logging
import math
from collections import defaultdict

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from pipelines import errors, functions
from pipelines.data import mixing
from pipelines.errors import SetupError
from pipelines.evaluation import best_of
from pipelines.evaluation.figures import Values
from pipelines.generation.implicit_reward import ImplicitReward, load_reward
from pipelines.generation.logprobs import sequence_scores
from pipelines.models import chat_template, loading, scorers, sharding
from pipelines.models.config import ModelSection

logger = logging.getLogger(__name__)


def judge(
    who: str,
    rows: list[dict],
    answers: dict[str, list[list[tuple[str, bool]]]],
    label: str | None = None,
    continued: dict[str, bool] | None = None,
    most: int | None = None,
    oracle: str | None = None,
) -> Values:
    """For every model and field of the verdicts, the mean over its answers to each prompt; `score` is what wins.

    `who` is a function `module:name` taking (prompt, answer) and giving a number or named numbers, a reward model, a
    policy whose implicit reward is its score, or a classifier, whose score is the log-odds of `label`.
    `answers[model][prompt]` are pairs (text, whether it came to its end) to a row with `prompt` (and `tools`);
    `continued[model]` whether the model goes on with the text of its prompt (`scorers.continues`).
    With `most` also what the best of up to so many answers is worth (`best_of.values`), by `oracle` too where given.
    """
    found = {}
    for model, groups in answers.items():
        fields = verdicts(who, rows, groups, label, (continued or {}).get(model, False))
        found[model] = {field: [sum(group) / len(group) for group in values] for field, values in fields.items()}
        if most:
            second = verdicts(oracle, rows, groups, None, (continued or {}).get(model, False)) if oracle else {}
            found[model] |= best_of.values(most, fields["score"], second.get("score"))
    return found


def verdicts(
    who: str, rows: list[dict], groups: list[list[tuple[str, bool]]], label: str | None = None, continued: bool = False
) -> dict[str, list[list[float]]]:
    """Each field of the verdict on each answer of one model, by prompt; `who` and the rest as `judge` has them.

    A function gives numbers (their field is `score`), mappings or named tuples of numbers.
    """
    if not functions.is_function(who):
        return {"score": model_scores(who, rows, groups, label, continued)}
    function = functions.load(who)
    by_prompt = [
        [_verdict(who, row, function(row["prompt"], text)) for text, _ in group]
        for row, group in zip(rows, groups, strict=True)
    ]
    for row, group in zip(rows, by_prompt, strict=True):
        if other := next((v for v in group if v.keys() != group[0].keys()), None):
            raise SetupError(
                f"{row.get('where', row['prompt'])}: judge {who} gives {', '.join(group[0])} for one answer and "
                f"{', '.join(other)} for another: give all of a prompt the same fields"
            )
    names = dict.fromkeys(name for group in by_prompt for name in group[0])
    if "score" not in names:
        raise SetupError(f"judge {who} gives {', '.join(names)}, but no `score` to compare models by")
    return {name: [[v[name] for v in group] for group in by_prompt if name in group[0]] for name in names}


def mean_verdict(verdicts: list) -> dict[str, float]:
    """The mean of each field over verdicts: numbers (their field is `score`), mappings or named tuples of numbers."""
    named = [_fields(verdict) for verdict in verdicts]
    return {field: sum(float(v[field]) for v in named) / len(named) for field in named[0]}


def _verdict(who: str, row: dict, given) -> dict[str, float]:
    """What the function `who` gave for an answer to `row`, by field; `SetupError` for what is no finite number."""
    found = {}
    for field, value in _fields(given).items():
        try:
            found[field] = functions.number(value)
            if not math.isfinite(found[field]):
                raise ValueError(f"{value} is not finite")
        except ValueError as error:
            raise SetupError(f"{row.get('where', row['prompt'])}: judge {who}, {field}: {error}") from None
    return found


def _fields(verdict) -> dict:
    if hasattr(verdict, "_asdict"):
        return verdict._asdict()
    return verdict if isinstance(verdict, dict) else {"score": verdict}


def model_scores(
    path: str, rows: list[dict], groups: list[list[tuple[str, bool]]], label: str | None = None, continued: bool = False
) -> list[list[float]]:
    """Scores of each prompt's answers by the model at `path`, as PPO would score them; every process scores its
    share and gets all.
    """
    state = PartialState()
    with sharding.on_each_process():
        model, tokenizer = load_reward(ModelSection(model_name_or_path=path), label)
    if label and not (isinstance(model, scorers.Classifier) and model.config.num_labels > 1):
        raise SetupError(f"label: judge {path} gives one number, it is no classifier of several labels: drop this key")
    model = model.to(state.device).eval()
    logger.info("judge %s: on %s, %s", path, state.device.type, loading.described(getattr(model, "model", model)))
    where = [i for i, group in enumerate(groups) for _ in group]
    texts = [text for group in groups for text, _ in group]
    if isinstance(model, scorers.Classifier):
        encoded = model.features([rows[i]["prompt"] for i in where], texts, continued)
        lengths = [len(feature["input_ids"]) for feature in encoded]
    else:
        ended = [ended for group in groups for _, ended in group]
        encoded = [_dialogue(tokenizer, rows[i], text, end) for i, text, end in zip(where, texts, ended, strict=True)]
        lengths = [len(prompt) + len(answer) for prompt, answer in encoded]
        limit = loading.positions(model)
        if limit is not None and lengths and max(lengths) > limit:
            raise SetupError(
                f"judge {path} reads at most {limit} tokens and was given {max(lengths)}: use shorter answers"
            )
    mine, found = sorted(range(len(texts)), key=lengths.__getitem__)[state.process_index :: state.num_processes], []
    for start in range(0, len(mine), 64):
        chunk = mine[start : start + 64]
        batch = [encoded[i] for i in chunk]
        with torch.no_grad():
            if isinstance(model, (scorers.Classifier, ImplicitReward)):
                scores_ = model(batch)
            else:
                scores_ = sequence_scores(model, [prompt + answer for prompt, answer in batch], False, state.device)
        found += zip(chunk, scores_.tolist(), strict=True)
    scores: list[list[float]] = [[] for _ in groups]
    for i, score in sorted(gather_object(found) if state.num_processes > 1 else found):
        scores[where[i]].append(score)
    return scores


def _dialogue(tokenizer, row: dict, text: str, ended: bool) -> tuple[list[int], list[int]]:
    prompt_ids, answer_ids = chat_template.encode_answer(tokenizer, row["prompt"], text, row.get("tools"))
    return prompt_ids, answer_ids if ended else answer_ids[:-1]  # as PPO scores what broke off: no EOS


def ranked_values(path: str, names: list[str]) -> Values:
    """How often answers of one model were ranked above those of another to the same prompt: `rank/OTHER` of each model.

    One value for each ranking that holds answers of both, ties counted half. Models that are not in `names` are added.
    """

    values: Values = {name: defaultdict(list) for name in names}
    rows = list(mixing.stream({"train": path}, "train", "rankings", 0))
    if not any("models" in row for row in rows):
        raise errors.DataError(f"{path}: no row says who wrote its answers (column `models`)")
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
