"""The mathematics of RLHF-PPO as pure functions on tensors, each equation with its source.

Shapes: B responses, T tokens of the longest one. Responses are left-aligned; `mask` (B, T) is True on the
tokens that were really sampled (EOS included), False on the padding after them. Token t is the action, what
precedes it is the state; `values[:, t]` is the critic's estimate *before* token t. Functions that say (…)
take any shape, e.g. the flat list of all real tokens of a minibatch.

Sources: PPO = Schulman et al. 2017 (arXiv 1707.06347); GAE = Schulman et al. 2016 (1506.02438); KL note =
Schulman 2020 (http://joschu.net/blog/kl-approx.html); Ziegler et al. 2019 (1909.08593); Stiennon et al. 2020
(2009.01325); InstructGPT = Ouyang et al. 2022 (2203.02155); N+ details = Huang et al. 2024 (2403.17031).

Where this deliberately differs from TRL 1.12's trainer, the reference (tests/test_ppo_parity.py: undo these, and
all numbers and the updated weights are equal):
- The score is added at the last real token. TRL adds it one later, on the first PAD after EOS, so that the
  critic also values a state behind EOS (trl issue 3750); a response that fills the whole length gets it at
  its last token in both.
- Responses keep their natural length. TRL pads them to the longest of the batch, and without its `stop_token`
  samples `response_length` tokens whatever comes. A PAD that the policy itself samples ends an answer there.
- Every mean is over real tokens. TRL's approximate KL, ratio and entropy statistics include padding. Our
  entropy is that of the first epoch.
- Whitening is over the answers of all processes. TRL whitens on each by itself.
- A minibatch's loss is the mean over all of its tokens, on all ranks and micro-batches. TRL averages the
  means of its micro-batches, so that gradient accumulation changes the loss.
- One optimizer step per minibatch. TRL steps every `gradient_accumulation_steps` micro-batches, whatever the
  minibatch.
- Gradients are clipped (`max_grad_norm`). TRL never does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.errors import SetupError


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Per-token estimate (…) of KL(policy ‖ reference), from both log-probs (…) of the sampled tokens.

    With r = p_ref / p_policy (KL note): k1 = −log r, unbiased, may be negative; k2 = (log r)² / 2, biased,
    low variance; k3 = (r − 1) − log r, unbiased, never negative.
    """
    log_r = ref_logprobs - logprobs
    if estimator == "k1":
        return -log_r
    if estimator == "k2":
        return 0.5 * log_r.square()
    if estimator == "k3":
        return torch.expm1(log_r) - log_r
    raise SetupError(f"kl_estimator must be k1, k2 or k3, not {estimator!r}")


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Rewards (B, T): −β·KL on every token, plus the score (B,) on the last real token of its response.

    R(x, y) = r(x, y) − β log(π(y|x) / π_ref(y|x)) (Stiennon section 3.4), the log-ratio spread over the
    tokens (N+).
    """
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    last = mask.sum(1) - 1
    rewards[torch.arange(len(scores), device=scores.device), last] += scores
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both (B, T) and 0 outside `mask`, by generalised advantage estimation.

    δ_t = r_t + γ V_{t+1} − V_t;  A_t = δ_t + γλ A_{t+1};  R_t = A_t + V_t  (GAE eq. 11–16, V = 0 after the
    last token).
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return torch.where(mask, advantages, 0.0), torch.where(mask, advantages + values, 0.0)


def leave_one_out(rewards: Tensor, group: int, normalize: bool = False) -> Tensor:
    """Advantages (B,): each reward (B,) less the mean of the other `group` − 1 answers to the same prompt.

    RLOO (Ahmadian et al. 2024, 2402.14740, eq. 7); the answers to a prompt come one after the other. `normalize`: to
    mean 0 and deviation 1 over the batch, as TRL.
    """
    grouped = rewards.view(-1, group)
    others = (grouped.sum(1, keepdim=True) - grouped) / (group - 1)
    advantages = (grouped - others).flatten()
    return (advantages - advantages.mean()) / (advantages.std() + 1e-4) if normalize else advantages


def group_relative(rewards: Tensor, group: int, scale: str) -> Tensor:
    """Advantages (B,): each reward (B,) less the mean of all `group` answers to the same prompt.

    GRPO (Shao et al. 2024, 2402.03300, section 4.1.2). `scale`: divided by the deviation over the answers to the prompt
    ("group"), over the batch ("batch"; 2508.08221), or not ("none"; Dr. GRPO, 2503.20783).
    """
    grouped = rewards.view(-1, group)
    advantages = grouped - grouped.mean(1, keepdim=True)
    if scale != "none":
        deviation = grouped.std(1, keepdim=True) if scale == "group" else rewards.std()
        advantages = advantages / (deviation + 1e-4)
    return advantages.flatten()


def alike(scores: Tensor, group: int) -> Tensor:
    """Of the prompts, the share () whose `group` answers all have the same score (B,): nothing tells them apart."""
    grouped = scores.view(-1, group)
    return (grouped.amax(1) - grouped.amin(1) < 1e-6).float().mean()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean () of `values` (…) where `mask` (…) is True. NaN where nothing is."""
    return torch.where(mask, values, 0.0).sum() / mask.sum()


def masked_var(values: Tensor, mask: Tensor) -> Tensor:
    """Unbiased variance () of `values` (…) where `mask` (…) is True; 0 for a single value."""
    centred = torch.where(mask, values - masked_mean(values, mask), 0.0)
    return centred.square().sum() / (mask.sum() - 1).clamp(min=1)


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """`values` (…) with variance 1 over `mask`, and mean 0 unless `shift_mean` is False; 0 outside it.

    Over the global batch, unbiased as TRL's `masked_whiten` (N+: advantages are shifted to mean 0, rewards
    are not).
    """
    mean = masked_mean(values, mask)
    white = (values - mean) * torch.rsqrt(masked_var(values, mask) + 1e-8)
    return torch.where(mask, white if shift_mean else white + mean, 0.0)


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cliprange: float) -> tuple[Tensor, Tensor]:
    """Clipped surrogate (…) to minimise (PPO eq. 7, sign turned), and (…) whether its clip was active."""
    ratio = torch.exp(logprobs - old_logprobs)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - cliprange, 1.0 + cliprange)
    return torch.maximum(plain, clipped), clipped > plain


def answer_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, lengths: list[int], cliprange: float
) -> tuple[Tensor, Tensor]:
    """`policy_loss` with the ratio of whole answers, π(y|x) / π_old(y|x), and whether its clip was active; both (N,).

    All are of the N tokens of answers of `lengths`, one after the other; the loss of an answer is spread evenly over
    its tokens.
    """
    counts = torch.tensor(lengths)
    owner = torch.arange(len(lengths)).repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    place = torch.arange(len(owner)) - first[owner]
    where = torch.cat([owner, place, first, counts]).to(logprobs.device)  # in one copy
    owner, place, first, counts = where.split([len(owner), len(place), len(first), len(counts)])
    # laid out and summed: `index_add` sums in another order each time on a GPU
    rows = lambda x: x.new_zeros(len(lengths), max(lengths)).index_put((owner, place), x).sum(1)  # noqa: E731
    loss, clipped = policy_loss(rows(logprobs), rows(old_logprobs), advantages[first], cliprange)
    return (loss / counts)[owner], clipped[owner]


def importance(
    logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, mode: str, low: float | None, high: float | None
) -> Tensor:
    """Weights (B, T) of tokens that another program sampled than the policy: π / μ, as TRL's GRPO bounds it.

    `logprobs` are the policy's, `sampler_logprobs` those of what sampled, μ; a token without (NaN) has the ratio 1.
    `mode`: of each token or of a whole answer ("token_…", "sequence_…"); out of [`low`, `high`] it is cut to the bound
    ("…_truncate") or 0 ("…_mask"). Yao et al. 2025 (https://fengyao.notion.site/off-policy-rl).
    """
    log_ratio = torch.where(mask, torch.nan_to_num(logprobs - sampler_logprobs, nan=0.0), 0.0)
    if mode.startswith("sequence"):
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
    ratio = torch.exp(log_ratio)
    if low is None and high is None:
        return ratio
    cut = ratio.clamp(min=low, max=high)
    return cut if mode.endswith("truncate") else torch.where(cut == ratio, ratio, 0.0)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float) -> tuple[Tensor, Tensor]:
    """Clipped squared error (…) of the critic, ½·max, and (…) whether its clip was active (N+).

    The new value may move at most `cliprange` from the old one before its gradient vanishes.
    """
    plain = (values - returns).square()
    near = torch.minimum(torch.maximum(values, old_values - cliprange), old_values + cliprange)
    clipped = (near - returns).square()
    return 0.5 * torch.maximum(plain, clipped), clipped > plain


def approx_kl(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """½(log π − log π_old)² per token (…): how far the update has moved (KL note's k2, as TRL logs it)."""
    return 0.5 * (logprobs - old_logprobs).square()


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(returns − values) / Var(returns), (): 1 perfect critic, 0 as good as a constant, < 0 worse."""
    return 1.0 - masked_var(returns - values, mask) / masked_var(returns, mask)


class FixedKL:
    """β stays what it is."""

    def __init__(self, kl_coef: float):
        self.value = kl_coef

    def update(self, kl: float, episodes: int) -> None:
        """`kl`: mean KL of the responses (nats per response) in the last batch of `episodes` responses."""

    def state_dict(self) -> dict:
        return {"value": self.value}

    def load_state_dict(self, state: dict) -> None:
        self.value = state["value"]


class AdaptiveKL(FixedKL):
    """β rises while the KL is above its target and falls while below. Ziegler section 2.2:

    e = clip(KL / target − 1, −0.2, 0.2);  β ← β · (1 + e · episodes / horizon), K_β there being episodes /
    horizon.
    """

    def __init__(self, kl_coef: float, target: float, horizon: int):
        super().__init__(kl_coef)
        self.target, self.horizon = target, horizon

    def update(self, kl: float, episodes: int) -> None:
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.value *= 1.0 + error * episodes / self.horizon


class ScoreNormalizer:
    """Scores brought to mean 0, deviation 1 by the moments of all scores so far (this batch included).

    The moments are merged batch by batch (Chan et al. 1979), so they are those of the whole history.
    """

    def __init__(self):
        self.count, self.mean, self.m2 = 0, 0.0, 0.0

    def __call__(self, scores: Tensor) -> Tensor:
        """Take `scores` (B,) into the moments and return them normalised (B,)."""
        n, mean = len(scores), scores.double().mean().item()
        m2 = (scores.double() - mean).square().sum().item()
        delta, total = mean - self.mean, self.count + n
        self.m2 += m2 + delta**2 * self.count * n / total
        self.mean += delta * n / total
        self.count = total
        std = (self.m2 / max(total - 1, 1)) ** 0.5
        return (scores - self.mean) / (std + 1e-8)

    def state_dict(self) -> dict:
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, state: dict) -> None:
        self.count, self.mean, self.m2 = state["count"], state["mean"], state["m2"]
