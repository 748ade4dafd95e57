"""The optimizer steps on one batch of rollouts: advantages, minibatches, micro-batches, losses, statistics.

`PPOTrainer` holds a `Learner`, and gives it the wrapped model and the optimizer each time; it knows nothing of
sampling, logs or checkpoints. What it draws (order of minibatches, pretraining rows) depends only on the place in the
run, so a resumed run takes the same.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipelines.generation.logprobs import collate
from pipelines.ppo import algorithm
from pipelines.ppo.config import PPOConfig
from pipelines.ppo.rollouts import Rollouts, chunks

TRAIN, EVAL, PTX = 0, 1, 2  # which random streams an answer or a pretraining row is drawn from
STATISTICS = (  # of each optimizer step
    "loss/policy_avg",
    "loss/value_avg",
    "policy/clipfrac_avg",
    "val/clipfrac_avg",
    "policy/approxkl_avg",
    "val/ratio",
    "policy/entropy_avg",
)
OF_CRITIC = ("loss/value_avg", "val/clipfrac_avg")


@dataclass
class Targets:
    """What the answers of a batch are learned with."""

    advantages: Tensor  # (B, T) of each token
    returns: Tensor | None  # (B, T) what the critic should have said; None: there is no critic
    kl_coef: float  # weight of the KL in the loss (`kl_placement: loss`)


@dataclass
class Steps:
    """The optimizer steps that were taken on a batch."""

    metrics: dict[str, float]
    grad_norms: list[float]
    minibatches: list[list[int]]  # answers of each step


def targets(args: PPOConfig, rollouts: Rollouts, scores: Tensor, kl: Tensor, kl_coef: float) -> Targets:
    """Advantages by `args.advantage`, from the scores (B,) and the KL (B, T) of the global batch."""
    mask, in_reward = rollouts.mask, args.kl_placement == "reward"
    weights = rollouts.importance(args)  # where vLLM sampled; none is negative, so they weigh the loss
    weights = 1.0 if weights is None else weights
    if args.advantage in ("rloo", "grpo"):
        rewards = scores - kl_coef * torch.where(mask, kl, 0.0).sum(1) if in_reward else scores
        if args.advantage == "rloo":
            advantages = algorithm.leave_one_out(rewards, args.num_generations, args.normalize_advantages)
        else:
            advantages = algorithm.group_relative(rewards, args.num_generations, args.scale_rewards)
        return Targets(torch.where(mask, advantages[:, None], 0.0) * weights, None, kl_coef)
    rewards = algorithm.token_rewards(scores, kl, mask, kl_coef if in_reward else 0.0)
    if args.whiten_rewards:
        rewards = algorithm.whiten(rewards, mask, shift_mean=False)
    if args.advantage == "gae":
        advantages, returns = algorithm.gae(rewards, rollouts.values, mask, args.gamma, args.lam)
    else:
        advantages, _ = algorithm.gae(rewards, torch.zeros_like(rewards), mask, args.gamma, 1.0)  # what comes after
        returns = None
    return Targets(algorithm.whiten(advantages, mask) * weights, returns, kl_coef)


class Learner:
    """Takes the optimizer steps on a batch of rollouts: see `learn`.

    Args:
        args: `PPOConfig`.
        accelerator: of the trainer.
        packed: whether sequences are laid end to end in one row, or padded.
        share: whether answers may stand behind one copy of their prompt, as `collate` takes it.
        batch_size: answers of the global batch.
        ptx_dataset: rows with `input_ids` of pretraining text, or None.
    """

    def __init__(
        self, args: PPOConfig, accelerator: Accelerator, packed: bool, share: int, batch_size: int, ptx_dataset=None
    ):
        self.args, self.accelerator, self.packed, self.share = args, accelerator, packed, share
        self.batch_size, self.mini_batch_size = batch_size, batch_size // args.num_mini_batches
        self.ptx_dataset = ptx_dataset
        self.deepspeed = getattr(accelerator.state, "deepspeed_plugin", None) is not None

    def learn(
        self, model: nn.Module, optimizer, clip: Callable[[], Tensor], rollouts: Rollouts, goal: Targets, update: int
    ) -> Steps:
        """`num_ppo_epochs` passes over the batch, in `num_mini_batches` optimizer steps each.

        Args:
            model: the `PolicyAndCritic`, wrapped as it is trained.
            clip: clips the gradients and returns their norm, ().
            update: how many updates came before this one.
        """
        args = self.args
        statistics, ptx_losses, grad_norms, minibatches, stopped = [], [], [], [], False
        ptx = args.ptx_coef > 0 and update >= args.critic_warmup_steps
        first = None
        for epoch in range(args.num_ppo_epochs):
            for number, minibatch in enumerate(chunks(self.order(update, epoch), self.mini_batch_size)):
                ptx_losses += [self.ptx_backward(model, update, epoch, number)] if ptx else []
                stats = self.backward(model, rollouts, goal, minibatch, update, first=epoch == 0)
                first = stats if first is None else first
                if args.max_approx_kl is not None:
                    moved = self.accelerator.reduce(stats, "sum")[STATISTICS.index("policy/approxkl_avg")]
                    if stopped := moved.item() > args.max_approx_kl:
                        model.zero_grad()
                        break
                grad_norms.append(clip())
                minibatches.append(minibatch)
                optimizer.step()
                model.zero_grad()
                statistics.append(stats)
            if stopped:
                break
        grad_norms = torch.stack(grad_norms).tolist() if grad_norms else []  # read at the end: reading waits
        before = dict(zip(STATISTICS, self.accelerator.reduce(first, "sum").tolist(), strict=True))  # any step
        metrics = {"val/first_ratio_rms": math.sqrt(2 * before["policy/approxkl_avg"])}  # of log π/π_old, ideally 0
        taken = self.order(update, 0)[: self.mini_batch_size]  # of samples of π, −log π is on average its entropy
        surprise = -rollouts.logprobs.flatten()[rollouts.places(taken)]
        metrics["val/surprise_gap"] = surprise.mean().item() - before["policy/entropy_avg"]
        metrics["val/surprise_sem"] = surprise.std(unbiased=False).item() / math.sqrt(len(surprise))
        if ptx_losses:
            metrics["loss/ptx_avg"] = self.accelerator.reduce(torch.stack(ptx_losses).mean(), "sum").item()
        if statistics:
            table = self.accelerator.reduce(torch.stack(statistics), "sum")  # (optimizer steps, STATISTICS)
            metrics |= dict(zip(STATISTICS, table.mean(0).tolist(), strict=True))
            metrics["val/ratio_var"] = table[:, STATISTICS.index("val/ratio")].var(unbiased=False).item()
            metrics["policy/entropy_avg"] = table[: args.num_mini_batches, -1].mean().item()
            metrics["grad_norm"] = sum(grad_norms) / len(grad_norms)
        metrics["optimizer_steps"] = len(grad_norms)
        if goal.returns is None:
            metrics = {name: value for name, value in metrics.items() if name not in OF_CRITIC}
        return Steps(metrics, grad_norms, minibatches)

    def order(self, update: int, epoch: int) -> list[int]:
        """The answers of the global batch in the order in which this epoch of this update takes them.

        The answers to one prompt come one after the other.
        """
        shuffle = np.random.default_rng((self.args.seed, update, epoch))
        group = self.args.num_generations
        groups = shuffle.permutation(self.batch_size // group).tolist()
        return [number * group + i for number in groups for i in range(group)]

    def backward(
        self, model: nn.Module, rollouts: Rollouts, goal: Targets, minibatch: list[int], update: int, first: bool
    ) -> Tensor:
        """Gradients of the loss of one minibatch (indices into the global batch); returns its STATISTICS.

        The loss is a mean over the minibatch on all processes and in all micro-batches (see `divisor`); the
        statistics are this process's part of such means.
        """
        args, accelerator = self.args, self.accelerator
        warming_up = update < args.critic_warmup_steps
        policy_weight = 0.0 if warming_up else 1.0
        tokens, bonus = sum(len(rollouts.responses[i]) for i in minibatch), args.entropy_coef > 0
        divisor = self.divisor(rollouts, minibatch)
        micros = self.micro_batches(rollouts, minibatch)
        stats = torch.zeros(len(STATISTICS), device=accelerator.device)
        for number, micro in enumerate(micros, 1):
            last = number == len(micros)
            accelerator.gradient_state._set_sync_gradients(last)  # as Trainer does; DeepSpeed then steps by itself
            share_gradients = last or self.deepspeed
            places, weight = rollouts.places(micro), self.weights(rollouts, micro)  # the flat order (N,) of `collate`
            old_logprobs, ref_logprobs, advantage = (
                x.flatten()[places] for x in (rollouts.logprobs, rollouts.ref_logprobs, goal.advantages)
            )
            answers = [(rollouts.prompts[i], rollouts.responses[i]) for i in micro]
            batch = collate(answers, self.packed, accelerator.device, self.share)
            with contextlib.nullcontext() if share_gradients else accelerator.no_sync(model):
                # entropy costs a pass over the vocabulary: to watch it, the first epoch is enough
                logprobs, entropies, values = model(
                    batch,
                    hold_trunk=warming_up,
                    temperature=args.temperature,
                    entropy=first or bonus,
                    grad_entropy=bonus,
                )
                pg, pg_clipped = self.policy_loss(logprobs, old_logprobs, advantage, rollouts, micro)
                of_policy = pg - args.entropy_coef * entropies if bonus else pg
                if args.kl_placement == "loss":
                    kl = algorithm.kl_estimate(logprobs, ref_logprobs, args.kl_estimator)
                    if args.advantage == "grpo":  # sampled from π_old: each token weighs by π/π_old, as in TRL
                        kl = kl * torch.exp(logprobs - old_logprobs)
                    of_policy = of_policy + goal.kl_coef * kl
                if values is None:
                    vf = vf_clipped = torch.zeros_like(pg)
                    loss = (weight * of_policy).sum() / divisor
                else:
                    old_values, target = (x.flatten()[places] for x in (rollouts.values, goal.returns))
                    vf, vf_clipped = algorithm.value_loss(values, old_values, target, args.cliprange_value)
                    loss = (policy_weight * of_policy + args.vf_coef * vf).sum() / divisor
                scaling = {"scale_wrt_gas": False} if self.deepspeed else {}
                accelerator.backward(loss * accelerator.num_processes, **scaling)  # DDP averages over processes
            with torch.no_grad():
                moved = algorithm.approx_kl(logprobs, old_logprobs)
                ratio = torch.exp(logprobs - old_logprobs)
                entropies = torch.zeros_like(pg) if entropies is None else entropies
                pg = pg * weight * (tokens / divisor)  # a part of the loss; the others are means over tokens
                columns = (pg, vf, pg_clipped, vf_clipped, moved, ratio, entropies)
                stats += torch.stack([column.detach().float().sum() for column in columns]) / tokens
        return stats

    def policy_loss(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, rollouts: Rollouts, micro: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Clipped surrogate (N,) of the tokens of `micro`, and whether its clip was active; RLOO's is of answers."""
        if self.args.advantage == "rloo":
            lengths = [len(rollouts.responses[i]) for i in micro]
            return algorithm.answer_policy_loss(logprobs, old_logprobs, advantages, lengths, self.args.cliprange)
        return algorithm.policy_loss(logprobs, old_logprobs, advantages, self.args.cliprange)

    def divisor(self, rollouts: Rollouts, minibatch: list[int]) -> float:
        """What the sum over the tokens of a minibatch is divided by: the names are those of TRL's `loss_type`.

        RLOO: answers, since its loss is of whole answers. GRPO, "dapo": tokens of a minibatch on average; "bnpo": of
        this one, as with GAE and REINFORCE; "dr_grpo": those of answers of full length; "grpo": answers, in each of
        which the tokens weigh 1 together (`weights`).
        """
        args, tokens = self.args, sum(len(rollouts.responses[i]) for i in minibatch)
        if args.advantage == "rloo" or args.loss_type == "grpo":
            return len(minibatch)
        if args.loss_type == "dapo":
            return sum(map(len, rollouts.responses)) / args.num_mini_batches
        return len(minibatch) * args.response_length if args.loss_type == "dr_grpo" else tokens

    def weights(self, rollouts: Rollouts, micro: list[int]) -> Tensor | float:
        """What each token of `micro` weighs: (N,), or 1."""
        if self.args.loss_type != "grpo":
            return 1.0
        lengths = torch.tensor([len(rollouts.responses[i]) for i in micro])
        return (1.0 / lengths).repeat_interleave(lengths).to(self.accelerator.device)

    def micro_batches(self, rollouts: Rollouts, minibatch: list[int]) -> list[list[int]]:
        """This process's share of a minibatch, cut to what fits in memory: as many cuts on every process.

        A micro-batch holds about the tokens of `per_device_train_batch_size` answers of full length, hence
        more answers than that when they are short (padded batches: just that many answers).
        """
        args, world = self.args, self.accelerator.num_processes
        size = {i: len(rollouts.prompts[i]) + len(rollouts.responses[i]) for i in minibatch}
        units = chunks(minibatch, self.together(len(minibatch) // world))
        units.sort(key=lambda unit: (sum(size[i] for i in unit), unit))
        shares = [units[rank::world] for rank in range(world)]  # of like size
        mine = shares[self.accelerator.process_index]
        if not self.packed:
            return chunks([i for unit in mine for i in unit], args.per_device_train_batch_size)
        room = args.per_device_train_batch_size * (max(map(len, rollouts.prompts)) + args.response_length)
        cuts = max(math.ceil(sum(size[i] for unit in share for i in unit) / room) for share in shares)
        return [[i for unit in mine[cut::cuts] for i in unit] for cut in range(cuts)]

    def together(self, share: int) -> int:
        """How many answers to a prompt stay together, where they may share it: what divides a group and a process's
        `share` of a minibatch, and fits into a micro-batch.
        """
        group = self.args.num_generations
        fits = [n for n in range(1, group + 1) if group % n == 0 and share % n == 0]
        return max(n for n in fits if n <= self.args.per_device_train_batch_size) if self.share and self.packed else 1

    def ptx_backward(self, model: nn.Module, update: int, epoch: int, number: int) -> Tensor:
        """Gradients of `ptx_coef` × the mean loss per token on rows of pretraining text; returns that loss.

        L = −γ E_{x∼D} log π(x) (InstructGPT eq. 2). Which rows depends only on the place in the run, so a resumed
        run takes the same. The loss returned, (), is this process's part of it.
        """
        args, accelerator, world = self.args, self.accelerator, self.accelerator.num_processes
        draw = np.random.default_rng((args.seed, PTX, update, epoch, number))
        size = args.ptx_batch_size or self.mini_batch_size
        size = math.ceil(size / world) * world
        chosen = draw.choice(len(self.ptx_dataset), size, replace=size > len(self.ptx_dataset))
        rows = [[int(i) for i in self.ptx_dataset[int(row)]["input_ids"]] for row in chosen]
        tokens = sum(len(ids) - 1 for ids in rows)
        total = torch.zeros((), device=accelerator.device)
        for micro in chunks(rows[accelerator.process_index :: world], args.per_device_train_batch_size):
            accelerator.gradient_state._set_sync_gradients(False)  # the minibatch's own backward comes last
            batch = collate([(ids[:1], ids[1:]) for ids in micro], self.packed, accelerator.device)
            with contextlib.nullcontext() if self.deepspeed else accelerator.no_sync(model):
                if self.deepspeed:  # ZeRO-3 keeps old gradients of what a step's first backward leaves out
                    logprobs, _, values = model(batch, temperature=1.0)
                    loss = -logprobs.sum() / tokens + (0.0 if values is None else 0.0 * values.sum())
                else:
                    loss = -model(batch, logprobs_only=True, temperature=1.0).sum() / tokens
                scaling = {"scale_wrt_gas": False} if self.deepspeed else {}
                accelerator.backward(args.ptx_coef * loss * world, **scaling)
            total += loss.detach()
        return total
