"""The stage classify: it learns, keeps label names, weighs classes as said, stops early, and loses nothing."""

import json
import random

import pytest
import torch

from pipelines.chain import chain
from pipelines.errors import DataError, ModelError
from pipelines.models.config import ModelSection
from pipelines.models.loading import load_model
from pipelines.recipe.problems import RecipeError
from pipelines.recipe.recipe import load
from pipelines.training import trainer

GOOD, BAD, OTHER = (
    ["good", "fine", "great"],
    ["bad", "poor", "awful"],
    ["the", "film", "was", "a", "plot", "very", "and"],
)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """A folder with a BERT of about 20k parameters without a pooler or head, random weights, no dropout."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *OTHER]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def rows(count, good="positive", bad="negative", share=0.5, seed=0):
    """Texts with one word that tells the label."""
    chance, out = random.Random(seed), []
    for _ in range(count):
        positive = chance.random() < share
        text = chance.choices(OTHER, k=chance.randint(2, 8))
        text.insert(chance.randrange(len(text)), chance.choice(GOOD if positive else BAD))
        out.append({"text": " ".join(text), "label": good if positive else bad})
    return out


@pytest.fixture
def run(recipe, tiny_bert):
    """`run(data, name=…, task=…, **args)` runs one classify stage and returns `(stage, stage.json)`."""

    def run_(data, task=None, name="c", model=None, **args):
        args = {
            "max_steps": 40,
            "per_device_train_batch_size": 16,
            "learning_rate": 5e-3,
            "lr_scheduler_type": "constant",
            "report_to": [],
            **args,
        }
        body = {"kind": "classify", "model": model or {"model_name_or_path": tiny_bert}, "data": data, "args": args}
        loaded = load(recipe({name: body | ({"task": task} if task else {})}, name=f"{name}.yaml"))
        chain.run(loaded)
        folder = loaded[name].folder
        record = json.loads((folder / "stage.json").read_text())
        record["log"] = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
        return loaded[name], record

    return run_


def weights(stage):
    from safetensors.torch import load_file

    return load_file(stage.folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def predict(folder, texts):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        logits = model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    return model, logits


def test_learns_and_keeps_label_names_and_reports_rows(run, write):
    data = {"train": write("t.jsonl", rows(160)), "validation": write("v.jsonl", rows(40, seed=1))}
    stage, record = run(data)
    metrics = record["metrics"]
    assert metrics["eval_accuracy"] > 0.95 and metrics["eval_f1_macro"] > 0.95 and metrics["eval_matthews"] > 0.9
    matrix = torch.tensor(metrics["confusion_matrix"])
    assert matrix.sum() == 40 and matrix.diagonal().sum() / 40 == metrics["eval_accuracy"]
    assert metrics["labels"] == ["negative", "positive"]
    held_out = rows(40, seed=1)
    assert matrix.sum(1).tolist() == [sum(r["label"] == name for r in held_out) for name in metrics["labels"]]
    assert sum(record["rows"]["train"]["labels"].values()) == record["rows"]["train"]["used"] == 160
    model, logits = predict(stage.folder, ["the film was great", "a very poor plot"])
    assert [model.config.id2label[i] for i in logits.argmax(-1).tolist()] == ["positive", "negative"]
    assert model.config.label2id == {"negative": 0, "positive": 1}
    assert model.config.problem_type == "single_label_classification"


def test_declared_labels_fix_the_ids_and_names_and_ids_may_stand_in_the_data(run, write):
    train = rows(96, good="positive", bad=0)  # one label by name, one by id
    task = {"labels": ["negative", "neutral", "positive"]}
    stage, record = run({"train": write("t.jsonl", train)}, task)
    model, logits = predict(stage.folder, ["great film", "awful film"])
    assert logits.shape == (2, 3)
    assert [model.config.id2label[i] for i in logits.argmax(-1).tolist()] == ["positive", "negative"]


def test_multi_label(run, write):
    chance = random.Random(3)
    data = []
    for _ in range(200):
        present = [name for name in ("nice", "long") if chance.random() < 0.5]
        words = [{"nice": "great", "long": "plot"}[p] for p in present] + chance.choices(["film", "was", "a"], k=3)
        data.append({"text": " ".join(words), "label": present})
    task = {"problem_type": "multi_label_classification"}
    stage, record = run({"train": write("t.jsonl", data), "validation": 0.2}, task)
    assert record["metrics"]["eval_subset_accuracy"] > 0.95 and record["metrics"]["eval_f1_micro"] > 0.95
    model, logits = predict(stage.folder, [row["text"] for row in data])
    assert model.config.id2label == {0: "long", 1: "nice"}
    truth = torch.tensor([["long" in row["label"], "nice" in row["label"]] for row in data])
    assert ((logits > 0) == truth).all(1).float().mean() > 0.95


def test_regression(run, write):
    chance = random.Random(4)
    data = []
    for _ in range(200):
        words = chance.choices([*GOOD, *BAD], k=4)
        data.append({"text": " ".join(words), "label": sum(w in GOOD for w in words) / 4})
    task = {"problem_type": "regression", "labels": ["goodness"]}
    stage, record = run({"train": write("t.jsonl", data), "validation": 0.2}, task, max_steps=80)
    metrics = record["metrics"]
    assert metrics["eval_spearman"] > 0.9 and metrics["eval_pearson"] > 0.9
    assert metrics["eval_mse"] == pytest.approx(metrics["eval_loss"], rel=1e-4)
    model, logits = predict(stage.folder, ["great good fine great", "bad awful poor bad"])
    assert logits.shape == (2, 1) and logits[0] > 0.7 > 0.3 > logits[1]
    assert model.config.id2label == {0: "goodness"}


def first_loss(record):
    return next(entry["loss"] for entry in record["log"] if "loss" in entry)


@pytest.mark.parametrize("weighted", [False, True])
def test_accumulation_changes_nothing_and_the_weighted_loss_is_the_closed_form(run, write, tiny_bert, weighted):
    train = rows(32, share=0.2)
    data = {"train": write("t.jsonl", train)}
    task = {"class_weights": "balanced"} if weighted else {}
    common = {"max_steps": 3, "logging_steps": 1, "global_batch_size": 32, "max_grad_norm": 1000.0, "optim": "sgd"}
    whole, record = run(data, task, "whole", per_device_train_batch_size=32, **common)
    split, record2 = run(data, task, "split", per_device_train_batch_size=4, **common)
    a, b = weights(whole), weights(split)
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)
    assert first_loss(record) == pytest.approx(first_loss(record2), abs=1e-4)
    untrained, _ = run(data, task, "untrained", per_device_train_batch_size=32, **common | {"learning_rate": 1e-30})
    _, logits = predict(untrained.folder, [r["text"] for r in train])
    labels = torch.tensor([r["label"] == "positive" for r in train]).long()
    counts = torch.bincount(labels).float()
    weight = 32 / (2 * counts) if weighted else torch.ones(2)
    expected = torch.nn.functional.cross_entropy(logits, labels, weight)  # torch divides by the sum of the weights
    assert first_loss(record) == pytest.approx(expected.item(), abs=1e-4)
    if weighted:
        assert counts[0] > 2 * counts[1]
        assert list(record["rows"]["class_weights"].values()) == pytest.approx(weight.tolist())


def interrupt(monkeypatch, at):
    """Make the process die (as far as a test can) right after the checkpoint of step `at` was written."""
    original = trainer.ChainTrainer._save_checkpoint

    def save(self, *args):
        original(self, *args)
        if self.state.global_step == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.ChainTrainer, "_save_checkpoint", save)


def test_a_killed_run_ends_with_the_very_weights_of_an_uninterrupted_one(run, write, tiny_bert, monkeypatch):
    data = {"train": write("t.jsonl", rows(90)), "validation": write("v.jsonl", rows(20, seed=1))}
    model = {"model_name_or_path": tiny_bert, "config": {"hidden_dropout_prob": 0.2}}
    common = {"model": model, "max_steps": 12, "save_steps": 3, "eval_steps": 3, "learning_rate": 1e-3}
    whole, _ = run(data, name="whole", **common)
    for at in (6, 12):  # in the middle, and when all steps were done but nothing was reported yet
        with monkeypatch.context() as patch:
            interrupt(patch, at)
            with pytest.raises(KeyboardInterrupt):
                run(data, name=f"killed{at}", **common)
        resumed, _ = run(data, name=f"killed{at}", **common)
        assert same(weights(whole), weights(resumed)), at


def test_stops_early_with_the_best_model_even_when_killed_after_stopping(run, write, tiny_bert, monkeypatch):
    held_out = rows(30, seed=1)
    wrong = [{**r, "label": {"positive": "negative", "negative": "positive"}[r["label"]]} for r in held_out]
    data = {"train": write("t.jsonl", rows(64)), "validation": write("v.jsonl", wrong)}  # training can only hurt
    common = {
        "early_stopping_patience": 2,
        "eval_steps": 4,
        "max_steps": 400,
        "save_total_limit": 1,
        "learning_rate": 1e-3,
    }
    stage, record = run(data, **common)
    losses = [e["eval_loss"] for e in record["log"] if "eval_loss" in e][:-1]  # the last is of the best model again
    assert record["metrics"]["steps"] < 100
    assert len(losses) == losses.index(min(losses)) + 1 + 2  # two evaluations after the best one
    assert record["metrics"]["eval_loss"] == pytest.approx(min(losses), abs=1e-6)
    with monkeypatch.context() as patch:
        interrupt(patch, record["metrics"]["steps"])
        with pytest.raises(KeyboardInterrupt):
            run(data, name="killed", **common)
    resumed, again = run(data, name="killed", **common)
    assert again["metrics"]["steps"] == record["metrics"]["steps"]
    assert same(weights(stage), weights(resumed))


def test_an_unseen_validation_label_is_an_error_that_names_the_row(run, write):
    odd = [*rows(5, seed=1), {"text": "the plot", "label": "mixed"}]
    data = {"train": write("t.jsonl", rows(40)), "validation": write("v.jsonl", odd)}
    with pytest.raises(RecipeError, match=r"v\.jsonl:6: no training row has the label 'mixed'"):
        run(data)


def test_long_texts_are_cut_and_counted_or_dropped_or_refused(run, write):
    long = {"text": "great " + "plot " * 60, "label": "positive"}
    path = write("t.jsonl", [*rows(40), long])
    _, record = run({"train": path}, name="cut", max_steps=2)
    assert record["rows"]["train"] | {"labels": 0} == {"rows": 41, "used": 41, "too_long": 1, "labels": 0}
    _, record = run({"train": path, "too_long": "drop"}, name="drop", max_steps=2)
    assert record["rows"]["train"]["used"] == 40
    with pytest.raises(DataError, match=r"1 of 41 rows are longer than 32 tokens: found, the first at .*t\.jsonl:41"):
        run({"train": path, "too_long": "error"}, name="error", max_steps=2)


def test_pairs_of_texts(run, write):
    data = [
        {"text": a, "text_pair": b, "label": int(a == b)}
        for a in GOOD + BAD
        for b in GOOD + BAD
        for _ in range(1 + 4 * (a == b))
    ]
    stage, record = run({"train": write("t.jsonl", data)}, max_steps=5)
    assert record["metrics"]["labels"] == ["0", "1"]
    data[3].pop("text_pair")
    with pytest.raises(DataError, match=r"t\.jsonl:4: no text_pair"):
        run({"train": write("t.jsonl", data)}, name="broken", max_steps=5)


def test_a_causal_model_without_padding_token_classifies(run, write, tmp_path, tiny_gpt2):
    data = {"train": write("t.jsonl", rows(400)), "validation": write("v.jsonl", rows(60, seed=1))}
    stage, record = run(data, model={"model_name_or_path": str(tiny_gpt2)}, max_steps=60, eval_steps=60, save_steps=60)
    assert record["metrics"]["eval_accuracy"] > 0.8
    _, together = predict(stage.folder, ["great", "a very very poor plot and the film"])
    _, alone = predict(stage.folder, ["great"])
    assert torch.allclose(together[0], alone[0], atol=1e-5)


def test_a_head_for_another_number_of_classes_is_made_new(run, write):
    three = [{**r, "label": ("a", "b", "c")[i % 3]} for i, r in enumerate(rows(48))]
    first, _ = run({"train": write("three.jsonl", three)}, max_steps=2)
    model = {"model_name_or_path": str(first.folder)}
    second, record = run({"train": write("two.jsonl", rows(48))}, name="d", model=model, max_steps=2)
    assert record["metrics"]["labels"] == ["negative", "positive"]
    assert weights(second)["classifier.weight"].shape[0] == 2


COMMON = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
KINDS = {
    "bert": COMMON,
    "roberta": COMMON,
    "distilbert": {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64},
    "deberta-v2": COMMON,
    "electra": COMMON | {"embedding_size": 32},
    "albert": COMMON | {"embedding_size": 16},
    "modernbert": COMMON | {"pad_token_id": 0},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2},
    "bart": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
}


@pytest.mark.parametrize("kind", KINDS)
def test_only_heads_may_be_new(kind, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModel

    base = AutoModel.from_config(AutoConfig.for_model(kind, vocab_size=50, **KINDS[kind]))
    base.save_pretrained(tmp_path)
    section = ModelSection(model_name_or_path=str(tmp_path))
    model = load_model(section, "AutoModelForSequenceClassification", new_head=True, id2label={0: "a", 1: "b", 2: "c"})
    assert model.config.num_labels == 3
    kept = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in kept if "layer" in name.lower() or name.startswith(("h.", "encoder.")))
    save_file({k: v for k, v in kept.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="they would be random"):
        load_model(section, "AutoModelForSequenceClassification", new_head=True, id2label={0: "a", 1: "b"})


def refused(recipe, body):
    with pytest.raises(RecipeError) as error:
        load(recipe({"c": {"kind": "classify", **body}}), read_data=False)
    return str(error.value)


def test_settings_that_cannot_work_are_refused_at_check(recipe, write, tiny_bert):
    path = write("t.jsonl", rows(10))
    text = refused(
        recipe,
        {
            "model": {"model_name_or_path": tiny_bert, "chat_template": "plain", "load_in_4bit": True},
            "task": {"problem_type": "regression", "class_weights": "balanced", "labels": ["a", "b"]},
            "data": {"train": path},
            "args": {"early_stopping_patience": 0, "metric_for_best_model": "accuracy", "label_smoothing_factor": 0.1},
        },
    )
    for part in (
        "model.chat_template",
        "model.load_in_4bit",
        "task.class_weights",
        "task.labels",
        "label_smoothing_factor",
        "must be at least 1",
        "needs held-out rows",
        "must be one of loss, mse, pearson, spearman",
    ):
        assert part in text, part
    text = refused(
        recipe,
        {
            "model": {"config": {"model_type": "bert"}},
            "task": {"labels": ["1", "2", "3"]},
            "data": {"train": path, "validation": 0.1},
            "args": {
                "load_best_model_at_end": True,
                "eval_strategy": "epoch",
                "save_strategy": "steps",
                "eval_steps": 10,
                "save_steps": 20,
            },
        },
    )
    for part in ("model.tokenizer_name_or_path", "could be a name or an id", "args.save_strategy", "args.save_steps"):
        assert part in text, part


@pytest.mark.parametrize("args", [{"save_steps": 5}, {"eval_strategy": "epoch"}])
def test_saving_follows_evaluation_when_the_best_model_is_kept(run, write, args):
    data = {"train": write("t.jsonl", rows(64)), "validation": 0.2}
    _, record = run(data, max_steps=12, learning_rate=1e-3, metric_for_best_model="accuracy", **args)
    best = max(e["eval_accuracy"] for e in record["log"] if "eval_accuracy" in e)
    assert record["metrics"]["eval_accuracy"] == best
