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

logger = logging.getLogger(__name__)

SECTIONS = {
    "model": "pipelines.sections:ModelSection",
    "task": "pipelines.sections:TaskSection",
    "data": "pipelines.sections:DataSection",
    "args": "pipelines.sections:ClassifyArguments",
}
ROWS = "labelled"
DEFAULTS = {
    "learning_rate": 2e-5,
    "num_train_epochs": 3,
    "warmup_steps": 0.06,
    "weight_decay": 0.01,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
}
SINGLE, MULTI, NUMBER = "single_label_classification", "multi_label_classification", "regression"
METRICS = {
    SINGLE: ("accuracy", "f1_macro", "matthews"),
    MULTI: ("f1_micro", "f1_macro", "subset_accuracy"),
    NUMBER: ("mse", "pearson", "spearman"),
}
USED = ("model_name_or_path", "model_revision", "tokenizer_name_or_path", "config", "dtype", "attn_implementation",
        "trust_remote_code", "load_in_4bit", "load_in_8bit")  # fmt: skip
ADAPTERS = ("use_peft", "lora_", "use_rslora", "use_dora", "bnb_", "use_bnb_")


def problems(stage, kinds) -> Iterator[tuple[str, str, object]]:
    """What is wrong with the stage as a whole: `(key path, message, value)`."""
    from pipelines import best

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
    yield from best.problems(args, bool(stage.sections.get("data", {}).get("validation")), METRICS[kind])


def run(stage) -> dict:
    """Train, evaluate, save; returns the metrics."""
    import torch
    from transformers import DataCollatorWithPadding, Trainer, set_seed

    from pipelines import best, chat, corpus, data, metrics, models, training

    class ClassifyTrainer(training.ChainTrainer, Trainer):
        """transformers' Trainer; with `class_weights` (a tensor of one weight per class) the loss is weighted."""

        class_weights = None

        def _get_num_items_in_batch(self, batch_samples, device):
            """Sum of the weights of all rows of the step, over micro-batches and processes."""
            if self.class_weights is None:
                return super()._get_num_items_in_batch(batch_samples, device)
            weight = sum(self.class_weights[batch["labels"].cpu()].sum() for batch in batch_samples)
            return self.accelerator.reduce(torch.as_tensor(weight, device=device), "sum")

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if self.class_weights is None:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            labels = inputs["labels"]
            outputs = model(**{k: v for k, v in inputs.items() if k != "labels"})
            loss = torch.nn.functional.cross_entropy(
                outputs.logits.float(), labels, reduction="none", label_smoothing=self.args.label_smoothing_factor
            )
            loss = self.class_weights.to(labels.device)[labels] * loss
            if model.training:
                loss = loss.sum() / num_items_in_batch * self.accelerator.num_processes  # DDP averages over processes
            else:
                loss = loss.mean()  # the weights of the training rows are 1 on average
            return (loss, outputs) if return_outputs else loss

    set_seed(stage.seed)
    section, task = stage.section("model"), stage.section("task")
    args = training.build_args(stage, **DEFAULTS, **best.defaults(stage.sections.get("args", {})))
    tokenizer = models.load_tokenizer(section)
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        chat.ensure_pad(tokenizer)
    tokenizer.padding_side = "right"  # causal models read the score at the last token before the padding

    train, validation = data.load(stage.data, ROWS, stage.seed, stage.sections.get("task"))
    names = label_names(train, validation, task)
    settings = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    if section.model_name_or_path:
        settings["ignore_mismatched_sizes"] = True  # another number of classes: a new head; all else is refused by name
    model = models.load_model(
        section,
        "AutoModelForSequenceClassification",
        tokenizer,
        new_head=True,
        problem_type=task.problem_type,
        **settings,
    )
    chat.fit_model(model, tokenizer)
    context = models.context_length(model, args.max_length)
    read_by_model(model, tokenizer)
    too_long = stage.data.get("too_long", "truncate")

    def make():
        sides = {"train": train, "validation": validation}
        return {
            side: _encode(stage, side, rows, names, task, tokenizer, context, too_long)
            for side, rows in sides.items()
            if rows
        }

    sets = corpus.encoded_rows(stage, tokenizer, {"names": names, "context": context}, make)
    (train_set, where), (validation_set, _) = sets["train"], sets["validation"]

    model = models.adapt(model, section, "SEQ_CLS")
    measure = Measure(task.problem_type, len(names), metrics)
    trainer = ClassifyTrainer(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=validation_set,
        data_collator=training.RowCollator(DataCollatorWithPadding(tokenizer)),
        compute_metrics=measure,
        preprocess_logits_for_metrics=lambda logits, labels: logits[0] if isinstance(logits, tuple) else logits,
        callbacks=best.callbacks(args),
    )
    # The heads of transformers take `num_items_in_batch` and ignore it: the Trainer would then neither divide by the
    # accumulation steps nor leave the mean over processes alone. All micro-batches are of one size: a mean is exact.
    trainer.model_accepts_loss_kwargs = False
    if task.class_weights == "balanced":
        trainer.class_weights = balanced_weights(list(train_set["labels"]), len(names))
        trainer.loss_is_scaled_for_ga = True
        stage.report["class_weights"] = dict(zip(names, trainer.class_weights.tolist(), strict=True))
        logger.info("class weights: %s", ", ".join(f"{k} {v:.3g}" for k, v in stage.report["class_weights"].items()))
    trainer.where = where
    training.fit(stage, trainer)
    results = training.final_metrics(trainer)
    training.save(trainer, stage.folder, tokenizer)
    return {**results, "labels": names, **measure.details()}


def read_by_model(model, tokenizer) -> None:
    """Let the tokenizer write only what the model reads: not every encoder knows segments (`token_type_ids`)."""
    import inspect

    known = inspect.signature(model.forward).parameters
    segments = getattr(model.config, "type_vocab_size", 2) > 1
    tokenizer.model_input_names = [
        name for name in tokenizer.model_input_names if name in known and (segments or name != "token_type_ids")
    ]


def label_names(train: list[dict], validation: list[dict], task) -> list[str]:
    """Names of the classes in the order of their ids; labels in the rows become ids, in place.

    Raises `DataError` for a validation row whose label no training row has (where `task.labels` does not name it).
    """
    from pipelines.data import DataError

    if task.problem_type == NUMBER:
        return task.labels or ["value"]
    several = task.problem_type == MULTI
    seen = {label for row in train for label in (row["label"] if several else [row["label"]])}
    if task.labels:
        absent = [name for i, name in enumerate(task.labels) if i not in seen]
        if absent:
            logger.warning("no training row has the label %s: it cannot be learned", ", ".join(absent))
        return task.labels
    # ids before names: both may stand in a file
    order = sorted(seen, key=lambda label: (isinstance(label, str), label))
    if len(order) < (1 if several else 2):
        raise DataError(f"data.train: all rows have the same label {order}: there is nothing to learn")
    ids = {label: i for i, label in enumerate(order)}
    for row in [*train, *validation]:
        for label in row["label"] if several else [row["label"]]:
            if label not in ids:
                known = ", ".join(map(str, order[:20]))
                raise DataError(
                    f"{row['where']}: no training row has the label {label!r} (they have {known}). "
                    "Add training rows with it, leave the row out, or name all labels in task.labels"
                )
        row["label"] = [ids[label] for label in row["label"]] if several else ids[row["label"]]
    return [str(label) for label in order]


def encode(tokenizer, rows: list[dict], context: int) -> tuple[list[dict], list[str]]:
    """`(features with input_ids …, `where` of the rows that were cut at `context` tokens)` of text and text_pair."""
    from pipelines.data import DataError

    pairs = [row.get("text_pair") for row in rows]
    if any(pair is None for pair in pairs) and any(pair is not None for pair in pairs):
        raise DataError(f"{rows[pairs.index(None)]['where']}: no text_pair, but other rows have one")
    pairs = None if pairs[0] is None else pairs
    encoded = tokenizer([row["text"] for row in rows], pairs)
    features, long = [], []
    for i, row in enumerate(rows):
        feature = {key: encoded[key][i] for key in encoded.keys()}
        if len(feature["input_ids"]) > context:
            long.append(row["where"])
            feature = dict(tokenizer(row["text"], pairs and pairs[i], truncation=True, max_length=context))
        features.append(feature)
    return features, long


def class_id(row: dict, names: list[str]) -> int:
    """The id of a row's label among the names of a model's classes; raises `DataError` where it is none of them.

    A name comes before an id. Where a class is called by another class's number, only names are taken.
    """
    from pipelines.data import DataError

    label, numbers = row["label"], any(name.isdigit() and name != str(i) for i, name in enumerate(names))
    if str(label) in names:
        return names.index(str(label))
    if isinstance(label, int) and label < len(names) and not numbers:
        return label
    raise DataError(f"{row['where']}: label {label!r} is no class of the model: {', '.join(names[:20])}")


def _encode(stage, side: str, rows: list[dict], names: list[str], task, tokenizer, context: int, too_long: str):
    """`Dataset` of input_ids …, labels, row and where; long rows are counted, said and recorded."""
    from datasets import Dataset

    from pipelines import data

    encoded, long = encode(tokenizer, rows, context)
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
    data.report_length(stage, side, len(rows), len(features), long, f"{context} tokens", too_long, "cut at their end")
    if task.problem_type == SINGLE:
        counts = [0] * len(names)
        for feature in features:
            counts[feature["labels"]] += 1
        stage.report[side]["labels"] = dict(zip(names, counts, strict=True))
    return Dataset.from_list([{**feature, "row": i} for i, feature in enumerate(features)])


def balanced_weights(labels: list[int], classes: int):
    """Float32 tensor (classes,): rows / (classes x rows of the class), 0 for a class without rows.

    The weights of the rows are 1 on average (as scikit-learn's `class_weight="balanced"`).
    """
    import torch

    counts = torch.bincount(torch.tensor(labels), minlength=classes)
    present = counts > 0
    return torch.where(present, len(labels) / (present.sum() * counts.clamp(min=1)), 0.0).float()


class Measure:
    """`compute_metrics` of the Trainer for one problem type; `details()` tells about the predictions it saw last."""

    def __init__(self, problem_type: str, classes: int, metrics):
        import evaluate

        self.problem_type, self.classes, self.metrics = problem_type, classes, metrics
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
        return self.metrics.ConfusionMatrix().compute(**self.last, num_classes=self.classes)
