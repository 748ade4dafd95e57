"""What is told of a PPO run as it goes: metrics, held-out answers, diagnoses, samples; and which checkpoint is best."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path

import torch
from transformers.trainer_utils import SaveStrategy

from pipelines.errors import SetupError
from pipelines.ppo import algorithm
from pipelines.ppo.base_trainer import EVAL, Machinery

logger = logging.getLogger(__name__)

SAMPLES = "samples.jsonl"


class Watching(Machinery):
    """Base of `PPOTrainer`, which rolls out what is looked at here (`trainer.Rollouts`)."""

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

    def _metrics(self, rollouts, scores, kl, kl_coef: float, returns, seconds: dict) -> dict[str, float]:
        """What there is to know of one batch of rollouts, under TRL's names."""
        mask, responses = rollouts.mask, len(rollouts.responses)
        each_kl = torch.where(mask, kl, 0.0).sum(1)
        kl_of_answers = each_kl.mean().item()
        off = algorithm.masked_mean(returns - rollouts.values, mask)
        spread = algorithm.masked_var(returns, mask).sqrt().clamp(min=1e-8)
        tokens = int(mask.sum())
        metrics = {
            "objective/kl": kl_of_answers,
            "objective/kl_sem": each_kl.std(unbiased=False).item() / math.sqrt(responses),  # its standard error
            "objective/entropy": torch.where(mask, -rollouts.logprobs, 0.0).sum(1).mean().item(),
            "objective/non_score_reward": -kl_coef * kl_of_answers,
            "objective/rlhf_reward": scores.mean().item() - kl_coef * kl_of_answers,
            "objective/scores": scores.mean().item(),
            "objective/scores_std": scores.std(unbiased=False).item(),
            "objective/raw_scores": rollouts.scores.mean().item(),  # not normalised, clipped or less a penalty
            "val/explained_variance": algorithm.explained_variance(rollouts.values, returns, mask).item(),
            "val/bias": (off / spread).item(),
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

    def _is_sample_step(self, step: int) -> bool:
        count = self.args.num_sample_generations
        return count > 0 and (step - 1) % max(1, self.max_steps // count) == 0

    def _write_samples(self, split: str, rollouts, count: int = 10) -> None:
        """Append the first answers of a batch, with what was thought of them, to samples.jsonl; log a few."""
        if not self.is_world_process_zero():
            return
        kl = torch.where(rollouts.mask, rollouts.logprobs - rollouts.ref_logprobs, 0.0).sum(1)
        completions = self.processing_class.batch_decode(rollouts.responses[:count], skip_special_tokens=True)
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

    def _forget_samples_after(self, step: int) -> None:
        """Drop samples that an interrupted run wrote after its last checkpoint: they come again."""
        path = Path(self.args.output_dir) / SAMPLES
        if self.is_world_process_zero() and path.is_file():
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # not splitlines: text may hold U+0085 or U+2028
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def _set_up(self, checkpoint: str | None) -> None:
        super()._set_up(checkpoint)
        if checkpoint is not None:
            self._forget_samples_after(self.state.global_step)
