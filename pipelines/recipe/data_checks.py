"""What can be wrong with a `data:` section, rows included, found before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from pipelines import errors
from pipelines.data.mixing import SIDES
from pipelines.data.rows import normalise
from pipelines.data.sources import SHOWN, SUFFIXES, TRIED, files, fraction, is_local, read, sources
from pipelines.errors import DataError
from pipelines.kinds import KINDS, of_kind
from pipelines.recipe import schema
from pipelines.recipe.sections import SourceSection


def problems(section: dict, kind: str, task: dict | None, read_rows: bool) -> Iterator[tuple[str, str, object]]:
    """`(key path below data, what is wrong, value)` for the section and, with `read_rows`, for every local row."""
    if not section.get("train"):
        yield "train", "needs a source: a file, a glob or a hub id", None
    value = section.get("validation")
    if isinstance(value, (int, float)) and not 0 < value < 1:
        yield "validation", "a fraction lies between 0 and 1 (or give a source)", value
    known = schema.fields(SourceSection)
    tried = TRIED if section.get("streaming") else None
    for side in SIDES:
        many = isinstance(section.get(side), list)
        for i, source in enumerate(sources(section, side)):
            at = f"{side}[{i}]" if many else side
            if not isinstance(source, dict) or not source.get("path"):
                yield at, "a source is a path, a hub id or a mapping with `path`", source
                continue
            wrong = list(_wrong_keys(source, known, at))
            yield from wrong
            if not wrong and source["path"].startswith("stage:"):
                # Its rows come to be when that stage runs; they are checked when they are read.
                if not source["path"].removesuffix(".gz").endswith(SUFFIXES):
                    yield at, "name the file that the stage writes: stage:NAME/samples.jsonl", source["path"]
            elif not wrong and is_local(source["path"]):
                if not files(source["path"]):
                    yield f"{at}", f"no such file (looked in {Path.cwd()})", source["path"]
                elif read_rows:
                    rows = "text" if side == "ptx" else kind
                    limit = tried if side == "train" else None
                    yield from ((at, message, None) for message in _wrong_rows(source, rows, task, limit))


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
    if section.get("buffer_size", 1) < 1:
        yield "data.buffer_size", "must be at least 1", section["buffer_size"]
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


def _wrong_keys(source: dict, known: dict, at: str) -> Iterator[tuple[str, str, object]]:
    for key, value in source.items():
        if key not in known:
            yield f"{at}.{key}", f"unknown key{errors.meant(key, known)}", value
        else:
            wrong = schema.check_value(known[key], value)[1]
            if wrong:
                yield f"{at}.{key}", wrong, value
    weight, rows = source.get("weight", 1.0), source.get("rows")
    if isinstance(weight, (int, float)) and weight <= 0:
        yield f"{at}.weight", "must be above 0", weight
    if isinstance(rows, int) and rows < 1:
        yield f"{at}.rows", "must be at least 1", rows


def _wrong_rows(source: dict, kind: str, task: dict | None, limit: int | None) -> Iterator[str]:
    """The first `SHOWN` bad rows of a source (of its first `limit` rows), and how many more there are."""
    bad = count = 0
    try:
        for where, row in islice(read(source), limit):
            count += 1
            try:
                normalise(row, kind, source.get("columns"), task)
            except DataError as error:
                bad += 1
                if bad <= SHOWN:
                    yield f"{where}: {error}"
                if "no column" in str(error) and bad == 1 and count == 1:
                    return  # every row would say the same
    except DataError as error:
        yield str(error)
        return
    if bad > SHOWN:
        yield f"… and {bad - SHOWN} more bad rows in {source['path']} ({bad} of {count})"
    if count == 0:
        yield f"{source['path']}: no rows"
