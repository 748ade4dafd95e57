"""Sources mixed into the rows of one side: weights, limits, the split by prompt, streams without end."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from itertools import islice

from pipelines.data.rows import KEEPS, normalise
from pipelines.data.sources import fraction, is_local, read, sources
from pipelines.errors import DataError

logger = logging.getLogger(__name__)

SIDES = ("train", "validation", "ptx")  # the last in ppo only: pretraining text beside the prompts


def stream(
    section: dict, side: str, kind: str, seed: int, task: dict | None = None, report: dict | None = None
) -> Iterator[dict]:
    """Normalised rows of one side, one after the other, with `where`: weights and the validation fraction applied.

    Columns that hold something and are not read are logged, and listed in `report["ignored_columns"]`; rows that
    `section["bad_rows"]` lets drop are logged and counted in `report["bad_rows"]`.

    Which rows are held out or left out by a weight depends only on the seed and the row itself (its prompt, where it
    has one), never on its place, so a growing file keeps its split and the same prompt is never on both sides.
    """
    share, report = fraction(section), {} if report is None else report
    origin = "train" if side == "validation" and share else side
    for source in sources(section, origin):
        weight = float(source.get("weight", 1.0)) if side == "train" else 1.0
        ignored: set[str] = set()
        bad = BadRows(section, report)
        for where, raw in read(source):
            try:
                row = normalise(raw, kind, source.get("columns"), task, ignored)
            except DataError as error:
                bad.add(where, error)
                continue
            if share and (_draw(row, seed, "split") < share) != (side == "validation"):
                continue
            copies = int(weight)
            if weight > copies:
                copies += _draw(row, seed, where) < weight - copies
            for _ in range(copies):
                yield {**row, "where": where}
        _note_ignored(ignored, source, report)
        bad.note(source)


class BadRows:
    """The rows of a source that `data.bad_rows: drop` leaves out; without it the first is a `DataError`."""

    def __init__(self, section: dict, report: dict):
        self.drop, self.report = section.get("bad_rows") == "drop", report
        self.count, self.first = 0, ""

    def add(self, where: str, error: DataError) -> None:
        """Count a row, or raise."""
        if not self.drop:
            raise DataError(f"{where}: {error}") from None
        self.count, self.first = self.count + 1, self.first or f"{where}: {error}"

    def note(self, source: dict) -> None:
        """Log and record what was left out, once it is all known."""
        if self.count:
            logger.warning("%s: %d rows left out (bad_rows: drop); %s", source["path"], self.count, self.first)
            name = source["path"].rpartition("/")[2]  # records hold no folders
            self.report.setdefault("bad_rows", {})[name] = self.count


def given(section: dict) -> list[str]:
    """The sides that a section has: train, and validation where it is asked for."""
    return ["train", *(["validation"] if section.get("validation") is not None else [])]


def _note_ignored(ignored: set[str], source: dict, report: dict) -> None:
    """Name columns that are not read, each once in a stage."""
    new = sorted(ignored - set(report.get("ignored_columns", [])))
    if new:
        logger.warning("%s: ignored columns: %s", source["path"], ", ".join(new))
        report["ignored_columns"] = sorted({*report.get("ignored_columns", []), *new})


def load(
    section: dict, kind: str, seed: int, task: dict | None = None, report: dict | None = None
) -> tuple[list[dict], list[dict]]:
    """`(train rows, validation rows)` in memory; the second is empty where the recipe has no validation, the first
    where
    it streams them. `report` as in `stream`."""
    streaming, report = section.get("streaming"), {} if report is None else report
    train = [] if streaming else list(stream(section, "train", kind, seed, task, report))
    has_validation = section.get("validation") is not None
    validation = list(stream(section, "validation", kind, seed, task, report)) if has_validation else []
    if not train and not streaming:
        paths = ", ".join(source["path"] for source in sources(section, "train"))
        raise DataError(f"data.train: no rows are left for training, of {paths}")
    if kind in KEEPS:  # `datasets` takes the columns of the first row alone
        names = dict.fromkeys(name for row in [*train, *validation] for name in row)
        train, validation = ([{**dict.fromkeys(names), **row} for row in side] for side in (train, validation))
    if has_validation and not validation:
        raise DataError(f"data.validation: no rows ({section['validation']!r} of {len(train)}); raise the fraction")
    return train, validation


def columns(section: dict, kind: str) -> list[str]:
    """The columns that normalised training rows have, `where` too, by the first row of each source that is here."""
    names: dict[str, None] = {}
    for source in sources(section, "train"):
        if not source["path"].startswith("stage:") and is_local(source["path"]):
            for _, raw in read({**source, "rows": 1}):
                names |= dict.fromkeys([*normalise(raw, kind, source.get("columns")), "where"])
    return list(names)


def endless(section: dict, kind: str, seed: int, places: list[dict], report: dict | None = None) -> Iterator[dict]:
    """Normalised training rows without end, with `where`; a source that ends begins again.

    The next row comes from the source that is furthest behind its `weight`'s share of all rows (D'Hondt's method), so
    that the mixture is the same from beginning to end. `places` (an empty mapping for each source, or a copy of what
    it held earlier) says where to begin and is kept up to date, as in `read`. Several files of a source come in another
    order each time. `report` as in `stream`.
    """
    found, report = sources(section, "train"), {} if report is None else report
    readers = [_again(source, kind, seed, place, report, section) for source, place in zip(found, places, strict=True)]
    weights = [float(source.get("weight", 1.0)) for source in found]
    while True:
        behind = max(range(len(found)), key=lambda i: weights[i] / (places[i].get("taken", 0) + 1))
        row = next(readers[behind])
        places[behind]["taken"] = places[behind].get("taken", 0) + 1
        yield row


def first_block(section: dict, kind: str, seed: int, size: int, report: dict | None = None) -> list[dict]:
    """The first `size` rows of `endless`."""
    return list(islice(endless(section, kind, seed, [{} for _ in sources(section, "train")], report), size))


def _again(source: dict, kind: str, seed: int, place: dict, report: dict, section: dict) -> Iterator[dict]:
    ignored: set[str] = set()
    named = 0
    while True:
        epoch = place.setdefault("epoch", 0)
        bad = BadRows(section, report)
        for where, raw in read(source, place, f"{seed}|{epoch}"):
            try:
                row = normalise(raw, kind, source.get("columns"), None, ignored)
            except DataError as error:
                bad.add(where, error)
                continue
            place["good"] = True
            if len(ignored) > named:
                named = len(ignored)
                _note_ignored(ignored, source, report)
            yield {**row, "where": where}
        bad.note(source)
        if not place.get("rows") or (bad.count and not place.get("good")):
            raise DataError(f"{source['path']}: no rows" + f" that can be read; {bad.first}" * bool(bad.count))
        taken = place.get("taken", 0)
        place.clear()
        place |= {"epoch": epoch + 1, "taken": taken}


def _draw(row: dict, seed: int, salt: str) -> float:
    """A number in [0, 1) that depends on the seed, the salt and the row's prompt (or whole content)."""
    key = next((row[c] for c in ("prompt", "text", "source", "messages") if c in row), row)
    digest = hashlib.blake2b(f"{seed}|{salt}|{json.dumps(key, sort_keys=True)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def report_length(stage, side: str, total: int, used: int, long: list[str], limit: str, policy: str, cut: str) -> None:
    """Count, log and record the rows of a side that exceed the context; `DataError` when that is asked or none is left.

    `long` names the rows, `limit` says what they exceed ("256 tokens"), `policy` is the section's `too_long` and `cut`
    what truncating did to them.
    """
    done = {"drop": "dropped", "truncate": cut, "error": "found"}[policy]
    text = f"{side}: {len(long)} of {total} rows are longer than {limit}: {done}"
    if long and policy == "error":
        raise DataError(f"{text}, the first at {long[0]}; set data.too_long to drop or truncate, or raise the length")
    if long:
        logger.warning("%s (the first: %s)", text, long[0])
    if not used:
        raise DataError(f"{side}: no row fits into {limit}; raise the length, or set data.too_long: truncate")
    stage.report[side] = {"rows": total, "used": used, "too_long": len(long)}
