"""Labels of texts: the names of the classes, their ids, their weights, and the encoded texts."""

from __future__ import annotations

import logging
from collections import Counter

import torch

from pipelines.data.plain_text import tokenize
from pipelines.errors import DataError

logger = logging.getLogger(__name__)

SINGLE, MULTI, NUMBER = "single_label_classification", "multi_label_classification", "regression"


def doubtful(counts: dict) -> list[str]:
    """What is worth a warning about labels and their counts: twins by blanks or case, ids beside names, single rows."""
    found: list[str] = []
    twins: dict = {}
    for label in counts:
        twins.setdefault(" ".join(str(label).split()).casefold(), []).append(label)
    for same in twins.values():
        if len(same) > 1:
            found.append(
                f"the labels {', '.join(map(repr, same))} differ only in blanks or case, and are different classes"
            )
    names = [label for label in counts if isinstance(label, str)]
    if names and len(names) < len(counts):
        ids = [label for label in counts if not isinstance(label, str)]
        found.append(f"some labels are ids ({ids[0]}) and some names ({names[0]!r}), and are different classes")
    single = [label for label, count in counts.items() if count == 1]
    if single:
        more = f" and {len(single) - 5} more" if len(single) > 5 else ""
        found.append(f"one row alone has the label {', '.join(map(repr, single[:5]))}{more}")
    return found


def label_counts(rows: list[dict]) -> Counter:
    """How many rows have each label, in the order in which they appear."""
    return Counter(
        label for row in rows for label in (row["label"] if isinstance(row["label"], list) else [row["label"]])
    )


def label_names(train: list[dict], validation: list[dict], task) -> list[str]:
    """Names of the classes in the order of their ids; labels in the rows become ids, in place.

    Raises `DataError` for a validation row whose label no training row has (where `task.labels` does not name it).
    """

    if task.problem_type == NUMBER:
        return task.labels or ["value"]
    several = task.problem_type == MULTI
    seen = label_counts(train)
    if several and not task.labels and len(seen) > 1 and all(len(row["label"]) == len(seen) for row in train):
        raise DataError(
            "data.train: every row has every label: give the ids or names of the labels that a text has, not a 0 or 1 "
            "for each"
        )
    if task.labels:
        absent = [name for i, name in enumerate(task.labels) if i not in seen]
        if absent:
            logger.warning("no training row has the label %s: it cannot be learned", ", ".join(absent))
        return task.labels
    for doubt in doubtful(seen):
        logger.warning("data.train: %s", doubt)
    # ids before names: a file may hold both
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


def encode(tokenizer, rows: list[dict], context: int | None) -> tuple[list[dict], list[str]]:
    """`(features with input_ids …, `where` of the rows that were cut at `context` tokens)` of text and text_pair."""

    pairs = [row.get("text_pair") for row in rows]
    if any(pair is None for pair in pairs) and any(pair is not None for pair in pairs):
        raise DataError(f"{rows[pairs.index(None)]['where']}: no text_pair, but other rows have one")
    pairs = None if pairs[0] is None else pairs
    encoded = tokenize(tokenizer, [row["text"] for row in rows], pairs)  # what is too long is cut and counted here
    features, long = [], []
    for i, row in enumerate(rows):
        feature = {key: encoded[key][i] for key in encoded.keys()}
        if context is not None and len(feature["input_ids"]) > context:
            long.append(row["where"])
            feature = dict(tokenize(tokenizer, row["text"], pairs and pairs[i], truncation=True, max_length=context))
        features.append(feature)
    return features, long


def class_id(row: dict, names: list[str]) -> int:
    """The id of a row's label among the names of a model's classes; raises `DataError` where it is none of them.

    A name comes before an id. Where a class is called by another class's number, only names are taken.
    """

    label, numbers = row["label"], any(name.isdigit() and name != str(i) for i, name in enumerate(names))
    if str(label) in names:
        return names.index(str(label))
    if isinstance(label, int) and label < len(names) and not numbers:
        return label
    raise DataError(f"{row['where']}: label {label!r} is no class of the model: {', '.join(names[:20])}")


def balanced_weights(labels: list[int], classes: int):
    """Float32 tensor (classes,): rows / (classes x rows of the class), 0 for a class without rows.

    The weights of the rows are 1 on average (as scikit-learn's `class_weight="balanced"`).
    """

    counts = torch.bincount(torch.tensor(labels), minlength=classes)
    present = counts > 0
    return torch.where(present, len(labels) / (present.sum() * counts.clamp(min=1)), 0.0).float()
