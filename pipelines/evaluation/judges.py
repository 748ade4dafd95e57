"""Judges of answers: a Python function, a reward model, or people's rankings."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections import defaultdict

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from pipelines import errors
from pipelines.data import mixing
from pipelines.errors import SetupError
from pipelines.evaluation.figures import Values
from pipelines.generation.logprobs import sequence_scores
from pipelines.models import chat_template, loading
from pipelines.models.config import ModelSection

logger = logging.getLogger(__name__)

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # module:function, as opposed to a model


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

    state, section = PartialState(), ModelSection(model_name_or_path=path)
    tokenizer = loading.load_tokenizer(section)
    model = loading.load_model(section, "AutoModelForSequenceClassification", num_labels=1).to(state.device).eval()
    logger.info("judge %s: on %s, %s", path, state.device.type, loading.described(model))
    encoded = []
    for i, group in enumerate(groups):
        for text, ended in group:
            prompt, answer = chat_template.encode_answer(tokenizer, prompts[i], text)
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
