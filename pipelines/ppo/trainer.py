"""PPOTrainer: rollout → score → advantages → epochs × minibatches → log → evaluate → save.

What is global stays simple here: after scoring, every process gathers all rollouts of the batch (token ids
and a few floats per token, small beside any model), so rewards, whitening, advantages and statistics are
computed from the global batch by the same code on 1 and on N processes. Only the forwards and backwards are
shared out.

Nothing depends on a global random state: prompts, sampling and minibatches are drawn from generators seeded
by (seed, position), so a resumed run continues with exactly what an uninterrupted one would have done.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peft
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers.trainer_utils import SaveStrategy, TrainOutput, get_last_checkpoint, speed_metrics
from trl.models import prepare_deepspeed, unwrap_model_for_generation
from trl.trainer.base_trainer import _BaseTrainer

from pipelines import SetupError, models
from pipelines.chat import as_text, encode_answer, encode_prompt
from pipelines.models import whole
from pipelines.ppo import algorithm, checks
from pipelines.ppo.config import PPOConfig
from pipelines.ppo.diagnosis import Watch
from pipelines.ppo.forward import (
    PolicyAndCritic,
    ValueHead,
    collate,
    make_ready,
    plain_model,
    sequence_scores,
    shard_frozen,
    token_logprobs,
    within,
)
from pipelines.ppo.rewards import AdapterScorer
from pipelines.ppo.rollout import generate
from pipelines.training import NotFinite, untied

logger = logging.getLogger(__name__)

STATE = "ppo_state.json"
SAMPLES = "samples.jsonl"
TRAIN, EVAL, PTX = 0, 1, 2  # which random streams an answer or a pretraining row is drawn from


class Diagnosed(SetupError):
    """`diagnosis: stop` found a pathology; the run is saved, and the same command goes on from there."""


@dataclass
class Rollouts:
    """B answers of the global batch, the same on every process. Tensors are (B, T) right-padded, or (B,)."""

    rows: list[int]  # of the dataset
    prompts: list[list[int]]
    responses: list[list[int]]
    mask: Tensor  # (B, T) True on real tokens
    logprobs: Tensor  # (B, T) when sampled
    ref_logprobs: Tensor  # (B, T)
    values: Tensor  # (B, T) when sampled
    rewards: Tensor  # (B, reward functions) as they came
    scores: Tensor  # (B,) their weighted sum
    ended: Tensor  # (B,) True where the answer ends with EOS
    seconds: dict[str, float]  # per phase, on this process


class PPOTrainer(_BaseTrainer):
    """Trains a policy and its critic by PPO.

    Args:
        model: the policy, a causal language model (or a PEFT model around one).
        args: `PPOConfig`.
        reward_funcs: sequence-classification models with one label, and/or callables
            `(prompts, completions, **columns) -> list[float]`. These get the prompts as they are in the
            dataset, the completions as text, the dataset's other columns as lists, and `completion_ids`.
        value_model: the critic, a causal `AutoModelForSequenceClassification` with one label that shares the
            policy's token ids; usually a second copy of the reward model. Trained in place. "shared": a value
            head on the policy's own trunk.
        train_dataset, eval_dataset: column `prompt` (text or messages), any others go to the callables.
        processing_class: the policy's tokenizer.
        ptx_dataset: rows with `input_ids` of pretraining text for `ptx_coef`, EOS where a text ends.
        ref_model: frozen reference. None: a copy of `model`, or with PEFT the policy with its adapters off.
        reward_weights: one per reward function, all 1 by default.
        reward_processing_classes: a tokenizer for each reward model that has its own; None: the policy's.
        callbacks, optimizers: as in `transformers.Trainer`.
    """

    _tag_names = ["trl", "ppo"]
    _name = "PPO"
    _paper = {"title": "Fine-Tuning Language Models from Human Preferences", "id": "1909.08593"}

    def __init__(
        self,
        model: nn.Module,
        args: PPOConfig,
        reward_funcs: list,
        value_model: nn.Module | str,
        train_dataset,
        processing_class,
        eval_dataset=None,
        ptx_dataset=None,
        ref_model: nn.Module | None = None,
        reward_weights: list[float] | None = None,
        reward_processing_classes: list | None = None,
        callbacks: list | None = None,
        optimizers=(None, None),
    ):
        reward_funcs = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        self.reward_tokenizers = list(reward_processing_classes or [None] * len(reward_funcs))
        self.reward_weights = [1.0] * len(reward_funcs) if reward_weights is None else list(reward_weights)
        self.eos_token_ids = checks.end_tokens(model, processing_class)
        value_model = ValueHead(model) if value_model == "shared" else value_model
        checks.check_models(model, value_model, ref_model, reward_funcs, processing_class)
        checks.check_counts(reward_funcs, self.reward_weights, self.reward_tokenizers)
        checks.check_ptx(args, ptx_dataset)
        if ref_model is None and not hasattr(model, "peft_config"):
            with whole(*model.parameters()):
                ref_model = copy.deepcopy(model)
        together = [m for m in (model, value_model, ref_model) if m is not None and not isinstance(m, ValueHead)]
        self.packed = all([make_ready(module) for module in together])
        self.reward_packed = [
            self.packed
            if isinstance(f, AdapterScorer)
            else isinstance(f, nn.Module) and hasattr(f, "score") and make_ready(f)
            for f in reward_funcs
        ]
        super().__init__(
            model=PolicyAndCritic(model, value_model),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.policy, self.critic, self.ptx_dataset = model, value_model, ptx_dataset
        self.decoder = copy.deepcopy(model).eval() if self.is_fsdp_enabled else None  # see `_whole_policy`
        self.reward_funcs = [self._frozen(f) if isinstance(f, nn.Module) else f for f in reward_funcs]
        self.reward_tokenizers = [
            None if t is None or checks.same_tokenizer(t, processing_class) else t for t in self.reward_tokenizers
        ]
        self.reward_names = _unique([checks.name_of(f) for f in reward_funcs])
        self.ref_model = None if ref_model is None else self._frozen(ref_model)

        world = self.accelerator.num_processes
        self.batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * world
        self.mini_batch_size = self.batch_size // args.num_mini_batches
        if self.batch_size % args.num_mini_batches or self.mini_batch_size % world:
            raise SetupError(
                f"a batch of {self.batch_size} answers (per_device_train_batch_size × "
                f"gradient_accumulation_steps × processes) does not divide into "
                f"num_mini_batches={args.num_mini_batches} minibatches of equal "
                f"shares for {world} process(es): choose numbers that do"
            )
        if self.is_deepspeed_enabled and args.max_approx_kl is not None:
            raise SetupError("max_approx_kl needs a step that can be skipped, but DeepSpeed steps within backward")
        self.max_steps = args.max_steps
        if self.max_steps <= 0:
            episodes = args.total_episodes or math.ceil(args.num_train_epochs * len(train_dataset))
            self.max_steps = math.ceil(episodes / self.batch_size)
        self.train_prompts = self._encode_prompts(train_dataset, "train_dataset")
        self.eval_prompts = None if eval_dataset is None else self._encode_prompts(eval_dataset, "eval_dataset")

        if args.kl_target is None:
            self.kl_controller = algorithm.FixedKL(args.kl_coef)
        else:
            self.kl_controller = algorithm.AdaptiveKL(args.kl_coef, args.kl_target, args.kl_horizon)
        self.score_normalizer = algorithm.ScoreNormalizer() if args.normalize_scores else None
        self.watch, self._stopped_by = Watch(), None
        self.vllm = vllm_engine(self) if args.use_vllm else None
        self._unlogged = defaultdict(list)  # metrics of the updates since the last log line

    # --- the loop -------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Train to `max_steps` updates, from the checkpoint folder given (True: the last in output_dir)."""
        args = self.args
        checkpoint = self._find_checkpoint(resume_from_checkpoint)
        self.is_in_train = True
        started = time.time()
        self._set_up(checkpoint)
        if checkpoint is None:
            probe = math.ceil(64 / self.accelerator.num_processes) * self.accelerator.num_processes
            checks.check_rollouts(self._train_rollout(range(probe)), args)

        self.control = self.callback_handler.on_train_begin(args, self.state, self.control)
        if args.eval_on_start and checkpoint is None:
            self.evaluate()
        first_step = self.state.global_step
        while self.state.global_step < self.max_steps and not self.control.should_training_stop:
            self.control = self.callback_handler.on_step_begin(args, self.state, self.control)
            seen = self.state.global_step * self.batch_size
            rollouts = self._train_rollout(range(seen, seen + self.batch_size))
            metrics = self._update(rollouts)
            self.lr_scheduler.step()

            self.state.global_step += 1
            self.state.epoch = (seen + self.batch_size) / len(self.train_dataset)
            for name, value in metrics.items():
                self._unlogged[name].append(value)
            if self._is_sample_step(self.state.global_step):
                self._write_samples("train", rollouts)
            self.control = self.callback_handler.on_step_end(args, self.state, self.control)
            if int(self.state.epoch) > seen // len(self.train_dataset):
                self.control = self.callback_handler.on_epoch_end(args, self.state, self.control)
            self.watch.add_update(self.state.global_step, metrics)
            self._log_evaluate_save()

        if args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        metrics = speed_metrics(
            "train",
            started,
            num_samples=(self.state.global_step - first_step) * self.batch_size,
            num_steps=self.state.global_step - first_step,
        )
        self.log(dict(metrics))
        self.control = self.callback_handler.on_train_end(args, self.state, self.control)
        self.is_in_train = False
        if self._stopped_by is not None:
            raise Diagnosed(
                f"{self._stopped_by}\nStopped (diagnosis: stop) and saved in {get_last_checkpoint(args.output_dir)}. "
                "Running the same again goes on; diagnosis: warn does not stop any more."
            )
        return TrainOutput(self.state.global_step, float("nan"), metrics)

    # --- rollouts -------------------------------------------------------------------------------------------

    def _train_rollout(self, episodes: range) -> Rollouts:
        """Answers number `episodes` of the run, each with its own prompt and random stream."""
        rows = [self._row_of(episode) for episode in episodes]
        seeds = [(self.args.seed, TRAIN, episode) for episode in episodes]
        return self._rollout(self.train_dataset, self.train_prompts, rows, seeds)

    @torch.no_grad()
    def _rollout(self, dataset, prompts: list[list[int]], rows: list[int], seeds: list) -> Rollouts:
        """Sample and score an answer to each of `rows` of the dataset: each process its share."""
        args, device = self.args, self.accelerator.device
        share = len(rows) // self.accelerator.num_processes
        assert share * self.accelerator.num_processes == len(rows)
        mine = slice(self.accelerator.process_index * share, (self.accelerator.process_index + 1) * share)
        my_rows, my_prompts = rows[mine], [prompts[row] for row in rows[mine]]
        seconds = {}
        self.model_wrapped.eval()

        began = time.perf_counter()
        responses, logprobs = self._sample(my_prompts, seeds[mine])
        seconds["generate"] = time.perf_counter() - began

        began = time.perf_counter()
        answers = list(zip(my_prompts, responses, strict=True))
        per_token: list = [None] * share  # (3, length): log-probs of policy and reference, values
        for chunk in _chunks(_by_length(answers), args.local_rollout_forward_batch_size):
            batch = collate([answers[i] for i in chunk], self.packed, device)
            if self.vllm is None:
                sampled = torch.cat([logprobs[i] for i in chunk])
                values = self.model_wrapped(batch, values_only=True)
            else:
                sampled, _, values = self.model_wrapped(batch, temperature=args.temperature)
            with self.accelerator.autocast():
                ref_logprobs = self._reference_logprobs(batch)
            columns = torch.stack([sampled.cpu(), ref_logprobs.cpu(), values.cpu()])
            for i, part in zip(chunk, columns.split([len(responses[i]) for i in chunk], dim=1), strict=True):
                per_token[i] = part
        rewards = self._rewards(dataset, my_rows, answers)  # (share, functions)
        seconds["score"] = time.perf_counter() - began
        self.model_wrapped.train()

        gathered = gather_object(list(zip(responses, per_token, rewards, strict=True)))
        responses, per_token, rewards = map(list, zip(*gathered, strict=True))
        lengths = torch.tensor([len(r) for r in responses], device=device)
        padded = nn.utils.rnn.pad_sequence([p.T for p in per_token], batch_first=True).to(device)  # (B, T, 3)
        rewards = torch.stack(rewards).to(device)
        self._check_rewards(rewards, dataset, rows)
        return Rollouts(
            rows=rows,
            prompts=[prompts[row] for row in rows],
            responses=responses,
            mask=torch.arange(padded.shape[1], device=device) < lengths[:, None],
            logprobs=padded[..., 0],
            ref_logprobs=padded[..., 1],
            values=padded[..., 2],
            rewards=rewards,
            scores=rewards @ torch.tensor(self.reward_weights, device=device),
            ended=torch.tensor([r[-1] in self.eos_token_ids for r in responses], device=device),
            seconds=seconds,
        )

    def _sample(self, prompts: list[list[int]], seeds: list) -> tuple[list[list[int]], list[Tensor] | None]:
        """An answer to each prompt, and the log-probs of its tokens (None: vLLM's would not be ours)."""
        args = self.args
        if self.vllm is not None:
            self.vllm.sync_weights()
            return [list(ids) for ids in self.vllm.generate(prompts, None, 1)[1]], None
        with self._whole_policy() as policy, self.accelerator.autocast():
            return generate(
                policy,
                prompts,
                max_new_tokens=args.response_length,
                eos_token_ids=self.eos_token_ids,
                seeds=seeds,
                temperature=args.temperature,
                top_k=args.top_k,
                top_p=args.top_p,
                batch_size=args.local_rollout_forward_batch_size,
            )

    def _rewards(self, dataset, rows: list[int], answers: list[tuple[list[int], list[int]]]) -> Tensor:
        """What each reward function says of each answer (prompt ids, response ids): (answers, functions)."""
        responses = [response for _, response in answers]
        completions = self._completions(responses)
        columns = dataset[rows]
        prompts = columns.pop("prompt")
        out = torch.empty(len(rows), len(self.reward_funcs))
        for i, function in enumerate(self.reward_funcs):
            if isinstance(function, nn.Module):
                out[:, i] = self._model_scores(i, answers, prompts, completions)
                continue
            scores = function(prompts=prompts, completions=completions, completion_ids=responses, **columns)
            if len(scores) != len(rows):
                raise SetupError(
                    f"reward function {self.reward_names[i]} returned {len(scores)} scores for {len(rows)} answers"
                )
            out[:, i] = torch.tensor([float(score) for score in scores])
        return out

    def _model_scores(self, i: int, answers: list, prompts: list, completions: list[str]) -> Tensor:
        """Scores (answers,) of reward model number `i`, of the ids as they are or under its own tokenizer."""
        model, tokenizer = self.reward_funcs[i], self.reward_tokenizers[i]
        sequences = [prompt + response for prompt, response in answers]
        if tokenizer is not None:
            for row, (prompt, completion, (_, response)) in enumerate(zip(prompts, completions, answers, strict=True)):
                prompt_ids, answer_ids = encode_answer(tokenizer, prompt, completion)
                cut_off = response[-1] not in self.eos_token_ids  # then it has no EOS for the reward model either
                sequences[row] = prompt_ids + (answer_ids[:-1] if cut_off else answer_ids)
        limit = models.positions(model)
        longest = max(map(len, sequences))
        if limit is not None and longest > limit:
            raise SetupError(
                f"reward model {self.reward_names[i]} reads at most {limit} tokens and was given {longest}: "
                "lower response_length or drop the longest prompts"
            )
        scores = torch.empty(len(sequences))
        order = _by_length([(ids,) for ids in sequences])
        for chunk in _chunks(order, self.args.local_rollout_forward_batch_size):
            with self.accelerator.autocast():
                ids, packed = [sequences[j] for j in chunk], self.reward_packed[i]
                found = within(model, sequence_scores, ids, packed, self.accelerator.device)
            scores[chunk] = found.cpu()
        return scores

    # --- the update -----------------------------------------------------------------------------------------

    def _update(self, rollouts: Rollouts) -> dict[str, float]:
        """All optimizer steps on one batch of rollouts; returns the update's metrics."""
        args, mask = self.args, rollouts.mask
        began = time.perf_counter()
        scores = self._training_scores(rollouts)
        kl = algorithm.kl_estimate(rollouts.logprobs, rollouts.ref_logprobs, args.kl_estimator)
        kl_coef = self.kl_controller.value
        rewards = algorithm.token_rewards(scores, kl, mask, kl_coef if args.kl_placement == "reward" else 0.0)
        if args.whiten_rewards:
            rewards = algorithm.whiten(rewards, mask, shift_mean=False)
        advantages, returns = algorithm.gae(rewards, rollouts.values, mask, args.gamma, args.lam)
        advantages = algorithm.whiten(advantages, mask)

        statistics, ptx_losses, grad_norms, stopped = [], [], [], False
        ptx = args.ptx_coef > 0 and self.state.global_step >= args.critic_warmup_steps
        first = None
        for epoch in range(args.num_ppo_epochs):
            for number, minibatch in enumerate(_chunks(self._order(epoch), self.mini_batch_size)):
                ptx_losses += [self._ptx_backward(epoch, number)] if ptx else []
                stats = self._backward(rollouts, advantages, returns, minibatch, first=epoch == 0)
                first = stats if first is None else first
                if args.max_approx_kl is not None:
                    moved = self.accelerator.reduce(stats, "sum")[STATISTICS.index("policy/approxkl_avg")]
                    stopped = moved.item() > args.max_approx_kl
                    if stopped:
                        self.model_wrapped.zero_grad()
                        break
                clip = args.max_grad_norm if args.max_grad_norm > 0 else math.inf
                grad_norm = self.accelerator.clip_grad_norm_(self.model_wrapped.parameters(), clip)
                if hasattr(grad_norm, "full_tensor"):  # FSDP2: of this process's shards
                    grad_norm = grad_norm.full_tensor()
                grad_norm = 0.0 if grad_norm is None else float(grad_norm)  # DeepSpeed may not say
                if not math.isfinite(grad_norm) and self.accelerator.scaler is None:  # fp16's scaler skips such steps
                    what = f"the gradient norm is {grad_norm}"
                    raise NotFinite(self._where(what, self.train_dataset, rollouts.rows, minibatch))
                self.optimizer.step()
                self.model_wrapped.zero_grad()
                statistics.append(stats)
                grad_norms.append(grad_norm)
            if stopped:
                break
        self.kl_controller.update(torch.where(mask, kl, 0.0).sum(1).mean().item(), self.batch_size)

        seconds = rollouts.seconds | {"update": time.perf_counter() - began}
        metrics = self._metrics(rollouts, scores, kl, kl_coef, returns, seconds)
        moved_before_any_step = self.accelerator.reduce(first, "sum")[STATISTICS.index("policy/approxkl_avg")].item()
        metrics["val/first_ratio_rms"] = math.sqrt(2 * moved_before_any_step)  # of log π/π_old, ideally 0
        if ptx_losses:
            metrics["loss/ptx_avg"] = self.accelerator.reduce(torch.stack(ptx_losses).mean(), "sum").item()
        if statistics:
            table = self.accelerator.reduce(torch.stack(statistics), "sum")  # (optimizer steps, STATISTICS)
            metrics |= dict(zip(STATISTICS, table.mean(0).tolist(), strict=True))
            metrics["val/ratio_var"] = table[:, STATISTICS.index("val/ratio")].var(unbiased=False).item()
            metrics["policy/entropy_avg"] = table[: args.num_mini_batches, -1].mean().item()
            metrics["grad_norm"] = sum(grad_norms) / len(grad_norms)
        return metrics | {"optimizer_steps": len(grad_norms)}

    def _ptx_backward(self, epoch: int, number: int) -> Tensor:
        """Gradients of `ptx_coef` × the mean loss per token on rows of pretraining text; returns that loss.

        L = −γ E_{x∼D} log π(x) (InstructGPT eq. 2). Which rows depends only on the place in the run, so a resumed
        run takes the same. The loss returned, (), is this process's part of it.
        """
        args, accelerator, world = self.args, self.accelerator, self.accelerator.num_processes
        draw = np.random.default_rng((args.seed, PTX, self.state.global_step, epoch, number))
        size = args.ptx_batch_size or self.mini_batch_size
        size = math.ceil(size / world) * world
        chosen = draw.choice(len(self.ptx_dataset), size, replace=size > len(self.ptx_dataset))
        rows = [[int(i) for i in self.ptx_dataset[int(row)]["input_ids"]] for row in chosen]
        tokens = sum(len(ids) - 1 for ids in rows)
        total = torch.zeros((), device=accelerator.device)
        for micro in _chunks(rows[accelerator.process_index :: world], args.per_device_train_batch_size):
            accelerator.gradient_state._set_sync_gradients(False)  # the minibatch's own backward comes last
            batch = collate([(ids[:1], ids[1:]) for ids in micro], self.packed, accelerator.device)
            with contextlib.nullcontext() if self.is_deepspeed_enabled else accelerator.no_sync(self.model_wrapped):
                if self.is_deepspeed_enabled:  # ZeRO-3 keeps old gradients of what a step's first backward leaves out
                    logprobs, _, values = self.model_wrapped(batch, temperature=1.0)
                    loss = -logprobs.sum() / tokens + 0.0 * values.sum()
                else:
                    loss = -self.model_wrapped(batch, logprobs_only=True, temperature=1.0).sum() / tokens
                scaling = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
                accelerator.backward(args.ptx_coef * loss * world, **scaling)
            total += loss.detach()
        return total

    def _order(self, epoch: int) -> list[int]:
        """The answers of the global batch in the order in which this epoch of this update takes them."""
        shuffle = np.random.default_rng((self.args.seed, self.state.global_step, epoch))
        return shuffle.permutation(self.batch_size).tolist()

    def _backward(self, rollouts: Rollouts, advantages, returns, minibatch: list[int], first: bool) -> Tensor:
        """Gradients of the loss of one minibatch (indices into the global batch); returns its STATISTICS.

        The loss is the mean over all tokens of the minibatch, on all processes and in all micro-batches; the
        statistics are this process's part of such means.
        """
        args, accelerator, mask = self.args, self.accelerator, rollouts.mask
        warming_up = self.state.global_step < args.critic_warmup_steps
        policy_weight = 0.0 if warming_up else 1.0
        tokens, bonus = int(mask[minibatch].sum()), args.entropy_coef > 0
        micros = self._micro_batches(rollouts, minibatch)
        stats = torch.zeros(len(STATISTICS), device=accelerator.device)
        for number, micro in enumerate(micros, 1):
            last = number == len(micros)
            accelerator.gradient_state._set_sync_gradients(last)  # as Trainer does; DeepSpeed then steps by itself
            share_gradients = last or self.is_deepspeed_enabled
            chosen = mask[micro]  # (b, T); indexing with it gives the flat order (N,) of `collate`
            old_logprobs, old_values, ref_logprobs, advantage, target = (
                x[micro][chosen]
                for x in (rollouts.logprobs, rollouts.values, rollouts.ref_logprobs, advantages, returns)
            )
            batch = collate(
                [(rollouts.prompts[i], rollouts.responses[i]) for i in micro], self.packed, accelerator.device
            )
            with contextlib.nullcontext() if share_gradients else accelerator.no_sync(self.model_wrapped):
                # entropy costs a pass over the vocabulary: to watch it, the first epoch is enough
                logprobs, entropies, values = self.model_wrapped(
                    batch,
                    hold_trunk=warming_up,
                    temperature=args.temperature,
                    entropy=first or bonus,
                    grad_entropy=bonus,
                )
                pg, pg_clipped = algorithm.policy_loss(logprobs, old_logprobs, advantage, args.cliprange)
                vf, vf_clipped = algorithm.value_loss(values, old_values, target, args.cliprange_value)
                of_policy = pg
                if bonus:
                    of_policy = of_policy - args.entropy_coef * entropies
                if args.kl_placement == "loss":
                    kl = algorithm.kl_estimate(logprobs, ref_logprobs, args.kl_estimator)
                    of_policy = of_policy + self.kl_controller.value * kl
                loss = (policy_weight * of_policy + args.vf_coef * vf).sum() / tokens
                scaling = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
                accelerator.backward(loss * accelerator.num_processes, **scaling)  # DDP averages over processes
            with torch.no_grad():
                moved = algorithm.approx_kl(logprobs, old_logprobs)
                ratio = torch.exp(logprobs - old_logprobs)
                entropies = torch.zeros_like(pg) if entropies is None else entropies
                columns = (pg, vf, pg_clipped, vf_clipped, moved, ratio, entropies)
                stats += torch.stack([column.detach().float().sum() for column in columns]) / tokens
        return stats

    def _micro_batches(self, rollouts: Rollouts, minibatch: list[int]) -> list[list[int]]:
        """This process's share of a minibatch, cut to what fits in memory: as many cuts on every process.

        A micro-batch holds about the tokens of `per_device_train_batch_size` answers of full length, hence
        more answers than that when they are short (padded batches: just that many answers).
        """
        args, world = self.args, self.accelerator.num_processes
        size = {i: len(rollouts.prompts[i]) + len(rollouts.responses[i]) for i in minibatch}
        ordered = sorted(minibatch, key=lambda i: (size[i], i))
        shares = [ordered[rank::world] for rank in range(world)]  # of like size
        mine = shares[self.accelerator.process_index]
        if not self.packed:
            return _chunks(mine, args.per_device_train_batch_size)
        room = args.per_device_train_batch_size * (max(map(len, rollouts.prompts)) + args.response_length)
        cuts = max(math.ceil(sum(size[i] for i in share) / room) for share in shares)
        return [mine[cut::cuts] for cut in range(cuts)]

    def _metrics(self, rollouts: Rollouts, scores, kl, kl_coef: float, returns, seconds: dict) -> dict[str, float]:
        """What there is to know of one batch of rollouts, under TRL's names."""
        mask, responses = rollouts.mask, len(rollouts.responses)
        each_kl = torch.where(mask, kl, 0.0).sum(1)
        kl_of_answers = each_kl.mean().item()
        tokens = int(mask.sum())
        metrics = {
            "objective/kl": kl_of_answers,
            "objective/kl_sem": each_kl.std(unbiased=False).item() / math.sqrt(responses),  # its standard error
            "objective/entropy": torch.where(mask, -rollouts.logprobs, 0.0).sum(1).mean().item(),
            "objective/non_score_reward": -kl_coef * kl_of_answers,
            "objective/rlhf_reward": scores.mean().item() - kl_coef * kl_of_answers,
            "objective/scores": scores.mean().item(),
            "objective/scores_std": scores.std(unbiased=False).item(),
            "val/explained_variance": algorithm.explained_variance(rollouts.values, returns, mask).item(),
            "val/num_eos_tokens": int(rollouts.ended.sum()),
            "eos_rate": rollouts.ended.float().mean().item(),
            "response_length": tokens / responses,
            "kl_coef": kl_coef,
            "lr": self.lr_scheduler.get_last_lr()[0],
            "episode": (self.state.global_step + 1) * self.batch_size,
        }
        for name, column in zip(self.reward_names, rollouts.rewards.T, strict=True):
            metrics[f"reward/{name}"] = column.mean().item()
        metrics |= {f"seconds/{phase}": s for phase, s in seconds.items()}
        return metrics | {f"tokens_per_second/{phase}": tokens / s for phase, s in seconds.items()}

    def _training_scores(self, rollouts: Rollouts) -> Tensor:
        """Scores (B,) as PPO sees them: normalised, clipped, less the penalty where an answer did not end."""
        scores = rollouts.scores
        if self.score_normalizer is not None:
            scores = self.score_normalizer(scores)
        if self.args.score_clip is not None:
            scores = scores.clamp(-self.args.score_clip, self.args.score_clip)
        if self.args.missing_eos_penalty is not None:
            scores = scores - self.args.missing_eos_penalty * (~rollouts.ended).float()
        return scores

    # --- log, evaluate, save --------------------------------------------------------------------------------

    def _log_evaluate_save(self) -> None:
        if self.control.should_log and self._unlogged:
            logs = {name: sum(values) / len(values) for name, values in self._unlogged.items()}
            logs |= {name: self._unlogged[name][-1] for name in ("episode", "lr", "kl_coef")}
            self._unlogged.clear()
            self.log(logs)
        if self.control.should_evaluate:
            metrics = self.evaluate()
            too_far = self.args.best_kl_cap is not None and metrics["eval_kl"] > self.args.best_kl_cap
            is_best = not too_far and self._determine_best_metric(metrics=metrics, trial=None)
            if self.args.save_strategy == SaveStrategy.BEST:
                self.control.should_save = is_best
            self.watch.add_evaluation(self._held_out(metrics))
        self._diagnose()
        if self.control.should_save:
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _held_out(self, metrics: dict) -> dict[str, tuple[float, float]]:
        """Mean and standard error of the held-out score, and of every reward of weight 0: a judge unseen in training."""
        names = [
            "score",
            *(f"reward/{n}" for n, w in zip(self.reward_names, self.reward_weights, strict=True) if w == 0),
        ]
        noise = math.sqrt(len(self.eval_dataset))
        return {name: (metrics[f"eval_{name}"], metrics[f"eval_{name}_std"] / noise) for name in names}

    def _diagnose(self) -> None:
        """Say what is wrong and was not before; with `diagnosis: stop` save and stop at the first such thing."""
        if self.args.diagnosis == "off":
            return
        for finding in self.watch.new_findings():  # from global numbers: the same on every process
            logger.warning("%s", finding)
            if self.args.diagnosis == "stop" and self._stopped_by is None:
                self._stopped_by = str(finding)
                self.control.should_save = self.control.should_training_stop = True

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """One answer to each held-out prompt, each time from the same random streams; returns the metrics.

        The score is the weighted sum of the reward functions, without normalisation or penalties; the KL is
        the mean over answers of log π/π_ref (nats); `ref_perplexity` is exp of the mean over tokens of −log π_ref:
        how fluent the reference finds the answers.
        """
        began = time.time()
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise SetupError("evaluate needs an eval_dataset")
        prompts = self.eval_prompts if eval_dataset is None else self._encode_prompts(dataset, "eval_dataset")
        n, world = len(dataset), self.accelerator.num_processes
        rows = [i % n for i in range(math.ceil(n / world) * world)]  # equal shares; the repeats are dropped below
        rollouts = self._rollout(dataset, prompts, rows, [(self.args.seed, EVAL, row) for row in rows])
        kl = torch.where(rollouts.mask, rollouts.logprobs - rollouts.ref_logprobs, 0.0).sum(1)[:n]
        metrics = {
            "score": rollouts.scores[:n].mean().item(),
            "score_std": rollouts.scores[:n].std().item() if n > 1 else 0.0,
            "kl": kl.mean().item(),
            "ref_perplexity": math.exp(-algorithm.masked_mean(rollouts.ref_logprobs[:n], rollouts.mask[:n]).item()),
            "length": rollouts.mask[:n].sum().item() / n,
            "eos_rate": rollouts.ended[:n].float().mean().item(),
            "runtime": time.time() - began,
        }
        for name, column in zip(self.reward_names, rollouts.rewards[:n].T, strict=True):
            metrics[f"reward/{name}"] = column.mean().item()
            metrics[f"reward/{name}_std"] = column.std().item() if n > 1 else 0.0
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self._write_samples(metric_key_prefix, rollouts)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _is_sample_step(self, step: int) -> bool:
        count = self.args.num_sample_generations
        return count > 0 and (step - 1) % max(1, self.max_steps // count) == 0

    def _write_samples(self, split: str, rollouts: Rollouts, count: int = 10) -> None:
        """Append the first answers of a batch, with what was thought of them, to samples.jsonl; log a few."""
        if not self.is_world_process_zero():
            return
        kl = torch.where(rollouts.mask, rollouts.logprobs - rollouts.ref_logprobs, 0.0).sum(1)
        completions = self._completions(rollouts.responses[:count])
        table = [f"{'score':>9} {'KL':>7}  {split} prompts … answers after update {self.state.global_step}"]
        for i, completion in enumerate(completions[:3]):
            prompt, answer = (
                " ".join(text.split()) for text in (self.processing_class.decode(rollouts.prompts[i]), completion)
            )
            table.append(f"{rollouts.scores[i]:>9.3f} {kl[i]:>7.2f}  {prompt[-40:]} … {answer[:120]}")
        logger.info("%s", "\n".join(table))
        with open(Path(self.args.output_dir) / SAMPLES, "a", encoding="utf-8") as file:
            for i, completion in enumerate(completions):
                sample = {
                    "step": self.state.global_step,
                    "split": split,
                    "prompt": self.processing_class.decode(rollouts.prompts[i]),
                    "completion": completion,
                    "score": rollouts.scores[i].item(),
                    "kl": kl[i].item(),
                    "ended": bool(rollouts.ended[i]),
                }
                file.write(json.dumps(sample, ensure_ascii=False) + "\n")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The policy (with PEFT: its adapters) and tokenizer, the critic in the folder `critic`."""
        folder = Path(output_dir or self.args.output_dir)
        weights = {"policy": None, "critic": None}
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # collective: every process takes part
            whole = self.accelerator.get_state_dict(self.model_wrapped) or {}  # ZeRO-3: on the first process alone
            for part, model in (("policy", self.policy), ("critic", self.critic)):
                own = {k.removeprefix(f"{part}."): v for k, v in whole.items() if k.startswith(f"{part}.")}
                weights[part] = untied(model, own)
        if self.args.should_save:
            only = {"selected_adapters": [self.policy.active_adapter]} if hasattr(self.policy, "peft_config") else {}
            self.policy.save_pretrained(folder, state_dict=weights["policy"], **only)
            self.critic.save_pretrained(folder / "critic", state_dict=weights["critic"])
            for place in (folder,) if isinstance(self.critic, ValueHead) else (folder, folder / "critic"):
                self.processing_class.save_pretrained(place)

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save and not self.args.save_only_model:
            state = {
                "batch_size": self.batch_size,
                "kl_controller": self.kl_controller.state_dict(),
                "score_normalizer": self.score_normalizer and self.score_normalizer.state_dict(),
                "unlogged": self._unlogged,
                "watch": self.watch.state_dict(),
            }
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            (folder / STATE).write_text(json.dumps(state), encoding="utf-8")

    # --- setting up and resuming ----------------------------------------------------------------------------

    def _set_up(self, checkpoint: str | None) -> None:
        """Optimizer, scheduler, wrapped model and trainer state, from the checkpoint where there is one."""
        args = self.args
        if args.activation_checkpointing:
            settings = dict(args.activation_checkpointing_kwargs or {})
            for module in (self.policy, self.critic) if not isinstance(self.critic, ValueHead) else (self.policy,):
                plain_model(module).activation_checkpointing_enable(activation_checkpointing_kwargs=settings or None)
                if hasattr(module, "peft_config"):  # frozen embeddings: the first layer must see gradients flow
                    module.enable_input_require_grads()
        if checkpoint is not None and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            self._load_from_checkpoint(checkpoint)
        steps_per_epoch = max(1, len(self.train_dataset) // self.batch_size)
        epochs = math.ceil(self.max_steps * self.batch_size / len(self.train_dataset))
        self._init_training_state(self.max_steps, steps_per_epoch, epochs, checkpoint, None)
        self._prepare_for_training(self.max_steps, None, checkpoint)
        self.model_wrapped.train()
        self._unlogged.clear()
        if checkpoint is None:
            return
        state = json.loads((Path(checkpoint) / STATE).read_text(encoding="utf-8"))
        if state["batch_size"] != self.batch_size:
            raise SetupError(
                f"{checkpoint} was made with batches of {state['batch_size']} answers, this run has "
                f"{self.batch_size}: it would not continue with the right prompts. Keep "
                "per_device_train_batch_size × gradient_accumulation_steps × processes as it was"
            )
        self.kl_controller.load_state_dict(state["kl_controller"])
        if self.score_normalizer is not None and state["score_normalizer"] is not None:
            self.score_normalizer.load_state_dict(state["score_normalizer"])
        self._unlogged.update(state["unlogged"])
        self.watch.load_state_dict(state["watch"])
        self._load_rng_state(checkpoint)  # for reward functions that use one
        self._forget_samples_after(self.state.global_step)

    def _find_checkpoint(self, asked: str | bool | None) -> str | None:
        if not asked:
            return None
        found = get_last_checkpoint(self.args.output_dir) if asked is True else str(asked)
        if found is None or not (Path(found) / STATE).is_file():
            raise SetupError(f"no PPO checkpoint to resume from: {found or self.args.output_dir}")
        return found

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        for module, folder in ((self.policy, ""), (self.critic, "critic")):
            place = Path(resume_from_checkpoint) / folder
            if isinstance(module, ValueHead):
                module.load(place)
                continue
            if hasattr(module, "peft_config"):  # Trainer would add the adapter in `critic` to the policy
                peft.set_peft_model_state_dict(module, peft.load_peft_weights(str(place), device="cpu"))
                continue
            whole, self.model = self.model, module  # Trainer reports missing weights of self.model
            try:
                super()._load_from_checkpoint(str(place), module)
            finally:
                self.model = whole

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return super()._load_best_model()
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _forget_samples_after(self, step: int) -> None:
        """Drop samples that an interrupted run wrote after its last checkpoint: they come again."""
        path = Path(self.args.output_dir) / SAMPLES
        if self.is_world_process_zero() and path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def _frozen(self, module: nn.Module) -> nn.Module:
        module.requires_grad_(False)
        if hasattr(module, "full_precision"):  # quantized: it is where it was loaded, and cannot be moved
            return module.eval()
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            return prepare_deepspeed(module, self.accelerator).module
        if self.is_fsdp_enabled:
            return shard_frozen(module, self.accelerator)
        return module.to(self.accelerator.device).eval()

    @contextlib.contextmanager
    def _whole_policy(self):
        """The policy with all its weights on this process, for decoding: processes decode for different times."""
        if not self.is_fsdp_enabled:
            with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model:
                yield model.policy
            return
        weights = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in self.policy.state_dict().items()}
        self.decoder.load_state_dict(weights, assign=True)
        del weights
        yield self.decoder
        for weight in self.decoder.parameters():
            weight.data = weight.new_empty(1).expand_as(weight)  # its shape, without its memory

    def _reference_logprobs(self, batch: dict) -> Tensor:
        """Log-probs (N,) of the answer tokens under the model that the policy is held to."""
        if self.ref_model is not None:
            return within(self.ref_model, token_logprobs, batch, self.args.temperature)[0]
        with self.policy.disable_adapter():
            logprobs = self.model_wrapped(batch, logprobs_only=True, temperature=self.args.temperature)
            if self.is_fsdp_enabled:  # else what is whole now would be trained again, and not the shards
                self.model_wrapped.reshard()
        return logprobs

    def _encode_prompts(self, dataset, name: str) -> list[list[int]]:
        """Token ids of every prompt; all that are empty or too long are reported at once."""
        if "prompt" not in dataset.column_names:
            raise SetupError(f"{name} has no column `prompt`, but {', '.join(dataset.column_names)}")
        prompts = [encode_prompt(self.processing_class, prompt) for prompt in dataset["prompt"]]
        contexts = [
            models.positions(m)
            for m in (self.policy, self.critic, self.ref_model)
            if m is not None and not isinstance(m, ValueHead)
        ]
        context = min((c for c in contexts if c is not None), default=None)
        limits = [
            self.args.max_prompt_length,
            None if context is None else context - self.args.response_length,
        ]
        limit = min((x for x in limits if x is not None), default=None)
        long = [i for i, ids in enumerate(prompts) if limit is not None and len(ids) > limit]
        empty = [i for i, ids in enumerate(prompts) if not ids]
        if long or empty:
            raise SetupError(
                f"{name}: "
                + "; ".join(
                    f"{len(rows)} prompt(s) {what}, first rows {rows[:5]}"
                    for rows, what in (
                        (long, f"longer than {limit} tokens"),
                        (empty, "without a single token"),
                    )
                    if rows
                )
                + f". Drop or shorten them (response_length {self.args.response_length}, context {context})"
            )
        return prompts

    def _row_of(self, episode: int) -> int:
        """The dataset row of the run's n-th episode: each epoch takes all rows in its own order."""
        epoch, place = divmod(episode, len(self.train_prompts))
        if getattr(self, "_epoch_order", (None,))[0] != epoch:
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            self._epoch_order = (
                epoch,
                np.random.default_rng((seed, epoch)).permutation(len(self.train_prompts)),
            )
        return int(self._epoch_order[1][place])

    def _completions(self, responses: list[list[int]]) -> list[str]:
        return self.processing_class.batch_decode(responses, skip_special_tokens=True)

    def _check_rewards(self, rewards: Tensor, dataset, rows: list[int]) -> None:
        for name, column in zip(self.reward_names, rewards.T, strict=True):
            bad = (~torch.isfinite(column)).nonzero().flatten().tolist()
            if bad:
                raise NotFinite(
                    self._where(f"reward function {name} returned {column[bad[0]].item()}", dataset, rows, bad)
                )

    def _where(self, what: str, dataset, rows: list[int], of: list[int]) -> str:
        """An error text: what, when, for which prompts, and what to go back to."""
        shown = [rows[i] for i in of[:5]]
        last = get_last_checkpoint(self.args.output_dir) if Path(self.args.output_dir).is_dir() else None
        return (
            f"{what} in update {self.state.global_step + 1}, in {len(of)} answer(s), first dataset rows "
            f"{shown} "
            f"({'; '.join(repr(as_text(dataset[r]['prompt'])[:60]) for r in shown)}). "
            f"Last checkpoint: {last or 'none'}"
        )

    def _send_telemetry(self) -> None:
        """TRL's trainers report their use to the hub; this one reports nothing to anyone."""


def vllm_engine(trainer: PPOTrainer):
    """TRL's vLLM engine around the policy: `sync_weights()` and `generate(prompts, None, 1)`."""
    from trl.import_utils import is_vllm_available

    args = trainer.args
    if not is_vllm_available():
        raise SetupError("use_vllm: vLLM is not installed here: `pip install trl[vllm]` (NVIDIA GPUs), or leave it out")
    from trl.generation.vllm_generation import VLLMGeneration

    return VLLMGeneration(
        trainer.policy,
        trainer.accelerator,
        trainer.processing_class,
        mode=args.vllm_mode,
        server_base_url=args.vllm_server_base_url,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        max_model_length=max(map(len, trainer.train_prompts + (trainer.eval_prompts or []))) + args.response_length,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        max_completion_length=args.response_length,
        logprobs=None,
        generation_kwargs={"stop_token_ids": trainer.eos_token_ids},
    )


STATISTICS = (
    "loss/policy_avg",
    "loss/value_avg",
    "policy/clipfrac_avg",
    "val/clipfrac_avg",
    "policy/approxkl_avg",
    "val/ratio",
    "policy/entropy_avg",
)


def _chunks(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _by_length(items: list[tuple]) -> list[int]:
    """Indices of `items` (tuples of token lists), shortest first."""
    return sorted(range(len(items)), key=lambda i: sum(map(len, items[i])))


def _unique(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]
