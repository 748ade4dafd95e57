"""A decoding step of fixed shape: the tokens of the ordinary one, compiled once, recorded and replayed on a GPU."""

import copy
import functools
import logging

import pytest
import torch
from simulated_gpu import simulated_gpu
from torch._dynamo.utils import counters
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pipelines.generation import fixed_step
from pipelines.generation.decode import generate
from pipelines.speed.half_products import half_products, hold_half
from pipelines.speed.packed_attention import enable_packed_attention

V = 60


def gpt2():
    size = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(GPT2Config(**size, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).eval()


def llama():
    size = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**size, num_key_value_heads=2, max_position_embeddings=128)).eval()


def made(make):
    torch.manual_seed(0)
    return make()


def answers(model, count=9, tokens=40, **how):
    """Some end after a few tokens, so that rows are dropped."""
    prompts = [[(3 * i + j) % V for j in range(1 + i % 5)] for i in range(count)]
    how = {"max_new_tokens": tokens, "eos_token_ids": [0, 7, 11], "seeds": list(range(count)), "batch_size": 4} | how
    return generate(model, prompts, **how)


@pytest.fixture
def recorded(monkeypatch):
    """Steps of fixed shape on this CPU, each compiled (backend eager) in the place of a graph; shapes are recorded."""
    monkeypatch.setattr(fixed_step, "obstacle", lambda model, plain_masks: None)
    monkeypatch.setattr(fixed_step, "KEYS", 16)
    torch._dynamo.reset()
    counters.clear()
    compiled, shapes = torch.compile(fixed_step.advance, backend="eager", dynamic=False), []

    def step(model, draw, state):
        shapes.append((*state.ids.shape, state.keys))
        return functools.partial(compiled, model, draw, state)

    monkeypatch.setattr(fixed_step, "Recorded", step)
    return shapes


@pytest.mark.parametrize("make", [gpt2, pytest.param(llama, marks=pytest.mark.slow)])
def test_the_tokens_are_those_of_the_ordinary_step(make, recorded, monkeypatch):
    """Nothing is compiled twice for a shape: batch and keys come in few sizes, all else is a tensor."""
    model = made(make)
    enable_packed_attention(model)
    how = {"count": 9, "tokens": 14, "top_k": 40, "top_p": 0.95}
    found = answers(model, **how)
    graphs, shapes = counters["stats"]["unique_graphs"], set(recorded)
    assert len(recorded) > len(shapes) > 2
    assert graphs <= len(shapes) * graphs_of_one(counters), counters
    monkeypatch.undo()
    expected = answers(model, **how)
    assert found[0] == expected[0]
    torch.testing.assert_close(torch.cat(found[1]), torch.cat(expected[1]), atol=1e-5, rtol=1e-5)


def graphs_of_one(counters) -> int:
    """Graphs that one step is compiled to: one more than its breaks."""
    return 1 + sum(counters["graph_break"].values())


@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_gpu_replays_what_it_recorded(make, monkeypatch):
    monkeypatch.setattr(fixed_step, "KEYS", 24)
    model = made(make)
    expected = answers(model)
    with pytest.MonkeyPatch.context() as patch, simulated_gpu(patch) as gpu:
        there = copy.deepcopy(model).to("cuda")
        with gpu.phase("recorded") as counts:
            found = answers(there)
        monkeypatch.setenv("PIPELINES_GPU_OFF", "graphs")
        with gpu.phase("plain") as plain:
            same = answers(there)
    assert found[0] == same[0] == expected[0]
    torch.testing.assert_close(torch.cat(found[1]), torch.cat(expected[1]), atol=1e-5, rtol=1e-5)
    assert counts["replays"] > 40 and counts["operators"] < plain["operators"] / 2
    assert counts["wait"] == plain["wait"]


def test_a_step_that_cannot_be_recorded_is_computed_as_it_is(caplog, monkeypatch):
    """As with a mixture of experts, which asks the device which experts are needed."""
    model = made(gpt2)
    expected = answers(model)
    forward = type(model.transformer.h[0].mlp).forward
    monkeypatch.setattr(
        type(model.transformer.h[0].mlp), "forward", lambda self, x: forward(self, x) if x.abs().max() > 0 else x
    )
    fixed_step.log_eager.cache_clear()
    with pytest.MonkeyPatch.context() as patch, simulated_gpu(patch) as gpu, caplog.at_level(logging.INFO):
        there = model.to("cuda")
        found = answers(there)
        assert not gpu.counts["other"]["replays"]
    assert found[0] == expected[0]
    assert caplog.text.count("is decoded without CUDA graphs: CUDA error: operation not permitted") == 1


def test_products_held_in_bfloat16_are_those_of_autocast():
    model, ids = made(gpt2), torch.arange(12).reshape(2, 6)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(ids).logits
        with half_products(model):
            assert model.transformer.h[0].mlp.c_fc.weight.dtype == torch.bfloat16 == model.lm_head.weight.dtype
            assert model.transformer.wte.weight.dtype == torch.float32
            assert torch.equal(model(ids).logits, expected)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert model.lm_head.weight is model.transformer.wte.weight
    frozen = hold_half(copy.deepcopy(model).requires_grad_(False))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(ids).logits, expected)
    bytes_of = lambda m: sum(p.numel() * p.itemsize for p in m.parameters())  # noqa: E731
    assert bytes_of(frozen) < 0.75 * bytes_of(model)


def test_decoding_on_a_gpu_casts_no_frozen_weight_anew(monkeypatch):
    model = made(llama).requires_grad_(False)
    with pytest.MonkeyPatch.context() as patch, simulated_gpu(patch) as gpu:
        there = model.to("cuda")
        operators, tokens = {}, {}
        for off in ("graphs", "graphs, bf16_decoding"):
            monkeypatch.setenv("PIPELINES_GPU_OFF", off)
            with gpu.phase(off) as counts, torch.autocast("cuda", torch.bfloat16):
                tokens[off] = answers(there)
            operators[off] = counts["operators"]
    assert tokens["graphs"][0] == tokens["graphs, bf16_decoding"][0]
    assert all(torch.equal(a, b) for a, b in zip(tokens["graphs"][1], tokens["graphs, bf16_decoding"][1], strict=True))
    assert operators["graphs"] < 0.95 * operators["graphs, bf16_decoding"]
