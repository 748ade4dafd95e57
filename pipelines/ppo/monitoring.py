"""What is logged of a PPO run as it goes: metrics, held-out figures, diagnoses, samples."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from pipelines import files
from pipelines.ppo import algorithm, phrases
from pipelines.ppo.config import PPOConfig
from pipelines.ppo.diagnosis import Watch
from pipelines.ppo.rollouts import Rollouts

logger = logging.getLogger(__name__)

SAMPLES = "samples.jsonl"
SIDE_BY_SIDE = 128  # held-out answers of the first and of the last policy that are kept


class Monitor:
    """Looks at rollouts and their metrics, and changes nothing: `PPOTrainer` holds it and does what it says.

    Args:
        args: `PPOConfig`.
        tokenizer: the policy's.
        names, weights: of the reward functions.
        max_steps: updates of the whole run.
    """

    def __init__(self, args: PPOConfig, tokenizer, names: list[str], weights: list[float], max_steps: int):
        self.args, self.tokenizer, self.names, self.weights, self.max_steps = args, tokenizer, names, weights, max_steps
        self.watch = Watch()
        self.stopped_by: str | None = None  # the finding that stopped the run
        self.reference: list[list[int]] = []  # the first update's answers, which the reference itself gave
        self.phrase = ""  # the commonest of those that are rare in these
        self.unlogged: dict[str, list[float]] = defaultdict(list)  # metrics of the updates since the last log line

    def add_update(self, step: int, metrics: dict[str, float]) -> None:
        """Keep what `PPOTrainer` measured in update number `step`."""
        for name, value in metrics.items():
            self.unlogged[name].append(value)
        self.watch.add_update(step, metrics, self.phrase)

    def log_entry(self) -> dict[str, float] | None:
        """The means since the last call, of what counts up the last value; None where nothing has happened since."""
        if not self.unlogged:
            return None
        logs = {name: sum(values) / len(values) for name, values in self.unlogged.items()}
        logs |= {name: self.unlogged[name][-1] for name in ("episode", "lr", "kl_coef")}
        self.unlogged.clear()
        return logs

    def of_rollouts(self, rollouts: Rollouts, scores, kl, kl_coef: float, returns, seconds: dict) -> dict[str, float]:
        """What there is to know of one batch of rollouts, under TRL's names.

        Args:
            scores: (B,) as PPO saw them.
            kl, returns: (B, T) per token; no returns without a critic.
            seconds: of each phase.
        """
        mask, responses = rollouts.mask, len(rollouts.responses)
        each_kl = torch.where(mask, kl, 0.0).sum(1)
        own = {}  # what only some methods have
        if returns is not None:
            off = algorithm.masked_mean(returns - rollouts.values, mask)
            spread = algorithm.masked_var(returns, mask).sqrt().clamp(min=1e-8)
            own["val/explained_variance"] = algorithm.explained_variance(rollouts.values, returns, mask)
            own["val/bias"] = off / spread
        if self.args.num_generations > 1:
            own["objective/scores_alike"] = algorithm.alike(scores, self.args.num_generations)
        tokens = sum(map(len, rollouts.responses))
        sampling = {}  # of vLLM against the policy, as in TRL's GRPO
        if (weights := rollouts.importance(self.args)) is not None:
            known = mask & ~rollouts.sampler_logprobs.isnan()
            apart = torch.where(known, (rollouts.logprobs - rollouts.sampler_logprobs).abs(), 0.0)
            sampling = {
                "sampling/sampling_logp_difference/mean": apart.sum() / known.sum().clamp(min=1),
                "sampling/sampling_logp_difference/max": apart.max(),
                "sampling/importance_sampling_ratio/mean": algorithm.masked_mean(weights, mask),
                "sampling/importance_sampling_ratio/min": torch.where(mask, weights, math.inf).min(),
                "sampling/importance_sampling_ratio/max": torch.where(mask, weights, 0.0).max(),
            }
        found = _read(
            {
                **sampling,
                "objective/kl": each_kl.mean(),
                "objective/kl_sem": each_kl.std(unbiased=False),
                "objective/entropy": torch.where(mask, -rollouts.logprobs, 0.0).sum(1).mean(),
                "objective/scores": scores.mean(),
                "objective/scores_std": scores.std(unbiased=False),
                "objective/raw_scores": rollouts.scores.mean(),  # not normalised, clipped or less a penalty
                "val/num_eos_tokens": rollouts.ended.sum(),
                "eos_rate": rollouts.ended.float().mean(),
                **own,
            }
        )
        penalty = kl_coef * found["objective/kl"]
        metrics = found | {
            "objective/kl_sem": found["objective/kl_sem"] / math.sqrt(responses),  # the standard error of the mean
            "objective/non_score_reward": -penalty,
            "objective/rlhf_reward": found["objective/scores"] - penalty,
            "val/num_eos_tokens": int(found["val/num_eos_tokens"]),
            "response_length": tokens / responses,
            "kl_coef": kl_coef,
        }
        if rollouts.disagreement is not None:
            metrics["objective/disagreement"] = rollouts.disagreement.mean().item()
        for name, column in self._rewards(rollouts, responses):
            metrics[f"reward/{name}"] = column.mean().item()
        metrics |= self._phrases(rollouts)
        metrics |= {f"seconds/{phase}": s for phase, s in seconds.items()}
        return metrics | {f"tokens_per_second/{phase}": tokens / s for phase, s in seconds.items()}

    def of_held_out(self, rollouts: Rollouts, n: int) -> dict[str, float]:
        """Figures of the first `n` answers, which are to held-out prompts.

        The score is that of the reward functions together, without normalisation or penalties; the KL is
        the mean over answers of log π/π_ref (nats); `ref_perplexity` is exp of the mean over tokens of −log π_ref:
        how fluent the reference finds the answers.
        """
        scores = rollouts.scores[:n]
        metrics = _read(
            {
                "score": scores.mean(),
                "score_std": scores.std() if n > 1 else torch.zeros_like(scores[0]),
                "kl": _kl(rollouts)[:n].mean(),
                "ref_perplexity": algorithm.masked_mean(rollouts.ref_logprobs[:n], rollouts.mask[:n]),
                "eos_rate": rollouts.ended[:n].float().mean(),
            }
        )
        metrics["ref_perplexity"] = math.exp(-metrics["ref_perplexity"])
        metrics["length"] = sum(map(len, rollouts.responses[:n])) / n
        if rollouts.disagreement is not None:
            metrics["disagreement"] = rollouts.disagreement[:n].mean().item()
        for name, column in self._rewards(rollouts, n):
            metrics[f"reward/{name}"] = column.mean().item()
            metrics[f"reward/{name}_std"] = column.std().item() if len(column) > 1 else 0.0
            if len(column) < n:  # None for the others: the function does not apply to them
                metrics[f"reward/{name}_count"] = len(column)
        return metrics

    def _phrases(self, rollouts: Rollouts) -> dict[str, float]:
        """The commonest phrase that is rare in the reference's own answers, and how varied the answers are."""
        ends = set(self.tokenizer.all_special_ids)
        answers = [[token for token in answer if token not in ends] for answer in rollouts.responses]
        self.reference = self.reference or answers[: phrases.KEPT]
        found = phrases.commonest(answers, self.reference)
        self.phrase = self.tokenizer.decode(found.tokens) if found else ""
        shares = {"phrase/share": found.share, "phrase/reference_share": found.reference_share} if found else {}
        return {"phrase/distinct": phrases.distinct(answers), **shares}

    def _rewards(self, rollouts: Rollouts, n: int) -> Iterator[tuple[str, Tensor]]:
        """The rewards that each function gave those of the first `n` answers it applies to, where there are any."""
        rewards, applies = rollouts.rewards[:n].cpu(), rollouts.applies[:n].cpu()
        columns = zip(self.names, rewards.T, applies.T, strict=True)
        yield from ((name, column[applies]) for name, column, applies in columns if applies.any())

    def add_evaluation(self, metrics: dict[str, float], n: int) -> None:
        """Keep the held-out score of an evaluation on `n` prompts, and every reward of weight 0: an unseen judge.

        Args:
            metrics: what `of_held_out` found, under names that begin with `eval_`.
        """
        judges = [f"reward/{name}" for name, weight in zip(self.names, self.weights, strict=True) if weight == 0]
        held_out = {}
        for name in ["score", *(name for name in judges if f"eval_{name}" in metrics)]:
            count = metrics.get(f"eval_{name}_count", n)
            held_out[name] = metrics[f"eval_{name}"], metrics[f"eval_{name}_std"] / math.sqrt(count)
        self.watch.add_evaluation(held_out)

    def diagnose(self) -> bool:
        """Log what is wrong and was not before; whether the run shall save and stop (`diagnosis: stop`)."""
        if self.args.diagnosis == "off":
            return False
        stop = False
        for finding in self.watch.new_findings():  # from global numbers: the same on every process
            logger.warning("%s", finding)
            if self.args.diagnosis == "stop" and self.stopped_by is None:
                self.stopped_by, stop = str(finding), True
        return stop

    def is_sample_step(self, step: int) -> bool:
        """Whether answers of update number `step` are written down."""
        count = self.args.num_sample_generations
        return count > 0 and (step - 1) % max(1, self.max_steps // count) == 0

    def write_samples(self, split: str, rollouts: Rollouts, step: int, count: int = 10) -> None:
        """Append the first `count` answers of a batch, with what was thought of them, to samples.jsonl; log a few.

        Each has with it, as `first`, what the untrained policy answered to the same prompt, where that was written.
        """
        if self.args.process_index != 0:
            return
        path = Path(self.args.output_dir) / SAMPLES
        before = [row for row in files.read_rows(path) if row["step"] == 0 and row["split"] == split]
        kl = _kl(rollouts)[:count].tolist()
        scores, ended = rollouts.scores[:count].tolist(), rollouts.ended[:count].tolist()
        decode = self.tokenizer.decode
        completions = self.tokenizer.batch_decode(rollouts.responses[:count], skip_special_tokens=True)
        table = [f"{'score':>9} {'KL':>7}  {split} prompts … answers after update {step}"]
        for i, completion in enumerate(completions[:3]):
            prompt, answer = (" ".join(text.split()) for text in (decode(rollouts.prompts[i]), completion))
            table.append(f"{scores[i]:>9.3f} {kl[i]:>7.2f}  {prompt[-40:]} … {answer[:120]}")
        logger.info("%s", "\n".join(table))
        samples = []
        for i, completion in enumerate(completions):
            sample = {"step": step, "split": split, "prompt": decode(rollouts.prompts[i]), "completion": completion}
            sample |= {"score": scores[i], "kl": kl[i], "ended": ended[i]}
            if step > 0 and i < len(before) and before[i]["prompt"] == sample["prompt"]:
                sample["first"] = {key: before[i][key] for key in ("completion", "score", "ended")}
            samples.append(sample)
        files.append_rows(path, samples)

    def forget_samples_after(self, step: int) -> None:
        """Drop samples that an interrupted run wrote after its last checkpoint: they come again."""
        path = Path(self.args.output_dir) / SAMPLES
        if self.args.process_index == 0 and path.is_file():
            files.write_rows(path, [row for row in files.read_rows(path) if row["step"] <= step])

    def state_dict(self) -> dict:
        """What a checkpoint keeps."""
        return {"unlogged": self.unlogged, "watch": self.watch.state_dict(), "reference": self.reference}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` gave; other entries of `state` are not looked at."""
        self.unlogged.update(state["unlogged"])
        self.watch.load_state_dict(state["watch"])
        self.reference = state.get("reference", [])  # older checkpoints have none: their next answers stand for it


def _read(figures: dict[str, Tensor]) -> dict[str, float]:
    """Tensors of one element as numbers: the host waits for the device once."""
    values = torch.stack([figure.float() for figure in figures.values()]).tolist()
    return dict(zip(figures, values, strict=True))


def _kl(rollouts: Rollouts) -> Tensor:
    """log π/π_ref (B,) of each answer, in nats."""
    return torch.where(rollouts.mask, rollouts.logprobs - rollouts.ref_logprobs, 0.0).sum(1)
