"""Reward model: learns from rankings which answers people prefer, and gives any answer a score.

    reward:
      kind: reward
      model: {model_name_or_path: stage:sft}          # or any causal model or encoder; the score head is new
      data: {train: rankings.jsonl, validation: 0.05}           # prompt, completions, ranks; or prompt, chosen, rejected
      args: {global_batch_size: 32, learning_rate: 1e-5, num_train_epochs: 1}

A ranking of K answers is one element of a batch: each answer is encoded once, and the loss is the mean of
-log sigmoid(r_better - r_worse) over the pairs that the ranking decides (Ouyang et al. 2022, section 3.4,
https://arxiv.org/abs/2203.02155). K may differ from row to row, equals share a rank, and K = 2 is TRL's own loss.

The score is read at the last token, which is EOS (PAD is a token of its own). The head starts with deviation
1/sqrt(width + 1) (Stiennon et al. 2020, https://arxiv.org/abs/2009.01325), and scores are kept around zero by
`center_rewards_coefficient` (Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

logger = logging.getLogger(__name__)

SECTIONS = {
    "model": "pipelines.sections:ModelSection",
    "data": "pipelines.sections:DataSection",
    "args": "pipelines.sections:RewardArguments",
}
ROWS = "rankings"
DEFAULTS = {
    "learning_rate": 1e-5,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "center_rewards_coefficient": 0.01,
}
NEW = ("score",)  # the only weights that a reward model may begin without


def problems(stage, kinds) -> Iterator[tuple[str, str, object]]:
    """What is wrong with the stage as a whole: `(key path, message, value)`."""
    model = stage.sections.get("model", {})
    if not model.get("model_name_or_path"):
        yield "model.model_name_or_path", "a reward model starts from a model: stage:NAME, a folder or a hub id", None


def run(stage) -> dict:
    """Train, evaluate, save; returns the metrics."""
    import torch
    from transformers import set_seed
    from trl import RewardTrainer

    from pipelines import chat, data, models, training

    class Trainer_(training.ChainTrainer, RewardTrainer):
        """TRL's trainer in the chain's order, on rankings."""

        def _prepare_dataset(self, dataset, *_):
            return dataset  # `_encode` made it

        def _set_signature_columns_if_needed(self):
            self._signature_columns = ["ids", "ranks"]

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            better, worse, weight = (inputs.pop(name) for name in ("better", "worse", "weight"))
            outputs = model(**inputs, use_cache=False)
            scores = outputs.logits.squeeze(-1)
            loss = ranking_loss(scores[better], scores[worse], weight, self.args.center_rewards_coefficient)
            mode = "train" if self.model.training else "eval"
            if mode == "train":
                tokens = self.accelerator.gather_for_metrics(inputs["attention_mask"].sum()).sum().item()
                self._total_train_tokens += tokens
            margin = (scores[better] - scores[worse]).detach()
            batch = {
                "accuracy": (weight * (margin > 0)).sum(),
                "margin": (weight * margin).sum(),
                "mean_reward": scores.detach().mean(),
            }
            for name, value in batch.items():
                self._metrics[mode][name].append(self.accelerator.gather(value).mean().item())
            self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
            return (loss, outputs) if return_outputs else loss

    set_seed(stage.seed)
    section = stage.section("model")
    args = training.build_args(stage, **DEFAULTS)
    tokenizer = models.load_tokenizer(section)
    model = models.load_model(
        section, "AutoModelForSequenceClassification", allow_new=NEW, num_labels=1, problem_type="regression"
    )
    head = model.score if hasattr(model, "score") else model.classifier
    with torch.no_grad(), models.whole(head.weight):
        head.weight.normal_(std=1 / math.sqrt(head.weight.shape[-1] + 1))
    added = chat.install_template(model, tokenizer, section.chat_template)
    context = models.context_length(model, stage.sections.get("args", {}).get("max_length"))

    train, validation = data.load(stage.sections["data"], ROWS, stage.seed)
    too_long = stage.section("data").too_long
    train_set, where = _encode(stage, "train", train, tokenizer, context, too_long)
    validation_set, _ = (
        _encode(stage, "validation", validation, tokenizer, context, too_long) if validation else (None, [])
    )

    model = models.adapt(model, section, "SEQ_CLS", tokenizer.convert_tokens_to_ids(added))
    args.max_length = None  # rows that are too long are already dealt with, and counted
    trainer = Trainer_(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=validation_set,
        processing_class=tokenizer,
        data_collator=training.RowCollator(RankingCollator(tokenizer.pad_token_id)),
    )
    trainer.where = where
    training.fit(stage, trainer)
    metrics = {}
    if validation_set is not None:
        metrics |= preference_metrics(*pair_scores(trainer, validation_set, tokenizer.pad_token_id))
    training.save(trainer, stage.folder, tokenizer)
    return {**metrics, **training.final_metrics(trainer, evaluate=False)}


def _encode(stage, side: str, rows: list[dict], tokenizer, context: int, too_long: str):
    """`(Dataset of ids, ranks, row; names of the rows)`; what is left out is counted, said and recorded."""
    from datasets import Dataset

    from pipelines import chat, data

    columns, where, long = {"ids": [], "ranks": [], "row": []}, [], []
    ranked = [row for row in rows if decided(row["ranks"])]
    for row in ranked:
        encoded = [sum(chat.encode_answer(tokenizer, row["prompt"], c), []) for c in row["completions"]]
        if max(map(len, encoded)) > context:
            long.append(row["where"])
            if too_long == "drop":
                continue
            encoded = [
                ids[-context:] for ids in encoded
            ]  # the answer and its EOS are what is scored: cut the beginning
        columns["ids"].append(encoded)
        columns["ranks"].append([float(r) for r in row["ranks"]])
        columns["row"].append(len(where))
        where.append(row["where"])
    data.report_length(
        stage, side, len(rows), len(where), long, f"{context} tokens", too_long, "cut at their beginning"
    )
    if len(ranked) < len(rows):
        stage.report[side]["undecided"] = len(rows) - len(ranked)
        logger.warning(
            "%s: %d of %d rankings decide nothing (all ranks equal): left out", side, len(rows) - len(ranked), len(rows)
        )
    if not where:
        raise data.DataError(f"{side}: no ranking is left to learn from")
    return Dataset.from_dict(columns), where


def decided(ranks: list[float]) -> list[tuple[int, int]]:
    """The pairs `(better, worse)` of positions that a ranking decides: 1 is best, equals decide nothing."""
    return [(i, j) for i, a in enumerate(ranks) for j, b in enumerate(ranks) if a < b]


class RankingCollator:
    """Rankings {"ids": K lists of ids, "ranks": K numbers} -> one padded batch of all their answers.

    Gives `input_ids` and `attention_mask` (answers, longest), and for the P decided pairs of the batch `better` and
    `worse` (P,), which are rows of it, and `weight` (P,): every ranking weighs the same, and they sum to 1.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, features: list[dict]) -> dict:
        """One batch; the answers stand in the order of the rankings."""
        import torch
        from trl.trainer.utils import pad

        answers = [torch.tensor(ids) for f in features for ids in f["ids"]]
        better, worse, weight, start = [], [], [], 0
        for f in features:
            pairs = decided(f["ranks"])
            better += [start + i for i, _ in pairs]
            worse += [start + j for _, j in pairs]
            weight += [1 / (len(pairs) * len(features))] * len(pairs)
            start += len(f["ids"])
        return {
            "input_ids": pad(answers, padding_value=self.pad_token_id),
            "attention_mask": pad([torch.ones_like(ids) for ids in answers], padding_value=0),
            "better": torch.tensor(better),
            "worse": torch.tensor(worse),
            "weight": torch.tensor(weight),
        }


def ranking_loss(better, worse, weight, center: float | None = None):
    """Weighted mean of -log sigmoid(better - worse) over scores (P,), plus `center` times that of their sums squared.

    With pairs only (K = 2) it is the loss of `trl.RewardTrainer`, centring included.
    """
    from torch.nn.functional import softplus

    loss = (weight * softplus(worse - better)).sum()
    return loss + center * (weight * (better + worse) ** 2).sum() if center is not None else loss


def pair_scores(trainer, dataset, pad_token_id: int):
    """Scores of the better and the worse answer of every decided pair, two float32 arrays, the same on every process.

    Each process scores its share; rankings go through in order of length, so that there is little padding.
    """
    import numpy as np
    import torch
    from accelerate.utils import gather_object

    args = trainer.args
    model = trainer.model_wrapped if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled else trainer.model
    collate = RankingCollator(pad_token_id)
    order = np.argsort([max(map(len, r["ids"])) for r in dataset], kind="stable")
    mine = order[args.process_index :: args.world_size]
    was_training, found = model.training, []
    model.eval()
    # A sharded model needs every process in every forward, so each does as many batches as the first.
    for start in range(0, math.ceil(len(order) / args.world_size), args.per_device_eval_batch_size):
        chunk = [int(i) for i in mine[start : start + args.per_device_eval_batch_size]]
        rows = [dataset[i] for i in chunk or order[:1].tolist()]
        batch = {k: v.to(args.device) for k, v in collate(rows).items() if k in ("input_ids", "attention_mask")}
        with torch.no_grad(), trainer.compute_loss_context_manager():
            scores = model(**batch, use_cache=False).logits.squeeze(-1).float().tolist()
        for i, row in zip(chunk, rows, strict=False):  # no chunk: the row is there for the others alone
            own, scores = scores[: len(row["ids"])], scores[len(row["ids"]) :]
            found += [(i, n, own[a], own[b]) for n, (a, b) in enumerate(decided(row["ranks"]))]
    model.train(was_training)
    found = sorted(gather_object(found) if args.world_size > 1 else found)
    return np.array([f[2] for f in found], np.float32), np.array([f[3] for f in found], np.float32)


def preference_metrics(chosen, rejected) -> dict:
    """Accuracy, margin, calibration and level of the scores (n,) of n chosen and n rejected answers.

    `calibration_error` is the expected calibration error over ten bins (Guo et al. 2017, 1706.04599) of the
    Bradley–Terry probability sigma(|chosen - rejected|) that the preferred-by-score answer is the one people chose.
    """
    import numpy as np

    margin = chosen.astype(np.float64) - rejected
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    right = (margin > 0) + 0.5 * (margin == 0)
    bins = np.minimum(((confidence - 0.5) * 20).astype(int), 9)
    table = [
        {"confidence": float(confidence[bins == b].mean()), "accuracy": float(right[bins == b].mean()), "pairs": int((bins == b).sum())}
        for b in range(10)
        if (bins == b).any()
    ]  # fmt: skip
    return {
        "accuracy": float(right.mean()),
        "margin": float(margin.mean()),
        "loss": float(np.logaddexp(0, -margin).mean()),
        "calibration_error": sum(abs(t["confidence"] - t["accuracy"]) * t["pairs"] for t in table) / len(margin),
        "mean_score": float((chosen.mean() + rejected.mean()) / 2),
        "score_std": float(np.concatenate([chosen, rejected]).std()),
        "pairs": len(margin),
        "calibration": table,
    }
