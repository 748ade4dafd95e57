"""Packed products: the same maps as the plain layers', for as long as the block is open, where they can be."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pipelines.speed.cpu_products import packed_products


def layers():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(24, 40), nn.Linear(24, 40, bias=False), Conv1D(40, 24)])
    nn.init.normal_(model[2].bias)
    return model


@pytest.mark.parametrize("shape", [(24,), (1, 24), (7, 24), (3, 5, 24)])
def test_products_are_those_of_the_plain_layers(shape):
    model, x = layers(), torch.randn(shape)
    with torch.no_grad():
        plain = [layer(x) for layer in model]
        with packed_products(model):
            assert all("forward" in vars(layer) for layer in model)
            packed = [layer(x) for layer in model]
    for a, b in zip(packed, plain, strict=True):
        torch.testing.assert_close(a, b)
    assert not any("forward" in vars(layer) for layer in model)


def test_autocast_is_heeded():
    model, x = layers(), torch.randn(7, 24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = [layer(x) for layer in model]
        with packed_products(model):
            packed = [layer(x) for layer in model]
    for a, b in zip(packed, plain, strict=True):
        assert a.dtype == b.dtype == torch.bfloat16
        torch.testing.assert_close(a, b)


def test_weights_changed_afterwards_are_seen_the_next_time():
    model, x = layers(), torch.randn(2, 24)
    with packed_products(model):
        before = model[0](x)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with torch.no_grad(), packed_products(model):
        torch.testing.assert_close(model[0](x) - model[0].bias, 2 * (before - model[0].bias))


def test_others_are_left_alone_also_when_something_breaks():
    class Special(nn.Linear):
        pass

    hooked = nn.Linear(24, 40)
    hooked.forward = own = lambda x: x
    model = nn.ModuleList([Special(24, 40), hooked, nn.Linear(24, 40).double(), nn.Linear(24, 40)])
    with pytest.raises(KeyError), packed_products(model):
        assert ["forward" in vars(layer) for layer in model] == [False, True, False, True]
        raise KeyError
    assert hooked.forward is own
    assert ["forward" in vars(layer) for layer in model] == [False, True, False, False]
