"""Evaluation metrics as `evaluate.Metric` classes that need no hub: classification, regression, generated text.

`evaluate.load("accuracy")` downloads a script; these are plain classes, used the same way, alone or combined:

    evaluate.combine([Accuracy(), MacroF1()]).compute(predictions=[0, 1, 1], references=[0, 1, 0])

The arithmetic is scikit-learn's, SciPy's, sacreBLEU's and rouge_score's, so the figures compare with everybody's.
"""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu, corpus_chrf, sentence_chrf
from scipy.stats import rankdata
from sklearn.metrics import f1_score, matthews_corrcoef

CLASS, CLASSES = datasets.Value("int64"), datasets.List(datasets.Value("int64"))
NUMBER, TEXT = datasets.Value("float64"), datasets.Value("string")


class Metric(evaluate.Metric):
    """What the metrics below share: predictions and references of one type, kept in memory unless several processes
    share them (`num_process=`)."""

    row = CLASS

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("keep_in_memory", kwargs.get("num_process", 1) == 1)
        super().__init__(*args, **kwargs)

    def _info(self):
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="",
            features=datasets.Features({"predictions": self.row, "references": self.row}),
        )


class Accuracy(Metric):
    """Share of rows whose class is right: `accuracy`, 0 to 1."""

    def _compute(self, predictions, references):
        return {"accuracy": float(np.mean(np.equal(predictions, references)))}


class MacroF1(Metric):
    """F1 of each class that occurs, averaged without regard to how frequent it is: `f1_macro`, 0 to 1."""

    def _compute(self, predictions, references):

        return {"f1_macro": float(f1_score(references, predictions, average="macro", zero_division=0))}


class Matthews(Metric):
    """Matthews correlation (Gorodkin's for more than two classes): `matthews`, -1 to 1, 0 for a constant guess."""

    def _compute(self, predictions, references):

        return {"matthews": float(matthews_corrcoef(references, predictions))}


class ConfusionMatrix(Metric):
    """Row counts: `confusion_matrix[i][j]` rows of class i were taken for class j (`num_classes` rows and columns)."""

    def _compute(self, predictions, references, num_classes: int | None = None):
        size = num_classes or 1 + max([*predictions, *references])
        table = np.zeros((size, size), dtype=int)
        np.add.at(table, (np.asarray(references), np.asarray(predictions)), 1)
        return {"confusion_matrix": table.tolist()}


class MultiLabelF1(Metric):
    """F1 over rows of 0/1 per label: `f1_micro` over all decisions, `f1_macro` averaged over labels, 0 to 1."""

    row = CLASSES

    def _compute(self, predictions, references):

        score = lambda average: float(
            f1_score(_matrix(references), _matrix(predictions), average=average, zero_division=0)
        )  # noqa: E731
        return {"f1_micro": score("micro"), "f1_macro": score("macro")}


class SubsetAccuracy(Metric):
    """Share of rows all of whose labels are right: `subset_accuracy`, 0 to 1."""

    row = CLASSES

    def _compute(self, predictions, references):
        return {"subset_accuracy": float(np.mean(np.all(_matrix(predictions) == _matrix(references), axis=1)))}


class MeanSquaredError(Metric):
    """`mse`, in the square of the label's unit."""

    row = NUMBER

    def _compute(self, predictions, references):
        return {"mse": float(np.mean(np.subtract(predictions, references) ** 2))}


class Pearson(Metric):
    """Linear correlation: `pearson`, -1 to 1, 0 where predictions or labels are constant."""

    row = NUMBER

    def _compute(self, predictions, references):
        return {"pearson": _correlation(predictions, references)}


class Spearman(Metric):
    """Correlation of ranks (ties share their mean rank): `spearman`, -1 to 1, 0 where one side is constant."""

    row = NUMBER

    def _compute(self, predictions, references):

        return {"spearman": _correlation(rankdata(predictions), rankdata(references))}


class SacreBleu(Metric):
    """Corpus BLEU with sacreBLEU's 13a tokens (Post 2018, https://arxiv.org/abs/1804.08771): `sacrebleu`, 0 to 100."""

    row = TEXT

    def _compute(self, predictions, references):

        return {"sacrebleu": corpus_bleu(list(predictions), [list(references)]).score}


class ChrF(Metric):
    """Character n-gram F-score, chrF2 (Popović 2015, https://aclanthology.org/W15-3049): `chrf`, 0 to 100."""

    row = TEXT

    def _compute(self, predictions, references):

        return {"chrf": corpus_chrf(list(predictions), [list(references)]).score}


class Rouge(Metric):
    """F-measures `rouge1`, `rouge2`, `rougeL`, 0 to 100, stemmed, averaged over rows (Lin 2004, W04-1013).

    rouge_score keeps only the letters a-z and digits: for other scripts use chrF.
    """

    row = TEXT

    def _compute(self, predictions, references):
        return {name: float(np.mean(rows)) for name, rows in rouge_rows(predictions, references).items()}


GENERATION = {"sacrebleu": SacreBleu, "chrf": ChrF, "rouge": Rouge}


def class_scores(labels: np.ndarray, guesses: np.ndarray) -> dict[str, np.ndarray]:
    """`accuracy`, `f1_macro` and `matthews`, each (samples,), of class ids (samples, rows): as the classes above, row
    by row.

    For bootstrap intervals: scikit-learn, one sample after the other, would take seconds.
    """
    (samples, rows), size = labels.shape, 1 + max(labels.max(), guesses.max())
    place = np.arange(samples)[:, None] * size  # of each sample's first class in the counts below

    def count(ids, weights=None):
        return np.bincount((place + ids).ravel(), weights, samples * size).reshape(samples, size).astype(float)

    right = labels == guesses
    true, taken, hits = count(labels), count(guesses), count(labels, right.ravel())
    occurs = true + taken
    f1 = (2 * hits / np.maximum(occurs, 1)).sum(1) / (occurs > 0).sum(1)
    covariance = rows * hits.sum(1) - (true * taken).sum(1)
    spread = np.sqrt((rows**2 - (true**2).sum(1)) * (rows**2 - (taken**2).sum(1)))  # 0 where one side is constant
    return {"accuracy": right.mean(1), "f1_macro": f1, "matthews": covariance / np.maximum(spread, 1)}


def rouge_rows(predictions, references) -> dict[str, list[float]]:
    """`rouge1`, `rouge2`, `rougeL` of every row, see `Rouge`."""

    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, use_stemmer=True)
    rows = [scorer.score(r, p) for r, p in zip(references, predictions, strict=True)]
    return {name: [100 * row[name].fmeasure for row in rows] for name in names}


def chrf_rows(predictions, references) -> dict[str, list[float]]:
    """`sentence_chrf` of every row, 0 to 100. Their mean is not the corpus's `chrf`, which counts n-grams over all
    rows.
    """

    return {"sentence_chrf": [sentence_chrf(p, [r]).score for p, r in zip(predictions, references, strict=True)]}


def _matrix(rows) -> np.ndarray:
    return np.asarray(rows).reshape(len(rows), -1)


def _correlation(a, b) -> float:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def preference_metrics(chosen, rejected) -> dict:
    """Accuracy, margin, calibration and level of the scores (n,) of n chosen and n rejected answers.

    `calibration_error` is the expected calibration error over ten bins (Guo et al. 2017, 1706.04599) of the
    Bradley–Terry probability sigma(|chosen - rejected|) that the preferred-by-score answer is the one people chose.
    `histogram` counts both kinds of scores between 25 equally distant `edges`.
    """

    margin = chosen.astype(np.float64) - rejected
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    right = (margin > 0) + 0.5 * (margin == 0)
    bins = np.minimum(((confidence - 0.5) * 20).astype(int), 9)
    table = [
        {
            "confidence": float(confidence[bins == b].mean()),
            "accuracy": float(right[bins == b].mean()),
            "pairs": int((bins == b).sum()),
        }
        for b in range(10)
        if (bins == b).any()
    ]
    edges = np.histogram_bin_edges(np.concatenate([chosen, rejected]), 24)
    histogram = {"edges": edges.tolist()}
    for side, scores in (("chosen", chosen), ("rejected", rejected)):
        histogram[side] = np.histogram(scores, edges)[0].tolist()
    return {
        "accuracy": float(right.mean()),
        "margin": float(margin.mean()),
        "loss": float(np.logaddexp(0, -margin).mean()),
        "calibration_error": sum(abs(t["confidence"] - t["accuracy"]) * t["pairs"] for t in table) / len(margin),
        "mean_score": float((chosen.mean() + rejected.mean()) / 2),
        "score_std": float(np.concatenate([chosen, rejected]).std()),
        "pairs": len(margin),
        "calibration": table,
        "histogram": histogram,
    }
