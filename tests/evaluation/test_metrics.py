"""The metrics give scikit-learn's, SciPy's, sacreBLEU's and rouge_score's figures, through `evaluate`, with no hub."""

import evaluate
import numpy as np
import pytest
import sklearn.metrics
from scipy import stats

from pipelines.evaluation import metrics

CHANCE = np.random.default_rng(0)
LABELS, GUESSES = CHANCE.integers(0, 4, 200), CHANCE.integers(0, 4, 200)
GUESSES[:120] = LABELS[:120]


def test_class_metrics_are_scikit_learns_and_combine():
    combined = evaluate.combine([metrics.Accuracy(), metrics.MacroF1(), metrics.Matthews()])
    found = combined.compute(predictions=GUESSES, references=LABELS)
    assert found == pytest.approx(
        {
            "accuracy": sklearn.metrics.accuracy_score(LABELS, GUESSES),
            "f1_macro": sklearn.metrics.f1_score(LABELS, GUESSES, average="macro"),
            "matthews": sklearn.metrics.matthews_corrcoef(LABELS, GUESSES),
        }
    )
    assert combined.compute(predictions=[1, 1], references=[0, 0])["accuracy"] == 0  # nothing is left from before


def test_closed_forms():
    # 3 of 4 right; class 0: precision 1, recall 1/2; class 1: precision 2/3, recall 1
    rows = {"references": [0, 0, 1, 1], "predictions": [0, 1, 1, 1]}
    assert metrics.Accuracy().compute(**rows) == {"accuracy": 0.75}
    assert metrics.MacroF1().compute(**rows)["f1_macro"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert metrics.Matthews().compute(**rows)["matthews"] == pytest.approx(2 / np.sqrt(1 * 3 * 2 * 2))
    assert metrics.ConfusionMatrix().compute(**rows, num_classes=3) == {
        "confusion_matrix": [[1, 1, 0], [0, 2, 0], [0, 0, 0]]
    }


def test_a_constant_guess_has_no_correlation():
    assert metrics.Matthews().compute(predictions=[1, 1, 1], references=[0, 1, 1]) == {"matthews": 0.0}
    assert metrics.Pearson().compute(predictions=[1, 1, 1], references=[0, 1, 1]) == {"pearson": 0.0}


def test_confusion_matrix_is_scikit_learns():
    found = metrics.ConfusionMatrix().compute(predictions=GUESSES, references=LABELS, num_classes=4)
    assert found["confusion_matrix"] == sklearn.metrics.confusion_matrix(LABELS, GUESSES).tolist()


def test_many_samples_at_once_are_scikit_learns_one_by_one():
    """Few rows of many classes: some occur in no label, in no guess, in neither; one side is constant."""
    labels, guesses = CHANCE.integers(0, 6, (20, 8)), CHANCE.integers(0, 6, (20, 8))
    guesses[:10, :5], labels[0], guesses[1] = labels[:10, :5], 3, 2
    found = metrics.class_scores(labels, guesses)
    for i, (label, guess) in enumerate(zip(labels, guesses)):
        assert found["accuracy"][i] == pytest.approx(sklearn.metrics.accuracy_score(label, guess))
        assert found["f1_macro"][i] == pytest.approx(sklearn.metrics.f1_score(label, guess, average="macro"))
        assert found["matthews"][i] == pytest.approx(sklearn.metrics.matthews_corrcoef(label, guess))


def test_multi_label_metrics():
    labels, guesses = CHANCE.integers(0, 2, (50, 3)), CHANCE.integers(0, 2, (50, 3))
    guesses[:30] = labels[:30]
    found = metrics.MultiLabelF1().compute(predictions=guesses, references=labels)
    assert found["f1_micro"] == pytest.approx(sklearn.metrics.f1_score(labels, guesses, average="micro"))
    assert found["f1_macro"] == pytest.approx(sklearn.metrics.f1_score(labels, guesses, average="macro"))
    found = metrics.SubsetAccuracy().compute(predictions=guesses, references=labels)
    assert found["subset_accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(labels, guesses))


def test_regression_metrics():
    labels = CHANCE.normal(size=60)
    guesses = np.round(labels + CHANCE.normal(size=60), 1)  # rounded: there are ties
    found = evaluate.combine([metrics.MeanSquaredError(), metrics.Pearson(), metrics.Spearman()])
    assert found.compute(predictions=guesses, references=labels) == pytest.approx(
        {
            "mse": sklearn.metrics.mean_squared_error(labels, guesses),
            "pearson": stats.pearsonr(labels, guesses).statistic,
            "spearman": stats.spearmanr(labels, guesses).statistic,
        }
    )


def test_generation_metrics():
    texts = {
        "predictions": ["the cat sat on the mat", "a dog"],
        "references": ["the cat sat on a mat", "the dog barks"],
    }
    bleu = metrics.SacreBleu().compute(**texts)["sacrebleu"]
    assert (
        0
        < bleu
        < metrics.SacreBleu().compute(predictions=texts["references"], references=texts["references"])["sacrebleu"]
    )
    assert metrics.SacreBleu().compute(predictions=["a b c d e"], references=["a b c d e"])[
        "sacrebleu"
    ] == pytest.approx(100)
    # 5 tokens against 6 with the same beginning: all precisions 1, brevity penalty exp(1 - 6/5)
    short = metrics.SacreBleu().compute(predictions=["a b c d e"], references=["a b c d e f"])["sacrebleu"]
    assert short == pytest.approx(100 * np.exp(1 - 6 / 5))
    assert metrics.ChrF().compute(predictions=["abcd"], references=["abcd"])["chrf"] == pytest.approx(100)
    assert metrics.ChrF().compute(predictions=["abcd"], references=["wxyz"])["chrf"] == pytest.approx(0, abs=1e-6)
    # 3 of 4 words: precision = recall = 3/4; bigrams: 1 of 3; longest common subsequence: 3 words
    rouge = metrics.Rouge().compute(predictions=["the black cat sat"], references=["the grey cat sat"])
    assert rouge == pytest.approx({"rouge1": 75, "rouge2": 100 / 3, "rougeL": 75})


def test_rows_may_come_in_batches():
    metric = metrics.Accuracy()
    for start in range(0, 200, 33):
        metric.add_batch(predictions=GUESSES[start : start + 33], references=LABELS[start : start + 33])
    assert metric.compute()["accuracy"] == pytest.approx(np.mean(LABELS == GUESSES))
