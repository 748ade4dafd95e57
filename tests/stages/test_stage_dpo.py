"""DPO: for two answers it is TRL's trainer, for more it is the Plackett-Luce model; layouts do not change it; it
resumes.
"""

import copy
import itertools
import json
from types import SimpleNamespace

import preference_stages
import pytest
import torch
from datasets import Dataset
from preference_stages import TRL, check_parts, check_resumed, policy, rankings, with_lora
from tiny_words import WORDS
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from pipelines.chain import chain
from pipelines.recipe.problems import RecipeError
from pipelines.recipe.recipe import load
from pipelines.stages import dpo
from pipelines.training.preferences import (
    PAIR_LOSSES,
    collate_rankings,
    pair_loss,
    plackett_luce,
    rankings_loss,
    table,
)
from pipelines.training.rankings import decided


def settings(**changes):
    fixed = {
        "ranking_loss": "pairs",
        "loss_type": ["sigmoid"],
        "loss_weights": None,
        "beta": 0.3,
        "label_smoothing": 0.1,
    }
    return SimpleNamespace(**fixed | changes)


def loss_of(logratios, rows, lengths, **changes):
    return rankings_loss(logratios, **table(rows), lengths=lengths, args=settings(**changes))


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_two_answers_give_the_loss_gradients_and_weights_of_trl(tiny_gpt2, tmp_path, name):
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    ours, theirs = policy(tiny_gpt2), AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    reference = copy.deepcopy(theirs)
    with torch.no_grad():  # another model, so that the log-ratios are not 0
        for weight in reference.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    rows = rankings(6, 2)
    pairs = [
        {"prompt_ids": r["prompts"][0], "chosen_ids": r["answers"][0], "rejected_ids": r["answers"][1]} for r in rows
    ]
    config = DPOConfig(
        str(tmp_path),
        loss_type=[name],
        beta=0.3,
        label_smoothing=0.1,
        **TRL,
        per_device_train_batch_size=6,
    )
    text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trl = DPOTrainer(theirs, reference, config, train_dataset=text, processing_class=tokenizer)
    frozen = policy(tiny_gpt2)
    frozen.load_state_dict(trl.ref_model.state_dict())
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-3, eps=1e-5) for model in (ours, trl.model)]
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    for _ in range(3):
        batch = collate_rankings(rows, True, True)
        with torch.no_grad():
            base = frozen(answers=batch)
        our_loss = loss_of(ours(answers=batch) - base, rows, batch["lengths"], loss_type=[name])
        their_loss = trl._compute_loss(trl.model, DataCollatorForPreference(tokenizer.pad_token_id)(pairs), False)
        torch.testing.assert_close(our_loss, their_loss, atol=1e-5, rtol=1e-5)
        for loss, optimizer in zip((our_loss, their_loss), optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for key, weight in trl.model.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], weight, atol=1e-5, rtol=0)
    assert max((ours.state_dict()[k] - v).abs().max() for k, v in before.items()) > 1e-3


def test_a_shared_prompt_a_pack_and_padding_give_the_same(tiny_gpt2):
    rows = [*rankings(3, 4), *rankings(2, 2, seed=1)]
    rows[0]["answers"][1] = [7]  # one token: the state before it is the prompt's last
    rows[0]["answers"][2] = rows[0]["answers"][0][:1] + [9, 9]  # begins as another answer
    found = []
    for packed, share in ((True, True), (True, False), (False, False)):
        model = policy(tiny_gpt2, packed)
        loss = model(answers=collate_rankings(rows, packed, share))
        loss.sum().backward()
        found.append((loss.detach(), model.transformer.wte.weight.grad.clone()))
    for values, gradient in found[1:]:
        torch.testing.assert_close(values, found[0][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradient, found[0][1], atol=1e-4, rtol=1e-4)


def test_plackett_luce_is_a_distribution_over_rankings_and_dpo_for_two():
    rewards, ranks = torch.tensor([0.3, -1.2, 0.8, 2.0]), lambda *values: torch.tensor(values, dtype=torch.float32)
    orders = itertools.permutations(range(4))
    chances = [(-plackett_luce(rewards[list(order)], ranks(1, 2, 3, 4))).exp() for order in orders]
    torch.testing.assert_close(sum(chances), torch.tensor(1.0))
    two = plackett_luce(rewards[:2], ranks(2, 1))
    torch.testing.assert_close(two, -torch.nn.functional.logsigmoid(rewards[1] - rewards[0]))
    tied = plackett_luce(rewards[:3], ranks(1, 1, 2))
    torch.testing.assert_close(tied, plackett_luce(rewards[[1, 0, 2]], ranks(1, 1, 2)))
    assert plackett_luce(rewards[[0, 0, 1]], ranks(1, 1, 2)).isfinite()


@pytest.mark.parametrize("form", [{"ranking_loss": "plackett_luce"}, *({"loss_type": [n]} for n in PAIR_LOSSES)])
def test_rankings_of_any_length_weigh_alike_and_pairs_are_counted_once(form):
    """Against sums written out one by one, ties and missing answers included."""
    draw = torch.Generator().manual_seed(0)
    rows = [{"ranks": r} for r in ([1, 2, 2, 3], [2, 1], [1, 1, 3], [3, 1, 2, 1, 5])]
    ratios = torch.randn(sum(len(row["ranks"]) for row in rows), generator=draw, requires_grad=True)
    lengths, args, start, losses = torch.randint(1, 9, ratios.shape, generator=draw), settings(**form), 0, []
    for row in rows:
        at = range(start, start + len(row["ranks"]))
        pairs = [(at[i], at[j]) for i, j in decided(row["ranks"])]
        if "loss_type" in form:
            of = [
                pair_loss(form["loss_type"][0], ratios[i], ratios[j], (lengths[i], lengths[j]), args) for i, j in pairs
            ]
            losses.append(torch.stack(of).mean())
        else:
            worse = {i: [b for a, b in pairs if a == i] for i, _ in pairs}
            losses.append(
                sum((args.beta * ratios[[i, *w]]).logsumexp(0) - args.beta * ratios[i] for i, w in worse.items())
            )
        start += len(row["ranks"])
    found, wanted = loss_of(ratios, rows, lengths, **form), torch.stack(losses).mean()
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(loss, ratios)[0] for loss in (found, wanted)]
    torch.testing.assert_close(*gradients)


def rows_of(count):
    """Rankings in which an answer of more "red" is better."""
    return [
        {
            "prompt": f"the {WORDS[i % 20]}",
            "completions": ["red red red", "red red a", "a red a", "a a a"],
            "ranks": [1, 2, 3, 4],
        }
        for i in range(count)
    ]


def stage(write, folder, **args):
    return preference_stages.stage("dpo", write("r.jsonl", rows_of(40)), folder, **args)


@pytest.mark.parametrize("form", ["pairs", "plackett_luce"])
def test_the_stage_learns_the_ranking_and_resumes_to_the_bit(recipe, write, tiny_gpt2, tmp_path, monkeypatch, form):
    body = stage(write, tiny_gpt2, ranking_loss=form, max_steps=8, learning_rate=3e-3)
    loaded = load(recipe({"whole": body, "broken": body}))
    chain.run(loaded, ["whole"])
    metrics = json.loads((loaded["whole"].folder / "stage.json").read_text())["metrics"]
    assert metrics["accuracy"] > 0.95 and metrics["margin"] > 0 and metrics["pairs"] % 6 == 0
    assert metrics["displacement"] < 0  # the best answers have become likelier
    check_resumed(loaded, dpo.PreferenceTrainer, monkeypatch)


def test_best_answers_that_become_unlikely_are_measured_and_warned_of(recipe, write, tiny_gpt2, monkeypatch, caplog):
    rows = [
        {"ranks": [2.0, 1.0], "answers": [[5], [6, 7]]},
        {"ranks": [1.0, 3.0, 1.0], "answers": [[5], [6], [7]]},
    ]
    ratios = [torch.tensor([-9.0, -3.0]), torch.tensor([-2.0, -9.0, 1.0])]
    assert dpo.displacement(rows, ratios) == pytest.approx((3 + 2 - 1) / 4)
    monkeypatch.setattr(dpo, "DISPLACED", -100.0)
    chain.run(load(recipe({"x": stage(write, tiny_gpt2, max_steps=1)})))
    assert "nats a token less likely than before training" in caplog.text


def test_lora_and_gradient_accumulation(recipe, write, tiny_gpt2):
    body = stage(write, tiny_gpt2, per_device_train_batch_size=2)
    whole = stage(write, tiny_gpt2, per_device_train_batch_size=8)
    loaded = load(recipe({"parts": body, "whole": whole, "lora": with_lora(stage(write, tiny_gpt2))}))
    chain.run(loaded)
    check_parts(loaded)


@pytest.mark.parametrize(
    "args, key",
    [
        ({"loss_type": ["sigmiod"]}, "args.loss_type"),
        ({"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0]}, "args.loss_weights"),
        ({"ranking_loss": "plackett_luce", "loss_type": ["ipo"]}, "args.loss_type"),
        ({"beta": 0.0}, "args.beta"),
        ({"sync_ref_model": True}, "args.sync_ref_model"),
        ({"label_smoothing": 0.5}, "args.label_smoothing"),
    ],
)
def test_what_cannot_be_done_is_found_by_check(recipe, write, tiny_gpt2, args, key):
    with pytest.raises(RecipeError, match=key.replace(".", r"\.")):
        load(recipe({"x": stage(write, tiny_gpt2, **args)}))
