"""PPOTrainer: rollout → score → advantages → epochs × minibatches → log → evaluate → save; with a critic or without.

What is global stays simple here: after scoring, every process gathers all rollouts of the batch (token ids and a few
floats per token, small beside any model), so rewards, whitening, advantages and statistics are computed from the global
batch by the same code on 1 and on N processes. Only the forwards and backwards are shared out. Nothing depends on a
global random state: prompts, sampling and minibatches are drawn from generators seeded by (seed, position), so a
resumed run continues with exactly what an uninterrupted one would have done.

The trainer holds a `RolloutMaker` (rollouts.py: sampling, scoring, vLLM), a `Learner` (update.py: advantages, losses,
optimizer steps) and a `Monitor` (monitoring.py: metrics, held-out figures, diagnosis, samples). Saving and loading two
models is its base class's (base_trainer.py).
"""

from __future__ import annotations

import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers.trainer_utils import SaveStrategy, TrainOutput, get_last_checkpoint, speed_metrics

from pipelines.errors import NotFinite, SetupError
from pipelines.generation.answers import end_tokens
from pipelines.generation.logprobs import can_share, make_ready
from pipelines.models.sharding import whole
from pipelines.ppo import algorithm, checks
from pipelines.ppo.base_trainer import STATE, TwoModelTrainer
from pipelines.ppo.config import PPOConfig
from pipelines.ppo.monitoring import SIDE_BY_SIDE, Monitor
from pipelines.ppo.policy_and_critic import ValueHead, place_frozen
from pipelines.ppo.rollouts import RewardScorer, RolloutMaker, Rollouts, encode_prompts, vllm_engine
from pipelines.ppo.update import EVAL, TRAIN, Learner, targets


class Diagnosed(SetupError):
    """`diagnosis: stop` found a pathology; the run is saved, and the same command goes on from there."""


class PPOTrainer(TwoModelTrainer):
    """Trains a policy and its critic by PPO; or, as `args.advantage` says, without one by RLOO, GRPO or REINFORCE.

    Beside the models a checkpoint holds `ppo_state.json`: the KL coefficient, the moments of the scores, what was not
    logged yet and what the diagnosis has seen.

    Args:
        model: the policy, a causal language model (or a PEFT model around one).
        args: `PPOConfig`.
        reward_funcs: sequence-classification models with one label, and/or callables
            `(prompts, completions, **columns) -> list[float]`. These get the prompts as they are in the
            dataset, the completions as text, the dataset's other columns as lists, and `completion_ids`.
        value_model: the critic, a causal `AutoModelForSequenceClassification` with one label that shares the policy's
            token ids; usually a second copy of the reward model. Trained in place. "shared": a head on the policy's
            trunk. None with an `advantage` that has no critic.
        train_dataset, eval_dataset: column `prompt` (text or messages), any others go to the callables.
        processing_class: the policy's tokenizer.
        ptx_dataset: rows with `input_ids` of pretraining text for `ptx_coef`, EOS where a text ends.
        ref_model: frozen reference. None: a copy of `model`, or with PEFT the policy with its adapters off.
        reward_weights: one per reward function, all 1 by default.
        reward_processing_classes: a tokenizer for each reward model that has its own; None: the policy's.
        reward_combine, uncertainty_coef: how the reward models' scores become one, see `rewards.combined`.
        callbacks, optimizers: as in `transformers.Trainer`.
    """

    _tag_names = ["trl", "ppo"]
    _name = "PPO"
    seconds_before = 0.0  # spent in earlier launches, for the rates; 0: unknown, the rates are those of this launch
    _paper = {"title": "Fine-Tuning Language Models from Human Preferences", "id": "1909.08593"}

    def __init__(
        self,
        model: nn.Module,
        args: PPOConfig,
        reward_funcs: list,
        value_model: nn.Module | str | None,
        train_dataset,
        processing_class,
        eval_dataset=None,
        ptx_dataset=None,
        ref_model: nn.Module | None = None,
        reward_weights: list[float] | None = None,
        reward_processing_classes: list | None = None,
        reward_combine: str = "sum",
        uncertainty_coef: float = 1.0,
        callbacks: list | None = None,
        optimizers=(None, None),
    ):
        reward_funcs = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        reward_weights = [1.0] * len(reward_funcs) if reward_weights is None else list(reward_weights)
        reward_tokenizers = list(reward_processing_classes or [None] * len(reward_funcs))
        eos_token_ids = end_tokens(model, processing_class)
        value_model = ValueHead(model) if value_model == "shared" else value_model
        checks.check_critic(args, value_model)
        checks.check_models(model, value_model, ref_model, reward_funcs, processing_class)
        checks.check_counts(reward_funcs, reward_weights, reward_tokenizers)
        models = [w for f, w in zip(reward_funcs, reward_weights, strict=True) if isinstance(f, nn.Module)]
        checks.check_combine(reward_combine, models)
        checks.check_ptx(args, ptx_dataset)
        checks.check_vllm(args, model)
        if ref_model is None and not hasattr(model, "peft_config"):
            with whole(*model.parameters()):
                ref_model = copy.deepcopy(model)
        together = [m for m in (model, value_model, ref_model) if m is not None and not isinstance(m, ValueHead)]
        self.packed = all([make_ready(module) for module in together])
        share = min(map(can_share, together)) if self.packed else 0
        super().__init__(
            model,
            value_model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        world = self.accelerator.num_processes
        self.batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * world
        checks.check_batch(self.batch_size, args.num_mini_batches, world, args.num_generations)
        if self.is_deepspeed_enabled and args.max_approx_kl is not None:
            raise SetupError("max_approx_kl needs a step that can be skipped, but DeepSpeed steps within backward")
        self.max_steps = args.max_steps
        if self.max_steps <= 0:
            prompts = args.num_train_epochs * len(train_dataset)
            episodes = args.total_episodes or math.ceil(prompts * args.num_generations)
            self.max_steps = math.ceil(episodes / self.batch_size)
        self.ref_model = ref_model
        self.train_prompts = self._encode(train_dataset, "train_dataset")
        self.eval_prompts = None if eval_dataset is None else self._encode(eval_dataset, "eval_dataset")

        vllm = None
        if args.use_vllm:
            longest = max(map(len, self.train_prompts + (self.eval_prompts or [])))
            vllm = vllm_engine(model, processing_class, self.accelerator, args, longest, eos_token_ids)
        scorer = RewardScorer(
            reward_funcs,
            reward_weights,
            reward_tokenizers,
            processing_class,
            eos_token_ids,
            args.local_rollout_forward_batch_size,
            self.accelerator,
            args.keep_thoughts,
            args.num_generations,
            reward_combine,
            uncertainty_coef,
        )
        self.ref_model = None if ref_model is None else place_frozen(ref_model, self.accelerator)
        self.rollout_maker = RolloutMaker(
            args, self.accelerator, model, self.ref_model, scorer, eos_token_ids, self.packed, share, vllm
        )
        self.learner = Learner(args, self.accelerator, self.packed, share, self.batch_size, ptx_dataset)
        self.monitor = Monitor(args, processing_class, scorer.names, reward_weights, self.max_steps)
        if args.kl_target is None:
            self.kl_controller = algorithm.FixedKL(args.kl_coef)
        else:
            self.kl_controller = algorithm.AdaptiveKL(args.kl_coef, args.kl_target, args.kl_horizon)
        self.score_normalizer = algorithm.ScoreNormalizer() if args.normalize_scores else None

    # --- the loop -------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Train to `max_steps` updates, from the checkpoint folder given (True: the last in output_dir)."""
        args = self.args
        checkpoint = self._find_checkpoint(resume_from_checkpoint)
        self.is_in_train = True
        started = time.time() - self.seconds_before
        self._set_up(checkpoint)
        if checkpoint is None:
            multiple = math.lcm(self.accelerator.num_processes, args.num_generations)  # equal shares, whole groups
            checks.check_rollouts(self._train_rollout(range(math.ceil(64 / multiple) * multiple)), args)
            if self.eval_dataset is not None and not args.eval_on_start:
                n = min(len(self.eval_dataset), SIDE_BY_SIDE)
                self.monitor.write_samples("eval", self._held_out(self.eval_dataset, self.eval_prompts, n), 0, n)

        self.control = self.callback_handler.on_train_begin(args, self.state, self.control)
        if args.eval_on_start and checkpoint is None:
            self.monitor.add_evaluation(self.evaluate(), len(self.eval_dataset))
        first_step = 0 if self.seconds_before else self.state.global_step
        while self.state.global_step < self.max_steps and not self.control.should_training_stop:
            self.control = self.callback_handler.on_step_begin(args, self.state, self.control)
            seen = self.state.global_step * self.batch_size
            batch = self._train_rollout(range(seen, seen + self.batch_size))
            metrics = self._update(batch)
            self.lr_scheduler.step()

            self.state.global_step += 1
            answers = len(self.train_dataset) * args.num_generations  # of an epoch
            self.state.epoch = (seen + self.batch_size) / answers
            self.monitor.add_update(self.state.global_step, metrics)
            if self.monitor.is_sample_step(self.state.global_step):
                self.monitor.write_samples("train", batch, self.state.global_step)
            self.control = self.callback_handler.on_step_end(args, self.state, self.control)
            if int(self.state.epoch) > seen // answers:
                self.control = self.callback_handler.on_epoch_end(args, self.state, self.control)
            self._log_evaluate_save()

        if args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        done = self.state.global_step - first_step
        metrics = speed_metrics("train", started, num_samples=done * self.batch_size, num_steps=done)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_train_end(args, self.state, self.control)
        self.is_in_train = False
        if self.monitor.stopped_by is not None:
            raise Diagnosed(
                f"{self.monitor.stopped_by}\nStopped (diagnosis: stop) and saved in "
                f"{get_last_checkpoint(args.output_dir)}. "
                "Running the same again goes on; diagnosis: warn does not stop any more."
            )
        return TrainOutput(self.state.global_step, float("nan"), metrics)

    def _set_up(self, checkpoint: str | None) -> None:
        """Everything that is trained, and PPO's own state, from the checkpoint where there is one."""
        self._begin(self.max_steps, self.batch_size // self.args.num_generations, checkpoint)
        self.monitor.unlogged.clear()
        if checkpoint is None:
            self.monitor.forget_samples_after(-1)  # of a run that was killed before its first checkpoint
            return
        state = json.loads((Path(checkpoint) / STATE).read_text(encoding="utf-8"))
        if state["batch_size"] != self.batch_size:
            raise SetupError(
                f"{checkpoint} was made with batches of {state['batch_size']} answers, this run has "
                f"{self.batch_size}: it would not continue with the right prompts. Keep "
                "per_device_train_batch_size × gradient_accumulation_steps × processes as it was"
            )
        before = state.get("advantage", "gae"), state.get("num_generations", 1)
        if before != (self.args.advantage, self.args.num_generations):
            raise SetupError(
                f"{checkpoint} was made with advantage: {before[0]}, num_generations: {before[1]}, this run has "
                f"{self.args.advantage}, {self.args.num_generations}: it would not continue. Keep both as they were"
            )
        self.kl_controller.load_state_dict(state["kl_controller"])
        if self.score_normalizer is not None and state["score_normalizer"] is not None:
            self.score_normalizer.load_state_dict(state["score_normalizer"])
        self.monitor.load_state_dict(state)
        self._load_rng_state(checkpoint)  # for reward functions that use one
        self.monitor.forget_samples_after(self.state.global_step)

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save and not self.args.save_only_model:
            state = {
                "batch_size": self.batch_size,
                "advantage": self.args.advantage,
                "num_generations": self.args.num_generations,
                "kl_controller": self.kl_controller.state_dict(),
                "score_normalizer": self.score_normalizer and self.score_normalizer.state_dict(),
                **self.monitor.state_dict(),
            }
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            (folder / STATE).write_text(json.dumps(state), encoding="utf-8")

    def _log_evaluate_save(self) -> None:
        logs = self.monitor.log_entry() if self.control.should_log else None
        if logs is not None:
            self.log(logs)
        if self.control.should_evaluate:
            metrics = self.evaluate()
            too_far = self.args.best_kl_cap is not None and metrics["eval_kl"] > self.args.best_kl_cap
            is_best = not too_far and self._determine_best_metric(metrics=metrics, trial=None)
            if self.args.save_strategy == SaveStrategy.BEST:
                self.control.should_save = is_best
            self.monitor.add_evaluation(metrics, len(self.eval_dataset))
        if self.monitor.diagnose():
            self.control.should_save = self.control.should_training_stop = True
        if self.control.should_save:
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """One answer to each held-out prompt, each time from the same random streams; returns `Monitor.of_held_out`."""
        began = time.time()
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise SetupError("evaluate needs an eval_dataset")
        prompts = self.eval_prompts if eval_dataset is None else self._encode(dataset, "eval_dataset")
        n = len(dataset)
        batch = self._held_out(dataset, prompts, n)
        found = self.monitor.of_held_out(batch, n) | {"runtime": time.time() - began}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        count = 10 if self.is_in_train and self.state.global_step > 0 else min(n, SIDE_BY_SIDE)
        self.monitor.write_samples(metric_key_prefix, batch, self.state.global_step, count)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # --- rollouts -------------------------------------------------------------------------------------------

    def _train_rollout(self, episodes: range) -> Rollouts:
        """Answers number `episodes` of the run, each with its own random stream, `num_generations` to each prompt."""
        rows = [self._row_of(episode // self.args.num_generations) for episode in episodes]
        seeds = [(self.args.seed, TRAIN, episode) for episode in episodes]
        return self._rollout(self.train_dataset, self.train_prompts, rows, seeds)

    def _held_out(self, dataset, prompts: list[list[int]], n: int) -> Rollouts:
        """An answer to each of the first `n` rows, always from the same random streams; what comes behind
        evens shares.
        """
        world = self.accelerator.num_processes
        rows = [i % n for i in range(math.ceil(n / world) * world)]
        return self._rollout(dataset, prompts, rows, [(self.args.seed, EVAL, row) for row in rows])

    def _row_of(self, number: int) -> int:
        """The dataset row of the run's n-th prompt: each epoch takes all rows in its own order."""
        epoch, place = divmod(number, len(self.train_prompts))
        if getattr(self, "_epoch_order", (None,))[0] != epoch:
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            order = np.random.default_rng((seed, epoch)).permutation(len(self.train_prompts))
            self._epoch_order = epoch, order
        return int(self._epoch_order[1][place])

    def _rollout(self, dataset, prompts: list[list[int]], rows: list[int], seeds: list) -> Rollouts:
        """An answer to each of `rows` of the dataset, whose prompts' token ids are `prompts`; scores that are
        finite.
        """
        batch = self.rollout_maker.make(self.model_wrapped, dataset, prompts, rows, seeds)
        rewards, applies = batch.rewards.cpu(), batch.applies.cpu()
        wrong = ~torch.isfinite(rewards) & applies
        for name, column, values in zip(self.monitor.names, wrong.T.tolist(), rewards.T.tolist(), strict=True):
            if bad := [i for i, is_wrong in enumerate(column) if is_wrong]:
                raise NotFinite(self._where(f"reward function {name} returned {values[bad[0]]}", dataset, rows, bad))
        counted = applies[:, [weight != 0 for weight in self.monitor.weights]]
        if none := (~counted.any(1)).nonzero().flatten().tolist():
            raise SetupError(self._where("every reward function of a weight gave None", dataset, rows, none))
        return batch

    def _encode(self, dataset, name: str) -> list[list[int]]:
        return encode_prompts(dataset, name, self.processing_class, self.model, self.ref_model, self.args)

    def _where(self, what: str, dataset, rows: list[int], of: list[int]) -> str:
        return checks.named_answers(what, self.state.global_step + 1, dataset, rows, of, self.args.output_dir)

    # --- the update -----------------------------------------------------------------------------------------

    def _update(self, rollouts: Rollouts) -> dict[str, float]:
        """All optimizer steps on one batch of rollouts; returns the update's metrics."""
        args = self.args
        began = time.perf_counter()
        scores = self._training_scores(rollouts)
        kl = algorithm.kl_estimate(rollouts.logprobs, rollouts.ref_logprobs, args.kl_estimator)
        kl_coef = self.kl_controller.value
        goal = targets(args, rollouts, scores, kl, kl_coef)
        update = self.state.global_step
        steps = self.learner.learn(self.model_wrapped, self.optimizer, self._clip_gradients, rollouts, goal, update)
        for norm, minibatch in zip(steps.grad_norms, steps.minibatches, strict=True):
            if not math.isfinite(norm) and self.accelerator.scaler is None:  # fp16's scaler skips such steps
                rows = rollouts.rows
                raise NotFinite(self._where(f"the gradient norm is {norm}", self.train_dataset, rows, minibatch))

        seconds = rollouts.seconds | {"update": time.perf_counter() - began}
        metrics = self.monitor.of_rollouts(rollouts, scores, kl, kl_coef, goal.returns, seconds)
        self.kl_controller.update(metrics["objective/kl"], self.batch_size)
        metrics["lr"] = self.lr_scheduler.get_last_lr()[0]
        metrics["episode"] = (update + 1) * self.batch_size
        return metrics | steps.metrics

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
