"""Reward model: learns from rankings which answers people prefer, and gives any answer a score.

    reward:
      kind: reward
      model: {model_name_or_path: stage:sft}          # or any causal model or encoder; the score head is new
      data: {train: rankings.jsonl, validation: 0.05}           # prompt, completions, ranks; or prompt, chosen,
      rejected
      args: {global_batch_size: 32, learning_rate: 1e-5, num_train_epochs: 1, tags: [inappropriate, inaccurate]}

A ranking of K answers is one element of a batch: the prompt and each answer are encoded once, and the loss is the mean
of -log sigmoid(r_better - r_worse) over the pairs that the ranking decides (Ouyang et al. 2022, section 3.4,
https://arxiv.org/abs/2203.02155). K may differ from row to row, equals share a rank, and K = 2 is TRL's own loss.

Rows may have a `margin`, a number for each answer: a better answer must be better by the difference, -log sigmoid(r_b -
r_w - (m_b - m_w)) (Touvron et al. 2023, section 3.2.2, https://arxiv.org/abs/2307.09288); `args.rank_margin` takes it
from the ranks. With `args.tags` the score head has one more output for each tag, learned by binary cross-entropy from
the rows' `tags` (a list for each answer). The folder holds a plain one-score model all the same, and the rows of the
head that tell tags beside it in `tags.safetensors`.

The score is read at the last token, which is EOS (PAD is a token of its own). The head starts with deviation
1/sqrt(width + 1) (Stiennon et al. 2020, https://arxiv.org/abs/2009.01325), and scores are kept around zero by
`center_rewards_coefficient` (Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import numpy as np
import torch
from datasets import Dataset
from transformers import set_seed
from trl import RewardTrainer

from pipelines import IGNORE_INDEX, errors
from pipelines.data import encoded_rows, mixing
from pipelines.models import adapters, loading, sharding, tag_heads, tokenizer_setup
from pipelines.speed import fast_model, packed_attention
from pipelines.training import arguments, loop, saving
from pipelines.training.rankings import RankingCollator, answer_logits, encode_answers, pair_scores, ranking_loss
from pipelines.training.trainer import ChainTrainer, RowCollator

logger = logging.getLogger(__name__)

DEFAULTS = {
    "learning_rate": 1e-5,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "center_rewards_coefficient": 0.01,
}


def reported(stage) -> tuple[str, ...]:
    """What an evaluation reports; the first decides about the best model where the recipe names none."""
    return ("loss", "accuracy", "margin", "mean_score")


def problems(stage, kinds) -> Iterator[tuple[str, str, object]]:
    """What is wrong with the stage as a whole: `(key path, message, value)`."""
    model = stage.sections.get("model", {})
    if not model.get("model_name_or_path"):
        yield "model.model_name_or_path", "a reward model starts from a model: stage:NAME, a folder or a hub id", None
    args = stage.sections.get("args", {})
    if len(set(args.get("tags") or [])) < len(args.get("tags") or []):
        yield "args.tags", "names a tag twice", args["tags"]


class RankingTrainer(ChainTrainer, RewardTrainer):
    """TRL's trainer in the chain's order, on rankings."""

    def _prepare_dataset(self, dataset, *_):
        return dataset  # `_encode` made it

    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["ids", "ranks", "margin", "tags"]

    def loss_of(self, logits, wanted):
        """The loss of logits (answers, 1 + T), given what `RankingCollator.wanted` tells of the answers."""
        scores = logits[:, 0]
        better, worse = scores[wanted["better"]], scores[wanted["worse"]]
        center = self.args.center_rewards_coefficient
        loss = ranking_loss(better, worse, wanted["weight"], center, wanted["margin"])
        return loss + tag_heads.loss(logits[:, 1:], wanted["tags"]) if wanted["tags"].numel() else loss

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._figures = []  # of the micro-batches since the last log: (processes, 4) each, on the device

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        wanted = {name: inputs.pop(name) for name in ("better", "worse", "weight", "margin", "tags")}
        outputs = model(**inputs, use_cache=False)
        loss = self.loss_of(outputs.logits, wanted)
        tokens = (inputs["attention_mask"] if "attention_mask" in inputs else inputs["position_ids"] >= 0).sum()
        scores = outputs.logits[:, 0].detach()
        margin = scores[wanted["better"]] - scores[wanted["worse"]]
        accuracy, distance = (wanted["weight"] * (margin > 0)).sum(), (wanted["weight"] * margin).sum()
        figures = torch.stack([x.double() for x in (tokens, accuracy, distance, scores.mean())])
        self._figures.append(self.accelerator.gather(figures[None]))
        return (loss, outputs) if return_outputs else loss

    def read_figures(self) -> None:
        if self._figures:
            figures, self._figures = torch.stack(self._figures), []  # (micro-batches, processes, 4)
            self._total_train_tokens += int(figures[..., 0].sum())
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
            for name, values in zip(("accuracy", "margin", "mean_reward"), figures[..., 1:].mean(1).T.tolist()):
                self._metrics["train"][name] += values

    def log(self, logs, start_time=None):
        self.read_figures()
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """The training loss and the figures of `preference_metrics`, each ranking counted once at any world size."""
        from pipelines.evaluation.metrics import preference_metrics  # late: takes a second, and `check` does without

        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        collate = self.data_collator.collator
        was_training = self.model.training
        self.model.eval()  # TRL logs the figures of training with what is logged in between
        logits = answer_logits(self, dataset, collate)
        found = preference_metrics(*pair_scores(dataset, logits))
        found["loss"] = self.loss_of(torch.from_numpy(np.concatenate(logits)), collate.wanted(list(dataset))).item()
        shown = ("loss", "accuracy", "margin", "mean_score")
        metrics = {f"{metric_key_prefix}_{name}": found[name] for name in shown}
        self.log(dict(metrics))
        self.model.train(was_training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def run(stage) -> dict:
    """Train, evaluate, save; returns the metrics."""
    from pipelines.evaluation.metrics import preference_metrics  # late: takes a second, and `check` does without

    set_seed(stage.seed)
    section = stage.section("model")
    args = arguments.build_args(stage)
    tags = args.tags or []
    tokenizer = loading.load_tokenizer(section)
    model = loading.load_model(
        section, "AutoModelForSequenceClassification", new_head=True, num_labels=1, problem_type="regression"
    )
    if tags:
        tag_heads.add(model, len(tags))
    if tags or model.new_weights:  # a model that already is a reward model goes on with its head
        head = loading.last_layer(model)
        with torch.no_grad(), sharding.whole(head.weight):
            head.weight.normal_(std=1 / math.sqrt(head.weight.shape[-1] + 1))
    added = tokenizer_setup.install_template(model, tokenizer, section.chat_template, section.chat_template_kwargs)
    fast_model.fast_gelu(model)
    fast_model.float32_head(model)
    collate = RankingCollator(tokenizer.pad_token_id, **_packs(model))
    context = loading.context_length(model, stage.sections.get("args", {}).get("max_length"))
    settings = {"context": context, "rank_margin": args.rank_margin, "tags": tags}
    sets = encoded_rows.encoded_rows(stage, tokenizer, settings, lambda: encode(stage, tokenizer, context))
    (train_set, where), (validation_set, _) = sets["train"], sets["validation"]

    model = adapters.adapt(model, section, "SEQ_CLS", tokenizer.convert_tokens_to_ids(added))
    args.max_length = None  # rows that are too long are already dealt with, and counted
    trainer = RankingTrainer(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=validation_set,
        processing_class=tokenizer,
        data_collator=RowCollator(collate),
    )
    trainer.where = where
    loop.fit(stage, trainer)
    metrics = {}
    if validation_set is not None:
        logits = answer_logits(trainer, validation_set, collate)
        metrics |= preference_metrics(*pair_scores(validation_set, logits)) | tag_heads.metrics(
            validation_set["tags"], logits, tags
        )
    saving.save(trainer, stage.folder, tokenizer)
    if tags and args.should_save:
        tag_heads.split(stage.folder, tags)
    return {**metrics, **saving.final_metrics(trainer, evaluate=False)}


def _packs(model) -> dict[str, bool]:
    """Make the model read batches without padding where its architecture can; what the collator may do then."""

    try:
        return {"packed": True, "share": packed_attention.enable_packed_scores(model)}
    except errors.CannotPack as error:
        logger.info("%s cannot be packed (%s): its batches are padded.", error.model, error.reason)
        return {"packed": False}


def ready(stage, tokenizer):
    """The tokenizer as the stage trains with it."""
    tokenizer_setup.dress(tokenizer, stage.section("model").chat_template, stage.section("model").chat_template_kwargs)
    return tokenizer


def encode(stage, tokenizer, context: int) -> dict[str, Dataset]:
    """The encoded rankings of each side, as `_encode` gives them; `args.rank_margin` and `args.tags` are applied."""
    args = stage.sections.get("args", {})
    tags, margin = args.get("tags") or [], args.get("rank_margin")
    train, validation = mixing.load(stage.data, stage.spec.rows, stage.seed, report=stage.report)
    for row in [*train, *validation]:
        if "margin" not in row and margin:
            row["margin"] = [-margin * rank for rank in row["ranks"]]
    for tag in tags:
        if not any(tag in answer for row in train for answer in row.get("tags", [])):
            raise errors.DataError(f"data.train: no answer has the tag {tag!r} (args.tags), so it cannot be learned")
    sides = {"train": train, "validation": validation}
    return {side: _encode(stage, side, rows, tags, tokenizer, context) for side, rows in sides.items() if rows}


def shown(stage, tokenizer, model) -> Iterator[dict]:
    """The rankings that the model is given, for `pipelines show`: the prompt, and the answers that stand behind it.

    `input_ids` are the prompt's; what is learned is a score at the end of each answer, no token.
    """
    context = loading.context_length(model, stage.sections.get("args", {}).get("max_length"))
    tags = stage.sections.get("args", {}).get("tags") or []
    for side, rows in encode(stage, tokenizer, context).items():
        for row in rows:
            behind = [max(0, len(ids) - n) for ids, n in zip(row["ids"], row["answer_lengths"], strict=True)]
            yield {
                "side": side,
                "where": row["where"],
                "input_ids": row["ids"][0][: behind[0]],
                "labels": [IGNORE_INDEX] * behind[0],
                "completion_ids": [ids[at:] for ids, at in zip(row["ids"], behind, strict=True)],
                "ranks": row["ranks"],
                "margin": row["margin"],
                "tags": [[tag for tag, has in zip(tags, of, strict=True) if has > 0] for of in row["tags"]],
            }


def _encode(stage, side: str, rows: list[dict], tags: list[str], tokenizer, context: int):
    """`Dataset` of ids, answer_lengths, ranks, margin, tags, row and where.

    Of each answer `tags` holds 1 or 0 for each of the tags, or -1 where the row says nothing about tags.
    """
    columns = {name: [] for name in ("ids", "answer_lengths", "ranks", "margin", "tags", "row", "where")}
    # Too long ones are cut at the beginning: the answer and its EOS are what is scored.
    for row, pairs in encode_answers(stage, side, rows, tokenizer, context):
        columns["ids"].append([prompt + answer for prompt, answer in pairs])
        columns["answer_lengths"].append([len(answer) for _, answer in pairs])
        columns["ranks"].append([float(r) for r in row["ranks"]])
        columns["margin"].append([float(m) for m in row.get("margin", [0] * len(pairs))])
        given = row.get("tags", [None] * len(pairs))
        columns["tags"].append([[-1.0 if g is None else float(tag in g) for tag in tags] for g in given])
        columns["row"].append(len(columns["row"]))
        columns["where"].append(row["where"])
    return Dataset.from_dict(columns)
