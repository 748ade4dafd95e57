"""Figures from values: means with bootstrap intervals, paired differences, win rates, and the tables that show them.

Every figure is a mean over items (windows, rows, questions, prompts) with a 95 % bootstrap interval, but for those of a
whole corpus: macro F1 and Matthews, computed anew for each resample, and BLEU and chrF, which have no interval. Models see
the same items, so differences and win rates are paired: their intervals come from resampling the items, not the models' means.
"""

from __future__ import annotations

import math

import numpy as np

from pipelines.evaluation.metrics import ConfusionMatrix, class_scores

Values = dict[str, dict[str, list]]  # model -> measure -> one value for each item: a number, or the name of a class
CLASSES = ("labelled/label", "labelled/guess")  # the measures that are names of classes


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

    _, labels, guesses = class_ids(of)
    parts = [class_scores(labels[i], guesses[i]) for i in [np.arange(len(labels))[None], *resamples(len(labels))]]
    return {measure: np.concatenate([part[measure] for part in parts]) for measure in parts[0]}


def confusion(values: Values) -> dict[str, dict[str, list]]:
    """For each classifier `labels` and `counts`: `counts[i][j]` rows of class i were taken for class j."""

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
