"""Every training kind keeps its best checkpoint by one rule: the metrics it reports, lower is better where it is."""

import json
from pathlib import Path

import pytest

from pipelines import files
from pipelines.chain import chain
from pipelines.kinds import KINDS
from pipelines.recipe.recipe import load
from pipelines.recipe.stage import Stage
from pipelines.training import arguments, best_checkpoint

LOWER = {"loss", "perplexity", "pseudo_perplexity", "mse", "kl", "ref_perplexity"}
TRAINED = [name for name, kind in KINDS.items() if "args" in kind.sections]


def stage_of(kind: str, args: dict) -> Stage:
    """A stage of this kind of which only the args matter."""
    return Stage(kind, kind, Path("runs") / kind, {"args": args, "data": {"validation": 0.1}})


@pytest.mark.parametrize("kind", TRAINED)
def test_each_metric_has_its_direction_in_every_kind(kind):
    for metric in best_checkpoint.reported(stage_of(kind, {})):
        for name in (metric, f"eval_{metric}"):
            args, wrong = arguments.problems(stage_of(kind, {"metric_for_best_model": name}), arguments.Hardware("cpu"))
            assert wrong == [] and args.load_best_model_at_end, (metric, wrong)
            assert args.greater_is_better == (metric not in LOWER), (kind, name)
            assert (args.eval_strategy, args.eval_steps) == (args.save_strategy.value, args.save_steps)


@pytest.mark.parametrize("kind", TRAINED)
def test_without_a_name_the_first_that_it_reports_decides(kind):
    args, wrong = arguments.problems(stage_of(kind, {"load_best_model_at_end": True}), arguments.Hardware("cpu"))
    assert wrong == [] and args.metric_for_best_model == best_checkpoint.reported(stage_of(kind, {}))[0]


def test_pretrain_keeps_the_lowest_perplexity(recipe, write):
    """At a rate that makes it worse and worse: before, the worst was kept, as the one of the highest perplexity."""
    text = [{"text": f"the cat sees {i} red fish and {i * i} birds"} for i in range(80)]
    stage = {
        "kind": "pretrain",
        "model": {"config": {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 32}},
        "tokenizer": {"train": "bpe", "vocab_size": 300},
        "data": {"train": write("t.jsonl", text), "validation": 0.2},
        "args": {
            "max_steps": 12,
            "eval_steps": 2,
            "max_length": 16,
            "global_batch_size": 8,
            "learning_rate": 0.5,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "metric_for_best_model": "perplexity",
        },
    }
    loaded = load(recipe({"base": stage}))
    chain.run(loaded)
    metrics = json.loads((loaded["base"].folder / "stage.json").read_text())["metrics"]
    rows = files.read_rows(loaded["base"].folder / files.HISTORY)
    history = [entry["eval_perplexity"] for entry in rows if "eval_perplexity" in entry]
    assert max(history) > 1.05 * min(history)
    assert metrics["eval_perplexity"] == pytest.approx(min(history), rel=1e-4)
