"""The stage mlm: masks are a function of seed, epoch and row; loss and metrics are over hidden words; nothing
is lost.
"""

import json
import random

import numpy as np
import pytest
import torch

from pipelines.chain import chain
from pipelines.data import token_file, train_tokenizer
from pipelines.recipe.problems import RecipeError
from pipelines.recipe.recipe import load
from pipelines.training import masked_words, trainer

NAMES, COLOURS, PLACES = (
    ["otter", "kettle", "wagon", "lantern"],
    ["red", "green", "blue", "yellow"],
    ["mill", "bridge", "harbour", "market"],
)


def documents(count, seed=0):
    """Sentences in which the place follows from the thing: a hidden word can be told from the others."""
    chance = random.Random(seed)
    out = []
    for _ in range(count):
        i = chance.randrange(4)
        out.append({"text": f"the {NAMES[i]} is {COLOURS[i]} and it stands at the {PLACES[i]} ."})
    return out


@pytest.fixture(scope="module")
def wordpiece():
    return train_tokenizer.train_wordpiece([d["text"] for d in documents(200)], vocab_size=120)


@pytest.fixture
def windows(tmp_path, wordpiece):
    texts = [d["text"] for d in documents(300)]
    token_file.tokenize_corpus(texts, wordpiece, tmp_path / "tokens", separator_id=wordpiece.sep_token_id)
    return token_file.Windows(tmp_path / "tokens", 30)


@pytest.fixture
def run(recipe, wordpiece, tmp_path):
    """`run(data, name=…, **args)` runs one mlm stage and returns `(stage, stage.json)`."""
    wordpiece.save_pretrained(tmp_path / "tokenizer")

    def run_(data, name="m", tokenizer=None, config=(), **args):
        config = {
            "model_type": "bert",
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 32,
            "initializer_range": 0.1,
            **dict(config),
        }
        args = {
            "max_length": 32,
            "max_steps": 8,
            "per_device_train_batch_size": 8,
            "learning_rate": 5e-3,
            "save_steps": 4,
            "eval_steps": 8,
            "report_to": [],
            **args,
        }
        body = {"kind": "mlm", "model": {"config": config}, "data": data, "args": args}
        if tokenizer:
            body["tokenizer"] = tokenizer
        else:
            body["model"]["tokenizer_name_or_path"] = str(tmp_path / "tokenizer")
        loaded = load(recipe({name: body}, name=f"{name}.yaml"))
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


def test_windows_are_full_and_framed_and_labels_are_what_was_hidden(windows, wordpiece):
    items = masked_words.MaskedWindows(windows, wordpiece, 0.15, whole_words=False, seed=1)
    batch = masked_words.stack([items[i] for i in range(len(items))])
    ids, labels = batch["input_ids"], batch["labels"]
    assert ids.shape == labels.shape == (len(windows), 32) and batch["row"].tolist() == list(range(len(windows)))
    assert (ids[:, 0] == wordpiece.cls_token_id).all() and (ids[:, -1] == wordpiece.sep_token_id).all()
    original = torch.stack([windows[i]["input_ids"] for i in range(len(windows))])
    hidden = labels != -100
    assert torch.equal(torch.where(hidden, labels, ids)[:, 1:-1], original)
    assert not hidden[:, 0].any() and not hidden[:, -1].any()
    assert not hidden[:, 1:-1][original == wordpiece.sep_token_id].any()
    words = (original != wordpiece.sep_token_id).sum()
    assert 0.12 < hidden.sum() / words < 0.18
    assert 0.7 < (ids[hidden] == wordpiece.mask_token_id).float().mean() < 0.9
    assert 0.03 < (ids[hidden] == labels[hidden]).float().mean() < 0.25  # left as they were


def test_masks_depend_on_seed_epoch_and_row_alone(windows, wordpiece):
    make = lambda **kwargs: masked_words.MaskedWindows(
        windows, wordpiece, 0.15, whole_words=False, **{"seed": 1, **kwargs}
    )  # noqa: E731
    first, second = make(), make()
    torch.manual_seed(0)
    expected = first[5]["labels"]
    torch.rand(7)  # neither the global random state nor what was drawn before matters
    second[3], second[9]
    assert torch.equal(second[5]["labels"], expected)
    assert not torch.equal(make(seed=2)[5]["labels"], expected)
    assert not torch.equal(first[6]["labels"] != -100, expected != -100)
    second.set_epoch(1)
    assert not torch.equal(second[5]["labels"], expected)
    fixed = make(dynamic=False)
    fixed.set_epoch(1)
    assert torch.equal(fixed[5]["labels"], expected)


def test_whole_words_are_hidden_whole(tmp_path):
    chance = random.Random(0)
    words = [
        "".join(chance.choices("abcdefgh", k=7)) for _ in range(60)
    ]  # too many for 105 entries: they come in pieces
    texts = [" ".join(chance.choices(words, k=9)) for _ in range(60)]
    small = train_tokenizer.train_wordpiece(texts, vocab_size=105)
    token_file.tokenize_corpus(texts, small, tmp_path / "tokens", separator_id=small.sep_token_id)
    pieces = token_file.Windows(tmp_path / "tokens", 30)
    items = masked_words.MaskedWindows(pieces, small, 0.3, whole_words=True, seed=1)
    tokens = small.convert_ids_to_tokens(range(len(small)))
    several = 0
    for i in range(len(items)):
        item = items[i]
        ids = torch.where(item["labels"] != -100, item["labels"], item["input_ids"]).tolist()
        hidden = (item["labels"] != -100).tolist()
        for j in range(2, 31):
            if tokens[ids[j]].startswith("##") and tokens[ids[j - 1]] not in ("[CLS]", "[SEP]"):
                assert hidden[j] == hidden[j - 1], (i, j)
                several += hidden[j]
        assert all(t == small.mask_token_id for t, h in zip(item["input_ids"].tolist(), hidden, strict=True) if h)
    assert several > 10


def test_word_starts_of_byte_level_tokenizers(tokenizer):
    starts = masked_words.word_starts(tokenizer)
    ids = tokenizer(" dog eats")["input_ids"]
    texts = tokenizer.convert_ids_to_tokens(ids)
    assert [bool(starts[i]) for i in ids] == [t.startswith("Ġ") for t in texts]
    assert np.array_equal(masked_words.word_offsets(torch.tensor([[True, False, True]])), [[[2, 3], [3, 4], [5, 6]]])


def test_a_tokenizer_without_mask_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"no \[MASK\] token"):
        masked_words.edges(tokenizer)


def test_learns_and_saves_an_encoder_that_fills_in(run, write):
    from transformers import pipeline

    data = {"train": write("t.jsonl", documents(400)), "validation": write("v.jsonl", documents(60, seed=1))}
    tokenizer = {"train": "wordpiece", "vocab_size": 200}
    settings = {"max_steps": 200, "eval_steps": 200, "save_steps": 200, "learning_rate": 3e-3}
    settings |= {"per_device_train_batch_size": 16, "config": {"hidden_size": 64, "hidden_dropout_prob": 0.0}}
    stage, record = run(data, tokenizer=tokenizer, **settings)
    metrics = record["metrics"]
    assert metrics["eval_accuracy"] > 0.8
    assert metrics["eval_pseudo_perplexity"] == pytest.approx(np.exp(metrics["eval_loss"]))
    assert record["rows"]["train"]["documents"] == 400 and record["rows"]["train"]["context"] == 32
    fill = pipeline("fill-mask", model=str(stage.folder))
    assert fill("the otter is red and it stands at the [MASK] .")[0]["token_str"] == "mill"


def test_validation_is_the_mean_over_hidden_words_at_any_batch_size(run, write, tmp_path):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    data = {"train": write("t.jsonl", documents(100)), "validation": write("v.jsonl", documents(50, seed=1))}
    stage, record = run(data, per_device_eval_batch_size=7)
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(stage.folder), AutoTokenizer.from_pretrained(stage.folder)
    tokens = token_file.Windows(tmp_path / "out/.tokens/m/validation", 30)
    items = masked_words.MaskedWindows(tokens, tokenizer, 0.15, False, seed=42, dynamic=False)
    batch = masked_words.stack([items[i] for i in range(len(items))])
    with torch.no_grad():
        logits = model.eval()(batch["input_ids"]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    assert record["metrics"]["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert record["metrics"]["eval_hidden_words"] == (batch["labels"] != -100).sum()


def test_accumulation_changes_nothing(run, write):
    data = {"train": write("t.jsonl", documents(200))}
    common = {"global_batch_size": 8, "optim": "sgd", "max_grad_norm": 1000.0, "logging_steps": 1, "max_steps": 3}
    common["config"] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    whole, one = run(data, name="whole", per_device_train_batch_size=8, **common)
    split, two = run(data, name="split", per_device_train_batch_size=2, **common)
    a, b = weights(whole), weights(split)
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)
    losses = [[e["loss"] for e in r["log"] if "loss" in e] for r in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and len(losses[0]) == 3
    assert 3 < losses[0][0] < 7  # about log(vocabulary), not a multiple of it


def test_a_killed_run_ends_with_the_very_weights_of_an_uninterrupted_one(run, write, monkeypatch):
    data = {"train": write("t.jsonl", documents(100)), "validation": write("v.jsonl", documents(30, seed=1))}
    common = {"max_steps": 12, "eval_steps": 2}  # 4 windows of 8 rows per epoch: three epochs, other masks in each
    whole, _ = run(data, name="whole", **common)
    original = trainer.ChainTrainer._save_checkpoint

    def save(self, *args):
        original(self, *args)
        if self.state.global_step == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.ChainTrainer, "_save_checkpoint", save)
        with pytest.raises(KeyboardInterrupt):
            run(data, name="killed", **common)
    resumed, _ = run(data, name="killed", **common)
    assert same(weights(whole), weights(resumed))


def test_a_classifier_starts_from_the_encoder(run, write, recipe):
    from safetensors.torch import load_file

    stage, _ = run({"train": write("t.jsonl", documents(100))})
    rows = [{"text": d["text"], "label": int("red" in d["text"])} for d in documents(40)]
    body = {
        "kind": "classify",
        "model": {"model_name_or_path": str(stage.folder)},
        "data": {"train": write("c.jsonl", rows)},
        "args": {"max_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 1e-30, "report_to": []},
    }
    loaded = load(recipe({"c": body}, name="c.yaml"))
    chain.run(loaded)
    made, base = load_file(loaded["c"].folder / "model.safetensors"), weights(stage)
    shared = [k for k in made if k in base]
    assert len(shared) > 20 and all(torch.equal(made[k], base[k]) for k in shared)


def test_settings_that_cannot_work_are_refused_at_check(recipe, write):
    body = {
        "kind": "mlm",
        "model": {"config": {"model_type": "bert"}, "use_peft": True, "chat_template": "plain"},
        "tokenizer": {"train": "bpe", "vocab_size": 100},
        "data": {"train": write("t.jsonl", documents(5))},
        "args": {"mlm_probability": 1.5, "max_length": 4, "load_best_model_at_end": True},
    }
    with pytest.raises(RecipeError) as error:
        load(recipe({"m": body}), read_data=False)
    for part in (
        "model.use_peft",
        "model.chat_template",
        "need `wordpiece`",
        "tokenizer.vocab_size",
        "args.mlm_probability",
        "args.max_length",
        "needs held-out rows",
    ):
        assert part in str(error.value), part
