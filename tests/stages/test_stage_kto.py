"""KTO: its loss, rewards and updated weights are TRL's; a step is the same however it is cut up; it resumes to the bit."""

import copy
import dataclasses
import json
import random

import preference_stages
import pytest
import torch
from datasets import Dataset
from preference_stages import TRL, check_parts, check_resumed, policy, rankings, with_lora
from tiny_words import WORDS
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import DPOConfig, KTOConfig, KTOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from pipelines.chain import chain
from pipelines.data.rows import desirable, normalise
from pipelines.errors import DataError
from pipelines.recipe.problems import RecipeError
from pipelines.recipe.recipe import load
from pipelines.stages import dpo, kto, reward
from pipelines.training.preferences import collate_rankings, kto_losses, mismatched


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_loss_rewards_and_weights_are_those_of_trl(tiny_gpt2, tmp_path, name):
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    ours, theirs = policy(tiny_gpt2), AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    reference = copy.deepcopy(theirs)
    with torch.no_grad():  # another model, so that the log-ratios are not 0, and the reference point is not
        for weight in reference.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(4)))
    rows = rankings(6, 1)
    labels = [True, False, False, True, False, True]
    partner = mismatched([tuple(row["prompts"][0]) for row in rows], seed=3)
    others = [row | {"answers": rows[partner[i]]["answers"]} for i, row in enumerate(rows)]
    examples = [
        {
            "prompt_ids": row["prompts"][0],
            "completion_ids": row["answers"][0],
            "KL_completion_ids": other["answers"][0],
            "label": label,
        }
        for row, other, label in zip(rows, others, labels, strict=True)
    ]
    config = KTOConfig(
        str(tmp_path),
        loss_type=name,
        beta=0.3,
        desirable_weight=1.5,
        undesirable_weight=0.7,
        **TRL,
        per_device_train_batch_size=6,
    )
    text = Dataset.from_list([{"prompt": "a", "completion": "b", "label": True}] * 6)
    trl = KTOTrainer(theirs, reference, config, train_dataset=text, processing_class=tokenizer)
    trl.model.train()
    frozen = policy(tiny_gpt2)
    frozen.load_state_dict(trl.ref_model.state_dict())
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-3, eps=1e-5) for model in (ours, trl.model)]
    wanted, points = torch.tensor(labels), []
    for _ in range(3):
        batch, mixed = collate_rankings(rows, True, True), collate_rankings(others, True, True)
        with torch.no_grad():
            base, point = frozen(answers=batch), (ours(answers=mixed) - frozen(answers=mixed)).mean().clamp(min=0)
        points.append(point.item())
        ratios = ours(answers=batch) - base
        our_loss = kto_losses(ratios, wanted, point, config).mean()
        their_loss = trl._compute_loss(trl.model, DataCollatorForUnpairedPreference(0)(examples), False)
        torch.testing.assert_close(our_loss, their_loss, atol=1e-5, rtol=1e-5)
        found = trl._metrics["train"]
        for side, which in (("chosen", wanted), ("rejected", ~wanted)):
            assert found[f"rewards/{side}"][-1] == pytest.approx(0.3 * ratios[which].mean().item(), abs=1e-5)
        if name == "kto":
            assert found["kl"][-1] == pytest.approx(points[-1], abs=1e-5)
        for loss, optimizer in zip((our_loss, their_loss), optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert name != "kto" or max(points) > 0.01
    for key, weight in trl.model.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], weight, atol=1e-5, rtol=0)


def test_every_answer_goes_once_to_another_prompt():
    for seed in range(200):
        draw = random.Random(seed)
        prompts = [(draw.randrange(draw.randint(2, 9)),) for _ in range(draw.randint(2, 40))]
        partner = mismatched(prompts, seed)
        assert sorted(partner) == list(range(len(prompts))) and partner == mismatched(prompts, seed)
        most = max(prompts.count(prompt) for prompt in prompts)
        same = sum(prompts[i] == prompts[j] for i, j in enumerate(partner))
        assert same == max(0, 2 * most - len(prompts)), (prompts, partner)


@pytest.mark.parametrize(
    "ranks, tags, labels",
    [
        ([1, 2], None, [True, False]),  # a pair, as TRL unpairs it
        ([1, 2, 3], None, [True, None, False]),
        ([1, 1, 2, 2], [[], [], [], []], [True, True, False, False]),
        ([1, 1], None, [None, None]),
        ([1, 2, 3], [[], [], ["rude"]], [True, None, False]),
        ([1, 2, 3], [["rude"], [], []], [False, None, None]),  # the first is no good, the others are unknown
        ([1, 1, 2], [["rude"], [], ["wrong"]], [False, True, False]),
        ([1, 1], [["rude"], []], [False, True]),
    ],
)
def test_rankings_and_tags_tell_what_is_desirable(ranks, tags, labels):
    assert desirable(ranks, tags) == labels


def test_rows_of_both_forms_and_what_is_wrong_with_them():
    for label, wanted in ((True, True), (0, False), ("False", False), (" 1", True)):
        found = normalise({"prompt": "a", "completion": "b", "label": label}, "unpaired")
        assert found == {"prompt": "a", "completions": ["b"], "labels": [wanted]}
    ignored = set()
    pair = normalise({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2.0}, "unpaired", ignored=ignored)
    assert pair == {"prompt": "a", "completions": ["b", "c"], "labels": [True, False]} and ignored == {"margin"}
    for row, words in (
        ({"prompt": "a", "completion": "b"}, "no column label"),
        ({"prompt": "a", "completion": "b", "label": "good"}, "label must be true"),
        ({"prompt": "a", "completion": "b", "label": 0.5}, "label must be true"),
        ({"prompt": "a", "completion": "b", "label": 2}, "label must be true"),
        ({"prompt": "a", "completions": ["b", "c"], "labels": [1, 0]}, "no column ranks"),
        ({"completion": "b", "label": 1}, "no column prompt"),
        ({"prompt": "a", "completion": " ", "label": 1}, "completion is empty"),
        ({"prompt": "a", "completions": ["b", "b"], "ranks": [1, 1], "tags": [["dull"], []]}, "the same answer"),
    ):
        with pytest.raises(DataError, match=words):
            normalise(row, "unpaired")


def rows_of(count):
    """Rankings in which an answer with "red" is good, and one with "a" alone has a tag."""
    return [
        {
            "prompt": f"the {WORDS[i % 20]}",
            "completions": ["red red red", "red a", "a a a"],
            "ranks": [1, 2, 3],
            "tags": [[], [], ["dull"]],
        }
        for i in range(count)
    ]


def stage(write, folder, **args):
    return preference_stages.stage("kto", write("r.jsonl", rows_of(40)), folder, **args)


def test_the_stage_learns_and_resumes_to_the_bit(recipe, write, tiny_gpt2, monkeypatch, caplog):
    body = stage(write, tiny_gpt2, max_steps=8, learning_rate=3e-3, eval_steps=4)
    loaded = load(recipe({"whole": body, "broken": body}))
    chain.run(loaded, ["whole"])
    record = json.loads((loaded["whole"].folder / "stage.json").read_text())
    metrics = record["metrics"]
    assert metrics["accuracy"] > 0.9 and metrics["margin"] > 0 and metrics["kl"] >= 0
    for what in ("desirable", "undesirable", "unlabelled"):
        assert sum(record["rows"][side][what] for side in ("train", "validation")) == 40
    history = [json.loads(line) for line in open(loaded["whole"].folder / "history.jsonl")]
    assert all({"kl", "margin", "accuracy"} <= entry.keys() for entry in history if "loss" in entry)
    assert {"eval_kl", "eval_margin", "eval_accuracy"} <= next(e for e in history if "eval_loss" in e).keys()
    check_resumed(loaded, kto.UnpairedTrainer, monkeypatch)


def test_micro_batches_of_uneven_rows_change_nothing_and_lora_trains(recipe, write, tiny_gpt2):
    rows = rows_of(30) + [{"prompt": f"a {word}", "completion": "red red", "label": True} for word in WORDS[:10]]
    data = {"train": write("mixed.jsonl", rows), "validation": 0.2}
    body = stage(write, tiny_gpt2, per_device_train_batch_size=2) | {"data": data}
    whole = stage(write, tiny_gpt2, per_device_train_batch_size=8) | {"data": data}
    apo = stage(write, tiny_gpt2, loss_type="apo_zero_unpaired")
    loaded = load(recipe({"parts": body, "whole": whole, "lora": with_lora(body), "apo": apo}))
    chain.run(loaded)
    check_parts(loaded)
    metrics = [json.loads((loaded[name].folder / "stage.json").read_text())["metrics"] for name in ("parts", "whole")]
    assert metrics[0]["loss"] == pytest.approx(metrics[1]["loss"], abs=1e-5)
    assert metrics[0]["train_loss"] == pytest.approx(metrics[1]["train_loss"], abs=1e-5)


def test_it_stops_early_and_keeps_the_best(recipe, write, tiny_gpt2):
    body = stage(
        write,
        tiny_gpt2,
        max_steps=12,
        learning_rate=1e-12,  # nothing gets better
        metric_for_best_model="accuracy",
        early_stopping_patience=1,
        eval_steps=2,
        save_steps=2,
    )
    loaded = load(recipe({"x": body, "y": body | {"kind": "dpo"}}))
    chain.run(loaded)
    for name in ("x", "y"):
        record = json.loads((loaded[name].folder / "stage.json").read_text())
        assert record["metrics"]["steps"] < 12, name


@pytest.mark.parametrize(
    "change, key",
    [
        ({"loss_type": "kta"}, "args.loss_type"),
        ({"beta": 0.0}, "args.beta"),
        ({"desirable_weight": -1.0}, "args.desirable_weight"),
        ({"precompute_ref_log_probs": True}, "args.precompute_ref_log_probs"),
        ({"train_sampling_strategy": "group_by_length"}, "args.train_sampling_strategy"),
        ({"metric_for_best_model": "bleu"}, "args.metric_for_best_model"),
    ],
)
def test_what_cannot_be_done_is_found_by_check(recipe, write, tiny_gpt2, change, key):
    with pytest.raises(RecipeError, match=key.replace(".", r"\.")):
        load(recipe({"x": stage(write, tiny_gpt2, **change)}))


def test_rows_that_teach_nothing(recipe, write, tiny_gpt2):
    ties = [{"prompt": f"the {i}", "completions": ["red", "a"], "ranks": [1, 1]} for i in range(9)]
    alike = [{"prompt": "the cat", "completion": word, "label": i % 2 == 0} for i, word in enumerate(WORDS[:16])]
    body = stage(write, tiny_gpt2)
    with pytest.raises(RecipeError, match="no answer of 9 rows is desirable or undesirable"):
        load(recipe({"x": body | {"data": {"train": write("ties.jsonl", ties)}}}))
    loaded = load(recipe({"x": body | {"data": {"train": write("alike.jsonl", alike)}}}))
    with pytest.raises(DataError, match="all answers are to one prompt"):
        chain.run(loaded)


def test_columns_of_prompts_may_be_called_as_those_of_rankings(recipe, write, tiny_gpt2):
    rows = [{"prompt": f"the {i}", "ranks": i, "labels": [{"a": 1}], "label": [{"a": 1}]} for i in range(9)]
    sample = {"kind": "sample", "sample": {"models": [str(tiny_gpt2)]}, "data": {"train": write("p.jsonl", rows)}}
    load(recipe({"x": sample}))


def test_every_option_of_trl_is_used_or_refused():
    """A new option of TRL's configs that nobody looked at would be taken, and do nothing."""
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    used = {"beta", "loss_type", "max_length", "disable_dropout"}
    for config, module, more in (
        (KTOConfig, kto, {"desirable_weight", "undesirable_weight"}),
        (DPOConfig, dpo, {"loss_weights", "label_smoothing"}),
    ):
        own = {field.name for field in dataclasses.fields(config)} - known
        assert own == used | more | module.NOT_HERE.keys()


def test_control_tokens_in_texts_are_counted_by_all_kinds_that_learn_from_answers(recipe, write, tiny_gpt2, caplog):
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    rows = rows_of(12)
    rows[2]["prompt"] += tokenizer.eos_token
    rows[7]["completions"][1] += f" {tokenizer.eos_token} a"
    rows[7]["tags"][1] = ["dull"]  # kto reads it, too
    body = stage(write, tiny_gpt2) | {"data": {"train": write("marks.jsonl", rows)}}
    loaded = load(
        recipe({kind: body | {"kind": kind, "args": preference_stages.ARGS} for kind in ("reward", "dpo", "kto")})
    )
    for kind, module in (("reward", reward), ("dpo", dpo), ("kto", kto)):
        caplog.clear()
        module.encode(loaded[kind], module.ready(loaded[kind], tokenizer), 64)
        assert loaded[kind].report["train"]["control_text"] == 2
        assert "2 of 12 rows hold the text of a control token" in caplog.text and "marks.jsonl:3" in caplog.text
