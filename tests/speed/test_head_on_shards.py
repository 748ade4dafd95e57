"""The loss in the head where FSDP2 has cut up the head: gathered for it, not replaced by whole logits."""

import copy

import pytest
import torch
from test_packing import build, packed_loss, sequences
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from pipelines.speed import fast_model
from pipelines.speed.packed_attention import enable_packed_attention
from pipelines.speed.packing import pack


@pytest.fixture
def mesh():
    """A world of this process alone, over gloo: FSDP2 cuts up its weights all the same."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", ["of the model", "by itself"])
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa"])
def test_fsdp_takes_the_loss_in_the_head(name, head, dtype, mesh, monkeypatch):
    if name == "gpt2" and head == "by itself":
        pytest.skip("its weight is the embeddings'")
    model, batch = build(name), pack(sequences([5, 12, 3]))
    enable_packed_attention(model)
    fast_model.fast_model(model)
    sharded = copy.deepcopy(model)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=None)
    blocks = sharded.transformer.h if name == "gpt2" else sharded.model.layers
    for part in [*blocks, *([sharded.lm_head] if head == "by itself" else []), sharded]:
        fully_shard(part, mesh=mesh, mp_policy=policy)
    assert all(isinstance(weight, DTensor) for weight in sharded.parameters())
    weights, real = [], fast_model.linear_cross_entropy
    monkeypatch.setattr(
        fast_model, "linear_cross_entropy", lambda h, w, *args, **how: weights.append(w) or real(h, w, *args, **how)
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss, expected = sharded(**batch, use_cache=False).loss, packed_loss(model, batch)
    assert len(weights) == 2 and not isinstance(weights[0], DTensor) and weights[0].shape == weights[1].shape
    loss.backward()
    expected.backward()
    slack = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(loss, expected, **slack)
    for (name, mine), theirs in zip(sharded.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad, msg=lambda m, n=name: f"{n}: {m}", **slack)
