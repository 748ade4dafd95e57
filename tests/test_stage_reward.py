"""The reward model learns to tell answers apart, is measured exactly, and never serves with a random head."""

import json

import numpy as np
import pytest
import torch

from pipelines import chain
from pipelines import recipe as recipes
from pipelines.models import ModelError
from pipelines.stages.reward import preference_metrics

PAIRS = [
    {"prompt": f"what is the {w} {i}", "chosen": f"the {w} is red", "rejected": f"the {w} is blue"}
    for i in range(20)
    for w in ("cat", "dog", "bird")
]
ARGS = {"global_batch_size": 8, "learning_rate": 3e-3, "num_train_epochs": 4, "max_length": 64, "eval_steps": 0.5}


@pytest.fixture
def trained(recipe, write, tiny_gpt2):
    stage = {
        "kind": "reward",
        "model": {"model_name_or_path": str(tiny_gpt2)},
        "data": {"train": write("pairs.jsonl", PAIRS), "validation": 0.2},
        "args": ARGS,
    }
    loaded = recipes.load(recipe({"reward": stage}))
    chain.run(loaded)
    return loaded["reward"].folder


def test_it_learns_and_reports_what_the_saved_model_says(trained):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from pipelines import chat, data

    record = json.loads((trained / "stage.json").read_text())
    assert record["metrics"]["accuracy"] > 0.95 and record["metrics"]["margin"] > 0.5
    model = AutoModelForSequenceClassification.from_pretrained(trained).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert model.config.num_labels == 1 and tokenizer.pad_token_id != tokenizer.eos_token_id
    _, held_out = data.load(record["record"]["sections"]["data"], "pairs", record["seed"])
    margins = []
    for row in held_out:
        scores = []
        for answer in (row["chosen"], row["rejected"]):
            prompt, ids = chat.encode_answer(tokenizer, row["prompt"], answer)
            with torch.no_grad():
                scores.append(model(torch.tensor([prompt + ids])).logits.item())
        margins.append(scores[0] - scores[1])
    assert record["metrics"]["margin"] == pytest.approx(np.mean(margins), rel=1e-3)
    assert record["metrics"]["pairs"] == len(held_out) == record["rows"]["validation"]["used"]


def test_scores_stay_around_zero(trained):
    metrics = json.loads((trained / "stage.json").read_text())["metrics"]
    assert abs(metrics["mean_score"]) < metrics["margin"]


def test_metrics_against_closed_forms():
    chosen, rejected = np.array([2.0, 1.0, 0.0, 3.0]), np.array([0.0, 1.5, 0.0, -1.0])
    found = preference_metrics(chosen, rejected)
    assert found["accuracy"] == (1 + 0 + 0.5 + 1) / 4
    assert found["margin"] == pytest.approx((2 - 0.5 + 0 + 4) / 4)
    assert found["loss"] == pytest.approx(np.mean(np.log1p(np.exp(-(chosen - rejected)))))
    # a model that is right exactly as often as it says is calibrated
    margin = np.log(0.75 / 0.25)
    calibrated = preference_metrics(np.array([margin] * 3 + [-margin]), np.zeros(4))
    assert calibrated["calibration_error"] == pytest.approx(0, abs=1e-9)
    sure_and_wrong = preference_metrics(np.full(10, -20.0), np.zeros(10))
    assert sure_and_wrong["calibration_error"] == pytest.approx(1, abs=1e-6)


def test_a_model_without_a_score_head_never_becomes_a_reward(tiny_gpt2):
    from pipelines.sections import ModelSection
    from pipelines.stages.ppo import scorer

    with pytest.raises(ModelError, match="score.weight"):
        scorer(str(tiny_gpt2), ModelSection(model_name_or_path=str(tiny_gpt2)))
