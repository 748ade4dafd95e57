"""PPO's mathematics against closed forms, brute force and the properties that must hold for any input."""

import math

import pytest
import torch

from pipelines.ppo import algorithm


def ragged(seed=0, b=5, t=7):
    """Random (B, T) tensors with a left-aligned mask of lengths 1 … T."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, t + 1, (b,), generator=g)
    lengths[0], lengths[1] = t, 1
    mask = torch.arange(t) < lengths[:, None]
    return mask, *(torch.randn(b, t, generator=g) for _ in range(3)), torch.randn(b, generator=g)


def test_kl_estimators_closed_forms():
    logprobs, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    r = (ref - logprobs).exp()
    torch.testing.assert_close(algorithm.kl_estimate(logprobs, ref, "k1"), -r.log())
    torch.testing.assert_close(algorithm.kl_estimate(logprobs, ref, "k2"), r.log() ** 2 / 2)
    torch.testing.assert_close(algorithm.kl_estimate(logprobs, ref, "k3"), (r - 1) - r.log())
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        algorithm.kl_estimate(logprobs, ref, "k4")


def test_k1_and_k3_are_unbiased_and_k3_never_negative():
    """Their exact expectation over the policy is the exact KL of two categorical distributions."""
    torch.manual_seed(0)
    p, q = (torch.randn(50, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    kl = (p.exp() * (p - q)).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((p.exp() * algorithm.kl_estimate(p, q, estimator)).sum(), kl)
    assert (algorithm.kl_estimate(p, q, "k3") >= 0).all()
    assert (algorithm.kl_estimate(p, q, "k1") < 0).any()


def test_score_lands_on_the_last_real_token():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    kl = torch.full((2, 3), 0.5)
    rewards = algorithm.token_rewards(torch.tensor([1.0, 2.0]), kl, mask, kl_coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.95, 0.0], [-0.05, -0.05, 1.95]]))


def test_gae_equals_its_definition():
    """A_t = Σ_l (γλ)^l δ_{t+l}, summed by brute force over each response's real length."""
    mask, rewards, values, _, _ = ragged()
    gamma, lam = 0.9, 0.8
    advantages, returns = algorithm.gae(rewards, values, mask, gamma, lam)
    for row in range(len(mask)):
        n = int(mask[row].sum())
        delta = [
            rewards[row, t] + (gamma * values[row, t + 1] if t + 1 < n else 0.0) - values[row, t] for t in range(n)
        ]
        for t in range(n):
            expected = sum((gamma * lam) ** k * delta[t + k] for k in range(n - t))
            torch.testing.assert_close(advantages[row, t], expected)
            torch.testing.assert_close(returns[row, t], expected + values[row, t])
        assert (advantages[row, n:] == 0).all() and (returns[row, n:] == 0).all()


def test_gae_limits():
    """λ = 1: Monte Carlo return minus value. λ = 0: the one-step TD error."""
    mask, rewards, values, _, _ = ragged()
    rewards, values = rewards * mask, values * mask
    advantages, _ = algorithm.gae(rewards, values, mask, 1.0, 1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(advantages, (to_go - values) * mask)
    advantages, _ = algorithm.gae(rewards, values, mask, 1.0, 0.0)
    following = torch.cat([values[:, 1:], torch.zeros(len(values), 1)], 1)
    torch.testing.assert_close(advantages, (rewards + following - values) * mask)


def test_whitening_is_unbiased_and_masked():
    mask, x, *_ = ragged(b=40)
    white = algorithm.whiten(x, mask)
    torch.testing.assert_close(white[mask].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(white[mask].var(unbiased=True), torch.tensor(1.0))
    unshifted = algorithm.whiten(x, mask, shift_mean=False)
    torch.testing.assert_close(unshifted[mask], white[mask] + x[mask].mean())
    assert (white[~mask] == 0).all()
    assert algorithm.whiten(torch.tensor([3.0]), torch.tensor([True])).isfinite().all()


@pytest.mark.parametrize("poison", [1e6, math.nan, math.inf])
def test_what_is_in_the_padding_changes_nothing(poison):
    mask, logprobs, ref, values, scores = ragged()

    def everything(logprobs, ref, values):
        kl = algorithm.kl_estimate(logprobs, ref, "k3")
        rewards = algorithm.token_rewards(scores, kl, mask, 0.05)
        rewards = algorithm.whiten(rewards, mask, shift_mean=False)
        advantages, returns = algorithm.gae(rewards, values, mask, 1.0, 0.95)
        return algorithm.whiten(advantages, mask), returns, algorithm.explained_variance(values, returns, mask)

    clean = everything(logprobs, ref, values)
    poisoned = everything(*(torch.where(mask, x, poison) for x in (logprobs, ref, values)))
    for one, other in zip(clean, poisoned, strict=True):
        assert torch.equal(one, other)


def test_order_and_padding_width_do_not_matter():
    mask, logprobs, ref, values, scores = ragged()
    order = torch.tensor([3, 0, 4, 2, 1])

    def advantages(mask, logprobs, ref, values, scores):
        rewards = algorithm.token_rewards(scores, algorithm.kl_estimate(logprobs, ref, "k1"), mask, 0.05)
        return algorithm.whiten(algorithm.gae(rewards, values, mask, 1.0, 0.95)[0], mask)

    plain = advantages(mask, logprobs, ref, values, scores)
    shuffled = advantages(mask[order], logprobs[order], ref[order], values[order], scores[order])
    torch.testing.assert_close(shuffled, plain[order])
    wider = [torch.nn.functional.pad(x, (0, 3)) for x in (mask, logprobs, ref, values)]
    torch.testing.assert_close(advantages(*wider, scores)[:, :-3], plain)


def test_policy_loss_clips_where_ppo_says():
    old = torch.zeros(4)
    new = torch.log(torch.tensor([1.5, 1.5, 0.5, 0.5])).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, clipped = algorithm.policy_loss(new, old, advantages, 0.2)
    torch.testing.assert_close(loss, torch.tensor([-1.2, 1.5, -0.5, 0.8]))
    assert clipped.tolist() == [True, False, False, True]
    loss.sum().backward()
    assert ((new.grad == 0) == clipped).all()


def test_first_minibatch_gradient_is_the_policy_gradient():
    """At ratio 1 the surrogate's gradient is −A·∇log π."""
    logprobs = torch.randn(6, requires_grad=True)
    advantages = torch.randn(6)
    algorithm.policy_loss(logprobs, logprobs.detach(), advantages, 0.2)[0].sum().backward()
    torch.testing.assert_close(logprobs.grad, -advantages)


@pytest.mark.parametrize(
    "mode, low, high, expected",  # of the ratios 2, 1/4 (product 1/2) and 8 (the rest is padding)
    [
        ("token_truncate", 0.5, 3.0, [[2, 0.5], [3, 1]]),
        ("token_truncate", None, 3.0, [[2, 0.25], [3, 1]]),
        ("token_mask", None, 3.0, [[2, 0.25], [0, 1]]),
        ("token_mask", 0.5, None, [[2, 0], [8, 1]]),
        ("sequence_truncate", None, 3.0, [[0.5, 0.5], [3, 3]]),
        ("sequence_mask", None, 3.0, [[0.5, 0.5], [0, 0]]),
        ("sequence_mask", None, None, [[0.5, 0.5], [8, 8]]),
    ],
)
def test_importance_of_what_another_program_sampled(mode, low, high, expected):
    mask = torch.tensor([[True, True], [True, False]])
    apart = torch.tensor([[2.0, 0.25], [8.0, 5.0]]).log()
    found = algorithm.importance(apart - 1, torch.full((2, 2), -1.0), mask, mode, low, high)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))
    unknown = algorithm.importance(apart - 1, torch.full((2, 2), math.nan), mask, mode, low, high)
    assert torch.equal(unknown, torch.ones(2, 2))


def test_weighted_advantages_weigh_the_loss():
    new, old, advantages, weights = (torch.randn(50, generator=torch.Generator().manual_seed(i)) for i in range(4))
    weights = weights.abs()
    plain, _ = algorithm.policy_loss(new, old, advantages, 0.2)
    weighted, _ = algorithm.policy_loss(new, old, advantages * weights, 0.2)
    torch.testing.assert_close(weighted, plain * weights)


def test_value_loss_clips_around_the_old_value():
    old, returns = torch.zeros(3), torch.tensor([1.0, 1.0, -1.0])
    new = torch.tensor([0.1, 0.5, 0.5], requires_grad=True)
    loss, clipped = algorithm.value_loss(new, old, returns, 0.2)
    torch.testing.assert_close(loss, 0.5 * torch.tensor([0.81, 0.64, 2.25]))
    assert clipped.tolist() == [False, True, False]
    loss.sum().backward()
    assert new.grad[1] == 0 and new.grad[2] == 1.5


def test_approx_kl():
    torch.testing.assert_close(algorithm.approx_kl(torch.tensor([-1.0]), torch.tensor([-1.2])), torch.tensor([0.02]))


def test_explained_variance():
    mask, returns, *_ = ragged(b=20)
    assert algorithm.explained_variance(returns, returns, mask) == 1
    torch.testing.assert_close(
        algorithm.explained_variance(torch.zeros_like(returns), returns, mask), torch.tensor(0.0)
    )
    assert algorithm.explained_variance(-returns, returns, mask) < 0


def test_kl_controllers():
    fixed, adaptive = algorithm.FixedKL(0.1), algorithm.AdaptiveKL(0.1, target=6.0, horizon=1000)
    for controller in (fixed, adaptive):
        controller.update(kl=12.0, episodes=100)
    assert fixed.value == 0.1
    assert adaptive.value == pytest.approx(0.1 * (1 + 0.2 * 0.1))  # the error is clipped at 0.2
    adaptive.update(kl=5.4, episodes=100)
    assert adaptive.value == pytest.approx(0.102 * (1 - 0.1 * 0.1))
    again = algorithm.AdaptiveKL(1.0, target=6.0, horizon=1000)
    again.load_state_dict(adaptive.state_dict())
    assert again.value == adaptive.value


def test_score_normalizer_has_the_moments_of_all_it_saw():
    torch.manual_seed(0)
    batches = [torch.randn(n) * 3 + 5 for n in (4, 9, 1, 16)]
    normalizer = algorithm.ScoreNormalizer()
    for i, batch in enumerate(batches):
        if i == 2:  # a resumed run goes on from the saved state
            state, normalizer = normalizer.state_dict(), algorithm.ScoreNormalizer()
            normalizer.load_state_dict(state)
        out = normalizer(batch)
    seen = torch.cat(batches)
    torch.testing.assert_close(out, (batches[-1] - seen.mean()) / seen.std())
