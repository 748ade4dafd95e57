"""Training rows that also stand in evaluation data, whose figures then say less about text that is new.

Compared are prompts (what the user says), texts and sources, never answers. A row is found where its text is the same
but for case and white space, or shares 13 words in a row (without case and punctuation) with a training row, as Brown
et al. 2020 (https://arxiv.org/abs/2005.14165, appendix C) look for it; words that more than ten training rows share are
what a prompt's form repeats and do not count, also theirs.
"""

from __future__ import annotations

import array
import json
import re
from dataclasses import dataclass

import numpy as np

from pipelines.data.rows import normalise
from pipelines.data.sources import files, is_local, read
from pipelines.errors import DataError

LENGTH = 13  # words in a row
COMMON = 10  # training rows that share them; more: the form of all prompts
ROWS = 10_000  # of each source that are compared
CHARACTERS = 5_000_000  # likewise
FACTORS = np.array([pow(0x9E3779B97F4A7C15, n, 2**64) for n in range(LENGTH)], dtype=np.uint64)

ADVICE = "rows to evaluate on are training data, too: hold others out, or leave these out of training"
SHOWN = 40  # characters of the example

WORD = re.compile(r"\w+")

Source = tuple[dict, str]  # a source in full form, and the shape of its rows


@dataclass(frozen=True)
class Texts:
    """The rows of some files, and all their runs of 13 words."""

    where: list[str]  # (R,) the row's place
    plain: list[str]  # (R,) its text without case and surplus white space
    runs: np.ndarray  # (M,) uint64, a hash of each run
    row: np.ndarray  # (M,) the row that it is of
    cut: bool  # whether there are more rows than were read


def find(training: list[Source], evaluation: list[Source], most: int = ROWS) -> list[str]:
    """A line for each file of `evaluation` some of whose rows stand in `training`, with the first of them; then one
    that names what was not compared. At most the first `most` rows of each source are read. `note` shows them.
    """
    skipped: dict[str, str] = {}
    held = [(source["path"], _texts([(source, kind)], most, skipped)) for source, kind in _here(evaluation, skipped)]
    if not held:
        return []
    trained = _texts(_here(training, skipped), most, skipped)
    rows_of = {text: i for i, text in reversed(list(enumerate(trained.plain)))}
    lines = [_line(path, texts, trained, rows_of) for path, texts in held]
    found = list(dict.fromkeys(filter(None, lines)))  # a file may be read as several kinds of rows
    if found and (trained.cut or any(texts.cut for _, texts in held)):
        found.append(f"of each file at most {most:,} rows and {CHARACTERS // 10**6} MB of text were compared")
    if skipped:
        names = ", ".join(f"{path} ({why})" for path, why in skipped.items())
        found.append(f"not looked for in both training and evaluation data: {names}")
    return found


def note(lines: list[str]) -> str:
    """What `find` found, for people."""
    return "\n  ".join([ADVICE, *lines])


def _line(path: str, held: Texts, trained: Texts, rows_of: dict[str, int]) -> str | None:
    """What of one file stands in training data; None where nothing does."""
    twins = {i: rows_of[text] for i, text in enumerate(held.plain) if text in rows_of}
    exact = len(twins)
    known = np.unique(held.runs)
    place = np.minimum(np.searchsorted(known, trained.runs), max(len(known) - 1, 0))
    hits = known[place] == trained.runs if len(known) else np.zeros(len(trained.runs), bool)
    pairs = np.unique(np.stack([place[hits], trained.row[hits]]), axis=1)  # a run, and a training row that has it
    times = np.bincount(pairs[0].astype(np.int64), minlength=len(known))
    first = dict(zip(pairs[0][::-1].tolist(), pairs[1][::-1].tolist()))  # the first such row
    for run, i in zip(np.searchsorted(known, held.runs).tolist(), held.row.tolist()):
        if 0 < times[run] <= COMMON:
            twins.setdefault(i, first[run])
    if not twins:
        return None
    i, near = min(twins), len(twins) - exact
    how = f" by {LENGTH} words in a row" if near else ""
    how = f" ({exact} word for word, {near}{how})" if near and exact else how
    text = held.plain[i][:SHOWN] + ("…" if len(held.plain[i]) > SHOWN else "")
    places = f"{held.where[i].removeprefix(path)}, {trained.where[twins[i]]}"
    return f"{path}: {len(twins)} of {len(held.plain)} rows{how}, as {text!r} ({places})"


def _here(sources: list[Source], skipped: dict[str, str]) -> list[Source]:
    """Each source once, without those that cannot be compared."""
    found: dict[str, Source] = {}
    for source, kind in sources:
        path = source["path"]
        if path.startswith("stage:"):
            continue  # made of the data of earlier stages, which are compared
        if source.get("streaming"):
            skipped[path] = "streamed"
        elif path.startswith("…/") or (is_local(path) and not files(path)):  # records keep no absolute paths
            skipped[path] = "not here"
        elif not is_local(path):
            skipped[path] = "on the hub"
        else:
            given = {key: value for key, value in source.items() if value is not None}
            found.setdefault(json.dumps([given, kind], sort_keys=True, default=str), (source, kind))
    return list(found.values())


def _texts(sources: list[Source], most: int, skipped: dict[str, str]) -> Texts:
    where, plain, hashes, lengths, cut = [], [], array.array("q"), [], False
    for source, kind in sources:
        left = CHARACTERS
        try:
            for number, (at, raw) in enumerate(read(source)):
                if number == most or left < 0:
                    cut = True
                    break
                text = _compared(raw, kind, source.get("columns"))
                if text.strip():
                    where.append(at)
                    plain.append(" ".join(text.lower().split()))
                    words = WORD.findall(text.lower())
                    hashes.extend(map(hash, words))
                    lengths.append(len(words))
                left -= len(text)
        except DataError:
            skipped[source["path"]] = "cannot be read"
    runs, row = _runs(np.array(hashes, np.int64).view(np.uint64), np.repeat(np.arange(len(lengths)), lengths))
    return Texts(where, plain, runs, row, cut)


def _compared(raw: dict, kind: str, columns: dict | None) -> str:
    """What of a row is compared: a text, a source, or what the user says."""
    if column := {"text": "text", "labelled": "text", "seq2seq": "source"}.get(kind):
        text = raw.get((columns or {}).get(column, column))
        return text if isinstance(text, str) else ""
    row = normalise(raw, kind, columns)
    asked = row.get("prompt", row.get("messages"))
    if isinstance(asked, str):
        return asked
    return "\n".join(turn.get("content") or "" for turn in asked if turn["role"] == "user")


def _runs(words: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A hash (uint64) of every 13 words in a row, and the row that it is of, from hashes and rows of all words (M,)."""
    count = len(words) - LENGTH + 1
    if count < 1:
        return words[:0], row[:0]
    runs = np.zeros(count, np.uint64)
    for n in range(LENGTH):  # modulo 2^64
        runs += words[n : n + count] * FACTORS[n]
    whole = row[:count] == row[LENGTH - 1 :]
    return runs[whole], row[:count][whole]
