"""Reward model: learns which of two answers people prefer, and gives any answer a score.

    reward:
      kind: reward
      model: {model_name_or_path: stage:sft}          # or any causal model or encoder; the score head is new
      data: {train: preferences.jsonl, validation: 0.05}                      # prompt, chosen, rejected
      args: {global_batch_size: 32, learning_rate: 1e-5, num_train_epochs: 1}

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
ROWS = "pairs"
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
    from trl.trainer.reward_trainer import DataCollatorForPreference

    from pipelines import chat, data, models, training

    class Trainer_(training.ChainTrainer, RewardTrainer):
        """TRL's trainer in the chain's order."""

    set_seed(stage.seed)
    section = stage.section("model")
    args = training.build_args(stage, **DEFAULTS)
    tokenizer = models.load_tokenizer(section)
    model = models.load_model(
        section, "AutoModelForSequenceClassification", allow_new=NEW, num_labels=1, problem_type="regression"
    )
    with torch.no_grad():
        head = model.score if hasattr(model, "score") else model.classifier
        head.weight.normal_(std=1 / math.sqrt(head.weight.shape[-1] + 1))
    chat.install_template(model, tokenizer, section.chat_template)
    context = models.context_length(model, stage.sections.get("args", {}).get("max_length"))

    train, validation = data.load(stage.sections["data"], ROWS, stage.seed)
    too_long = stage.section("data").too_long
    train_set, where = _encode(stage, "train", train, tokenizer, context, too_long)
    validation_set, _ = _encode(stage, "validation", validation, tokenizer, context, too_long) if validation else (None, [])

    args.max_length = None  # rows that are too long are already dealt with, and counted
    trainer = Trainer_(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=validation_set,
        processing_class=tokenizer,
        data_collator=training.RowCollator(DataCollatorForPreference(tokenizer.pad_token_id)),
    )
    trainer.where = where
    training.fit(stage, trainer)
    metrics = {}
    if validation_set is not None:
        metrics |= preference_metrics(*pair_scores(trainer, validation_set, tokenizer.pad_token_id))
    training.save(trainer, stage.folder, tokenizer)
    return {**metrics, **training.final_metrics(trainer, evaluate=False)}


def _encode(stage, side: str, rows: list[dict], tokenizer, context: int, too_long: str):
    """`(Dataset of chosen_ids, rejected_ids, row; names of the rows)`; long rows are counted, said and recorded."""
    from datasets import Dataset

    from pipelines import chat, data

    columns, where, long = {"chosen_ids": [], "rejected_ids": [], "row": []}, [], []
    for row in rows:
        pair = []
        for answer in (row["chosen"], row["rejected"]):
            prompt, ids = chat.encode_answer(tokenizer, row["prompt"], answer)
            pair.append(prompt + ids)
        if max(map(len, pair)) > context:
            long.append(row["where"])
            if too_long == "drop":
                continue
            pair = [ids[-context:] for ids in pair]  # the answer and its EOS are what is scored: cut the beginning
        columns["chosen_ids"].append(pair[0])
        columns["rejected_ids"].append(pair[1])
        columns["row"].append(len(where))
        where.append(row["where"])
    data.report_length(stage, side, len(rows), len(where), long, f"{context} tokens", too_long, "cut at their beginning")
    return Dataset.from_dict(columns), where


def pair_scores(trainer, dataset, pad_token_id: int):
    """Scores of all chosen and all rejected answers, two float32 arrays (rows,), the same on every process.

    Each process scores its share; rows go through in order of length, so that there is little padding.
    """
    import numpy as np
    import torch
    from accelerate.utils import gather_object
    from trl.trainer.reward_trainer import DataCollatorForPreference

    args, model = trainer.args, trainer.model
    collate = DataCollatorForPreference(pad_token_id)
    order = np.argsort([max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in dataset], kind="stable")
    mine = order[args.process_index :: args.world_size]
    was_training, found = model.training, []
    model.eval()
    for start in range(0, len(mine), args.per_device_eval_batch_size):
        chunk = [int(i) for i in mine[start : start + args.per_device_eval_batch_size]]
        batch = {k: v.to(args.device) for k, v in collate([dataset[i] for i in chunk]).items()}
        with torch.no_grad(), trainer.compute_loss_context_manager():
            chosen, rejected = model(**batch, use_cache=False).logits.squeeze(-1).float().cpu().chunk(2)
        found += list(zip(chunk, chosen.tolist(), rejected.tolist(), strict=True))
    model.train(was_training)
    found = sorted(gather_object(found) if args.world_size > 1 else found)
    return np.array([c for _, c, _ in found], np.float32), np.array([r for _, _, r in found], np.float32)


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
