"""PPOTrainer: rollout → score → advantages → epochs × minibatches → log → evaluate → save.

What is global stays simple here: after scoring, every process gathers all rollouts of the batch (token ids
and a few floats per token, small beside any model), so rewards, whitening, advantages and statistics are
computed from the global batch by the same code on 1 and on N processes. Only the forwards and backwards are
shared out.

Nothing depends on a global random state: prompts, sampling and minibatches are drawn from generators seeded
by (seed, position), so a resumed run continues with exactly what an uninterrupted one would have done.

What is no part of the algorithm is in the classes this one is built on: `machinery.py` (models as launchers want
them, checkpoints, vLLM) and `watching.py` (log, evaluation, diagnosis, samples).
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers.trainer_utils import TrainOutput, get_last_checkpoint, speed_metrics

from pipelines.errors import NotFinite, SetupError
from pipelines.generation.answers import end_tokens
from pipelines.generation.decode import generate
from pipelines.generation.logprobs import collate, make_ready, sequence_scores, within
from pipelines.models.sharding import whole
from pipelines.ppo import algorithm, checks
from pipelines.ppo.base_trainer import PTX, TRAIN, vllm_engine
from pipelines.ppo.config import PPOConfig
from pipelines.ppo.diagnosis import Watch
from pipelines.ppo.monitoring import Watching
from pipelines.ppo.policy_and_critic import PolicyAndCritic, ValueHead
from pipelines.ppo.rewards import read_anew

STATISTICS = (  # of each optimizer step
    "loss/policy_avg",
    "loss/value_avg",
    "policy/clipfrac_avg",
    "val/clipfrac_avg",
    "policy/approxkl_avg",
    "val/ratio",
    "policy/entropy_avg",
)


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


class PPOTrainer(Watching):
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
        self.eos_token_ids = end_tokens(model, processing_class)
        value_model = ValueHead(model) if value_model == "shared" else value_model
        checks.check_models(model, value_model, ref_model, reward_funcs, processing_class)
        checks.check_counts(reward_funcs, self.reward_weights, self.reward_tokenizers)
        checks.check_ptx(args, ptx_dataset)
        if ref_model is None and not hasattr(model, "peft_config"):
            with whole(*model.parameters()):
                ref_model = copy.deepcopy(model)
        together = [m for m in (model, value_model, ref_model) if m is not None and not isinstance(m, ValueHead)]
        self.packed = all([make_ready(module) for module in together])
        self.reward_packed = [isinstance(f, nn.Module) and hasattr(f, "score") and make_ready(f) for f in reward_funcs]
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
        checks.check_batch(self.batch_size, args.num_mini_batches, world)
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
            self.watch.add_evaluation(self._held_out(self.evaluate()))
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

    def _row_of(self, episode: int) -> int:
        """The dataset row of the run's n-th episode: each epoch takes all rows in its own order."""
        epoch, place = divmod(episode, len(self.train_prompts))
        if getattr(self, "_epoch_order", (None,))[0] != epoch:
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            order = np.random.default_rng((seed, epoch)).permutation(len(self.train_prompts))
            self._epoch_order = epoch, order
        return int(self._epoch_order[1][place])

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
        completions = self.processing_class.batch_decode(responses, skip_special_tokens=True)
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
        model, tokenizer, packed = self.reward_funcs[i], self.reward_tokenizers[i], self.reward_packed[i]
        sequences = read_anew(tokenizer, answers, prompts, completions, self.eos_token_ids)
        checks.check_lengths(sequences, model, self.reward_names[i])
        scores = torch.empty(len(sequences))
        for chunk in _chunks(_by_length([(ids,) for ids in sequences]), self.args.local_rollout_forward_batch_size):
            with self.accelerator.autocast():
                ids = [sequences[j] for j in chunk]
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
                grad_norm = self._clip_gradients()
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
        before = dict(zip(STATISTICS, self.accelerator.reduce(first, "sum").tolist(), strict=True))  # any step
        metrics["val/first_ratio_rms"] = math.sqrt(2 * before["policy/approxkl_avg"])  # of log π/π_old, ideally 0
        taken = self._order(0)[: self.mini_batch_size]  # if they were sampled from π, −log π is on average its entropy
        surprise = -rollouts.logprobs[taken][mask[taken]]
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


def _chunks(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _by_length(items: list[tuple]) -> list[int]:
    """Indices of `items` (tuples of token lists), shortest first."""
    return sorted(range(len(items)), key=lambda i: sum(map(len, items[i])))


def _unique(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]
