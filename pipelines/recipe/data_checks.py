"""What can be wrong with a `data:` section, rows included, found before anything runs."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from pipelines import errors
from pipelines.data import mixing
from pipelines.data.labels import MULTI, SINGLE, doubtful
from pipelines.data.mixing import SIDES
from pipelines.data.rows import KEEPS, READS, normalise
from pipelines.data.sources import SHOWN, SUFFIXES, TRIED, files, fraction, is_local, read, sources
from pipelines.errors import DataError
from pipelines.kinds import KINDS, of_kind
from pipelines.recipe import schema
from pipelines.recipe.model_checks import HUB_ID
from pipelines.recipe.sections import SourceSection
from pipelines.recipe.stage import references

logger = logging.getLogger(__name__)


def problems(section: dict, kind: str, task: dict | None, read_rows: bool) -> Iterator[tuple[str, str, object]]:
    """`(key path below data, what is wrong, value)` for the section and, with `read_rows`, for every local row."""
    if not section.get("train"):
        yield "train", "needs a source: a file, a glob or a hub id", None
    elif isinstance(section["train"], (bool, int, float)):
        yield "train", "needs a source: a file, a glob or a hub id", section["train"]
    value = section.get("validation")
    if isinstance(value, (int, float)) and not 0 < value < 1:
        yield "validation", "a fraction lies between 0 and 1 (or give a source)", value
    seen = {side: Seen() for side in SIDES}
    tried = TRIED if section.get("streaming") else None
    for side in SIDES:
        given = section.get(side)
        many, wrong = isinstance(given, list), list(_no_sources(given, side))
        seen[side].whole &= not wrong
        yield from wrong
        for i, source in enumerate([] if wrong else sources(section, side)):
            at = f"{side}[{i}]" if many else side
            rows = "text" if side == "ptx" else kind
            wrong = [*schema.wrong_keys(source, SourceSection, at, "source"), *_wrong_columns(source, rows, at)]
            yield from wrong
            if not wrong and source["path"].startswith("stage:"):
                # Its rows come to be when that stage runs; they are checked when they are read.
                if not source["path"].removesuffix(".gz").endswith(SUFFIXES):
                    yield at, "name the file that the stage writes: stage:NAME/samples.jsonl", source["path"]
            elif not wrong and not is_local(source["path"]) and not re.fullmatch(HUB_ID, source["path"]):
                yield at, f"no such file (looked in {Path.cwd()}), and no hub id either", source["path"]
            elif not wrong and is_local(source["path"]):
                if not files(source["path"]):
                    yield f"{at}", f"no such file (looked in {Path.cwd()})", source["path"]
                elif read_rows:
                    limit = tried if side == "train" else None
                    bad_rows = list(
                        wrong_rows(source, rows, task, limit, seen[side], section.get("bad_rows") == "drop")
                    )
                    seen[side].whole &= not bad_rows
                    yield from ((at, message, None) for message in bad_rows)
            seen[side].whole &= not wrong and not source["path"].startswith("stage:") and is_local(source["path"])
    if read_rows:
        yield from _wrong_sets(seen, kind, task or {})


def too_few_rows(stage, per_step: int) -> Iterator[tuple[str, str]]:
    """`(key path, what is wrong)` where the rows at hand do not fill one step, or none is held out for validation."""
    section, task = stage.data, stage.sections.get("task")
    if (
        section.get("streaming")
        or references(stage.sections["data"])
        or not all(at_hand(source) for side in SIDES for source in sources(section, side))
    ):
        return  # nobody knows yet how many there are
    try:
        train = sum(1 for _ in islice(mixing.stream(section, "train", stage.spec.rows, stage.seed, task), per_step))
        if train < per_step:
            yield (
                "data.train",
                (
                    f"{train} training rows do not fill one step of {per_step}: lower args.global_batch_size (or "
                    "per_device_train_batch_size x gradient_accumulation_steps), or add data"
                ),
            )
        if section.get("validation") is not None:
            if not any(True for _ in mixing.stream(section, "validation", stage.spec.rows, stage.seed, task)):
                yield "data.validation", f"no row is held out ({section['validation']!r} of them); raise the fraction"
    except DataError as error:  # a bad row, reported already where rows are read
        yield "data", str(error)


def at_hand(source: dict) -> bool:
    """Whether the files of a source are local, and there already."""
    return is_local(source["path"]) and bool(files(source["path"]))


def _no_sources(given, side: str) -> Iterator[tuple[str, str, object]]:
    """What is wrong with the shape of the sources of a side: each is a path or a mapping with `path`."""
    if given is None or (side == "validation" and isinstance(given, (int, float))):
        return
    if given == []:
        yield side, "an empty list: name a source, or drop the key", given
    many = isinstance(given, list)
    for i, item in enumerate(given if many else [given]):
        path = item.get("path") if isinstance(item, dict) else item
        at = f"{side}[{i}]" if many else side
        if not isinstance(path, str) or not path.strip():
            yield at, "a source is a path, a hub id or a mapping with `path`", item
        elif re.fullmatch(r"[\d.]+", path):
            yield at, "a fraction is a number: write it without quotes", item


def streaming_problems(kind: str, sections: dict[str, dict]) -> Iterator[tuple[str, str, object]]:
    """`(key path below the stage, what is wrong, value)` of a stage's `data.streaming` and what goes with it."""
    section, args, words = (sections.get(name, {}) for name in ("data", "args", "tokenizer"))
    if not section.get("streaming"):
        if "buffer_size" in section and "streaming" not in section:
            yield "data.buffer_size", "is used only with `streaming: true`", section["buffer_size"]
        return
    if not KINDS[kind].streams:
        message = (
            f"is for {', '.join(of_kind(streams=True))}: this stage reads all its rows before it trains; drop the key"
        )
        yield "data.streaming", message, True
        return
    if args.get("max_steps", -1) < 1:
        yield "args.max_steps", "data.streaming needs it: nobody knows how long a stream is", args.get("max_steps")
    if fraction(section):
        message = (
            "a fraction would need the whole stream beforehand: give a source of its own, as "
            "`{path: …, rows: 1000}` (hub data sets: with their `split: validation`)"
        )
        yield "data.validation", message, section["validation"]
    loaded = sections.get("model", {}).get("model_name_or_path")
    if words.get("train") and not loaded and not words.get("max_documents"):
        yield "tokenizer.max_documents", "say on how many documents of the stream the tokenizer is trained", None
    for key, reason in (
        ("num_train_epochs", "a stream begins again by itself, and args.max_steps says when to stop"),
        ("dataloader_num_workers", "a stream is read ahead by a thread of its own"),
        ("train_sampling_strategy", "a stream is shuffled by data.buffer_size"),
    ):
        if key in args:
            yield f"args.{key}", f"not with data.streaming, drop the key: {reason}", args[key]
    for key in ("save_strategy", "eval_strategy", "logging_strategy"):
        if args.get(key) == "epoch":
            yield f"args.{key}", "a stream has no epochs: use steps", "epoch"


@dataclass
class Seen:
    """What the rows of one side hold together."""

    rows: int = 0
    decided: int = 0  # rankings whose answers differ in rank; of unpaired rows those with a label
    labels: Counter = field(default_factory=Counter)
    labels_of_each: set[int] = field(default_factory=set)
    where: dict = field(default_factory=dict)  # the first row of each label
    whole: bool = True  # whether all rows of the side were read, and are right

    def add(self, where: str, row: dict, kind: str) -> None:
        """Count one normalised row of `kind`. Rows of other kinds may hold anything in columns of the same names."""
        self.rows += 1
        if kind == "rankings":
            self.decided += len(set(row["ranks"])) > 1
        elif kind == "unpaired":
            self.decided += any(label is not None for label in row["labels"])
        elif kind == "labelled" and not isinstance(row["label"], float):
            labels = row["label"] if isinstance(row["label"], list) else [row["label"]]
            self.labels.update(labels)
            self.labels_of_each.add(len(labels))
            for label in labels:
                self.where.setdefault(label, where)


def _wrong_sets(seen: dict[str, Seen], kind: str, task: dict) -> Iterator[tuple[str, str, object]]:
    """What is wrong with all rows of a side together, where all were read; doubts about labels are logged."""
    for side in ("train", "validation"):
        if kind == "rankings" and seen[side].whole and seen[side].rows and not seen[side].decided:
            yield side, f"all {seen[side].rows} rankings are ties: there is nothing to learn from", None
        if kind == "unpaired" and seen[side].whole and seen[side].rows and not seen[side].decided:
            yield side, f"no answer of {seen[side].rows} rows is desirable or undesirable: nothing to learn from", None
    train, validation = seen["train"], seen["validation"]
    if kind != "labelled" or task.get("labels") or not train.whole or not train.labels:
        return
    for doubt in doubtful(train.labels):
        logger.warning("data.train: %s", doubt)
    if task.get("problem_type") == MULTI and len(train.labels) > 1 and train.labels_of_each == {len(train.labels)}:
        yield "train", "every row has every label: give the labels that a text has, not a 0 or 1 for each", None
    elif task.get("problem_type", SINGLE) == SINGLE and len(train.labels) == 1:
        yield "train", f"all rows have the same label {next(iter(train.labels))!r}: there is nothing to learn", None
    for label in validation.labels.keys() - train.labels.keys():
        yield "validation", f"{validation.where[label]}: no training row has the label {label!r}", None


def _wrong_columns(source: dict, kind: str, at: str) -> Iterator[tuple[str, str, object]]:
    """Names on the left of `columns` that the stage does not read: a typing error, or the two sides exchanged."""
    columns = source.get("columns")
    if kind in KEEPS or not isinstance(columns, dict):
        return
    for ours, theirs in columns.items():
        if ours not in READS[kind]:
            turned = f"; it is written {{{theirs}: {ours}}}, ours first" if theirs in READS[kind] else ""
            known = ", ".join(READS[kind])
            yield (
                f"{at}.columns",
                f"no column {ours!r} is read here{errors.meant(ours, READS[kind])}{turned}; known: {known}",
                ours,
            )


def wrong_rows(
    source: dict,
    kind: str,
    task: dict | None = None,
    limit: int | None = None,
    seen: Seen | None = None,
    drop: bool = False,
) -> Iterator[str]:
    """The first `SHOWN` bad rows of a source (of its first `limit` rows), and how many more there are.

    Where they are to `drop`, only that all are bad is wrong.
    """
    bad, count, first = 0, 0, ""
    try:
        for where, row in islice(read(source), limit):
            count += 1
            try:
                (seen or Seen()).add(where, normalise(row, kind, source.get("columns"), task), kind)
            except DataError as error:
                bad += 1
                first = first or f"{where}: {error}"
                if drop:
                    continue
                if bad <= SHOWN:
                    yield f"{where}: {error}"
                if "no column" in str(error) and bad == 1 and count == 1:
                    return  # every row would say the same
    except DataError as error:
        yield str(error)
        return
    if drop and bad == count > 0:
        yield f"{source['path']}: none of {count} rows can be read; {first}"
    elif bad > SHOWN and not drop:
        yield f"… and {bad - SHOWN} more bad rows in {source['path']} ({bad} of {count})"
    if count == 0:
        yield f"{source['path']}: no rows"
