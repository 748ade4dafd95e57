"""The reward model learns to tell answers apart, is measured exactly, and never serves with a random head."""

import json

import numpy as np
import pytest
import torch

from pipelines.chain import chain
from pipelines.data import mixing
from pipelines.data.rows import normalise
from pipelines.errors import DataError, ModelError
from pipelines.evaluation.metrics import preference_metrics
from pipelines.models import chat_template, tag_heads
from pipelines.models.config import ModelSection
from pipelines.models.tag_heads import TagPenalty
from pipelines.recipe.recipe import load
from pipelines.speed import packed_attention
from pipelines.stages.ppo import one_score
from pipelines.training.rankings import RankingCollator, decided, ranking_loss

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
    loaded = load(recipe({"reward": stage}))
    chain.run(loaded)
    return loaded["reward"].folder


def test_it_learns_and_reports_what_the_saved_model_says(trained):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    record = json.loads((trained / "stage.json").read_text())
    assert record["metrics"]["accuracy"] > 0.95 and record["metrics"]["margin"] > 0.5
    model = AutoModelForSequenceClassification.from_pretrained(trained).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert model.config.num_labels == 1 and tokenizer.pad_token_id != tokenizer.eos_token_id
    data = {"train": str(trained.parents[1] / "pairs.jsonl"), "validation": 0.2}
    _, held_out = mixing.load(data, "rankings", record["seed"])
    margins, losses = [], []
    for row in held_out:
        scores = []
        for answer in row["completions"]:
            prompt, ids = chat_template.encode_answer(tokenizer, row["prompt"], answer)
            with torch.no_grad():
                scores.append(model(torch.tensor([prompt + ids])).logits.item())
        margins.append(scores[0] - scores[1])
        losses.append(np.log1p(np.exp(-margins[-1])) + 0.01 * sum(scores) ** 2)  # centred, as in training
    assert record["metrics"]["margin"] == pytest.approx(np.mean(margins), rel=1e-3)
    log = [json.loads(line) for line in open(trained / "history.jsonl")]
    assert [e["eval_loss"] for e in log if "eval_loss" in e][-1] == pytest.approx(np.mean(losses), rel=1e-3)
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

    with pytest.raises(ModelError, match="score.weight"):
        one_score(str(tiny_gpt2), ModelSection(model_name_or_path=str(tiny_gpt2)))


RANKED = [
    {"ids": [[5, 6, 7], [5, 8], [9], [4, 4, 4, 4]], "ranks": [1.0, 2.0, 2.0, 4.0], "row": 0},
    {"ids": [[6, 1], [6, 2, 3]], "ranks": [2.0, 1.0], "row": 1},
]


def test_a_batch_of_rankings_of_different_sizes():
    batch = RankingCollator(0)(RANKED)
    assert batch["input_ids"].shape == (6, 4)  # every answer once
    assert decided([1, 2, 2, 4]) == [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
    assert list(zip(batch["better"].tolist(), batch["worse"].tolist())) == [
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 3),
        (2, 3),
        (5, 4),
    ]
    assert batch["weight"].tolist() == pytest.approx([0.1] * 5 + [0.5])
    assert batch["input_ids"][1].tolist() == [5, 8, 0, 0] and batch["attention_mask"][1].tolist() == [1, 1, 0, 0]


def test_the_loss_is_that_of_the_paper():
    """-1/(number of pairs) sum log sigmoid(r_w - r_l) for each ranking, averaged over rankings; and plain TRL
    at K = 2.
    """
    batch = RankingCollator(0)(RANKED)
    scores = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    first = [-torch.nn.functional.logsigmoid(scores[a] - scores[b]) for a, b in decided(RANKED[0]["ranks"])]
    second = -torch.nn.functional.logsigmoid(scores[5] - scores[4])
    loss = ranking_loss(scores[batch["better"]], scores[batch["worse"]], batch["weight"])
    assert loss.item() == pytest.approx(((sum(first) / 5 + second) / 2).item())


def test_two_answers_are_trls_pairwise_loss(tiny_gpt2, tmp_path):
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    model = AutoModelForSequenceClassification.from_pretrained(tiny_gpt2, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    model.config.pad_token_id = tokenizer.pad_token_id = tokenizer.pad_token_id or 0
    pairs = [([5, 6, 7], [5, 8]), ([9, 3], [9, 4, 4]), ([7], [8, 8, 8, 8])]
    data = Dataset.from_list([{"chosen_ids": a, "rejected_ids": b} for a, b in pairs])
    args = RewardConfig(
        output_dir=str(tmp_path), center_rewards_coefficient=0.1, bf16=False, use_cpu=True, report_to=[]
    )
    theirs = RewardTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    inputs = theirs.data_collator([{"chosen_ids": a, "rejected_ids": b} for a, b in pairs])
    expected = theirs.compute_loss(model, dict(inputs))
    batch = RankingCollator(tokenizer.pad_token_id)([{"ids": [b, a], "ranks": [2, 1]} for a, b in pairs])
    scores = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(-1)
    ours = ranking_loss(scores[batch["better"]], scores[batch["worse"]], batch["weight"], 0.1)
    assert ours.item() == pytest.approx(expected.item(), abs=1e-5)


def test_without_padding_the_scores_and_gradients_are_the_same(tiny_gpt2):
    from transformers import AutoModelForSequenceClassification

    features = [
        {"ids": [[7, 3, 9, 4, 1], [5], [8, 8]], "ranks": [1, 2, 3]},
        {"ids": [[6, 1, 2], [6, 2]], "ranks": [2, 1]},
    ]
    found = []
    features[0]["ids"] = [[7, 3, *ids] for ids in features[0]["ids"]]  # answers to one prompt
    for settings in ({"packed": False}, {"packed": True, "share": False}, {"packed": True}):
        model = AutoModelForSequenceClassification.from_pretrained(tiny_gpt2, num_labels=1)
        model.config.pad_token_id = 0
        model.score.weight.data.copy_(torch.linspace(-1, 1, 32).sin()[None])
        if settings["packed"]:
            assert packed_attention.enable_packed_scores(model)
        batch = RankingCollator(0, **settings)(features)
        inputs = {k: v for k, v in batch.items() if k not in ("better", "worse", "weight", "margin", "tags")}
        scores = model(**inputs, use_cache=False).logits[:, 0]
        ranking_loss(scores[batch["better"]], scores[batch["worse"]], batch["weight"]).backward()
        found.append((scores, model.transformer.wte.weight.grad, model.score.weight.grad))
    assert batch["input_ids"].shape == (1, 2 + 8 + 1 + 3)  # each prompt once, also where it is no more than a token
    for padded, packed, shared in zip(*found):
        assert padded.abs().max() > 1e-4
        torch.testing.assert_close(padded, packed, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(padded, shared, rtol=1e-4, atol=1e-6)


def test_it_learns_from_rankings_and_says_what_decides_nothing(recipe, write, tiny_gpt2, caplog):
    rows = [
        {
            "prompt": f"what is the {w} {i}",
            "completions": [f"the {w} is {c}" for c in ("blue", "red", "green")],
            "ranks": [3, 1, 2],
        }
        for i in range(20)
        for w in ("cat", "dog")
    ]
    rows.append({"prompt": "p", "completions": ["a", "b"], "ranks": [1, 1]})
    stage = {
        "kind": "reward",
        "model": {"model_name_or_path": str(tiny_gpt2)},
        "data": {"train": write("ranked.jsonl", rows), "validation": write("check.jsonl", rows[:6])},
        "args": ARGS,
    }
    loaded = load(recipe({"reward": stage}))
    chain.run(loaded)
    record = json.loads((loaded["reward"].folder / "stage.json").read_text())
    assert record["metrics"]["accuracy"] > 0.95 and record["metrics"]["pairs"] == 18
    assert record["rows"]["train"]["undecided"] == 1 and "1 of 41 rankings decide nothing" in caplog.text


@pytest.mark.parametrize(
    "row, says",
    [
        ({"completions": ["a"], "ranks": [1]}, "two or more"),
        ({"completions": ["a", "b"], "ranks": [1]}, "list of 2 numbers"),
        ({"completions": ["a", "b"], "ranks": [1, "x"]}, "must be numbers"),
        ({"completions": ["a", "a"], "ranks": [1, 2]}, "two different ranks"),
        ({"completions": ["a", " "], "ranks": [1, 2]}, "completions is empty"),
        ({"completions": ["a", "b"]}, "no column ranks"),
    ],
)
def test_bad_rankings_are_named(row, says):

    with pytest.raises(DataError, match=says):
        normalise({"prompt": "p", **row}, "rankings")


def test_margins_are_taken_off_as_trl_takes_them(tiny_gpt2, tmp_path):
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    model = AutoModelForSequenceClassification.from_pretrained(tiny_gpt2, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    model.config.pad_token_id = tokenizer.pad_token_id
    pairs = [{"chosen_ids": [5, 6], "rejected_ids": [5, 8, 2], "margin": m} for m in (0.0, 1.5)]
    args = RewardConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to=[])
    theirs = RewardTrainer(model=model, args=args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
    expected = theirs.compute_loss(model, dict(theirs.data_collator(pairs)))
    rows = [
        normalise({"prompt": "p", "chosen": "a", "rejected": "b", "margin": p["margin"]}, "rankings") for p in pairs
    ]
    assert rows[1]["margin"] == [1.5, 0]
    batch = RankingCollator(tokenizer.pad_token_id)(
        [{"ids": [p["chosen_ids"], p["rejected_ids"]], **row} for p, row in zip(pairs, rows)]
    )
    scores = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(-1)
    ours = ranking_loss(scores[batch["better"]], scores[batch["worse"]], batch["weight"], None, batch["margin"])
    assert ours.item() == pytest.approx(expected.item(), abs=1e-5)
    ranked = RankingCollator(0)([{"ids": [[1], [2], [3]], "ranks": [1, 2, 4], "margin": [-1, -2, -4]}])
    assert ranked["margin"].tolist() == [1, 3, 2]  # pairs (0, 1), (0, 2), (1, 2)


def test_tags_are_learned_beside_a_plain_score(recipe, write, tiny_gpt2):
    """The score prefers red; the tag `loud`, independent of it, is learned by outputs of their own."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = [
        {
            "prompt": f"what is the {w} {i}",
            "completions": [f"the {w} is {c} {end}" for c in ("blue", "red") for end in ("big", "small")],
            "ranks": [2, 2, 1, 1],
            "tags": [["loud"], [], ["loud"], ["other"]],
        }
        for i in range(24)
        for w in ("cat", "dog")
    ]
    rows += [{"prompt": "p", "completions": ["a red", "a blue"], "ranks": [1, 2]}] * 8  # nothing is known of their tags
    stage = {
        "kind": "reward",
        "model": {"model_name_or_path": str(tiny_gpt2)},
        "data": {"train": write("ranked.jsonl", rows), "validation": 0.2},
        "args": {**ARGS, "num_train_epochs": 15, "tags": ["loud"], "rank_margin": 0.5},
    }
    loaded = load(recipe({"reward": stage}))
    chain.run(loaded)
    folder = loaded["reward"].folder
    metrics = json.loads((folder / "stage.json").read_text())["metrics"]
    assert metrics["accuracy"] > 0.95 and metrics["tag_loud_auc"] > 0.95 and metrics["tag_loud_share"] == 0.5
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.num_labels == 1 and model.score.weight.shape[0] == 1
    penalty = TagPenalty(folder, {"loud": 2.0})
    found = {}
    for color in ("blue", "red"):
        for end in ("big", "small"):
            ids = torch.tensor(
                [sum(chat_template.encode_answer(tokenizer, "what is the cat 1", f"the cat is {color} {end}"), [])]
            )
            with torch.no_grad():
                found[color, end] = (
                    model(ids).logits.item(),
                    penalty(model.base_model(ids).last_hidden_state[:, -1]).item(),
                )
    assert min(found["red", e][0] for e in ("big", "small")) > max(found["blue", e][0] for e in ("big", "small"))
    assert min(found[c, "big"][1] for c in ("blue", "red")) > 1 > max(found[c, "small"][1] for c in ("blue", "red"))
    with pytest.raises(ModelError, match="tells loud, not rude"):
        TagPenalty(folder, {"rude": 1.0})


def test_unknown_tags_teach_nothing_and_the_loss_is_a_mean_over_the_known():

    logits = torch.tensor([[2.0, -1.0], [0.5, 3.0]], requires_grad=True)
    loss = tag_heads.loss(logits, torch.tensor([[1.0, -1.0], [0.0, -1.0]]))
    assert loss.item() == pytest.approx((np.log1p(np.exp(-2.0)) + np.log1p(np.exp(0.5))) / 2)
    loss.backward()
    assert logits.grad[:, 1].tolist() == [0, 0]
    assert tag_heads.loss(logits, torch.full((2, 2), -1.0)).item() == 0


@pytest.mark.parametrize(
    "row, says",
    [
        ({"margin": [1]}, "list of 2, one for each"),
        ({"margin": [0, 1]}, "puts a worse answer above a better one"),
        ({"margin": ["x", 1]}, "margin must be numbers"),
        ({"tags": ["rude", "wrong"]}, "a list of tags for each answer"),
        ({"tags": [[1], []]}, "must be texts"),
        ({"models": [1, 2]}, "a name for each answer"),
    ],
)
def test_bad_columns_of_rankings_are_named(row, says):

    with pytest.raises(DataError, match=says):
        normalise({"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2], **row}, "rankings")
