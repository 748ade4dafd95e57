"""The chunked heads equal PyTorch's own closed forms in value and in every gradient."""

import pytest
import torch
import torch.nn.functional as F

from pipelines.speed.fused_head import linear_cross_entropy, linear_logprobs

N, H, V = 23, 12, 37


def tensors(seed=0, bias=True, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=g).mul(0.5).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=g).to(dtype).requires_grad_()
    b = torch.randn(V, generator=g).to(dtype).requires_grad_() if bias else None
    return hidden, weight, b, torch.randint(0, V, (N,), generator=g)


def grads(loss, *inputs):
    return torch.autograd.grad(loss, [x for x in inputs if x is not None])


def assert_close(ours, theirs, tol=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=tol, rtol=tol)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rows", [None, 1, 7, 23, 100])
def test_cross_entropy_equals_torch(bias, reduction, rows):
    hidden, weight, b, labels = tensors(bias=bias)
    labels[[0, 5, 6, 22]] = -100
    ours = linear_cross_entropy(hidden, weight, labels, b, reduction=reduction, rows=rows)
    theirs = F.cross_entropy(F.linear(hidden, weight, b), labels, reduction=reduction)
    assert_close([ours], [theirs])
    assert_close(grads(3.0 * ours, hidden, weight, b), grads(3.0 * theirs, hidden, weight, b))


@pytest.mark.parametrize("divisor", [5, 0.25, torch.tensor(12)])
def test_divisor_replaces_the_count(divisor):
    hidden, weight, b, labels = tensors()
    ours = linear_cross_entropy(hidden, weight, labels, b, divisor=divisor, rows=7)
    theirs = F.cross_entropy(F.linear(hidden, weight, b), labels, reduction="sum") / divisor
    assert_close([ours, *grads(ours, hidden, weight, b)], [theirs, *grads(theirs, hidden, weight, b)])


def test_cross_entropy_batched_shape_and_other_ignore_index():
    hidden, weight, b, labels = tensors()
    hidden2, labels2 = hidden[:22].reshape(2, 11, H), labels[:22].reshape(2, 11)
    labels2 = labels2.masked_fill(labels2 == 3, 0)
    ours = linear_cross_entropy(hidden2, weight, labels2, b, ignore_index=0)
    theirs = F.cross_entropy(F.linear(hidden2, weight, b).transpose(1, 2), labels2, ignore_index=0)
    assert_close([ours, *grads(ours, hidden, weight, b)], [theirs, *grads(theirs, hidden, weight, b)])


def test_extreme_logits_stay_finite():
    hidden, weight, _, labels = tensors(bias=False)
    with torch.no_grad():
        hidden *= 200
    ours, theirs = linear_cross_entropy(hidden, weight, labels), F.cross_entropy(hidden @ weight.T, labels)
    assert_close([ours, *grads(ours, hidden, weight)], [theirs, *grads(theirs, hidden, weight)])


def test_all_rows_ignored_is_a_differentiable_zero():
    hidden, weight, b, labels = tensors()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), b)
    loss.backward()
    assert loss.item() == 0.0
    for x in (hidden, weight, b):
        assert x.grad.shape == x.shape and x.grad.abs().sum() == 0


def test_ignored_rows_are_not_computed():
    hidden, weight, b, labels = tensors()
    labels[10:] = -100
    poisoned = hidden.detach().clone()
    poisoned[10:] = float("nan")  # a masked-out row multiplied by zero would still give NaN
    poisoned.requires_grad_()
    loss = linear_cross_entropy(poisoned, weight, labels, b)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(weight.grad).all()
    assert poisoned.grad[10:].abs().sum() == 0 and poisoned.grad[:10].abs().sum() > 0


def test_no_gradient_work_without_grad(monkeypatch):
    hidden, weight, b, labels = tensors()
    with torch.no_grad():
        expected = F.cross_entropy(F.linear(hidden, weight, b), labels)
        calls = []
        real = torch.mm
        monkeypatch.setattr(torch, "mm", lambda *a, **k: calls.append(1) or real(*a, **k))
        loss = linear_cross_entropy(hidden, weight, labels, b, rows=N)
    assert len(calls) == 1 and not loss.requires_grad
    torch.testing.assert_close(loss, expected)
    calls.clear()
    weight.requires_grad_(False), b.requires_grad_(False)  # a frozen head (LoRA) pays for one gradient
    linear_cross_entropy(hidden, weight, labels, b, rows=N)
    assert len(calls) == 2


def test_second_backward_is_refused():
    hidden, weight, _, labels = tensors(bias=False)
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward only"):
        loss.backward()


@pytest.mark.parametrize("autocast", [True, False])
def test_bf16(autocast):
    hidden, weight, b, labels = tensors(dtype=torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        ours = linear_cross_entropy(hidden, weight, labels, b, rows=8)
    theirs = F.cross_entropy(F.linear(hidden.float(), weight.float(), b.float()), labels)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=1e-2)
    got, wanted = grads(ours, hidden, weight, b), grads(theirs, hidden, weight, b)
    for a, e in zip(got, wanted, strict=True):
        assert a.dtype == e.dtype
        torch.testing.assert_close(a.float(), e.float(), atol=1e-2, rtol=3e-2)


def test_tied_weights():
    def run(head):
        torch.manual_seed(0)
        table = torch.nn.Embedding(V, H)
        ids = torch.randint(0, V, (4, 9))
        hidden = table(ids).tanh()
        loss = head(hidden[:, :-1].reshape(-1, H), table.weight, ids[:, 1:].reshape(-1))
        loss.backward()
        return loss.detach(), table.weight.grad

    assert_close(run(linear_cross_entropy), run(lambda h, w, y: F.cross_entropy(h @ w.T, y)))


def test_misuse_is_told():
    hidden, weight, _, labels = tensors(bias=False)
    with pytest.raises(ValueError, match="do not belong together"):
        linear_cross_entropy(hidden[1:], weight, labels)
    with pytest.raises(ValueError, match="reduction"):
        linear_cross_entropy(hidden, weight, labels, reduction="none")
    with pytest.raises(ValueError, match="temperature"):
        linear_logprobs(hidden, weight, labels, temperature=0.0)


def closed_form(hidden, weight, b, labels, temperature):
    # in float64: the entropy's float32 gradient is not exact to 1e-5 in either implementation
    hidden, weight, b = hidden.double(), weight.double(), None if b is None else b.double()
    logp = F.log_softmax(F.linear(hidden, weight, b) / temperature, -1)
    return logp.gather(1, labels[:, None])[:, 0].float(), -(logp.exp() * logp).sum(-1).float()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("rows", [None, 5])
def test_logprobs_equal_closed_form(bias, temperature, rows):
    hidden, weight, b, labels = tensors(1, bias=bias)
    torch.manual_seed(0)
    pull, push = torch.randn(N), torch.randn(N)
    ours = linear_logprobs(hidden, weight, labels, b, temperature, rows=rows)
    theirs = closed_form(hidden, weight, b, labels, temperature)
    assert_close(ours, theirs)

    def losses(pair):
        return (pair[0] * pull).sum(), (pair[1] * push).sum(), (pair[0] * pull + pair[1] * push).sum()

    for i in range(3):  # through the log-probability, through the entropy, through both
        ours = linear_logprobs(hidden, weight, labels, b, temperature, rows=rows)
        theirs = closed_form(hidden, weight, b, labels, temperature)
        assert_close(grads(losses(ours)[i], hidden, weight, b), grads(losses(theirs)[i], hidden, weight, b))


def test_logprobs_without_entropy():
    hidden, weight, b, labels = tensors(2)
    logprob, entropy = linear_logprobs(hidden, weight, labels, b, entropy=False)
    wanted = closed_form(hidden, weight, b, labels, 1.0)[0]
    assert entropy is None
    assert_close([logprob], [wanted])
    assert_close(grads(logprob.sum(), hidden, weight, b), grads(wanted.sum(), hidden, weight, b))


def test_logprobs_bf16_autocast():
    hidden, weight, b, labels = tensors(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_logprobs(hidden, weight, labels, b)
    theirs = closed_form(hidden, weight, b, labels, 1.0)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    assert_close(ours, theirs, tol=5e-2)
    assert_close(grads(ours[0].mean(), hidden, weight), grads(theirs[0].mean(), hidden, weight), tol=3e-2)


def test_logprobs_of_no_rows():
    hidden, weight, b, labels = tensors()
    logprob, entropy = linear_logprobs(hidden[:0], weight, labels[:0], b)
    assert logprob.shape == entropy.shape == (0,)
    logprob.sum().backward()


def test_logprobs_backward_can_run_twice():
    hidden, weight, _, labels = tensors(bias=False)
    logprob, _ = linear_logprobs(hidden, weight, labels)
    first = torch.autograd.grad(logprob.sum(), weight, retain_graph=True)
    assert_close(first, torch.autograd.grad(logprob.sum(), weight))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("entropy", [True, False])
def test_kept_logits_give_the_same(bias, entropy):
    hidden, weight, b, labels = tensors(4, bias=bias)
    upstream = torch.randn(N, generator=torch.Generator().manual_seed(0))
    ours = linear_logprobs(hidden, weight, labels, b, 0.7, entropy, keep=True)
    theirs = closed_form(hidden, weight, b, labels, 0.7)
    assert_close(ours[: 1 + entropy], theirs[: 1 + entropy])
    wanted = grads((theirs[0] * upstream).sum(), hidden, weight, b)
    for _ in range(2):  # nothing of what was kept is used up
        assert_close(
            torch.autograd.grad((ours[0] * upstream).sum(), [hidden, weight, b][: 2 + bias], retain_graph=True), wanted
        )
    assert ours[1] is None or not ours[1].requires_grad


def test_kept_logits_in_bf16_are_as_good_as_computed_again():
    hidden, weight, b, labels = tensors(5)
    both = []
    for keep in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logprob, _ = linear_logprobs(hidden, weight, labels, b, keep=keep)
        both.append([logprob, *grads(logprob.mean(), hidden, weight, b)])
    assert_close(*both, tol=1e-3)
