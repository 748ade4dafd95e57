"""Adding a kind is one stage module plus one row in the table: nothing else names the kinds."""

import json

import pytest

from pipelines.__main__ import main
from pipelines.chain import chain
from pipelines.kinds import KINDS, LANGUAGE_MODEL, MODEL, Kind
from pipelines.recipe.problems import RecipeError
from pipelines.recipe.recipe import load

MODULE = '''
"""Backwards: a language model learns raw text as pretrain does, and counts how often it saw it."""

from pipelines.stages import pretrain

DEFAULTS = {**pretrain.DEFAULTS, "learning_rate": 1e-3}


def reported(stage):
    return ("loss", "perplexity")


def problems(stage, kinds):
    if stage.sections.get("args", {}).get("max_steps", 1) > 5:
        yield "args.max_steps", "backwards takes at most five steps", stage.sections["args"]["max_steps"]


def run(stage):
    return {**pretrain.run(stage), "eval_backwards": 0.5}
'''


@pytest.fixture
def chain_of_it(tmp_path, monkeypatch, recipe, write):
    """A recipe with a stage of a new kind and one that builds on it."""
    (tmp_path / "backwards_stage.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    row = Kind(
        "raw text, backwards",
        {**MODEL, "tokenizer": "TokenizerSection", "data": "DataSection", "args": "PretrainArguments"},
        rows="text",
        auto_class=LANGUAGE_MODEL,
        hub_task="text-generation",
        headline=(("eval_backwards", "backwardness"),),
        module="backwards_stage",
    )
    monkeypatch.setitem(KINDS, "backwards", row)
    text = write("text.jsonl", [{"text": f"the cat sees {i} red fish and the dog eats {i * i}"} for i in range(60)])
    stage = {
        "kind": "backwards",
        "model": {"config": {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 32}},
        "tokenizer": {"train": "bpe", "vocab_size": 300},
        "data": {"train": text, "validation": 0.2},
        "args": {"max_steps": 2, "max_length": 16, "global_batch_size": 4},
    }
    prompts = write("prompts.jsonl", [{"prompt": "the cat"}])
    samples = {"kind": "sample", "sample": {"models": ["stage:back"]}, "data": {"train": prompts}}
    return recipe({"back": stage, "samples": samples})


def test_check_knows_the_new_kind(chain_of_it):
    load(chain_of_it)  # `sample` takes it, because its row tells that it writes text
    for override, words in (
        ("stages.back.args.max_steps=6", "backwards takes at most five steps"),
        ("stages.back.args.max_steps=0", "must be at least 1"),
        ("stages.back.args.metric_for_best_model=f1", "must be one of loss, perplexity"),
        ("stages.back.kind=backward", "did you mean backwards?"),
        ("stages.back.model.use_peft=true", "adapters are for"),
    ):
        with pytest.raises(RecipeError) as error:
            load(chain_of_it, [override])
        assert words in str(error.value)


def test_the_new_kind_runs_through_every_verb(chain_of_it, tmp_path, capsys):
    folder = tmp_path / "out"
    for words in (
        ["check", str(chain_of_it), "--offline"],
        ["plan", str(chain_of_it), "back"],
        ["status", str(chain_of_it)],
    ):
        assert main(words) == 0, words
        assert "back" in capsys.readouterr().out
    chain.run(load(chain_of_it), ["back"])
    final = json.loads((folder / "back" / "stage.json").read_text())
    assert final["metrics"]["eval_backwards"] == 0.5 and final["metrics"]["steps"] == 2
    card = (folder / "back" / "README.md").read_text()
    assert "kind `backwards`" in card and "pipeline_tag: text-generation" in card
    assert main(["keys", "backwards", "args"]) == 0 and "0.001 here" in capsys.readouterr().out
    assert main(["report", str(folder)]) == 0
    assert "backwardness" in next(folder.glob("*.html")).read_text()
    assert main(["status", str(chain_of_it)]) == 0 and "finished" in capsys.readouterr().out
