"""A classifier's score of an answer is that of transformers on the text as its training put it: every family, label and
shape.
"""

import json

import pytest
import torch
from test_families import CAUSAL, ENCODERS, make
from tiny_words import WORDS

from pipelines.errors import SetupError
from pipelines.models import loading
from pipelines.models.config import ModelSection
from pipelines.models.scorers import Classifier, load_scorer, trained_reading

AUTO = "AutoModelForSequenceClassification"
PROMPTS = [
    "the cat",
    [
        {"role": "user", "content": "what is it"},
        {"role": "assistant", "content": "a tree"},
        {"role": "user", "content": "which colour"},
    ],
    "a dog sees",
]
ANSWERS = [" likes the tree", "it is green and big", " " + " ".join(WORDS * 2)]


def folder_of(tmp_path, family, reads=None, labels=("bad", "good"), **config):
    """A tiny classifier of this family with a random head, as a classify stage that read its texts so leaves it."""
    of = ENCODERS if family in ENCODERS else CAUSAL
    _, sizes, words = of[family]
    labels = dict(enumerate(labels))
    sizes = {**sizes, "id2label": labels, "label2id": {v: k for k, v in labels.items()}, **config}
    folder = make(tmp_path / family, family, sizes, words, AUTO)
    if reads is not None:
        (folder / "stage.json").write_text(json.dumps({"kind": "classify", "rows": {"reads": reads}}))
    return str(folder)


def scores_of(folder, label, prompts, answers, continued):
    model, _ = load_scorer(ModelSection(model_name_or_path=folder), label)
    assert isinstance(model, Classifier)
    return model(model.features(prompts, answers, continued)).tolist()


def logits_of(folder, *texts, tokens):
    """What transformers itself gives for text, or text and text_pair: the tokenizer's own marks, segments and
    cutting.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    batch = tokenizer(*texts, truncation=True, max_length=tokens, return_tensors="pt")
    if getattr(model.config, "type_vocab_size", 1) < 2:  # a tokenizer that writes segments for a model without them
        batch.pop("token_type_ids", None)
    with torch.no_grad():
        return model.eval()(**batch).logits[0]


def joined(prompt, between):
    return prompt if isinstance(prompt, str) else between.join(m["content"] for m in prompt)


@pytest.mark.parametrize("family", [*ENCODERS, "gpt2", "llama", "qwen3"])
def test_every_family_reads_text_as_its_training_did(family, tmp_path):
    folder = folder_of(tmp_path, family, {"pairs": False, "tokens": 24, "too_long": "truncate"})
    for continued in (True, False):
        expected = []
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
            logits = logits_of(folder, (joined(prompt, "") if continued else "") + answer, tokens=24)
            expected.append((logits[1] - logits[0]).item())
        assert scores_of(folder, "good", PROMPTS, ANSWERS, continued) == pytest.approx(expected, abs=1e-4)
        assert scores_of(folder, "bad", PROMPTS, ANSWERS, continued) == pytest.approx([-x for x in expected], abs=1e-4)


@pytest.mark.parametrize("family", ENCODERS)
def test_every_encoder_reads_pairs_where_it_was_trained_on_pairs(family, tmp_path):
    folder = folder_of(tmp_path, family, {"pairs": True, "tokens": 24, "too_long": "truncate"})
    expected = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        logits = logits_of(folder, joined(prompt, "\n"), answer, tokens=24)
        expected.append((logits[1] - logits[0]).item())
    assert scores_of(folder, "good", PROMPTS, ANSWERS, True) == pytest.approx(expected, abs=1e-4)


def test_log_odds_of_several_labels_of_many_at_once_and_a_number(tmp_path):
    answer = ["it is green"]
    three = folder_of(tmp_path, "bert", labels=("bad", "fair", "good"))
    p = logits_of(three, answer[0], tokens=64).softmax(-1)[2]
    assert scores_of(three, "good", [""], answer, False) == pytest.approx([(p / (1 - p)).log().item()], abs=1e-5)
    many = folder_of(tmp_path, "distilbert", labels=("rude", "wrong"), problem_type="multi_label_classification")
    assert scores_of(many, "wrong", [""], answer, False) == pytest.approx(
        [logits_of(many, answer[0], tokens=64)[1].item()]
    )
    number = folder_of(tmp_path, "roberta", {"too_long": "truncate"}, labels=("stars",), problem_type="regression")
    assert scores_of(number, None, [""], answer, False) == pytest.approx(
        [logits_of(number, answer[0], tokens=64).item()]
    )
    for label, words in ((None, "name one of them"), ("fine", "'fine' is none of them")):
        with pytest.raises(SetupError, match=f"a classifier of bad, fair, good: .*{words}"):
            scores_of(three, label, [""], answer, False)


def test_what_training_left_out_is_refused_and_what_it_cut_is_cut_and_counted(tmp_path, caplog):
    long = [ANSWERS[2]]
    dropped = folder_of(tmp_path, "bert", {"tokens": 16, "too_long": "drop"})
    assert trained_reading(dropped).tokens == 16
    with pytest.raises(SetupError, match="up to 16 tokens, longer ones were left out .* 1 of 1 answers are longer"):
        scores_of(dropped, "good", [""], long, False)
    public = folder_of(tmp_path, "roberta")  # nobody knows how it was trained: what its positions allow
    model, _ = load_scorer(ModelSection(model_name_or_path=public), "good")
    for _ in range(2):
        (feature,) = model.features([""], [ANSWERS[2] * 2], False)
    assert len(feature["input_ids"]) == loading.positions(model.model) == 64
    assert caplog.text.count("1 of 1 texts are cut at 64 tokens, the most that it reads") == 1
