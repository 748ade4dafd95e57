"""Answers behind one copy of their prompt: what is computed of each is what is computed of it alone."""

import random

import pytest
import torch
from datasets import Dataset
from test_ppo_trainer import critic, gpt2, make, weights_of
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from pipelines.generation.logprobs import (
    can_share,
    collate,
    make_ready,
    sequence_scores,
    sharing_pays,
    token_logprobs,
    token_values,
)
from pipelines.ppo import update

SHAPE = dict(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=1))


def answers(seed: int) -> list:
    """Pairs of prompt and answer in groups of one to five; some answers begin or are alike, some are one token."""
    draw, out = random.Random(seed), []
    for _ in range(6):
        prompt = [draw.randrange(30) for _ in range(draw.choice([1, 20, 30]))]
        group = [[draw.randrange(3) for _ in range(draw.choice([1, 2, 5, 9]))] for _ in range(draw.randrange(1, 6))]
        out += [(prompt, answer) for answer in [*group, group[0]]]
    return out


@pytest.mark.parametrize("make_model", [gpt2, llama])
@pytest.mark.parametrize("seed", range(3))
def test_log_probs_and_gradients_are_those_of_answers_alone(make_model, seed):
    model, found = make_model(), []
    assert make_ready(model) and (share := can_share(model)) == 32
    pairs = answers(seed)
    weights = torch.rand(sum(len(answer) for _, answer in pairs), generator=torch.Generator().manual_seed(seed))
    for width in (0, share):
        batch = collate(pairs, True, "cpu", width)
        assert ("branches" in batch["inputs"]) == bool(width)
        logprobs, entropies = token_logprobs(model, batch, 0.7, entropy=True)
        model.zero_grad()
        (logprobs * weights).sum().backward()
        found.append((logprobs, entropies, torch.cat([w.grad.flatten() for w in model.parameters()])))
        tokens = batch["inputs"]["input_ids"].numel()
    assert tokens < sum(len(prompt) + len(answer) - 1 for prompt, answer in pairs)
    for alone, shared in zip(*found, strict=True):
        torch.testing.assert_close(shared, alone, atol=1e-5, rtol=1e-4)


def test_values_too():
    model = critic()
    make_ready(model)
    with torch.no_grad():
        alone, shared = (token_values(model, collate(answers(0), True, "cpu", width)) for width in (0, 32))
    torch.testing.assert_close(shared, alone, atol=1e-5, rtol=1e-4)


def test_where_a_window_would_be_counted_over_other_answers_nothing_is_shared():
    model = MistralForCausalLM(MistralConfig(**SHAPE, num_key_value_heads=1, sliding_window=8))
    assert make_ready(model) and can_share(model) == 0


def test_it_is_done_where_it_is_less_work():
    assert sharing_pays(500, [50] * 8, 768) and sharing_pays(200, [300] * 4, 1024)
    assert not sharing_pays(500, [50], 768)
    assert not sharing_pays(20, [1000] * 16, 768)  # 16,000 positions that nearly all do not see each other


def test_scores_of_a_reward_model_too():
    model, draw = critic(), random.Random(0)
    begin = [[draw.randrange(30) for _ in range(25)] for _ in range(3)]
    sequences = [prompt + [draw.randrange(30) for _ in range(1 + i)] for prompt in begin for i in range(6)]
    make_ready(model)
    seen = []
    model.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True, prepend=True
    )
    for group in (2, 3, 5, 6):  # some groups of 5 hold answers to two prompts
        alone, shared = (sequence_scores(model, sequences, True, "cpu", n) for n in (1, group))
        torch.testing.assert_close(shared, alone, atol=1e-5, rtol=1e-4)
        assert seen[-1] < seen[-2]


@pytest.mark.parametrize("method", ["gae", "grpo"])
def test_an_update_is_the_same_with_shared_prompts(tmp_path, method, monkeypatch):
    """The micro-batches hold whole groups then; with GAE the critic reads the same batches."""
    found, layouts = [], []
    monkeypatch.setattr(update, "collate", lambda *a: layouts.append(collate(*a)) or layouts[-1])
    texts = Dataset.from_dict({"prompt": [" ".join(f"w{(i * 7 + j) % 30}" for j in range(20 + i)) for i in range(8)]})
    for on in (True, False):
        trainer = make(
            tmp_path,
            models=(gpt2(), critic() if method == "gae" else None),
            data=texts,
            advantage=method,
            num_generations=4,
            num_ppo_epochs=2,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
        )
        assert trainer.learner.share == trainer.rollout_maker.share == 32
        if not on:
            trainer.rollout_maker.share = trainer.learner.share = 0
        layouts.clear()
        trainer.train()
        assert {"branches" in batch["inputs"] for batch in layouts} == {on}
        found.append(weights_of(trainer))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], atol=2e-6, rtol=1e-4)
