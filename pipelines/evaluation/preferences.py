"""A reward model, or a policy that DPO or KTO made one, on people's preferences: how often it agrees, by how much, and
whether it only likes what is long."""

from __future__ import annotations

import logging

import numpy as np

from pipelines import files
from pipelines.errors import DataError
from pipelines.evaluation.batches import by_length, rows_of
from pipelines.evaluation.figures import Items, drawn, ratio
from pipelines.generation.answers import load
from pipelines.generation.implicit_reward import implicit_reward
from pipelines.generation.logprobs import sequence_scores
from pipelines.kinds import of_kind
from pipelines.models import chat_template, loading, scorers
from pipelines.training.rankings import decided

logger = logging.getLogger(__name__)

BINS = 10  # of the probability 0.5 to 1 that the answer with the higher score is the preferred one


def preference_values(name: str, path: str, model, tokenizer, settings, seed: int) -> dict[str, Items]:
    """Figures of the pairs that the rankings of `settings.preferences` decide; the items are rankings.

    `accuracy_per_pair`: share of pairs whose better answer has the higher score, equal scores being half.
    `accuracy_per_ranking`: the mean over rankings of that share, so that a ranking of nine weighs as one of two.
    `in_order`: share of rankings all of whose pairs are right. `margin` and `loss`: mean over pairs of the difference
    of the scores and of -log sigmoid of it. `calibration_error`: expected calibration error over ten bins (Guo et al.
    2017, https://arxiv.org/abs/1706.04599) of the probability sigmoid(|difference|) that the higher score is preferred.
    `longer_chosen`: share of pairs whose better answer has more characters, and `longer_scored_higher`: share of pairs
    whose longer answer has the higher score; far above the former, the model likes length.
    """
    rows = rows_of(settings.preferences, "rankings", seed)
    ranked = [row for row in rows if decided(row["ranks"])]
    if len(ranked) < len(rows):
        logger.warning(
            "%s: %d of %d rankings decide nothing (all ranks equal): left out", name, len(rows) - len(ranked), len(rows)
        )
    if not ranked:
        raise DataError(f"{settings.preferences}: no ranking decides anything")
    kind = files.kind_of(path)
    if kind in of_kind(implicit_reward=True):
        read = implicit_rewards
    elif (
        kind == "classify"
        or model.config.num_labels > 1
        or (tokenizer.chat_template is None and not hasattr(model, "score"))
    ):
        read = classifier_scores  # as `scorers.load_scorer` has it for PPO and for judges
    else:
        read = answer_scores
    scores = iter(read(name, path, model, tokenizer, settings, ranked))
    return pair_figures(ranked, [[next(scores) for _ in row["completions"]] for row in ranked])


def answer_scores(name: str, path: str, model, tokenizer, settings, rows: list[dict]) -> list[float]:
    """The score of each answer of each ranking; what is too long is cut at its beginning, as the stage reward does."""
    texts = [prompt + answer for prompt, answer in _encode(name, path, model, tokenizer, settings, rows)]
    work = lambda some: sequence_scores(model, [texts[i] for i in some], False, model.device).tolist()
    return by_length([len(ids) for ids in texts], settings.batch_size, work, f"{name}: preferences")


def classifier_scores(name: str, path: str, model, tokenizer, settings, rows: list[dict]) -> list[float]:
    """The log-odds of `settings.label` for each answer of each ranking, read as the classifier was trained to."""
    scorer = scorers.Classifier(model, tokenizer, settings.label, scorers.trained_reading(path))
    logger.info(
        "%s: a classifier that reads %s",
        name,
        "prompt and answer as a pair" if scorer.reads.pairs else "the answer alone",
    )
    prompts = [row["prompt"] for row in rows for _ in row["completions"]]
    features = scorer.features(prompts, [c for row in rows for c in row["completions"]], continued=False)
    work = lambda some: scorer([features[i] for i in some]).tolist()
    lengths = [len(feature["input_ids"]) for feature in features]
    return by_length(lengths, settings.batch_size, work, f"{name}: preferences")


def implicit_rewards(name: str, path: str, model, tokenizer, settings, rows: list[dict]) -> list[float]:
    """`ImplicitReward` of each answer of each ranking, against the model that the stage in `path` started from."""
    reward = implicit_reward(path, model, tokenizer, lambda base: load(base)[0])
    encoded = _encode(name, path, model, tokenizer, settings, rows)
    work = lambda some: reward([encoded[i] for i in some]).tolist()
    lengths = [len(prompt) + len(answer) for prompt, answer in encoded]
    return by_length(lengths, settings.batch_size, work, f"{name}: preferences")


def _encode(name: str, path: str, model, tokenizer, settings, rows: list[dict]) -> list[tuple[list[int], list[int]]]:
    """`(prompt ids, answer ids)` of each answer of each ranking; prompts are cut at their beginning where need be."""
    context = loading.context_length(model, settings.max_length or files.recorded(path, "args", "max_length"))
    pairs = [chat_template.encode_answer(tokenizer, row["prompt"], c) for row in rows for c in row["completions"]]
    long = sum(len(prompt) + len(answer) > context for prompt, answer in pairs)
    if long:
        logger.warning(
            "%s: %d of %d answers with their prompts are longer than %d tokens: cut at their beginning",
            name,
            long,
            len(pairs),
            context,
        )
    cut = lambda prompt, answer: (prompt[max(len(prompt) + len(answer) - context, 0) :], answer[-context:])
    return [cut(prompt, answer) for prompt, answer in pairs]


def pair_figures(rows: list[dict], scores: list[list[float]]) -> dict[str, Items]:
    """The figures of `preference_values` from rankings that decide something and the scores of their answers."""
    pairs = [decided(row["ranks"]) for row in rows]
    margins = [np.array([s[i] - s[j] for i, j in some], float) for some, s in zip(pairs, scores, strict=True)]
    half = lambda values: (values > 0) + 0.5 * (values == 0)
    right = [half(m).sum() for m in margins]
    count = [len(m) for m in margins]
    longer = [
        np.sign([len(row["completions"][i]) - len(row["completions"][j]) for i, j in some])
        for row, some in zip(rows, pairs, strict=True)
    ]
    uneven = [int((sign != 0).sum()) for sign in longer]
    found = {
        "accuracy_per_pair": ratio(right, count),
        "accuracy_per_ranking": [float(r / n) for r, n in zip(right, count)],
        "in_order": [float((m > 0).all()) for m in margins],
        "margin": ratio([m.sum() for m in margins], count),
        "loss": ratio([np.logaddexp(0, -m).sum() for m in margins], count),
        "calibration_error": calibration(margins),
        "longer_chosen": ratio([(sign > 0).sum() for sign in longer], uneven),
        "longer_scored_higher": ratio(
            [half((sign * m)[sign != 0]).sum() for sign, m in zip(longer, margins, strict=True)], uneven
        ),
    }
    if not any(uneven):  # all pairs are of equal length
        del found["longer_chosen"], found["longer_scored_higher"]
    return {f"preferences/{measure}": items for measure, items in found.items()}


def calibration(margins: list[np.ndarray]) -> Items:
    """Expected calibration error of the pairs, resampled by rankings; an item is the mean |confidence - right|
    of one.
    """
    confidence, right, pairs = (np.zeros((len(margins), BINS)) for _ in range(3))
    for n, margin in enumerate(margins):
        sure = 1 / (1 + np.exp(-np.abs(margin)))
        bins = np.minimum(((sure - 0.5) * 2 * BINS).astype(int), BINS - 1)
        np.add.at(confidence[n], bins, sure)
        np.add.at(right[n], bins, (margin > 0) + 0.5 * (margin == 0))
        np.add.at(pairs[n], bins, 1)

    def error(i):
        counts = np.stack([np.bincount(one, minlength=len(margins)) for one in i])  # (samples, rankings)
        return np.abs(counts @ confidence - counts @ right).sum(1) / (counts @ pairs).sum(1)

    own = np.abs(confidence - right).sum(1) / pairs.sum(1)
    return Items(own.tolist(), drawn(error, len(margins)))
