"""The class that a classifier gives to each labelled text, as its training would have read the text."""

from __future__ import annotations

import logging

from pipelines import files
from pipelines.data import plain_text
from pipelines.data.labels import SINGLE, class_id, encode
from pipelines.errors import SetupError
from pipelines.evaluation.batches import by_length, rows_of
from pipelines.evaluation.figures import CLASSES, Items
from pipelines.models import loading, scorers

logger = logging.getLogger(__name__)


def class_values(name: str, path: str, model, tokenizer, settings, seed: int) -> dict[str, Items]:
    """The class of every row of `settings.labelled` and the one that the classifier gives it, by name (`CLASSES`).

    Texts are cut where they were in training, which the folder of a stage records (`args.max_length`), or at
    `settings.max_length`.
    """
    kind = model.config.problem_type or SINGLE
    if kind != SINGLE or model.config.num_labels < 2:
        raise SetupError(
            f"{name}: labelled needs one class of several for each text; this model has {model.config.num_labels} "
            f"output(s), {kind}"
        )
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    rows = rows_of(settings.labelled, "labelled", seed)
    labels = [class_id(row, names) for row in rows]
    trained = scorers.trained_reading(path).tokens or files.recorded(path, "args", "max_length")
    context = loading.context_length(model, settings.max_length or trained)
    scorers.make_readable(model, tokenizer)
    plain_text.report_texts({}, f"{name}: labelled", rows, tokenizer, "text", "text_pair")
    features, long = encode(tokenizer, rows, context)
    if long:
        why = (
            "as in training"
            if trained and not settings.max_length
            else "which is what it reads"
            if not settings.max_length
            else "as asked"
        )
        logger.warning(
            "%s: %d of %d texts are cut at their end to %d tokens, %s (the first: %s)",
            name,
            len(long),
            len(rows),
            context,
            why,
            long[0],
        )
    lengths = [len(feature["input_ids"]) for feature in features]

    def work(some: list[int]) -> list[int]:
        batch = tokenizer.pad([features[i] for i in some], return_tensors="pt").to(model.device)
        return model(**batch).logits.argmax(-1).tolist()

    guesses = by_length(lengths, settings.batch_size, work, f"{name}: labelled")
    return {key: Items((names[i] for i in ids), names=names) for key, ids in zip(CLASSES, (labels, guesses))}
