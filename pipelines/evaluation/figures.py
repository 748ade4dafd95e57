"""Figures from values: means with bootstrap intervals, paired differences, win rates, and the tables that show them.

Every figure is an aggregate over items (windows, rows, rankings, questions, prompts) with a 95 % bootstrap interval
over
them: mostly their mean; else (`Items`) a ratio of sums such as the loss per token, or what a task of lm-eval
prescribes. Only BLEU and chrF of `pairs` have no interval. Models see the same items, so differences and win rates are
paired: their intervals come from resampling the items, not the models' means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from pipelines.evaluation import best_of
from pipelines.evaluation.metrics import ConfusionMatrix, class_scores

Values = dict[str, dict[str, list]]  # model -> measure -> one value for each item: a number, or the name of a class
CLASSES = ("labelled/label", "labelled/guess")  # the measures that are names of classes
TIMES = 2000  # resamples
MANY = 12  # more classes than this are listed instead of shown as a matrix
WORST = 10  # confusions named then


class Items(list):
    """One value for each item where the figure of all is not their mean.

    `draws` (1 + resamples,): the figure of all items, then of each resample; None for names of classes. `same`: what
    the items are, where they differ between models (windows of tokens); None: the rows of a file. `names`: the classes
    of the model, in the order of their ids.
    """

    def __init__(self, values: Iterable, draws=None, same: str | None = None, names: list[str] | None = None):
        super().__init__(values)
        self.draws, self.same, self.names = draws, same, names


def resamples(count: int, times: int = TIMES):
    """Rows drawn with replacement, `times` times: index arrays (100, count), the same for the same count (pairing!)."""
    rng = np.random.default_rng(0)
    for _ in range(times // 100):  # in parts: the indices of all resamples would be large
        yield rng.integers(count, size=(100, count))


def drawn(function: Callable, count: int, times: int = TIMES) -> np.ndarray:
    """`function` of index arrays (samples, count) -> (samples,), for the items as they are and for resamples
    of them.
    """
    return np.concatenate([np.atleast_1d(function(i)) for i in [np.arange(count)[None], *resamples(count, times)]])


def ratio(above: list[float], below: list[float], transform=lambda x: x, same: str | None = None) -> Items:
    """The sum of `above` over the sum of `below`, both one for each item: a loss per token, the share of right pairs, …

    `transform` is applied to the figure: exp for a perplexity. Items without any weight have no value of their own.
    """
    above, below = np.asarray(above, float), np.asarray(below, float)

    def figure(i):
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # inf and nan are what they are
            return transform(above[i].sum(1) / below[i].sum(1))

    own = [float(transform(a / b)) if b else None for a, b in zip(above, below)]
    return Items(own, drawn(figure, len(above)), same)


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean of the values and its 95 % percentile bootstrap interval (Efron 1979); the same for the same values."""
    # Not scipy.stats.bootstrap: every figure is drawn from the same resamples of the items, or differences are not
    # paired.
    return spread(means(values))


def means(values: list[float]) -> np.ndarray:
    """The mean of the values, then of each resample (1 + resamples,)."""
    values = np.asarray(values, float)
    return np.concatenate([[values.mean()], *(values[i].mean(1) for i in resamples(len(values)))])


def draws_of(items: list) -> np.ndarray:
    """The figure of the items, then of each resample (1 + resamples,)."""
    return items.draws if isinstance(items, Items) else means(items)


def spread(scores: np.ndarray) -> tuple[float, float, float]:
    """The first score, that of the rows themselves, with the 95 % percentile interval of the rest, those of
    resamples.
    """
    rest = scores[1:][~np.isnan(scores[1:])]  # a resample may have no figure, such as one without any pair
    low, high = np.quantile(rest, [0.025, 0.975]) if len(rest) else (scores[0], scores[0])
    return float(scores[0]), float(low), float(high)


def class_ids(of: dict[str, list]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """`(names of the classes that occur, labels (rows,), guesses (rows,))` of a model's values; ids count the names.

    The names are in the order of the model's labels where that is known (`Items.names`).
    """
    labels, guesses = (of[key] for key in CLASSES)
    occur = {*labels, *guesses}
    names = [name for name in getattr(labels, "names", None) or sorted(occur) if name in occur]
    ids = {name: i for i, name in enumerate(names)}
    return names, np.array([ids[name] for name in labels]), np.array([ids[name] for name in guesses])


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

    `score` becomes a win rate too, which for `score/A/B` (rankings) is all there is.
    """
    classified = {name: resampled_classes(of) for name, of in values.items() if CLASSES[0] in of}
    values = {name: {m: items for m, items in of.items() if m not in CLASSES} for name, of in values.items()}
    found, names = {}, list(values)
    for name in names:
        for measure, scores in classified.get(name, {}).items():
            found[f"{name}/labelled/{measure}"] = spread(scores)
        for measure, items in values[name].items():
            if not measure.startswith("rank/"):
                found[f"{name}/{measure}"] = spread(draws_of(items))
    for i, later in enumerate(names):
        for earlier in names[:i]:
            pair, (a, b) = f"{later} over {earlier}", (values[later], values[earlier])
            if later in classified and earlier in classified:
                for measure, scores in classified[later].items():
                    if len(scores) == len(classified[earlier][measure]):
                        found[f"{pair}/labelled/{measure}"] = spread(scores - classified[earlier][measure])
            for measure in a:
                if measure == f"rank/{earlier}":
                    found[f"{pair}/ranked_win_rate"] = interval(a[measure])
                elif measure in b and comparable(a[measure], b[measure]):
                    if measure == "score":
                        found[f"{pair}/win_rate"] = interval(wins(a[measure], b[measure]))
                    if isinstance(a[measure], Items):
                        found[f"{pair}/{measure}"] = spread(a[measure].draws - b[measure].draws)
                    else:
                        found[f"{pair}/{measure}"] = interval(
                            [x - y for x, y in zip(a[measure], b[measure], strict=True)]
                        )
    return found


def comparable(a: list, b: list) -> bool:
    """Whether two models' values are of the same items, more than one of them, so that they can be paired."""
    of = lambda items: (len(items), getattr(items, "same", None), len(getattr(items, "draws", ())))
    return len(a) > 1 and of(a) == of(b)


def named(found: dict[str, tuple[float, float, float]]) -> dict[str, dict[str, float]]:
    """The figures for programs: value, low and high of each by name."""
    return {name: dict(zip(("value", "low", "high"), three, strict=True)) for name, three in found.items()}


PERCENT = ("win_rate", "accuracy_per_pair", "accuracy_per_ranking", "in_order", "longer_chosen", "longer_scored_higher")


def table(found: dict[str, tuple[float, float, float]]) -> str:
    """The figures for people: a line for each, models first, then what is between two of them."""
    shown = {name: three for name, three in found.items() if best_of.NAME not in name}
    width, lines = max(map(len, shown), default=0), []
    for name, (value, low, high) in shown.items():
        difference = " over " in name and "win_rate" not in name
        write = "{:.1%}".format if name.endswith(PERCENT) else "{:.3f}".format
        sign = "+" if difference and write(value)[0] not in "-+" else ""
        lines.append(f"  {name:<{width}}  {sign}{write(value)} [{write(low)}, {write(high)}]")
    head = "  value [95 % interval]; A over B: paired differences, and win rates with ties split"
    chosen = best_of.table(found)
    return "\n".join(["", head, *lines, ""]) + (f"\n{chosen}" if chosen else "")


def matrices(values: Values) -> str:
    """The confusions of classifiers for people: a matrix, or of many classes a list and the worst; empty
    without any.
    """
    lines = []
    for model, of in confusion(values).items():
        names, counts = of["labels"], np.array(of["counts"])
        if len(names) <= MANY:
            cells = [["", *names], *([name, *map(str, row)] for name, row in zip(names, of["counts"]))]
            width = max(len(cell) for row in cells for cell in row)
            lines += [f"  {model}: rows of each class, and what they were taken for"]
            lines += ["  " + "  ".join(cell.rjust(width) for cell in row) for row in cells] + [""]
        else:
            lines += [f"  {model}: {len(names)} classes in the order of their labels", *class_list(names, counts), ""]
            lines += [f"  {model}: the worst confusions", *worst(names, counts), ""]
    return "\n".join(["", *lines]) if lines else ""


def class_list(names: list[str], counts: np.ndarray) -> list[str]:
    """A line for each class: its rows, recall, precision and F1."""
    width = max(map(len, names))
    lines = [f"  {'':<{width}}  {'rows':>6}  recall  precision     F1"]
    share = lambda a, b: a / b if b else float("nan")
    for i, name in enumerate(names):
        right, rows, taken = counts[i, i], counts[i].sum(), counts[:, i].sum()
        parts = [share(right, rows), share(right, taken), share(2 * right, rows + taken)]
        recall, precision, f1 = ("–" if np.isnan(part) else f"{part:.3f}" for part in parts)
        lines.append(f"  {name:<{width}}  {rows:>6}  {recall:>6}  {precision:>9}  {f1:>5}")
    return lines


def worst(names: list[str], counts: np.ndarray) -> list[str]:
    """The most frequent confusions of two classes, the more frequent first."""
    wrong = counts * (1 - np.eye(len(names), dtype=int))
    order = [
        (int(i), int(j)) for i, j in zip(*np.unravel_index(np.argsort(-wrong, axis=None, kind="stable"), wrong.shape))
    ]
    shown = [(i, j) for i, j in order[:WORST] if wrong[i, j]]
    return [f"  {wrong[i, j]:>6} of {counts[i].sum()} {names[i]} were taken for {names[j]}" for i, j in shown] or [
        "  none"
    ]
