"""KTO: a policy learns from single answers that are desirable or not, without pairs and without a reward model.

    preferred:
      kind: kto
      model: {model_name_or_path: stage:sft}                     # the policy, and as it is now the reference
      data: {train: feedback.jsonl, validation: 0.05}            # prompt, completion, label; or rankings with tags
      args: {global_batch_size: 32, learning_rate: 1e-6, beta: 0.1, undesirable_weight: 1.0}

`args` is TRL's `KTOConfig`, and the loss is `trl.KTOTrainer`'s (tests/stages/test_stage_kto.py; Ethayarajh et al. 2024,
https://arxiv.org/abs/2402.01306). Of a ranking an answer with a tag is undesirable, wherever it ranks, and one without
that no other beats is desirable; where no answer of the row has a tag (pairs, say) the last are undesirable. Answers of
which that tells nothing are left out. A row is one element of a batch, in which its answers stand behind one copy of
their prompt; the loss is a mean over answers.

The reference is the model that the stage starts from: its log-probs are computed once, before the first step, and kept
with the checkpoints. The reference point z0 of the loss is how much likelier the policy finds answers that were given
to other prompts. Which answer goes with which prompt is drawn once by the seed, for the whole training, and z0 is the
mean over those of a whole step: so a step is the same at any number of processes and micro-batches, and after a resume.

Logged are `kl` (z0, at least 0), `margin`, the mean implicit reward of desirable answers less that of undesirable ones,
and `accuracy`, the share of answers whose implicit reward is on their side of beta times z0.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from datasets import Dataset

from pipelines.data import mixing
from pipelines.errors import DataError
from pipelines.training import reference
from pipelines.training.preferences import kto_losses, mismatched
from pipelines.training.rankings import cut, encode_answers
from pipelines.training.reference import AnswerRows, ReferenceTrainer, ready

__all__ = ["DEFAULTS", "encode", "problems", "ready", "reported", "run", "shown"]

logger = logging.getLogger(__name__)

DEFAULTS = reference.DEFAULTS
NOT_HERE = reference.NOT_HERE
BALANCE = 4 / 3  # by how much desirable answers may outweigh the others


def reported(stage) -> tuple[str, ...]:
    """What an evaluation reports; the first decides about the best model where the recipe names none."""
    return ("loss", "accuracy", "margin", "kl")


def problems(stage, kinds) -> Iterator[tuple[str, str, object]]:
    """What is wrong with the stage as a whole: `(key path, message, value)`."""
    yield from reference.problems(stage, NOT_HERE)


class LabelledRows(AnswerRows):
    """As `AnswerRows`, and `desirable` (answers,) bool."""

    @staticmethod
    def told(features: list[dict]) -> dict[str, torch.Tensor]:
        return {"desirable": torch.tensor([label for feature in features for label in feature["desirable"]])}


class WithOthers(LabelledRows):
    """As `LabelledRows`, and `others`: for each answer one to another prompt, behind this row's prompt."""

    answers = ("answers", "others")

    def pairs(self, feature: dict, name: str) -> dict:
        prompts = feature["prompts" if name == "answers" else "other_prompts"]
        return {"prompts": prompts, "answers": feature[name]}


class UnpairedTrainer(ReferenceTrainer):
    """Single answers under the loss of KTO."""

    # Sums over a micro-batch of the implicit rewards of desirable and undesirable answers, their numbers, how many are
    # on their side; and z0.
    FIGURES = ("good", "bad", "goods", "bads", "right", "kl")
    loss_is_scaled_for_ga = True  # by the answers of the whole step
    kl = torch.tensor(0.0)  # z0 of the step

    @property
    def uses_kl(self) -> bool:
        """Whether the loss has a reference point."""
        return self.args.loss_type == "kto"

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step and the number of their answers over all processes; z0 is computed on the way."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        total = torch.zeros(2, device=device)  # log-ratios of answers to other prompts, answers
        if batches:
            model, was_training = self.model_wrapped, self.model_wrapped.training
            model.eval()  # as the reference was; and a forward that draws no random numbers resumes to the bit
            for batch in batches:
                if self.uses_kl:
                    with torch.no_grad(), self.compute_loss_context_manager():
                        total[0] += self.logratios(model, batch, "others").sum()
                total[1] += len(batch["desirable"])
            model.train(was_training)
            total = self.accelerator.reduce(total, "sum")
            self.kl = (total[0] / total[1]).clamp(min=0)
        return batches, total[1]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ratios, desirable = self.logratios(model, inputs), inputs["desirable"]
        with torch.no_grad():
            self.note(*self._sides(ratios, desirable, self.kl), self.kl)
        losses = kto_losses(ratios, desirable, self.kl, self.args)
        return losses.sum() * self.args.world_size / num_items_in_batch  # gradients are means over processes

    def _sides(self, ratios, desirable, kl) -> tuple[torch.Tensor, ...]:
        rewards, right = self.args.beta * ratios, torch.where(desirable, ratios > kl, ratios < kl)
        good, bad = torch.where(desirable, rewards, 0.0), torch.where(desirable, 0.0, rewards)
        return good.sum(), bad.sum(), desirable.sum(), (~desirable).sum(), right.sum()

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """`kl`, `accuracy`, and `margin` where there were answers of both sides."""
        out = {"kl": means["kl"], "accuracy": means["right"] / (means["goods"] + means["bads"])}
        if means["goods"] and means["bads"]:
            out["margin"] = means["good"] / means["goods"] - means["bad"] / means["bads"]
        return out

    def measure(self) -> dict:
        """`accuracy`, `margin`, `kl` and the training loss of the validation rows, with one z0 of all of them."""
        ratios, desirable = torch.cat(self.validation_logratios()), LabelledRows.told(self.eval_dataset)["desirable"]
        kl = torch.cat(self.validation_logratios("others")).mean().clamp(min=0) if self.uses_kl else torch.tensor(0.0)
        figures = (*self._sides(ratios, desirable, kl), kl)
        found = self.summary({name: value.item() for name, value in zip(self.FIGURES, figures, strict=True)})
        found["loss"] = kto_losses(ratios, desirable, kl, self.args).mean().item()
        return found


def run(stage) -> dict:
    """Train, evaluate, save; returns the metrics."""
    loss_type = _loss_type(stage)
    collator = WithOthers if loss_type == "kto" else LabelledRows
    return reference.train(stage, UnpairedTrainer, collator, encode, {"loss_type": loss_type})


def _loss_type(stage) -> str:
    return stage.sections.get("args", {}).get("loss_type", "kto")


def encode(stage, tokenizer, context: int) -> dict[str, Dataset]:
    """The encoded rows of each side, as `_encode` gives them."""
    sides = zip(("train", "validation"), mixing.load(stage.data, stage.spec.rows, stage.seed, report=stage.report))
    return {side: _encode(stage, side, rows, tokenizer, context) for side, rows in sides if rows}


def shown(stage, tokenizer, model) -> Iterator[dict]:
    """The rows that the model is given, for `pipelines show`: the prompt, and the answers that stand behind it."""
    return reference.shown(stage, tokenizer, model, encode, "desirable")


def _encode(stage, side: str, rows: list[dict], tokenizer, context: int) -> Dataset:
    """`Dataset` of prompts, answers, desirable, row and where; for `loss_type: kto` also others and other_prompts."""
    known = [
        row
        | {"completions": [c for c, label in zip(row["completions"], row["labels"], strict=True) if label is not None]}
        for row in rows
    ]
    columns = {name: [] for name in ("prompts", "answers", "desirable", "row", "where")}
    useless = "rows hold no answer that is desirable or undesirable"
    found = encode_answers(
        stage, side, known, tokenizer, context, lambda row: bool(row["completions"]), useless, shortest_prompt=1
    )
    for row, pairs in found:
        columns["prompts"].append([prompt for prompt, _ in pairs])
        columns["answers"].append([answer for _, answer in pairs])
        columns["desirable"].append([label for label in row["labels"] if label is not None])
        columns["row"].append(len(columns["row"]))
        columns["where"].append(row["where"])
    _count(stage, side, columns["desirable"], [row["labels"] for row, _ in found])
    if _loss_type(stage) == "kto":
        columns |= _others(side, columns, stage.seed, context)
    return Dataset.from_dict(columns)


def _count(stage, side: str, desirable: list[list[bool]], labels: list[list[bool | None]]) -> None:
    """Record and log how many answers are of which side."""
    good, every, given = sum(map(sum, desirable)), sum(map(len, desirable)), sum(map(len, labels))
    stage.report[side] |= {"desirable": good, "undesirable": every - good, "unlabelled": given - every}
    logger.info("%s: %d desirable and %d undesirable answers, %d are neither", side, good, every - good, given - every)
    bad, args = every - good, stage.sections.get("args", {})
    weights = [args.get(name, 1.0) for name in ("desirable_weight", "undesirable_weight")]
    if side == "train" and good in (0, every):
        logger.warning(
            "train: all answers are %s: there is no contrast to learn", "desirable" if good else "undesirable"
        )
    elif side == "train" and not bad * weights[1] <= good * weights[0] <= BALANCE * bad * weights[1]:
        logger.warning(
            "train: desirable answers weigh %.2f times the undesirable ones; equation 8 of the KTO paper advises 1 to "
            "1.33: args.desirable_weight from %.2f",
            good * weights[0] / max(bad * weights[1], 1e-9),
            bad * weights[1] / good,
        )


def _others(side: str, columns: dict[str, list], seed: int, context: int) -> dict[str, list]:
    """For each answer of each row one to another prompt, and this row's prompt as it fits before it."""
    prompts = [tuple(prompt) for row in columns["prompts"] for prompt in row]
    answers = [answer for row in columns["answers"] for answer in row]
    partner = mismatched(prompts, seed)
    same = sum(prompts[i] == prompts[j] for i, j in enumerate(partner))
    if same == len(prompts):
        raise DataError(
            f"{side}: all answers are to one prompt, but z0 of loss_type kto needs answers to others: add rows, or set "
            "args.loss_type: apo_zero_unpaired"
        )
    if same:
        logger.warning("%s: z0 is estimated with %d of %d answers to their own prompt", side, same, len(prompts))
    others, fitting, start = [], [], 0
    for row in columns["prompts"]:
        some = [answers[partner[start + i]] for i in range(len(row))]
        others.append(some)
        fitting.append([cut(prompt, len(answer), context) for prompt, answer in zip(row, some, strict=True)])
        start += len(row)
    return {"others": others, "other_prompts": fitting}
