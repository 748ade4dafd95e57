"""The head where ZeRO-3 has cut it up: gathered by DeepSpeed for its loss and its log-probs, which hold no whole logits."""

import copy

import pytest
import torch
from test_packing import build, packed_loss, sequences
from transformers import LlamaConfig, LlamaForCausalLM

from pipelines.generation import logprobs
from pipelines.generation.logprobs import collate, has_plain_head
from pipelines.speed import fast_model
from pipelines.speed.packed_attention import enable_packed_attention
from pipelines.speed.packing import pack
from pipelines.training.preferences import enable_answer_logprobs

deepspeed = pytest.importorskip("deepspeed")

# Without a threshold weights of less than 1e5 numbers stay whole, here all of them.
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
}


@pytest.fixture(scope="module", autouse=True)
def world():
    """A world of this process alone, over gloo: ZeRO-3 cuts up its weights all the same."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
            patch.setenv(name, value)
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
        yield
        torch.distributed.destroy_process_group()


def cut_up(model):
    """As transformers loads a model for ZeRO-3: no weight is whole when the stages begin to change it."""
    deepspeed.zero.Init(module=model, config_dict_or_path=CONFIG)
    assert all(weight.numel() == 0 for weight in model.parameters())
    return model


def engine_of(model):
    """DeepSpeed's engine around it."""
    return deepspeed.initialize(model=model, config=CONFIG, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))[0]


def assert_same_gradients(engine, model):
    for (name, mine), theirs in zip(engine.module.named_parameters(), model.parameters(), strict=True):
        found = deepspeed.utils.safe_get_full_grad(mine)
        torch.testing.assert_close(found, theirs.grad, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa"])  # tied, and a head of its own
def test_the_loss_is_taken_in_the_head(name, monkeypatch):
    model, batch = build(name), pack(sequences([5, 12, 3]))
    sharded = cut_up(copy.deepcopy(model))
    for one in (model, sharded):
        enable_packed_attention(one)
        fast_model.fast_model(one)
    weights, real = [], fast_model.linear_cross_entropy
    monkeypatch.setattr(
        fast_model,
        "linear_cross_entropy",
        lambda h, w, *args, **how: weights.append(w.shape) or real(h, w, *args, **how),
    )
    engine = engine_of(sharded)
    for _ in range(2):
        model.zero_grad()
        loss, expected = engine(**batch, use_cache=False).loss, packed_loss(model, batch)
        assert len(weights) == 2 and weights[0] == weights[1]
        weights.clear()
        engine.backward(loss)
        expected.backward()
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
        assert_same_gradients(engine, model)
        assert all(weight.numel() == 0 for weight in sharded.parameters())
        engine.step()
        with torch.no_grad():
            for weight in model.parameters():
                weight -= 0.1 * weight.grad


@pytest.mark.parametrize("kept", [0, 2**26])
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa"])
def test_log_probs_are_taken_in_the_head(name, kept, monkeypatch):
    monkeypatch.setattr(logprobs, "KEPT", kept)  # with and without the probabilities for the backward
    model = build(name)
    sharded = cut_up(copy.deepcopy(model))
    for one in (model, sharded):
        enable_packed_attention(one)
        enable_answer_logprobs(one)
    engine = engine_of(sharded)
    answers = [([1, 2, 3], [4, 5]), ([6, 7], [8, 9, 10])]
    batch = {**collate(answers, True, "cpu"), "lengths": torch.tensor([2, 3])}
    found, expected = engine(answers=batch), model(answers=batch)
    assert has_plain_head(sharded)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = torch.tensor([0.3, -0.8])
    engine.backward((found * weights).sum())
    (expected * weights).sum().backward()
    assert_same_gradients(engine, model)


class Doubled(LlamaForCausalLM):
    """Something between backbone and logits, of which no config tells."""

    def forward(self, *args, labels=None, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 2 * out.logits
        if labels is not None:
            out.loss = self.loss_function(out.logits, labels, self.vocab_size)
        return out


def test_what_is_no_plain_head_shows_in_the_first_forward(caplog):
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = Doubled(config)
    sharded = cut_up(copy.deepcopy(model))
    fast_model.fast_model(sharded)
    assert sharded.loss_is_fused  # as far as can be seen
    ids = torch.arange(12)[None]
    out, expected = engine_of(sharded)(input_ids=ids, labels=ids), model(input_ids=ids, labels=ids)
    torch.testing.assert_close(out.loss, expected.loss)
    assert not sharded.loss_is_fused and out.logits is not None
    assert "Doubled keeps its own loss" in caplog.text
