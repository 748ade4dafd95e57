"""The evaluation after the last step is not done twice, and stage.json has its figures all the same."""

import json
from types import SimpleNamespace

import pytest
from tiny_words import WORDS

from pipelines.chain import chain
from pipelines.recipe.recipe import load
from pipelines.training.saving import final_metrics

TEXTS = [{"text": " ".join(WORDS[i:] + WORDS[:i]), "label": i % 2} for i in range(12)]


@pytest.mark.parametrize("kind", ["pretrain", "classify"])
def test_the_last_evaluation_is_used(kind, recipe, write, tiny_gpt2):
    rows = write("t.jsonl", TEXTS)
    args = {
        "max_steps": 4,
        "global_batch_size": 4,
        "max_length": 32,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
    }
    stage = {
        "kind": kind,
        "model": {"model_name_or_path": str(tiny_gpt2)},
        "data": {"train": rows, "validation": rows},
        "args": args,
    }
    loaded = load(recipe({"it": stage}))
    chain.run(loaded)
    folder = loaded["it"].folder
    metrics = json.loads((folder / "stage.json").read_text())["metrics"]
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    losses = [(e["step"], e["eval_loss"]) for e in history if "eval_loss" in e]
    assert [step for step, _ in losses] == [2, 4] and metrics["eval_loss"] == losses[1][1]
    assert ("confusion_matrix" in metrics) == (kind == "classify")


class Trained:
    """A trainer at step 4 whose log has evaluations at steps 2 and 4."""

    eval_dataset = [1]

    def __init__(self, best=None, load_best=False):
        log = [{"step": 2, "eval_loss": 1.0, "epoch": 1}, {"step": 4, "eval_loss": 3.0, "epoch": 2, "eval_runtime": 9}]
        self.state = SimpleNamespace(global_step=4, best_global_step=best, log_history=log)
        self.args, self.times = SimpleNamespace(load_best_model_at_end=load_best), 0

    def evaluate(self):
        self.times += 1
        self.state.log_history.append({"step": 4, "eval_loss": 1.0})
        return {"eval_loss": 1.0, "epoch": 2}


@pytest.mark.parametrize(
    "trainer, reuse, loss, times, entries",
    [
        (Trained(), True, 3.0, 0, 2),
        (Trained(best=4, load_best=True), True, 3.0, 0, 2),  # the best model is the last
        (Trained(best=2, load_best=True), True, 1.0, 1, 3),  # the model of step 2 was loaded: it is another one
        (Trained(best=2), True, 3.0, 0, 2),  # it was not loaded
        (Trained(), False, 1.0, 1, 2),  # its texts are needed: evaluated, but in the history once
    ],
)
def test_only_an_evaluation_of_the_same_model_is_used(trainer, reuse, loss, times, entries):
    metrics = final_metrics(trainer, reuse=reuse)
    assert {k: v for k, v in metrics.items() if k != "history"} == {"eval_loss": loss, "steps": 4}
    assert trainer.times == times and len(metrics["history"]) == entries
