"""Classification: an encoder (or any model) learns one label per text, several, or a number.

    reviews:
      kind: classify
      model: {model_name_or_path: google-bert/bert-base-uncased}        # or stage:NAME; the head is new
      task: {labels: [negative, positive], class_weights: balanced}     # all optional
      data: {train: reviews.jsonl, validation: 0.1}                     # text (and text_pair), label
      args: {global_batch_size: 32, learning_rate: 2e-5, num_train_epochs: 3, early_stopping_patience: 3}

Labels are names, or ids from 0; lists of them for multi_label_classification, numbers for regression. Their names are
kept in the model's config. Texts that are too long are truncated unless data.too_long says otherwise, and counted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding, Trainer, set_seed

from pipelines.data import encoded_rows, labels, mixing, plain_text
from pipelines.data.labels import MULTI, NUMBER, SINGLE, balanced_weights, label_names
from pipelines.models import adapters, loading, tokenizer_setup
from pipelines.models.tokenizer_setup import read_by_model
from pipelines.training import arguments, best_checkpoint, loop, saving
from pipelines.training.trainer import ChainTrainer, RowCollator

logger = logging.getLogger(__name__)

DEFAULTS = {
    "learning_rate": 2e-5,
    "num_train_epochs": 3,
    "warmup_steps": 0.06,
    "weight_decay": 0.01,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
}
METRICS = {
    SINGLE: ("accuracy", "f1_macro", "matthews"),
    MULTI: ("f1_micro", "f1_macro", "subset_accuracy"),
    NUMBER: ("mse", "pearson", "spearman"),
}
USED = (
    "model_name_or_path",
    "model_revision",
    "tokenizer_name_or_path",
    "config",
    "dtype",
    "attn_implementation",
    "trust_remote_code",
    "load_in_4bit",
    "load_in_8bit",
)
ADAPTERS = ("use_peft", "lora_", "use_rslora", "use_dora", "bnb_", "use_bnb_")


def reported(stage) -> tuple[str, ...]:
    """What an evaluation reports; the first decides about the best model where the recipe names none."""
    return ("loss", *METRICS.get(stage.sections.get("task", {}).get("problem_type", SINGLE), ()))


def problems(stage, kinds) -> Iterator[tuple[str, str, object]]:
    """What is wrong with the stage as a whole: `(key path, message, value)`."""

    model, task, args = (stage.sections.get(name, {}) for name in ("model", "task", "args"))
    for key in model.keys() - set(USED):
        if not key.startswith(ADAPTERS):
            yield f"model.{key}", "classify reads plain text; drop this key", model[key]
    if not model.get("model_name_or_path") and not model.get("tokenizer_name_or_path"):
        yield "model.tokenizer_name_or_path", "a new model needs a tokenizer: a folder, a hub id or stage:NAME", None
    kind, labels = task.get("problem_type", SINGLE), task.get("labels")
    if kind == NUMBER and labels is not None and len(labels) != 1:
        yield "task.labels", "regression predicts one number: give its name alone, or nothing", labels
    if kind != NUMBER and labels is not None:
        if len(set(labels)) < len(labels) or len(labels) < (2 if kind == SINGLE else 1):
            yield "task.labels", "needs at least two different names", labels
        numbers = [name for i, name in enumerate(labels) if name.isdigit() and name != str(i)]
        if numbers:
            yield (
                "task.labels",
                f"{numbers[0]} could be a name or an id; drop the key (labels are taken from the data)",
                labels,
            )
    if kind != SINGLE:
        if task.get("class_weights"):
            yield "task.class_weights", f"weighs the classes of {SINGLE} only; drop this key", task["class_weights"]
        if args.get("label_smoothing_factor"):
            yield "args.label_smoothing_factor", f"is for {SINGLE} only; drop this key", args["label_smoothing_factor"]


class ClassifyTrainer(ChainTrainer, Trainer):
    """transformers' Trainer; with `class_weights` (a tensor of one weight per class) the loss is weighted."""

    class_weights = None

    def _get_num_items_in_batch(self, batch_samples, device):
        """Sum of the weights of all rows of the step, over micro-batches and processes."""
        if self.class_weights is None:
            return super()._get_num_items_in_batch(batch_samples, device)
        weight = sum(self.class_weights[batch["labels"].to(self.class_weights.device)].sum() for batch in batch_samples)
        return self.accelerator.reduce(torch.as_tensor(weight, device=device), "sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.class_weights is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        outputs = model(**{k: v for k, v in inputs.items() if k != "labels"})
        loss = torch.nn.functional.cross_entropy(
            outputs.logits.float(), labels, reduction="none", label_smoothing=self.args.label_smoothing_factor
        )
        loss = self.class_weights[labels] * loss
        if model.training:
            loss = loss.sum() / num_items_in_batch * self.accelerator.num_processes  # DDP averages over processes
        else:
            loss = loss.mean()  # the weights of the training rows are 1 on average
        return (loss, outputs) if return_outputs else loss


def run(stage) -> dict:
    """Train, evaluate, save; returns the metrics."""

    set_seed(stage.seed)
    section, task = stage.section("model"), stage.section("task")
    args = arguments.build_args(stage)
    tokenizer = ready(stage, loading.load_tokenizer(section))
    sides, names = labelled(stage)
    settings = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    if section.model_name_or_path:
        settings["ignore_mismatched_sizes"] = True  # another number of classes: a new head; all else is refused by name
    model = loading.load_model(
        section,
        "AutoModelForSequenceClassification",
        tokenizer,
        new_head=True,
        problem_type=task.problem_type,
        **settings,
    )
    tokenizer_setup.fit_model(model, tokenizer)
    context = loading.context_length(model, args.max_length)
    read_by_model(model, tokenizer)
    pairs, too_long = any("text_pair" in row for row in sides["train"]), stage.data.get("too_long", "truncate")
    stage.report["reads"] = {"pairs": pairs, "tokens": context, "too_long": too_long}  # for who uses it later
    settings = {"names": names, "context": context}
    sets = encoded_rows.encoded_rows(
        stage, tokenizer, settings, lambda: encode(stage, sides, names, tokenizer, context)
    )
    (train_set, where), (validation_set, _) = sets["train"], sets["validation"]

    model = adapters.adapt(model, section, "SEQ_CLS")
    measure = Measure(task.problem_type, len(names))
    trainer = ClassifyTrainer(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=validation_set,
        data_collator=RowCollator(DataCollatorWithPadding(tokenizer)),
        compute_metrics=measure,
        preprocess_logits_for_metrics=lambda logits, labels: logits[0] if isinstance(logits, tuple) else logits,
        callbacks=best_checkpoint.callbacks(args),
    )
    # The heads of transformers take `num_items_in_batch` and ignore it: the Trainer would then neither divide by the
    # accumulation steps nor leave the mean over processes alone. All micro-batches are of one size: a mean is exact.
    trainer.model_accepts_loss_kwargs = False
    if task.class_weights == "balanced":
        weights = balanced_weights(list(train_set["labels"]), len(names))
        trainer.class_weights = weights.to(args.device)  # once: a batch's labels are there, and would be waited for
        trainer.loss_is_scaled_for_ga = True
        stage.report["class_weights"] = dict(zip(names, trainer.class_weights.tolist(), strict=True))
        logger.info("class weights: %s", ", ".join(f"{k} {v:.3g}" for k, v in stage.report["class_weights"].items()))
    trainer.where = where
    loop.fit(stage, trainer)
    results = saving.final_metrics(trainer, reuse=measure.last is not None)
    saving.save(trainer, stage.folder, tokenizer)
    return {**results, "labels": names, **measure.details()}


def ready(stage, tokenizer):
    """The tokenizer as the stage trains with it."""
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        tokenizer_setup.ensure_pad(tokenizer)
    tokenizer.padding_side = "right"  # causal models read the score at the last token before the padding
    return tokenizer


def labelled(stage) -> tuple[dict[str, list[dict]], list[str]]:
    """`(rows of each side, names of the labels in the order of their ids)`."""
    train, validation = mixing.load(stage.data, stage.spec.rows, stage.seed, stage.sections.get("task"), stage.report)
    names = label_names(train, validation, stage.section("task"))
    return {side: rows for side, rows in (("train", train), ("validation", validation)) if rows}, names


def encode(stage, sides: dict[str, list[dict]], names: list[str], tokenizer, context: int) -> dict[str, Dataset]:
    """The encoded rows of each side, as `_encode` gives them."""
    task, too_long = stage.section("task"), stage.data.get("too_long", "truncate")
    return {side: _encode(stage, side, rows, names, task, tokenizer, context, too_long) for side, rows in sides.items()}


def shown(stage, tokenizer, model) -> Iterator[dict]:
    """The texts that the model is given, and their labels, for `pipelines show`; counts go to `stage.report`."""
    kind = stage.section("task").problem_type
    sides, names = labelled(stage)
    context = loading.context_length(model, stage.sections.get("args", {}).get("max_length"))
    for side, rows in encode(stage, sides, names, tokenizer, context).items():
        for row in rows:
            given = row["labels"] if kind == MULTI else [row["labels"]]
            learned = [name for name, has in zip(names, given) if has] if kind == MULTI else given
            learned = [names[label] for label in given] if kind == SINGLE else learned
            yield {
                "side": side,
                "where": row["where"],
                "input_ids": row["input_ids"],
                "labels": given,
                "learned": list(map(str, learned)),
            }


def _encode(stage, side: str, rows: list[dict], names: list[str], task, tokenizer, context: int, too_long: str):
    """`Dataset` of input_ids …, labels, row and where; long rows are counted, logged and recorded."""

    encoded, long = labels.encode(tokenizer, rows, context)
    cut, features = set(long), []
    for row, feature in zip(rows, encoded, strict=True):
        if too_long == "drop" and row["where"] in cut:
            continue
        label = row["label"]
        if task.problem_type == MULTI:
            label = [float(c in label) for c in range(len(names))]
        features.append({**feature, "labels": label, "where": row["where"]})
    if side == "validation":
        features.sort(key=lambda feature: len(feature["input_ids"]))  # little padding; the order means nothing
    mixing.report_length(stage, side, len(rows), len(features), long, f"{context} tokens", too_long, "cut at their end")
    plain_text.report_texts(stage.report, side, rows, tokenizer, "text", "text_pair")
    if task.problem_type == SINGLE:
        counts = [0] * len(names)
        for feature in features:
            counts[feature["labels"]] += 1
        stage.report[side]["labels"] = dict(zip(names, counts, strict=True))
    return Dataset.from_list([{**feature, "row": i} for i, feature in enumerate(features)])


class Measure:
    """`compute_metrics` of the Trainer for one problem type; `details()` tells about the predictions it saw last."""

    def __init__(self, problem_type: str, classes: int):

        import evaluate  # late: takes a second, and `check` does without

        from pipelines.evaluation import metrics

        self.problem_type, self.classes, self.matrix = problem_type, classes, metrics.ConfusionMatrix()
        parts = {
            SINGLE: (metrics.Accuracy, metrics.MacroF1, metrics.Matthews),
            MULTI: (metrics.MultiLabelF1, metrics.SubsetAccuracy),
            NUMBER: (metrics.MeanSquaredError, metrics.Pearson, metrics.Spearman),
        }[problem_type]
        self.combined = evaluate.combine([part() for part in parts])
        self.last = None

    def __call__(self, prediction) -> dict:
        """Scalar metrics of logits (rows, classes) against labels (rows,) or, multi-label, (rows, classes)."""
        logits, labels = prediction.predictions, prediction.label_ids
        if self.problem_type == SINGLE:
            guesses = logits.argmax(-1)
        elif self.problem_type == MULTI:
            guesses, labels = (logits > 0).astype(int), labels.astype(int)  # a probability above one half
        else:
            guesses = logits.reshape(len(labels))
        self.last = {"predictions": guesses, "references": labels}
        return self.combined.compute(**self.last)

    def details(self) -> dict:
        """What is no scalar: the confusion matrix of the predictions seen last (single label only)."""
        if self.last is None or self.problem_type != SINGLE:
            return {}
        return self.matrix.compute(**self.last, num_classes=self.classes)
