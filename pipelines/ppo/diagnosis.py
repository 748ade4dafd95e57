"""What goes wrong in PPO, found in the numbers of a run and put into words, each with its usual remedy.

Every check is a function of the run so far: `updates`, the metrics of its updates as `PPOTrainer` logs them (oldest
first; a long run keeps its beginning and its end), and `evaluations`, one dict each with `train_score` (mean of the
updates before it) and `held_out`, a dict of name to (mean, standard error). It returns what is wrong in one sentence,
or None. The limits lie between what benchmarks/ppo_diagnosis.py saw in healthy worlds and in worlds made sick on
purpose: the numbers are in each check, the table in docs/ppo.md. Sources of what can go wrong: what users report of
TRL's trainer (issues 322, 925, 2015) and of DeepSpeed-Chat, N+ details (2403.17031), over-optimisation (Gao et al.
2022, 2210.10760).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import sqrt

WINDOW = 10  # updates over which a run is judged
KEPT = 30  # updates kept beside the first WINDOW
USED = (
    "objective/kl",
    "objective/kl_sem",
    "objective/raw_scores",
    "objective/scores_std",
    "objective/scores_alike",
    "policy/entropy_avg",
    "response_length",
    "val/explained_variance",
    "val/bias",
    "val/first_ratio_rms",
    "val/surprise_gap",
    "val/surprise_sem",
    "phrase/share",
    "phrase/reference_share",
    "phrase/distinct",
)


@dataclass(frozen=True)
class Finding:
    """A pathology, when it was first seen, what was seen, and what usually helps."""

    name: str
    step: int
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"PPO diagnosis after update {self.step}, {self.name.replace('_', ' ')}: {self.what}. {self.remedy}"


def _mean(rows: list[dict], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def ratio_not_one(updates: list[dict], evaluations: list[dict]) -> str | None:
    """Before any step the new log-probs must be those sampled with: fp32 4e-7, bfloat16 4e-3, sick worlds 0.3."""
    off = updates[-1].get("val/first_ratio_rms", 0.0) if updates else 0.0
    if off > 0.05:
        return f"on the first minibatch, before any step, log-probs differ by {off:.2g} (RMS) from those sampled with"


def sampled_otherwise(updates: list[dict], evaluations: list[dict]) -> str | None:
    """Of tokens sampled from π, −log π is on average the entropy of π. Here it is not, by five standard errors.

    Healthy worlds come to 0.14 nats at 600 tokens an update (within the five), top_p 0.9 to 0.4, top_k 3 to 0.8.
    """
    rows = [row for row in updates[-WINDOW:] if "val/surprise_gap" in row]
    if len(rows) >= 3:
        gap = _mean(rows, "val/surprise_gap")
        noise = sqrt(sum(row["val/surprise_sem"] ** 2 for row in rows)) / len(rows)
        if abs(gap) > max(5 * noise, 0.1):
            kind = "likelier" if gap < 0 else "less likely"
            return (
                f"sampled tokens are {kind} than tokens of the policy: −log π is on average {abs(gap):.2g} nats "
                f"{'below' if gap < 0 else 'above'} its entropy, {abs(gap) / noise if noise else 0:.0f} standard errors"
            )


def negative_kl(updates: list[dict], evaluations: list[dict]) -> str | None:
    """A KL is never negative; its estimate may be, but not by four standard errors over three updates.

    In healthy worlds it never is below noise; an engine that is never updated brings it 30 standard errors below 0.
    """
    last = updates[-3:]
    if len(last) == 3:
        kl = _mean(last, "objective/kl")
        noise = sqrt(sum(row["objective/kl_sem"] ** 2 for row in last)) / 3
        if kl < -4 * noise and kl < -0.01:
            return (
                f"the KL per answer is estimated as {kl:.3g}, {-kl / noise if noise else 0:.0f} standard errors below 0"
            )


def kl_running_away(updates: list[dict], evaluations: list[dict]) -> str | None:
    """More than 1 nat per token: the healthy worlds come to 0.8, IMDB to 0.3, a runaway to 3 and more.

    How fast it grows says nothing: a healthy run's KL doubles within ten updates, too, when learning sets in.
    """
    last = updates[-3:]
    if len(last) == 3:
        kl, length = _mean(last, "objective/kl"), _mean(last, "response_length")
        if kl > length:
            return f"the KL per answer is {kl:.3g} nats on {length:.0f} tokens: more than 1 per token, no fluent text"


def entropy_collapse(updates: list[dict], evaluations: list[dict]) -> str | None:
    """Less than a quarter of the entropy at first: healthy worlds keep 0.66, the demo 0.32, a collapse 0.13."""
    rows = [row for row in updates if "policy/entropy_avg" in row]
    if len(rows) >= 6:
        began, now = _mean(rows[:3], "policy/entropy_avg"), _mean(rows[-3:], "policy/entropy_avg")
        if now < began / 4:
            return f"the entropy per token fell from {began:.3g} to {now:.3g} nats: answers become all alike"


def one_phrase_takes_over(updates: list[dict], evaluations: list[dict]) -> str | None:
    """Six answers in ten hold a phrase that at most one in twenty of the reference's own held, and answers vary less.

    In healthy worlds such a phrase came to at most 0.49 of the answers, to 0.9 and more where a reward likes one.
    """
    rows = [row for row in updates if "phrase/share" in row]
    if len(rows) >= 6:
        now, before = _mean(rows[-3:], "phrase/share"), _mean(rows[-3:], "phrase/reference_share")
        began, varied = _mean(rows[:3], "phrase/distinct"), _mean(rows[-3:], "phrase/distinct")
        if now > 0.6 and varied < began:
            phrase = rows[-1].get("phrase") or "one phrase"
            return (
                f"{phrase!r} is in {now:.0%} of the answers, in {before:.0%} of the reference's own; of pairs of "
                f"neighbouring tokens {varied:.0%} differ, at first {began:.0%}"
            )


def length_drift(updates: list[dict], evaluations: list[dict]) -> str | None:
    """Answers twice as long as at first, or 0.4 times: healthy worlds come to 1.7 and 0.42, drifts to 2.5 and 0.38."""
    if len(updates) >= 6:
        began, now = _mean(updates[:3], "response_length"), _mean(updates[-3:], "response_length")
        if not 0.4 * began <= now <= 2 * began:
            return f"answers went from {began:.0f} to {now:.0f} tokens"


def held_out_falls(updates: list[dict], evaluations: list[dict]) -> str | None:
    """The training score rises, a held-out one is below its best by three standard errors in two evaluations."""
    if len(evaluations) < 3:
        return None
    for name in evaluations[-1]["held_out"]:
        if any(name not in e["held_out"] for e in evaluations):
            continue  # a function that applies to some answers only
        best = max(evaluations[:-2], key=lambda e: e["held_out"][name][0])
        top, noise = best["held_out"][name]
        last = [e["held_out"][name] for e in evaluations[-2:]]
        fell = all(mean < top - 3 * sqrt(sem**2 + noise**2) for mean, sem in last)
        if fell and evaluations[-1]["train_score"] > best["train_score"]:
            return (
                f"the training score rose from {best['train_score']:.3g} to {evaluations[-1]['train_score']:.3g} while "
                f"held-out {name} fell from {top:.3g} to {last[-1][0]:.3g}"
            )


def constant_scores(updates: list[dict], evaluations: list[dict]) -> str | None:
    """All answers of three batches get the same score: nothing to learn from, or nothing left to learn."""
    last = updates[-3:]
    if len(last) == 3 and max(row["objective/scores_std"] for row in last) < 1e-6:
        return f"all answers of three updates got the same score, {last[-1]['objective/raw_scores']:.3g}"


def answers_score_alike(updates: list[dict], evaluations: list[dict]) -> str | None:
    """The answers to nine prompts in ten score alike over three updates, although others score otherwise.

    With RLOO and GRPO such a prompt teaches nothing: its answers are compared with each other only. In healthy runs the
    share came to 0.34 against reward models, and to 0.53 with a reward of 0 or 1 of which 0.3 to 0.6 are 1; it is 1
    where the prompt alone decides. Of four answers with a reward of 0 or 1 it is 0.9 where 2.6 % are right, or wrong.
    """
    last = [row for row in updates[-3:] if "objective/scores_alike" in row]
    if len(last) == 3 and max(row["objective/scores_std"] for row in last) >= 1e-6:
        share = _mean(last, "objective/scores_alike")
        if share > 0.9:
            return (
                f"to {share:.0%} of the prompts all answers score alike (the mean score is "
                f"{_mean(last, 'objective/raw_scores'):.3g}): these teach nothing"
            )


def critic_explains_nothing(updates: list[dict], evaluations: list[dict]) -> str | None:
    """Explained variance below -0.5, or wrong by more than a deviation of the returns, over the last WINDOW updates.

    The first WINDOW are left out. The explained variance came to -0.37 at the worst in healthy worlds, to -0.7 or less
    where the critic does not learn; around 0 it may be the best there is, where the reward is noise. The mean error
    came to 0.22 deviations in healthy worlds, to 3.5 where cliprange_value is too small for the scores.
    """
    if len(updates) >= 2 * WINDOW and "val/explained_variance" in updates[-1]:
        last = updates[-WINDOW:]
        explained, bias = _mean(last, "val/explained_variance"), sum(row.get("val/bias", 0.0) for row in last) / WINDOW
        if explained < -0.5:
            return (
                f"the critic's explained variance is {explained:.2g} over {WINDOW} updates: a constant would do better"
            )
        if abs(bias) > 1:
            return f"the critic's values are wrong by {abs(bias):.2g} deviations of the returns over {WINDOW} updates"


CHECKS = (
    (
        ratio_not_one,
        "Sampling and training see different models: look for dropout, another temperature, a generation engine with "
        "old weights, or precision too low for this model (bf16: true needs fp32 weights).",
    ),
    (
        sampled_otherwise,
        "Answers are not sampled from the distribution whose log-probs are used: set top_k: 0 and top_p: 1, give a "
        "generation engine the same temperature, and do not penalise repetition or suppress EOS while sampling.",
    ),
    (
        negative_kl,
        "Answers are not sampled from the distribution whose log-probs are used: set top_k: 0 and top_p: 1, and do not "
        "penalise repetition or suppress EOS while sampling.",
    ),
    (
        kl_running_away,
        "Lower learning_rate or num_ppo_epochs, raise kl_coef, or set kl_target so that it adapts; max_approx_kl "
        "bounds "
        "each update.",
    ),
    (
        entropy_collapse,
        "Raise kl_coef or entropy_coef, lower learning_rate; look at the samples: a reward that one phrase satisfies "
        "needs another reward.",
    ),
    (
        one_phrase_takes_over,
        "The reward likes the phrase itself: read the samples side by side (samples.jsonl), raise kl_coef or stop "
        "earlier "
        "(best_kl_cap), and mend the reward: train it on answers of this policy, or take a second judge beside it.",
    ),
    (
        length_drift,
        "See whether the reward model prefers length itself; add pipelines.ppo.rewards:length_penalty with a small "
        "weight, or missing_eos_penalty where answers no longer end (if it is what made them shorter, all is well).",
    ),
    (
        held_out_falls,
        "The policy exploits the reward: keep the best checkpoint (load_best_model_at_end, best_kl_cap), raise "
        "kl_coef, "
        "or train the reward model on answers of this policy.",
    ),
    (
        constant_scores,
        "If it is the best score, the task is solved: stop, or take harder prompts. Otherwise the reward cannot tell "
        "the answers apart, and only the KL is being trained on.",
    ),
    (
        answers_score_alike,
        "Where the score is near its best, the task is solved: stop, or take harder prompts; where it is near its "
        "worst, take easier prompts or a better model to start from. Else raise num_generations or temperature, or "
        "give the reward more steps between its worst and its best.",
    ),
    (
        critic_explains_nothing,
        "Give it time with critic_warmup_steps, raise vf_coef or cliprange_value (large scores: normalize_scores), or "
        "start it from the reward model.",
    ),
)


class Watch:
    """A run's history as far as the checks need it, and what was found in it: each occurrence once.

    An occurrence ends when its check was silent for WINDOW updates; what comes later is another one.
    """

    def __init__(self):
        self.step = 0
        self.updates: list[dict] = []
        self.evaluations: list[dict] = []
        self.seen: dict[str, int] = {}  # name -> update at which it was last true
        self.said: list[dict] = []  # every finding of the run, for stage.json

    def add_update(self, step: int, metrics: dict[str, float], phrase: str = "") -> None:
        self.step = step
        self.updates.append({name: metrics[name] for name in USED if name in metrics} | {"phrase": phrase})
        self.updates = self.updates[:WINDOW] + self.updates[WINDOW:][-KEPT:]

    def add_evaluation(self, held_out: dict[str, tuple[float, float]]) -> None:
        """After an update, or before the first one: then the untrained policy's own score stands for training's."""
        score = _mean(self.updates[-WINDOW:], "objective/raw_scores") if self.updates else held_out["score"][0]
        self.evaluations.append({"train_score": score, "held_out": held_out})

    def new_findings(self) -> list[Finding]:
        """What is wrong now and was not before."""
        found = []
        for check, remedy in CHECKS:
            what, name = check(self.updates, self.evaluations), check.__name__
            if what is None:
                continue
            if name not in self.seen or self.step - self.seen[name] > WINDOW:
                found.append(Finding(name, self.step, what, remedy))
            self.seen[name] = self.step
        self.said += [asdict(finding) for finding in found]
        return found

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)
