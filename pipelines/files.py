"""The files of a run: their names, replacing one in a single step, reading them back, and the lock on a run's folder."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from pipelines.errors import ChainError

STARTED, FINISHED = "started.json", "stage.json"
HISTORY = "history.jsonl"  # every logged step of a finished stage
LOG = "log.jsonl"  # the same while it runs, beside its checkpoints
CHAIN = "chain.json"  # the stages of the run, those that are still to come too


@contextlib.contextmanager
def replacing(path: Path, mode: str = "w") -> Iterator[IO]:
    """A file that appears under its name only when all of it is on disk: after a crash there is the old one or the new.

    Each process writes a temporary file of its own beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
        parent = os.open(path.parent, os.O_RDONLY)
        os.fsync(parent)
        os.close(parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace `path` in one step."""
    with replacing(path) as out:
        out.write(text)


def write_json(path: Path, value) -> None:
    """Replace `path` in one step."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def json_line(row: dict) -> str:
    """A row as one line of JSON, readable where it can be: half a surrogate, which UTF-8 cannot hold, is escaped."""
    line = json.dumps(row, ensure_ascii=False) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(row) + "\n"
    return line


def write_rows(path: Path, rows: Iterable[dict]) -> int:
    """As `write_json`, one JSON object a line; returns how many."""
    count = 0
    with replacing(path) as out:
        for count, row in enumerate(rows, 1):  # noqa: B007  returned below
            out.write(json_line(row))
    return count


def append_rows(path: Path, rows: Iterable[dict]) -> None:
    """Add JSON lines to a file that `read_rows` reads; on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as stream:
        stream.writelines(map(json_line, rows))
        stream.flush()
        os.fsync(stream.fileno())


def read_json(path: Path) -> dict | None:
    """The file's content, or None where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSON-lines file of ours, without a last one that is not finished; none where there is no file.

    For files that users bring see `pipelines.data.sources`.
    """
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []  # U+0085 ends no line in JSON
    return [json.loads(line) for line in lines]


def read_log(folder: Path) -> tuple[list[dict], int | None, float]:
    """`(entries, steps to come in all, seconds spent)` of a stage that is not finished, from its checkpoints' folder.

    What was logged after the checkpoint that a session resumed from is dropped; a line half written is left alone.
    """
    entries, total, seconds, last = [], None, 0.0, 0.0
    for entry in read_rows(folder / LOG):
        moment = entry.pop("time")
        if "max_steps" in entry:  # a session begins
            entries = [e for e in entries if e["step"] <= entry["step"]]
            total, last = entry["max_steps"], moment
        else:
            entries.append(entry)
        seconds += moment - last
        last = moment
    return entries, total, seconds


def begun_in(folder: Path) -> str | None:
    """The precision in which the stage that left its log in `folder` began to train; None where none has."""
    first = read_rows(folder / LOG)[:1]
    return first[0].get("precision") if first else None


def busy(folder: Path) -> bool:
    """Whether a run is working in this output folder."""
    if not (folder / ".lock").is_file():
        return False
    with open(folder / ".lock") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


@contextlib.contextmanager
def lock(folder: Path, main: bool):
    """One run at a time in an output folder: two launches would overwrite each other's checkpoints."""
    if not main:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ChainError(
                f"another run is working in {folder}. Wait for it, or choose another output_dir=… on the command line. "
                "(If you launched only once, the launcher started independent runs: use a file of accelerate_configs/.)"
            ) from None
        yield


def now() -> str:
    """UTC time to the microsecond, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat()


def recorded(folder: str, section: str, key: str):
    """What the recipe of the stage in `folder` gave for `section.key`; None for other folders and keys not given."""
    made = read_json(Path(folder) / FINISHED) or {}
    return made.get("record", {}).get("sections", {}).get(section, {}).get(key)


def source_prefix(folder: str) -> str:
    """What the stage in `folder` was trained to find before every source, so that it gets it later too; "" for others."""
    return recorded(folder, "task", "prefix") or ""
