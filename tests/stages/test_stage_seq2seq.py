"""The stage seq2seq: it learns to translate from nothing or from a saved model, measures the texts, loses nothing."""

import json
import random

import pytest
import torch

from pipelines.chain import chain
from pipelines.errors import DataError
from pipelines.recipe.problems import RecipeError
from pipelines.recipe.recipe import load
from pipelines.training import trainer

WORDS = [
    {"red": "rosk", "blue": "lazu"},
    {"dog": "kan", "cat": "gat"},
    {"eats": "mang", "sees": "vid"},
    {"fish": "silp", "bird": "avi"},
]
T5 = {"model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
BART = {
    "model_type": "bart",
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 32,
    "dropout": 0.0,
    "init_std": 0.1,
}


def pairs(count, seed=0):
    """Sentences of two to four words and their translation."""
    chance, out = random.Random(seed), []
    for _ in range(count):
        words = [chance.choice(list(slot)) for slot in WORDS[: chance.randint(2, 4)]]
        target = " ".join(slot[word] for slot, word in zip(WORDS, words, strict=False))
        out.append({"source": " ".join(words), "target": target})
    return out


@pytest.fixture
def run(recipe):
    """`run(data, name=…, config=…, task=…, **args)` runs one seq2seq stage and returns `(stage, stage.json)`."""

    def run_(data, name="s", config=None, model=None, task=None, tokenizer=None, **args):
        args = {
            "max_steps": 4,
            "per_device_train_batch_size": 8,
            "learning_rate": 5e-3,
            "max_source_length": 24,
            "max_target_length": 24,
            "save_steps": 1000,
            "eval_steps": 1000,
            "report_to": [],
            **args,
        }
        body = {"kind": "seq2seq", "model": model or {"config": config or T5}, "data": data, "args": args}
        if model is None:
            body["tokenizer"] = tokenizer or {"train": "bpe", "vocab_size": 360}
        if task:
            body["task"] = task
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


def reload(stage):
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    return AutoModelForSeq2SeqLM.from_pretrained(stage.folder).eval(), AutoTokenizer.from_pretrained(stage.folder)


def test_learns_to_translate_from_nothing_and_on_from_there(run, write):
    import sacrebleu

    data = {"train": write("t.jsonl", pairs(200)), "validation": write("v.jsonl", pairs(20, seed=1))}
    task = {"prefix": "say: ", "metrics": ["sacrebleu", "chrf", "rouge"]}
    stage, record = run(data, task=task, max_steps=150, per_device_train_batch_size=16, learning_rate=1e-2)
    metrics = record["metrics"]
    assert metrics["eval_chrf"] > 95 and metrics["eval_rouge1"] > 95 and metrics["eval_ended"] == 1
    samples = [json.loads(line) for line in (stage.folder / "samples.jsonl").read_text().splitlines()]
    assert [s["target"] for s in samples] == [p["target"] for p in pairs(20, seed=1)]
    assert samples[0]["source"] == "say: " + pairs(1, seed=1)[0]["source"]
    expected = sacrebleu.corpus_bleu([s["generated"] for s in samples], [[s["target"] for s in samples]]).score
    assert metrics["eval_sacrebleu"] == pytest.approx(expected)
    model, tokenizer = reload(stage)  # the tokenizer ends a source with EOS by itself, generation stops by itself
    out = model.generate(**tokenizer("say: red dog", return_tensors="pt"))
    assert tokenizer.decode(out[0], skip_special_tokens=True).strip() == "rosk kan"
    assert model.config.use_cache and tokenizer("red")["input_ids"][-1] == tokenizer.eos_token_id
    further, record = run(data, name="further", task=task, model={"model_name_or_path": str(stage.folder)}, max_steps=1)
    assert record["metrics"]["eval_chrf"] > 90


@pytest.mark.parametrize(
    "tokenizer", [{"train": "bpe", "vocab_size": 360}, {"train": "wordpiece", "vocab_size": 200, "lowercase": False}]
)
def test_bart_generates_with_its_own_special_tokens(run, write, tokenizer):
    data = {"train": write("t.jsonl", pairs(150)), "validation": write("v.jsonl", pairs(10, seed=1))}
    stage, record = run(data, config=BART, tokenizer=tokenizer, max_steps=120, per_device_train_batch_size=16)
    assert record["metrics"]["eval_chrf"] > 80
    model, reloaded = reload(stage)
    assert model.generation_config.eos_token_id == reloaded.eos_token_id == model.generation_config.forced_eos_token_id
    assert model.generation_config.decoder_start_token_id == reloaded.pad_token_id


def test_accumulation_changes_nothing_and_losses_are_token_means(run, write):
    data = {"train": write("t.jsonl", pairs(16)), "validation": write("v.jsonl", pairs(11, seed=1))}
    common = {
        "max_steps": 2,
        "logging_steps": 1,
        "global_batch_size": 16,
        "max_grad_norm": 1000.0,
        "optim": "sgd",
        "learning_rate": 0.1,
    }
    whole, one = run(data, name="whole", per_device_train_batch_size=16, per_device_eval_batch_size=11, **common)
    split, two = run(data, name="split", per_device_train_batch_size=2, per_device_eval_batch_size=3, **common)
    a, b = weights(whole), weights(split)
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)
    losses = [[e["loss"] for e in r["log"] if "loss" in e] for r in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and len(losses[0]) == 2
    assert one["metrics"]["eval_loss"] == pytest.approx(two["metrics"]["eval_loss"], rel=1e-4)
    model, tokenizer = reload(split)
    total = tokens = 0
    for pair in pairs(11, seed=1):
        labels = tokenizer(text_target=pair["target"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            total += (
                model(**tokenizer(pair["source"], return_tensors="pt"), labels=labels).loss.item() * labels.shape[1]
            )
        tokens += labels.shape[1]
    assert two["metrics"]["eval_loss"] == pytest.approx(total / tokens, rel=1e-4)


def test_a_killed_run_ends_with_the_very_weights_of_an_uninterrupted_one(run, write, monkeypatch):
    data = {"train": write("t.jsonl", pairs(30)), "validation": write("v.jsonl", pairs(4, seed=1))}
    common = {"config": {**T5, "dropout_rate": 0.2}, "max_steps": 8, "save_steps": 3, "eval_steps": 3}
    whole, _ = run(data, name="whole", **common)
    original = trainer.ChainTrainer._save_checkpoint

    def save(self, *args):
        original(self, *args)
        if self.state.global_step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.ChainTrainer, "_save_checkpoint", save)
        with pytest.raises(KeyboardInterrupt):
            run(data, name="killed", **common)
    resumed, _ = run(data, name="killed", **common)
    assert same(weights(whole), weights(resumed))


def test_the_best_model_by_a_generation_metric_is_kept(run, write):
    data = {"train": write("t.jsonl", pairs(60)), "validation": write("v.jsonl", pairs(8, seed=1))}
    args = {"metric_for_best_model": "chrf", "early_stopping_patience": 3, "eval_steps": 4, "save_steps": 4}
    _, record = run(data, task={"metrics": ["chrf"]}, max_steps=24, **args)
    assert record["metrics"]["eval_chrf"] == pytest.approx(
        max(e["eval_chrf"] for e in record["log"] if "eval_chrf" in e)
    )


def test_long_rows_are_cut_and_counted_or_dropped_or_refused(run, write):
    long = {"source": "red " * 40, "target": "rosk " * 40}
    train, held = write("t.jsonl", [*pairs(12), long]), write("v.jsonl", [*pairs(3, seed=1), long])
    stage, record = run({"train": train, "validation": held}, name="cut")
    assert record["rows"]["train"]["too_long"] == 1 and record["rows"]["validation"]["used"] == 4
    samples = [json.loads(line) for line in (stage.folder / "samples.jsonl").read_text().splitlines()]
    assert samples[3]["target"] == long["target"]  # measured against the whole text
    _, record = run({"train": train, "too_long": "drop"}, name="drop")
    assert record["rows"]["train"]["used"] == 12
    with pytest.raises(DataError, match=r"1 of 13 rows are longer than 24 tokens .*found, the first at .*t\.jsonl:13"):
        run({"train": train, "too_long": "error"}, name="error")


def test_lengths_beyond_the_positions_are_refused(run, write):
    with pytest.raises(RecipeError, match="(?s)max_target_length = 64.*is more than the model's 32 positions"):
        run({"train": write("t.jsonl", pairs(20))}, config=BART, max_target_length=64)


def test_settings_that_cannot_work_are_refused_at_check(recipe, write):
    body = {
        "kind": "seq2seq",
        "model": {"config": {"model_type": "t5"}, "load_in_8bit": True},
        "tokenizer": {"train": "wordpiece", "vocab_size": 50},
        "task": {"metrics": ["bleu", "chrf"]},
        "data": {"train": write("t.jsonl", pairs(5)), "validation": 0.2},
        "args": {"metric_for_best_model": "rouge1", "max_target_length": 1},
    }
    with pytest.raises(RecipeError) as error:
        load(recipe({"s": body}), read_data=False)
    for part in (
        "model.load_in_8bit",
        "tokenizer.lowercase",
        "tokenizer.vocab_size",
        "task.metrics",
        "did you mean sacrebleu",
        "args.max_target_length",
        "must be one of loss, chrf",
    ):
        assert part in str(error.value), part
