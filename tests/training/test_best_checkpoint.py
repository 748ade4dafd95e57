"""Every training kind keeps its best checkpoint by one rule: the metrics it reports, lower is better where it is."""

import json
from itertools import product
from pathlib import Path

import pytest

from pipelines import files
from pipelines.chain import chain
from pipelines.kinds import KINDS
from pipelines.recipe.recipe import load
from pipelines.recipe.stage import Stage
from pipelines.training import arguments, best_checkpoint

LOWER = {"loss", "perplexity", "pseudo_perplexity", "mse", "kl", "displacement", "ref_perplexity"}
EITHER = {"length", "mean_score"}  # what is better depends on what somebody wants
TRAINED = [name for name, kind in KINDS.items() if "args" in kind.sections]


def stage_of(kind: str, args: dict) -> Stage:
    """A stage of this kind of which only the args matter."""
    return Stage(kind, kind, Path("runs") / kind, {"args": args, "data": {"validation": 0.1}})


@pytest.mark.parametrize("kind", TRAINED)
def test_each_metric_has_its_direction_in_every_kind(kind):
    names = best_checkpoint.reported(stage_of(kind, {}))
    for metric, prefix, greater in product(names, ("", "eval_"), (None, True, False)):
        given = {"metric_for_best_model": prefix + metric, "greater_is_better": greater}
        wrong = [key for key, *_ in best_checkpoint.problems(given, True, names)]
        if metric in EITHER and greater is None or metric not in EITHER and greater == (metric in LOWER):
            assert wrong == ["args.greater_is_better"], given
        else:
            assert wrong == [], given


@pytest.mark.parametrize("kind", TRAINED)
def test_the_best_is_kept_by_that_direction(kind):
    for metric in best_checkpoint.reported(stage_of(kind, {})):
        for name in (metric, f"eval_{metric}"):
            given = {"metric_for_best_model": name} | ({"greater_is_better": False} if metric in EITHER else {})
            args, wrong = arguments.problems(stage_of(kind, given), arguments.Hardware("cpu"))
            assert wrong == [] and args.load_best_model_at_end, (metric, wrong)
            assert args.greater_is_better == (metric not in LOWER | EITHER), (kind, name)
            assert (args.eval_strategy, args.eval_steps) == (args.save_strategy.value, args.save_steps)


def test_a_reward_is_better_when_higher_whatever_its_function_is_called():
    functions = {"functions": ["m:no_loss", "m:toxicity", "m:kl"], "models": ["stage:perplexity"]}
    names = best_checkpoint.reported(Stage("p", "ppo", Path("runs/p"), {"reward": functions}))
    rewards = [name for name in names if name.startswith("reward/")]
    assert len(rewards) == 4 and [best_checkpoint.lower_is_better(f"eval_{name}") for name in rewards] == [False] * 4
    assert best_checkpoint.lower_is_better("reward/no_loss_std") is None


def test_headlines_say_what_is_better_and_figures_of_evaluate_are_read_by_their_last_part():
    for kind in KINDS.values():
        assert all(best_checkpoint.lower_is_better(name) is not None for name, _ in kind.headline)
    lower = best_checkpoint.lower_is_better
    assert all(map(lower, ["a/text/perplexity", "b over a/preferences/loss", "arc/bits_per_byte,none"]))
    assert [lower(name) for name in ("reward/preferences/loss", "loss/score", "arc/acc_norm,none")] == [
        True,
        False,
        False,
    ]
    assert [lower(name) for name in ("sft/toxicity", "my_loss", "sft/length")] == [None] * 3


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
