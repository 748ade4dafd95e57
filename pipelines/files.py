"""The files of a run: their names, replacing one in a single step, reading them back, and the lock on a run's folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from contextlib import contextmanager
from pathlib import Path

from pipelines.errors import ChainError

STARTED, FINISHED = "started.json", "stage.json"
HISTORY = "history.jsonl"  # every logged step of a finished stage
LOG = "log.jsonl"  # the same while it runs, beside its checkpoints


def write_json(path: Path, value) -> None:
    """Replace `path` in one step: after a crash it holds the old text or the new one, never half of it."""
    _replace(path, [json.dumps(value, indent=2, ensure_ascii=False, default=str)])


def write_rows(path: Path, rows) -> None:
    """As `write_json`, one JSON object a line."""
    _replace(path, (json.dumps(row, ensure_ascii=False) for row in rows))


def _replace(path: Path, lines) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with open(part, "w", encoding="utf-8") as stream:
        stream.writelines(line + "\n" for line in lines)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, path)


def read_json(path: Path) -> dict | None:
    """The file's content, or None where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_log(folder: Path) -> tuple[list[dict], int | None, float]:
    """`(entries, steps to come in all, seconds spent)` of a stage that is not finished, from its checkpoints' folder.

    What was logged after the checkpoint that a session resumed from is dropped; a line half written is left alone.
    """
    entries, total, seconds, last = [], None, 0.0, 0.0
    path = folder / LOG
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []:
        if not line.endswith("\n"):
            break
        entry = json.loads(line)
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
    path = folder / LOG
    first = path.read_text(encoding="utf-8").splitlines(keepends=True)[:1] if path.is_file() else []
    return json.loads(first[0]).get("precision") if first and first[0].endswith("\n") else None


CHAIN = "chain.json"  # the stages of the run, those that are still to come too


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


@contextmanager
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


@contextlib.contextmanager
def replacing(path: Path):
    """A file that appears under its name only when all of it is on disk. Each process writes its own
    temporary."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
        parent = os.open(path.parent, os.O_RDONLY)
        os.fsync(parent)
        os.close(parent)
    finally:
        temporary.unlink(missing_ok=True)
