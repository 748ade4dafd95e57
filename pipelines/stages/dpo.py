"""DPO: a policy learns from rankings directly, without a reward model.

    preferred:
      kind: dpo
      model: {model_name_or_path: stage:sft}                     # the policy, and as it is now the reference
      data: {train: rankings.jsonl, validation: 0.05}            # prompt, completions, ranks; or prompt, chosen,
      rejected
      args: {global_batch_size: 32, learning_rate: 1e-6, beta: 0.1, ranking_loss: plackett_luce}

`args` is TRL's `DPOConfig`. A ranking of K answers is one element of a batch, in which the answers stand behind one
copy of their prompt. With `ranking_loss: pairs` it is learned from as the pairs that it decides, under TRL's
`loss_type`; with `plackett_luce` as a whole (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, appendix A.3). For
two answers and `sigmoid` both are `trl.DPOTrainer`'s loss (tests/stages/test_stage_dpo.py).

The reference is the model that the stage starts from: its log-probs are computed once, before the first step, and kept
with the checkpoints; no second model is held in memory. Logged are `accuracy` and `margin` of the implicit rewards over
the decided pairs, and `kl`: by how many nats an answer of the data is less likely than it was on average, which is the
KL divergence from reference to policy where the reference wrote the answers. On validation rows also `displacement`,
by how many nats a token of the best answers is less likely than it was: the loss may fall by making all answers
unlikely, the worst ones most, and the policy then writes something else (Razin et al. 2024,
https://arxiv.org/abs/2410.08847). A large one is warned of.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from datasets import Dataset

from pipelines.data import mixing
from pipelines.errors import meant
from pipelines.training import reference
from pipelines.training.preferences import PAIR_LOSSES, over_pairs, rankings_loss, table
from pipelines.training.rankings import encode_answers, pair_scores
from pipelines.training.reference import AnswerRows, ReferenceTrainer, ready

__all__ = ["DEFAULTS", "encode", "problems", "ready", "reported", "run", "shown"]

logger = logging.getLogger(__name__)

DEFAULTS = reference.DEFAULTS
# On the demo's rankings policies with at most 0.25 answered better than before, with 0.7 worse, with 1.4 they babbled.
DISPLACED = 0.5
# Options of TRL's `DPOConfig` that this stage does otherwise, or does not do.
NOT_HERE = {
    **reference.NOT_HERE,
    "padding_free": "batches hold no padding wherever the architecture allows it",
    "truncation_mode": "set data.too_long",
    "pad_token": "PAD is always a token of its own",
    "ld_alpha": "every token of an answer counts alike here",
    "f_divergence_type": "the divergence is the reverse KL",
    "f_alpha_divergence_coef": "the divergence is the reverse KL",
    "use_weighting": "rankings weigh alike",
    "discopop_tau": "the loss `discopop` is not among those of this stage",
}


def reported(stage) -> tuple[str, ...]:
    """What an evaluation reports; the first decides about the best model where the recipe names none."""
    return ("loss", "accuracy", "margin", "kl", "displacement")


def problems(stage, kinds) -> Iterator[tuple[str, str, object]]:
    """What is wrong with the stage as a whole: `(key path, message, value)`."""
    yield from reference.problems(stage, NOT_HERE)
    args = stage.sections.get("args", {})
    names = args.get("loss_type") or ["sigmoid"]
    names = [names] if isinstance(names, str) else names
    for name in names:
        if name not in PAIR_LOSSES:
            yield "args.loss_type", f"must be of {', '.join(PAIR_LOSSES)}{meant(name, PAIR_LOSSES)}", name
    if args.get("loss_weights") is not None and len(args["loss_weights"]) != len(names):
        yield "args.loss_weights", f"needs one number for each loss_type: {len(names)}", args["loss_weights"]
    if args.get("ranking_loss") == "plackett_luce" and names != ["sigmoid"]:
        yield "args.loss_type", "is for ranking_loss: pairs; drop one of the two", args["loss_type"]


class RankingRows(AnswerRows):
    """As `AnswerRows`, and `places` and `ranks` (R, K)."""

    @staticmethod
    def told(features: list[dict]) -> dict[str, torch.Tensor]:
        return table(features)


class PreferenceTrainer(ReferenceTrainer):
    """Rankings as pairs or as a whole."""

    FIGURES = ("accuracy", "margin", "kl")
    # The loss is a mean over the rankings of a micro-batch, and these are of one size: the mean over them is exact.
    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ratios, places, ranks = self.logratios(model, inputs), inputs["places"], inputs["ranks"]
        with torch.no_grad():  # of the implicit rewards of the decided pairs, each ranking weighing alike
            own = self.args.beta * ratios[places]
            margin = own[:, :, None] - own[:, None, :]
            self.note(over_pairs((margin > 0).float(), ranks), over_pairs(margin, ranks), -ratios.mean())
        return rankings_loss(ratios, places, ranks, inputs["answers"]["lengths"], self.args)

    def measure(self) -> dict:
        """Of validation rankings: `preference_metrics` of their implicit rewards, `kl`, `displacement`, the loss."""
        from pipelines.evaluation.metrics import preference_metrics  # late: takes a second, and `check` does without

        dataset, ratios = self.eval_dataset, self.validation_logratios()
        rewards = [(self.args.beta * ratio)[:, None].numpy() for ratio in ratios]
        found = preference_metrics(*pair_scores(dataset, rewards))
        lengths = torch.tensor([len(answer) for row in dataset for answer in row["answers"]])
        found["loss"] = rankings_loss(torch.cat(ratios), **table(list(dataset)), lengths=lengths, args=self.args).item()
        found["kl"] = -torch.cat(ratios).mean().item()
        found["displacement"] = displacement(dataset, ratios)
        if found["displacement"] > DISPLACED:
            logger.warning(
                "the best held-out answers are %.2f nats a token less likely than before training: accuracy and loss "
                "may improve while the policy comes to write something else. Read what it writes (pipelines chat), "
                "raise beta (%g), lower learning_rate (%g) or train shorter",
                found["displacement"],
                self.args.beta,
                self.args.learning_rate,
            )
        return found


def displacement(rows, ratios: list[torch.Tensor]) -> float:
    """Nats a token by which the best answers of encoded rankings are less likely than under the reference.

    `ratios`: log pi - log pi_ref (K,) of each row's answers. Answers that share the first place all count.
    """
    lost = tokens = 0.0
    for row, ratio in zip(rows, ratios, strict=True):
        best = [rank == min(row["ranks"]) for rank in row["ranks"]]
        lost -= ratio[best].sum().item()
        tokens += sum(len(answer) for answer, first in zip(row["answers"], best, strict=True) if first)
    return lost / tokens


def run(stage) -> dict:
    """Train, evaluate, save; returns the metrics."""
    return reference.train(stage, PreferenceTrainer, RankingRows, encode, {})


def encode(stage, tokenizer, context: int) -> dict[str, Dataset]:
    """The encoded rankings of each side, as `_encode` gives them."""
    sides = zip(("train", "validation"), mixing.load(stage.data, stage.spec.rows, stage.seed, report=stage.report))
    return {side: _encode(stage, side, rows, tokenizer, context) for side, rows in sides if rows}


def shown(stage, tokenizer, model) -> Iterator[dict]:
    """The rankings that the model is given, for `pipelines show`: the prompt, and the answers that stand behind it."""
    return reference.shown(stage, tokenizer, model, encode, "ranks")


def _encode(stage, side: str, rows: list[dict], tokenizer, context: int) -> Dataset:
    """`Dataset` of prompts, answers, ranks, row and where."""
    if given := sum("margin" in row for row in rows):
        logger.warning("%s: %d rows have a margin, which is not used: it is for reward models", side, given)
    columns = {name: [] for name in ("prompts", "answers", "ranks", "row", "where")}
    for row, pairs in encode_answers(stage, side, rows, tokenizer, context, shortest_prompt=1):
        columns["prompts"].append([prompt for prompt, _ in pairs])
        columns["answers"].append([answer for _, answer in pairs])
        columns["ranks"].append([float(r) for r in row["ranks"]])
        columns["row"].append(len(columns["row"]))
        columns["where"].append(row["where"])
    return Dataset.from_dict(columns)
