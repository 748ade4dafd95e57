"""What must hold of PPO for any batch: company, order and padding never matter; identities of the mathematics.

The cases are hypothesis', the same ones in every run. Closed forms are in test_ppo_algorithm.py.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ppo_trainer import assert_same_weights, make, weights_of
from transformers import GPT2ForSequenceClassification, LlamaForSequenceClassification

from pipelines.generation.decode import lean_decode
from pipelines.generation.logprobs import collate, make_ready, sequence_scores, token_logprobs, token_values
from pipelines.ppo import algorithm
from tests.generation.test_decode import tiny_gpt2, tiny_llama

settings.register_profile("ppo", max_examples=40, deadline=None, derandomize=True, database=None)
settings.load_profile("ppo")


@st.composite
def batches(draw):
    """A mask (B, T), left-aligned, each row with a token; and a function that makes random (B, T) float64."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return mask, lambda: torch.randn(mask.shape, generator=generator, dtype=torch.float64)


unit = st.floats(0.0, 1.0)


def same(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


# --- the mathematics ----------------------------------------------------------------------------------------


@given(batches(), unit, unit)
def test_a_critic_that_is_right_leaves_no_advantage(batch, gamma, lam):
    """Values that are the discounted rewards to come: nothing was better than expected, whatever λ."""
    mask, random = batch
    rewards, values = random() * mask, torch.zeros(mask.shape, dtype=torch.float64)
    for t in reversed(range(mask.shape[1])):
        values[:, t] = rewards[:, t] + (gamma * values[:, t + 1] if t + 1 < mask.shape[1] else 0.0)
    advantages, returns = algorithm.gae(rewards, values, mask, gamma, lam)
    same(advantages, torch.zeros_like(values))
    same(returns, values)


@given(batches(), unit, unit)
def test_shaping_by_a_potential_changes_no_advantage(batch, gamma, lam):
    """r + γ Φ(s′) − Φ(s) with values V − Φ (Ng et al. 1999): any potential, 0 behind the last token."""
    mask, random = batch
    rewards, values, potential = random(), random(), random() * mask
    following = torch.cat([potential[:, 1:], torch.zeros(len(mask), 1, dtype=torch.float64)], 1)
    plain, _ = algorithm.gae(rewards, values, mask, gamma, lam)
    shaped, _ = algorithm.gae(rewards + gamma * following - potential, values - potential, mask, gamma, lam)
    same(shaped, plain)


@given(batches(), st.floats(0.0, 2.0), st.sampled_from(["k1", "k2", "k3"]))
def test_token_rewards_sum_to_the_score_less_the_kl(batch, kl_coef, estimator):
    mask, random = batch
    kl, scores = algorithm.kl_estimate(random(), random(), estimator), random()[:, 0]
    rewards = algorithm.token_rewards(scores, kl, mask, kl_coef)
    same(rewards.sum(1), scores - kl_coef * (kl * mask).sum(1))
    assert (rewards[~mask] == 0).all()


@given(batches(), st.floats(0.1, 10.0), st.floats(-10.0, 10.0))
def test_whitening_forgets_scale_shift_and_layout(batch, scale, shift):
    mask, random = batch
    values = random()
    if mask.sum() < 2:
        return
    white = algorithm.whiten(values, mask)
    torch.testing.assert_close(algorithm.whiten(scale * values + shift, mask), white, atol=1e-4, rtol=1e-4)  # its 1e-8
    same(algorithm.whiten(values[mask], torch.ones(int(mask.sum()), dtype=torch.bool)), white[mask])


@given(batches(), st.floats(0.01, 0.9))
def test_clipping_is_pessimistic_and_stops_the_gradient(batch, cliprange):
    """Both losses are at least the unclipped one, equal to it near the old value, and flat where clipped."""
    mask, random = batch
    old, target = random()[mask], random()[mask]
    new = (old + 2 * cliprange * random()[mask]).requires_grad_()
    surrogate, squared = -target * torch.exp(new - old), 0.5 * (new - target).square()
    ratio_near = (torch.exp(new - old) - 1).abs() < cliprange
    value_near = (new - old).abs() < cliprange
    for plain, (loss, clipped), near in (
        (surrogate, algorithm.policy_loss(new, old, target, cliprange), ratio_near),
        (squared, algorithm.value_loss(new, old, target, cliprange), value_near),
    ):
        assert (loss >= plain).all() and (clipped == (loss > plain)).all()
        assert (loss[near] == plain[near]).all()
        (slope,) = torch.autograd.grad(loss.sum(), new, retain_graph=True)
        (unclipped,) = torch.autograd.grad(plain.sum(), new, retain_graph=True)
        assert (slope[clipped] == 0).all()
        same(slope[~clipped], unclipped[~clipped])


@given(batches())
def test_kl_estimators_agree_where_the_policies_do(batch):
    """All three are 0 at equality, k2 and k3 never negative; k3 − k2 vanishes with the third power."""
    _, random = batch
    logprobs, step = random(), random()
    for estimator in ("k1", "k2", "k3"):
        assert (algorithm.kl_estimate(logprobs, logprobs, estimator) == 0).all()
    k1, k2, k3 = (algorithm.kl_estimate(logprobs, logprobs + step, k) for k in ("k1", "k2", "k3"))
    same(k1, -algorithm.kl_estimate(logprobs + step, logprobs, "k1"))
    assert (k2 >= 0).all() and (k3 >= 0).all()
    near = 1e-2 * step
    k2, k3 = (algorithm.kl_estimate(logprobs, logprobs + near, k) for k in ("k2", "k3"))
    assert ((k3 - k2).abs() <= near.abs() ** 3 + 1e-14).all()


@given(st.floats(0.01, 100.0), st.floats(0.01, 100.0), st.integers(1, 512))
def test_adaptive_kl_moves_towards_its_target_by_a_bounded_step(kl, target, episodes):
    controller = algorithm.AdaptiveKL(0.1, target, horizon=1000)
    controller.update(kl, episodes)
    change = controller.value / 0.1 - 1
    assert abs(change) <= 0.2 * episodes / 1000 + 1e-12
    assert change * (kl - target) >= 0


@given(st.lists(st.lists(st.floats(-50, 50), min_size=1, max_size=6), min_size=1, max_size=6), st.randoms())
def test_score_normalizer_does_not_care_how_scores_were_batched(parts, rng):
    """Nor in which order; so neither the batch size nor the number of processes changes its moments."""
    scores = [score for part in parts for score in part]
    shuffled = rng.sample(scores, len(scores))
    piecewise, at_once = algorithm.ScoreNormalizer(), algorithm.ScoreNormalizer()
    for part in parts:
        piecewise(torch.tensor(part, dtype=torch.float64))
    at_once(torch.tensor(shuffled, dtype=torch.float64))
    assert piecewise.count == at_once.count
    assert piecewise.mean == pytest.approx(at_once.mean, abs=1e-9)
    assert piecewise.m2 == pytest.approx(at_once.m2, abs=1e-6, rel=1e-9)


# --- the forwards -------------------------------------------------------------------------------------------

FAMILIES = [(tiny_gpt2, GPT2ForSequenceClassification), (tiny_llama, LlamaForSequenceClassification)]
answers = st.lists(
    st.tuples(
        st.lists(st.integers(0, 9), min_size=1, max_size=8), st.lists(st.integers(0, 10), min_size=1, max_size=8)
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("build, kind", FAMILIES)
def test_log_probs_values_and_scores_are_the_same_in_any_company(build, kind):
    """Packed or padded with others, in any order, or alone through the plain model: equal to 1e-5."""
    policy = build()
    config = type(policy.config)(**policy.config.to_dict() | {"num_labels": 1, "pad_token_id": 0})
    critic = kind(config).eval()
    plain = build()
    assert make_ready(policy) and make_ready(critic)

    @given(answers)
    def check(batch):
        expected = []
        for prompt, answer in batch:
            logits = plain(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / 0.7
            expected.append(logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0])
        values = [token_values(critic, collate([one], False, "cpu")) for one in batch]
        scores = [sequence_scores(critic, [prompt + answer], False, "cpu") for prompt, answer in batch]
        for packed in (True, False):
            together = collate(batch, packed, "cpu")
            found = token_logprobs(policy, together, 0.7)[0]
            torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=0)
            torch.testing.assert_close(token_values(critic, together), torch.cat(values), atol=1e-5, rtol=0)
            sequences = [prompt + answer for prompt, answer in batch]
            found = sequence_scores(critic, sequences, packed, "cpu")
            torch.testing.assert_close(found, torch.cat(scores), atol=1e-5, rtol=0)

    with torch.no_grad():
        check()


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_left_padding_in_decoding_changes_no_log_prob(build):
    """The decoder, made to say given answers after prompts of all lengths, finds the log-probs of the packed forward.

    Those rows that have ended are dropped on the way.
    """
    policy, packed = build(), build()
    make_ready(packed)

    @given(answers)
    def check(batch):
        longest = max(len(answer) for _, answer in batch)
        said = torch.full((len(batch), longest), 10)  # EOS from the end of the answer on
        for row, (_, answer) in enumerate(batch):
            said[row, : len(answer)] = torch.tensor(answer)

        def say(logits, step, rows):
            tokens = said[rows, step]
            return tokens, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]

        prompts = [prompt for prompt, _ in batch]
        tokens, logprobs = lean_decode(policy, prompts, longest, [10], say)
        heard = [(answer[: answer.index(10) + 1] if 10 in answer else answer) for _, answer in batch]
        for row, answer in enumerate(heard):
            assert tokens[row, : len(answer)].tolist() == answer
        expected, _ = token_logprobs(packed, collate(list(zip(prompts, heard, strict=True)), True, "cpu"), 1.0)
        found = torch.cat([logprobs[row, : len(answer)] for row, answer in enumerate(heard)])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

    with torch.no_grad():
        check()


# --- the update ---------------------------------------------------------------------------------------------


def updated(folder, change, **more) -> tuple[dict, dict]:
    """Weights and metrics after one update on rollouts that `change` has been applied to."""
    how = dict(optim="sgd", learning_rate=0.1, num_mini_batches=1, kl_coef=0.2, whiten_rewards=True)
    trainer = make(folder, **how | more)
    trainer._set_up(None)
    rollouts = trainer._train_rollout(range(16))
    assert 1 < rollouts.mask.sum(1).unique().numel()
    noise = torch.Generator().manual_seed(0)  # a policy that has moved, so that KL and clipping count
    for name in ("logprobs", "ref_logprobs", "values"):
        column = getattr(rollouts, name)
        setattr(rollouts, name, column + 0.3 * torch.randn(column.shape, generator=noise))
    metrics = trainer._update(change(rollouts))
    return weights_of(trainer), {k: v for k, v in metrics.items() if "second" not in k}


def test_what_is_in_the_padding_never_changes_an_update(tmp_path):
    """To the bit: whatever stands behind the answers' ends, the weights and all that is logged are the same."""
    expected = updated(tmp_path, lambda rollouts: rollouts)
    for poison in (float("nan"), 1e9):

        def fill(r, poison=poison):
            columns = {n: getattr(r, n).masked_fill(~r.mask, poison) for n in ("logprobs", "ref_logprobs", "values")}
            return dataclasses.replace(r, **columns)

        found = updated(tmp_path, fill)
        assert_same_weights(found[0], expected[0])
        assert found[1] == expected[1]


@pytest.mark.parametrize("micro", [16, 4])
def test_the_order_of_the_batch_never_changes_an_update(tmp_path, micro):
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1)).tolist()

    def shuffled(r):
        moved = {f.name: getattr(r, f.name) for f in dataclasses.fields(r) if f.name != "seconds"}
        moved = {name: value for name, value in moved.items() if value is not None}
        moved = {n: x[order] if isinstance(x, torch.Tensor) else [x[i] for i in order] for n, x in moved.items()}
        return dataclasses.replace(r, **moved)

    split = dict(per_device_train_batch_size=micro, gradient_accumulation_steps=16 // micro)
    expected, found = (updated(tmp_path, change, **split) for change in (lambda r: r, shuffled))
    assert_same_weights(found[0], expected[0], atol=1e-6, rtol=1e-5)
    for name in expected[1]:
        assert found[1][name] == pytest.approx(expected[1][name], abs=1e-5, rel=1e-5), name
