"""A reward model on preferences: the figures against loops by hand, the command on pairs, rankings and an encoder."""

import json
import math

import numpy as np
import pytest
import torch
from tiny_words import WORDS

from pipelines import files
from pipelines.commands import evaluate
from pipelines.errors import DataError, SetupError
from pipelines.evaluation.figures import figures, table
from pipelines.evaluation.metrics import preference_metrics
from pipelines.evaluation.preferences import implicit_rewards, pair_figures
from pipelines.models import chat_template
from pipelines.recipe.problems import RecipeError
from pipelines.recipe.recipe import load


def of_pairs(rows, scores):
    found = figures({"m": pair_figures(rows, scores)})
    return {name.removeprefix("m/preferences/"): figure for name, figure in found.items()}


def test_figures_of_pairs_are_those_of_the_reward_stage():
    chance = np.random.default_rng(0)
    rows = [{"completions": ["x" * n, "y" * 10], "ranks": [1, 2]} for n in chance.integers(1, 20, 150)]
    scores = chance.normal(size=(150, 2)) + [0.5, 0]
    found, stage = of_pairs(rows, scores.tolist()), preference_metrics(scores[:, 0], scores[:, 1])
    for ours, theirs in (
        ("accuracy_per_pair", "accuracy"),
        ("margin", "margin"),
        ("loss", "loss"),
        ("calibration_error", "calibration_error"),
    ):
        value, low, high = found[ours]
        assert value == pytest.approx(stage[theirs]) and low <= value <= high and low < high
    assert found["accuracy_per_ranking"] == pytest.approx(found["accuracy_per_pair"])
    lengths = np.array([len(row["completions"][0]) for row in rows])
    uneven = lengths != 10
    assert found["longer_chosen"][0] == pytest.approx((lengths[uneven] > 10).mean())
    likes = np.where(lengths > 10, scores[:, 0] > scores[:, 1], scores[:, 0] < scores[:, 1])[uneven]
    assert found["longer_scored_higher"][0] == pytest.approx(likes.mean())


def test_a_long_ranking_weighs_as_a_short_one_only_per_ranking():
    rows = [{"completions": list("abc"), "ranks": [1, 2, 3]}, {"completions": list("ab"), "ranks": [1, 2]}]
    found = of_pairs(rows, [[3, 2, 1], [0, 1]])
    assert found["accuracy_per_pair"][0] == 3 / 4 and found["accuracy_per_ranking"][0] == 1 / 2
    assert found["in_order"][0] == 1 / 2 and "longer_chosen" not in found
    tied = of_pairs([{"completions": list("abc"), "ranks": [1, 2, 2]}], [[1, 1, 0]])
    assert tied["accuracy_per_pair"][0] == 0.75 and tied["in_order"][0] == 0  # equal scores are half right
    assert "%" in table({"m/preferences/in_order": (0.5, 0.0, 1.0)})


@pytest.fixture(scope="module")
def reward(tmp_path_factory, tiny_gpt2):
    """A folder with a one-score GPT-2 of random weights whose stage cut at 16 tokens."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_gpt2, num_labels=1)
    model.score.weight.data.normal_()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_gpt2).save_pretrained(folder)
    (folder / "stage.json").write_text(json.dumps({"record": {"sections": {"args": {"max_length": 16}}}}))
    return folder


ROWS = [
    {
        "prompt": " ".join(WORDS[n : n + 2]),
        "chosen": " ".join(WORDS[: 2 + n]),
        "rejected": " ".join(WORDS[5 : 7 + 2 * n]),
    }
    for n in range(8)
] + [
    {"prompt": "what colour", "completions": ["red", "blue bird", "not"], "ranks": [1, 2, 2]},
    {
        "chosen": [{"role": "user", "content": "is it"}, {"role": "assistant", "content": "it is"}],
        "rejected": [{"role": "user", "content": "is it"}, {"role": "assistant", "content": "no"}],
    },
    {"prompt": "all the same", "completions": ["a", "the"], "ranks": [1, 1]},
]


def test_the_command_scores_as_the_stage_does(write, reward, tmp_path, caplog, capsys):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    target = tmp_path / "f.json"
    file = write("p.jsonl", ROWS)
    assert evaluate.main([str(reward), "--preferences", file, "--json", str(target), "--batch-size", "3"]) == 0
    found = {name.split("/")[-1]: figure["value"] for name, figure in json.loads(target.read_text()).items()}
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(reward).eval(),
        AutoTokenizer.from_pretrained(reward),
    )
    margins = []

    def score(prompt, answer):
        ids = sum(chat_template.encode_answer(tokenizer, prompt, answer), [])[-16:]
        with torch.no_grad():
            return model(torch.tensor([ids])).logits.item()

    for row in ROWS[:8]:
        margins.append([score(row["prompt"], row["chosen"]) - score(row["prompt"], row["rejected"])])
    best, *rest = (score("what colour", answer) for answer in ROWS[8]["completions"])
    margins.append([best - other for other in rest])
    turns = [{"role": "user", "content": "is it"}]
    margins.append([score(turns, "it is") - score(turns, "no")])
    every = [m for ms in margins for m in ms]
    assert found["margin"] == pytest.approx(np.mean(every), abs=1e-4)
    assert found["accuracy_per_pair"] == pytest.approx(np.mean([m > 0 for m in every]))
    assert found["accuracy_per_ranking"] == pytest.approx(np.mean([np.mean([m > 0 for m in ms]) for ms in margins]))
    assert found["loss"] == pytest.approx(np.mean([math.log1p(math.exp(-m)) for m in every]), abs=1e-4)
    assert "1 of 11 rankings decide nothing" in caplog.text and "are longer than 16 tokens" in caplog.text
    assert "preferences/accuracy_per_pair" in capsys.readouterr().out


def test_what_is_no_reward_model_is_refused(write, tiny_gpt2, recipe, tmp_path):
    file = write("p.jsonl", ROWS[:2])
    with pytest.raises(
        SetupError,
        match="preferences needs a reward model or a policy of dpo or kto, and this is a GPT2LMHeadModel",
    ):
        evaluate.main([str(tiny_gpt2), "--preferences", file])
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    AutoModelForSequenceClassification.from_pretrained(tiny_gpt2, num_labels=3).save_pretrained(tmp_path / "three")
    AutoTokenizer.from_pretrained(tiny_gpt2).save_pretrained(tmp_path / "three")
    with pytest.raises(SetupError, match="is a classifier of LABEL_0, LABEL_1, LABEL_2: name one"):
        evaluate.main([str(tmp_path / "three"), "--preferences", file])
    equal = write("e.jsonl", ROWS[-1:])
    with pytest.raises(DataError, match="no ranking decides anything"):
        evaluate.main([_one(tiny_gpt2, tmp_path), "--preferences", equal])
    stages = {
        "sft": {
            "kind": "sft",
            "model": {"model_name_or_path": str(tiny_gpt2)},
            "data": {"train": write("s.jsonl", [{"prompt": "a", "completion": "b"}])},
        },
        "a": {"kind": "evaluate", "evaluate": {"models": ["stage:sft"], "preferences": file}},
        "b": {"kind": "evaluate", "evaluate": {"models": [str(tiny_gpt2)], "preferences": file, "labelled": file}},
        "c": {"kind": "evaluate", "evaluate": {"models": [str(tiny_gpt2)], "pairs": file, "running_text": True}},
    }
    with pytest.raises(RecipeError) as error:
        load(recipe(stages))
    for words in [
        "must be a reward model or a policy of dpo or kto (reward, dpo, kto), this stage is of kind sft",
        "measure them apart",
        "goes with text",
    ]:
        assert words in str(error.value)


def test_a_classifier_is_judged_by_the_log_odds_of_a_label(write, tiny_gpt2, tmp_path):
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    from pipelines.evaluation.measure import measure
    from pipelines.recipe.sections import EvaluateSection

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.5,
        id2label={0: "bad", 1: "good"},
        label2id={"bad": 0, "good": 1},
    )
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "bert")
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    tokenizer.save_pretrained(tmp_path / "bert")
    of = lambda label: figures(
        measure({"m": str(tmp_path / "bert")}, EvaluateSection(preferences=write("p.jsonl", ROWS[:6]), label=label), 0)
    )

    def score(text):
        with torch.no_grad():
            bad, good = model(**tokenizer(text, return_tensors="pt")).logits[0].tolist()
        return good - bad

    margin = np.mean([score(row["chosen"]) - score(row["rejected"]) for row in ROWS[:6]])
    assert of("good")["m/preferences/margin"][0] == pytest.approx(margin, abs=1e-4)
    assert of("bad")["m/preferences/margin"][0] == pytest.approx(-margin, abs=1e-4)


def _one(tiny_gpt2, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    AutoModelForSequenceClassification.from_pretrained(tiny_gpt2, num_labels=1).save_pretrained(tmp_path / "one")
    AutoTokenizer.from_pretrained(tiny_gpt2).save_pretrained(tmp_path / "one")
    return str(tmp_path / "one")


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_policy_of_dpo_or_kto_is_its_own_reward_model(kind, write, recipe, tiny_gpt2):
    """Its figures are those that the stage itself found on its validation rows."""
    from pipelines.chain import chain
    from pipelines.evaluation.measure import measure
    from pipelines.recipe.sections import EvaluateSection

    train, held_out = write("t.jsonl", ROWS[:6]), write("v.jsonl", ROWS[6:8])
    sft = {
        "kind": "sft",
        "model": {"model_name_or_path": str(tiny_gpt2), "chat_template": "plain"},
        "data": {"train": write("s.jsonl", [{"prompt": "a", "completion": "it is"}] * 4)},
        "args": {"max_steps": 1, "global_batch_size": 4, "max_length": 64},
    }
    preferred = {
        "kind": kind,
        "model": {"model_name_or_path": "stage:sft"},
        "data": {"train": train, "validation": held_out},
        "args": {"max_steps": 3, "global_batch_size": 4, "learning_rate": 1e-2, "beta": 0.3, "max_length": 64},
    }
    loaded = load(recipe({"sft": sft, "preferred": preferred}))
    chain.run(loaded)
    folder = loaded["preferred"].folder
    metrics = json.loads((folder / "stage.json").read_text())["metrics"]
    found = figures(measure({"m": str(folder)}, EvaluateSection(preferences=held_out), 0))
    margin, accuracy = found["m/preferences/margin"][0], found["m/preferences/accuracy_per_pair"][0]
    keys = {key.removeprefix("eval_"): value for key, value in metrics.items() if isinstance(value, float)}
    assert margin == pytest.approx(keys["margin"], abs=1e-4) and abs(margin) > 1e-3
    if kind == "dpo":  # kto's is over answers
        assert accuracy == pytest.approx(keys["accuracy"])


def test_a_policy_of_dpo_whose_reference_is_nowhere_is_refused(tmp_path):
    section = {"model_name_or_path": files.portable("/home/ada/models/gpt2")}
    record = {"kind": "dpo", "sections": {"model": section}, "data": {}, "parents": {}}
    files.write_json(tmp_path / files.FINISHED, {"kind": "dpo", "record": record})
    with pytest.raises(SetupError, match=r": its reference is the folder …/gpt2 .*by a hub id, a relative path"):
        implicit_rewards("m", str(tmp_path), None, None, None, [])
