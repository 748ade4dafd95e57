"""Pretraining from scratch and from a base: what it reads, learns, measures and saves."""

import json
import math

import pytest
import torch

from pipelines.__main__ import main
from pipelines.chain import chain
from pipelines.errors import ModelError
from pipelines.models.config import ModelSection
from pipelines.models.loading import load_model
from pipelines.recipe.problems import RecipeError
from pipelines.recipe.recipe import load

TEXT = [
    {"text": f"the {a} is {c} and the {a} likes the {c} tree"} for a in ("cat", "dog", "bird") for c in ("red", "blue")
]
ARGS = {
    "global_batch_size": 8,
    "max_length": 32,
    "learning_rate": 3e-3,
    "max_steps": 60,
    "eval_steps": 30,
    "warmup_steps": 2,
}


@pytest.fixture
def trained(recipe, write):
    """A base model pretrained from scratch with its own tokenizer."""
    stage = {
        "kind": "pretrain",
        "model": {
            "config": {
                "model_type": "gpt2",
                "n_layer": 2,
                "n_embd": 32,
                "n_head": 2,
                "n_positions": 64,
                "resid_pdrop": 0.0,
            }
        },
        "tokenizer": {"train": "bpe", "vocab_size": 300},
        "data": {"train": write("text.jsonl", TEXT * 60), "validation": write("held.jsonl", TEXT * 5)},
        "args": ARGS,
    }
    loaded = load(recipe({"base": stage}))
    chain.run(loaded)
    return loaded["base"].folder


def test_it_learns_and_reports_exactly_what_it_saved(trained, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record = json.loads((trained / "stage.json").read_text())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    assert record["metrics"]["eval_loss"] < 0.5 * math.log(len(tokenizer))
    # the same tokens through the saved model and transformers' own loss: text, EOS, text, EOS … in windows of 32
    ids = [
        i
        for row in TEXT * 5
        for i in [*tokenizer(row["text"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ]
    windows = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    with torch.no_grad():
        logits = model.eval()(windows).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()).item()
    assert record["metrics"]["eval_loss"] == pytest.approx(loss, rel=1e-4)
    assert record["metrics"]["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)
    assert record["metrics"]["eval_tokens"] == windows.numel() - len(windows)
    assert record["rows"]["validation"]["tokens"] == len(ids)


def test_special_tokens_agree_and_pad_is_not_eos(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.eos_token_id == tokenizer.eos_token_id and model.config.pad_token_id == tokenizer.pad_token_id
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert not (trained / "training_args.bin").exists() and not (trained / "checkpoints").exists()


def test_a_base_model_is_continued_with_its_own_tokenizer(trained, recipe, write):
    from safetensors.torch import load_file

    stage = {
        "kind": "pretrain",
        "model": {"model_name_or_path": str(trained)},
        "data": {"train": write("new.jsonl", [{"text": "a fish sees a green bird"}] * 200)},
        "args": {**ARGS, "max_steps": 5},
    }
    loaded = load(recipe({"more": stage}, output_dir=str(trained.parent / "more")))
    chain.run(loaded)
    before, after = load_file(trained / "model.safetensors"), load_file(loaded["more"].folder / "model.safetensors")
    assert before.keys() == after.keys() and any(not torch.equal(before[k], after[k]) for k in before)
    assert max((before[k] - after[k]).abs().max() for k in before) < 0.1  # moved, not made anew


def test_one_override_swaps_a_base_model_into_a_recipe_for_a_new_one(recipe, write, tiny_gpt2, caplog):
    from safetensors.torch import load_file

    stage = {
        "kind": "pretrain",
        "model": {"config": {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 1}},
        "tokenizer": {"train": "bpe", "vocab_size": 300},
        "data": {"train": write("t.jsonl", TEXT * 40)},
        "args": {**ARGS, "max_steps": 1, "learning_rate": 1e-4, "warmup_steps": 0},
    }
    loaded = load(recipe({"base": stage}), [f"stages.base.model.model_name_or_path={tiny_gpt2}"])
    with caplog.at_level("WARNING", logger="pipelines"):
        chain.run(loaded)
    assert (
        "config describes a new model and is not used" in caplog.text and "tokenizer.train is not used" in caplog.text
    )
    before, after = load_file(tiny_gpt2 / "model.safetensors"), load_file(loaded["base"].folder / "model.safetensors")
    assert before.keys() == after.keys() and max((before[k] - after[k]).abs().max() for k in before) < 1e-3


def test_a_context_beyond_the_positions_is_refused(recipe, write, tiny_gpt2):

    stage = {
        "kind": "pretrain",
        "model": {"model_name_or_path": str(tiny_gpt2)},
        "data": {"train": write("t.jsonl", TEXT * 40)},
        "args": {"max_length": 65, "max_steps": 1},
    }
    with pytest.raises(RecipeError, match="(?s)max_length = 65.*is more than the model's 64 positions"):
        chain.run(load(recipe({"base": stage})))


def test_a_new_model_agrees_with_its_tokenizer(tiny_gpt2):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)

    def new(**config):
        section = ModelSection(config={"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 1, **config})
        return load_model(section, "AutoModelForCausalLM", tokenizer)

    assert new().config.vocab_size == len(tokenizer) and new().config.eos_token_id == tokenizer.eos_token_id
    assert new(vocab_size=1024).get_input_embeddings().weight.shape == (1024, 8)  # padded, as for tensor cores
    with pytest.raises(ModelError, match=r"model\.config\.vocab_size is 3, but the tokenizer's is"):
        new(vocab_size=3)
    with pytest.raises(ModelError, match=r"model\.config\.eos_token_id is 99.*taken from the tokenizer"):
        new(eos_token_id=99)


def test_too_little_text_is_said_without_a_traceback(recipe, write, capsys):

    stage = {
        "kind": "pretrain",
        "model": {"config": {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 1, "n_positions": 512}},
        "tokenizer": {"train": "bpe", "vocab_size": 300},
        "data": {"train": write("text.jsonl", TEXT)},
        "args": {"max_length": 512, "global_batch_size": 1, "max_steps": 1},
    }
    assert main([str(recipe({"base": stage}))]) == 2
    said = capsys.readouterr().err
    assert "error: " in said and "less than one window of 512" in said and "Traceback" not in said
