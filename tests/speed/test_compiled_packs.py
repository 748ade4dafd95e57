"""`torch.compile` of a model that trains on packs: batches of other lengths do not compile it anew."""

import random

import pytest
import torch
import varlen_on_cpu
from test_packing import build
from torch._dynamo.utils import counters

from pipelines.speed import varlen
from pipelines.speed.fast_model import fast_model
from pipelines.speed.packed_attention import enable_packed_attention
from pipelines.speed.packing import PackedCollator

ALLOWED = 2  # batches after the first at which anything is compiled again


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("gpt2", False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("llama_gqa", False), ("gpt2", True)]),
    ],
)
def test_batches_of_other_lengths_do_not_recompile(name, kernel, monkeypatch):
    """In blocks, and by the kernel of a GPU (its stand-in), which is part of what is compiled."""
    if kernel:
        varlen_on_cpu.install()
        monkeypatch.setattr(varlen, "why_not", lambda device, dtype: None if dtype == torch.bfloat16 else "float32")
    draw, model = random.Random(0), build(name)
    enable_packed_attention(model)
    fast_model(model)
    torch._dynamo.reset()
    counters.clear()
    compiled, graphs = torch.compile(model, backend="eager"), []
    for _ in range(20):
        lengths = [draw.randint(2, 40) for _ in range(draw.randint(3, 9))]
        batch = PackedCollator()([{"input_ids": [draw.randrange(3, 61) for _ in range(n)]} for n in lengths])
        with torch.autocast("cpu", torch.bfloat16, enabled=kernel):
            loss = compiled(**batch, use_cache=False).loss
            with torch.no_grad():
                torch.testing.assert_close(loss, model(**batch, use_cache=False).loss)
        loss.backward()
        graphs.append(counters["stats"]["unique_graphs"])
    again = sum(now > before for before, now in zip(graphs, graphs[1:], strict=False))
    assert not kernel or varlen_on_cpu.calls
    assert graphs[0] > 0 and again <= ALLOWED, (graphs, counters["graph_break"])
