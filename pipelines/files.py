"""The files of a run: their names, replacing one in a single step, reading and verifying them, and the run's lock."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import xxhash

from pipelines.errors import ChainError, RecordError, StorageError

STARTED, FINISHED = "started.json", "stage.json"
HISTORY = "history.jsonl"  # every logged step of a finished stage
LOG = "log.jsonl"  # the same while it runs, beside its checkpoints
REDO = "redo.json"  # a `--redo` that has begun and is not through
CARD = "README.md"  # of a finished model
CHAIN = "chain.json"  # the stages of the run, those that are still to come too

# What a record's fields must be where they are there: what is anything else was not written by us.
RECORD = {"kind": str, "sections": {"": dict}, "data": {"": dict}, "parents": {"": str}}
SHAPES: dict[str, dict] = {
    STARTED: {"record": RECORD, "started": str},
    FINISHED: {
        "stage": str,
        "kind": str,
        "record": RECORD,
        "rows": dict,
        "metrics": dict,
        "args": dict,
        "versions": dict,
        "started": str,
        "finished": str,
        "seconds": (int, float),
        "world_size": int,
        "files": {"": {"bytes": int, "xxh3": str}},
    },
    CHAIN: {"stages": [{"name": str, "kind": str, "parents": [str]}]},
    REDO: {"asked": [str], "open": [str], "aside": [str]},
}
NEEDED = {  # and what every reader of the whole chain needs
    STARTED: ("record", "started"),
    FINISHED: ("record", "metrics", "started", "finished", "seconds"),
    CHAIN: ("stages",),
    REDO: ("asked", "open", "aside"),
}
HERE = "…/"  # before the name of what was given by an absolute path
REMAKE = "put the file back from a copy, or make the stage again with --redo {stage} (the old folder is kept aside)"
REMEDIES = {
    STARTED: REMAKE,
    FINISHED: REMAKE,
    CHAIN: "move the file away: the next run writes it again",
    REDO: "move the file away; --redo then begins again",
    HISTORY: "put the file back from a copy; only the curves of {stage} are missing without it",
    LOG: "move the file away: only times and curves of the stopped stage are lost, its checkpoints are not",
}


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


def append_rows(path: Path, rows: Iterable[dict], sync: bool = True) -> None:
    """Add JSON lines to a file that `read_rows` reads; on disk when this returns, if `sync`.

    A last line that is not finished (the disk was full, the machine lost power) is cut off first: else the next one
    would be glued to it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as stream:
        _cut_unfinished(stream)
        stream.write("".join(map(json_line, rows)).encode("utf-8"))
        stream.flush()
        if sync:
            os.fsync(stream.fileno())


def _cut_unfinished(stream: IO) -> None:
    end = stream.seek(0, os.SEEK_END)
    while end:  # backwards in blocks: a line may be long
        start = max(0, end - 4096)
        stream.seek(start)
        found = stream.read(end - start).rfind(b"\n")
        if found >= 0:
            stream.truncate(start + found + 1)
            return
        end = start
    stream.truncate(0)


def damaged(path: Path, what: str) -> RecordError:
    """The error for a record of ours that cannot be read: the file, what is wrong, the way out."""
    remedy = REMEDIES.get(path.name, "put the file back from a copy, or move it away")
    return RecordError(f"{path} is damaged ({what}): {remedy.format(stage=path.parent.name)}.")


def read_json(path: Path, needs: Iterable[str] = ()) -> dict | None:
    """The file's content, or None where there is no such file.

    Args:
        needs: fields that must be there; of a record that is used as a whole, those of `NEEDED`.

    Raises `RecordError` for one that is truncated, empty, binary, or not what is written under its name (`SHAPES`).
    """
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise damaged(path, _what(path, error)) from None
    if not isinstance(value, dict):
        raise damaged(path, f"it holds a {type(value).__name__} instead of fields")
    for key in needs:
        if key not in value:
            raise damaged(path, f"its field {key!r} is missing")
    wrong = _misshapen(value, SHAPES.get(path.name, {}))
    if wrong is not None:
        raise damaged(path, f"its field {wrong!r} is wrong")
    return value


def read_record(path: Path) -> dict | None:
    """`read_json` of one of our records, which must be there with all that is needed of it."""
    return read_json(path, NEEDED[path.name])


def _misshapen(value, shape, at: str = "") -> str | None:
    """The path of the first part of `value` that is not of `shape`: a type, {key: shape} ("": of all) or [shape of
    all].
    """
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return at
        parts = [(key, of, shape.get(key, shape.get(""))) for key, of in value.items()]
    elif isinstance(shape, list):
        if not isinstance(value, list):
            return at
        parts = [(str(i), of, shape[0]) for i, of in enumerate(value)]
    else:
        return None if isinstance(value, shape) and not isinstance(value, bool) else at
    found = (_misshapen(of, inner, f"{at}.{key}".lstrip(".")) for key, of, inner in parts if inner is not None)
    return next((wrong for wrong in found if wrong is not None), None)


def _what(path: Path, error: Exception) -> str:
    if path.stat().st_size == 0:
        return "it is empty"
    return "it is no text" if isinstance(error, UnicodeDecodeError) else f"no JSON: {error}"


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSON-lines file of ours, without a last one that is not finished; none where there is no file.

    Raises `RecordError` where another line cannot be read. For files that users bring see `pipelines.data.sources`.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []  # U+0085 ends no line in JSON
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise damaged(path, f"line {number}: {_what(path, error)}") from None
        if not isinstance(row, dict):
            raise damaged(path, f"line {number} holds a {type(row).__name__} instead of fields")
        rows.append(row)
    return rows


def read_log(folder: Path) -> tuple[list[dict], int | None, float]:
    """`(entries, steps to come in all, seconds spent)` of a stage that is not finished, from its checkpoints' folder.

    What was logged after the checkpoint that a session resumed from is dropped; a line half written is left alone.
    """
    entries, total, seconds, last = [], None, 0.0, 0.0
    for number, entry in enumerate(read_rows(folder / LOG), 1):
        moment = entry.pop("time", None)
        if not isinstance(moment, (int, float)) or not isinstance(entry.get("step"), int):
            raise damaged(folder / LOG, f"line {number} has no time or step")
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


# --- what a folder holds, and whether it still does -------------------------------------------------------


CHUNK = 2**26  # bytes that one thread hashes: a large file is read by all cores at once


def checksum(path: Path, sync: bool = False) -> str:
    """XXH3 (128 bits, of that of each `CHUNK`) in hexadecimal, at the speed of memory: against accidents, not forgers.

    Args:
        sync: also wait until the file is on disk, whoever wrote it.
    """
    with open(path, "rb", buffering=0) as stream, ThreadPoolExecutor(min(8, os.cpu_count() or 1) + 1) as pool:
        file = stream.fileno()
        on_disk = pool.submit(os.fsync, file) if sync else None  # beside the reading
        starts = range(0, os.fstat(file).st_size, CHUNK)
        digest = xxhash.xxh3_128(b"".join(pool.map(lambda start: _checksum_at(file, start, fresh=sync), starts)))
        if on_disk is not None:
            on_disk.result()
    return digest.hexdigest()


def _checksum_at(file: int, start: int, fresh: bool) -> bytes:
    """XXH3 of a chunk. What was written just now (`fresh`) is in memory and is mapped, which spares a copy; anything
    else is read, since mapped a bad sector would be a signal instead of an error.
    """
    if fresh:
        with mmap.mmap(
            file, min(CHUNK, os.fstat(file).st_size - start), access=mmap.ACCESS_READ, offset=start
        ) as chunk:
            return xxhash.xxh3_128(chunk).digest()
    digest, block = xxhash.xxh3_128(), bytearray(2**18)
    view = memoryview(block)
    for at in range(start, start + CHUNK, len(block)):
        count = os.preadv(file, [block], at)
        digest.update(view[:count])
        if count < len(block):
            break
    return digest.digest()


def contents(folder: Path, names: Iterable[str], sync: bool = False) -> dict[str, dict]:
    """Size, time and checksum of files in `folder`, by name: what `damage` compares with. `sync` as in `checksum`."""
    found = {}
    for name in names:
        digest = checksum(folder / name, sync)
        stat = (folder / name).stat()
        found[name] = {"bytes": stat.st_size, "xxh3": digest, "time": stat.st_mtime_ns}
    return found


def damage(folder: Path, listed: dict[str, dict], quick: bool = False) -> list[str]:
    """What is wrong with the files that `contents` listed: "model.safetensors is missing", one entry for each.

    Args:
        quick: a file with the size and the time of then is taken to be the same, without reading it.
    """
    found = []
    for name, then in listed.items():
        try:
            stat = (folder / name).stat()
        except FileNotFoundError:
            found.append(f"{name} is missing")
            continue
        if stat.st_size != then["bytes"]:
            found.append(f"{name} has {stat.st_size} bytes instead of {then['bytes']}")
        elif quick and stat.st_mtime_ns == then.get("time"):
            continue
        elif checksum(folder / name) != then["xxh3"]:
            found.append(f"{name} holds other bytes than were written (checksum)")
    return found


def refuse_edited(folder: str | Path, names: Iterable[str] | None = None, quick: bool = False) -> None:
    """Raise `RecordError` where the folder of a finished stage no longer holds the model that the stage wrote.

    Args:
        folder: any folder or hub id; what no stage has made, or a version without checksums, passes.
        names: look at these of its files; None: at those in the folder itself, which `from_pretrained` reads.
        quick: see `damage`.
    """
    folder = Path(os.path.expanduser(folder))
    listed = (read_json(folder / FINISHED) or {}).get("files", {})
    wanted = [name for name in listed if "/" not in name] if names is None else names
    mine = {name: listed[name] for name in wanted if name in listed and name not in (CARD, HISTORY)}
    if wrong := damage(folder, mine, quick):
        raise RecordError(
            f"{folder}: changed since the stage was finished: {'; '.join(wrong[:3])}. Put the file back from a copy, "
            f"or make the stage again with --redo {folder.resolve().name}; if the change is meant, use a copy of the "
            f"folder without {FINISHED}"
        )


def portable(value, run: Path | None = None):
    """`value` (any nesting) without absolute paths, which tell others nothing, and too much: a record may be published.

    What lies in the folder `run` is called `stage:NAME/FILE`, and anything else "…/NAME (6 digits that tell two
    apart)".
    """
    if isinstance(value, dict):
        return {portable(k, run): portable(v, run) for k, v in value.items()}
    if isinstance(value, list):
        return [portable(v, run) for v in value]
    if not isinstance(value, str):
        return value
    if run is not None and value.startswith(f"{run}/"):
        return f"stage:{value.removeprefix(f'{run}/')}"
    if value.startswith(("/", "~")) and "\n" not in value and len(Path(value).parts) > 1:
        return f"{HERE}{Path(value).name} ({hashlib.sha256(value.encode()).hexdigest()[:6]})"
    return value


def set_aside(path: Path, home: Path, name: str) -> Path:
    """Move a file or folder to `home/NAME-TIME`, whatever lies there already; returns where it lies now."""
    home.mkdir(parents=True, exist_ok=True)
    stamp, number = now().replace(":", "")[:17], 1
    aside = home / f"{name}-{stamp}"
    while aside.exists():
        number += 1
        aside = home / f"{name}-{stamp}-{number}"
    path.rename(aside)
    return aside


def follow_umask(folder: Path) -> None:
    """Give files that only their owner may read (safetensors writes them so) the rights that the umask asks for."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o777 == 0o600:
            path.chmod(0o666 & ~mask)


FULL = (errno.ENOSPC, errno.EDQUOT)
CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)
# How libraries that do not raise OSError word it: safetensors (Rust), torch.save, Arrow.
FULL_WORDS = ("No space left", "os error 28", "os error 122", "Disk quota exceeded")
TORN_WORDS = ("PytorchStreamWriter failed", "file write failed", "unexpected pos")


def storage_error(error: BaseException, folder: Path | None = None, needed: int | None = None) -> StorageError | None:
    """`error` as one sentence where a full disk or missing rights are its cause, else None.

    Args:
        folder: what was written to, where the error does not name the file.
        needed: bytes that were to be written, where that is known.
    """
    cause: BaseException | None = error
    while cause is not None:
        code = cause.errno if isinstance(cause, OSError) else None
        words = str(cause)
        place = Path(os.fsdecode(cause.filename)) if code is not None and cause.filename else folder
        full = code in FULL or any(w in words for w in FULL_WORDS)
        torn = any(w in words for w in TORN_WORDS)
        if full or torn or code in CLOSED:
            at = f"{place}: " if place is not None else ""
            if code in CLOSED:
                return StorageError(f"{at}not allowed here ({os.strerror(code)}): change the rights, or the output_dir")
            near = free_bytes(place) if place is not None else None
            full = full or (near is not None and near < max(needed or 0, 2**16))  # torch.save does not say why
            room = "" if near is None else f", {size(near)} free"
            need = "" if needed is None else f"{size(needed)} needed"
            why = "the disk is full" if full else f"writing failed ({words.splitlines()[0]})"
            return StorageError(f"{at}{why} ({(need + room).strip(', ')}). Make room and give the same command again")
        cause = cause.__cause__ or cause.__context__
    return None


def free_bytes(path: Path) -> int | None:
    """Bytes that may still be written where `path` lies, or will lie; None where that is not known."""
    for place in (path, *path.absolute().parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(place).free
    return None


def size(count: float) -> str:
    """Bytes for people: "1.3 GB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


@contextlib.contextmanager
def lock(folder: Path, main: bool) -> Iterator[bool]:
    """One run at a time in an output folder: two launches would overwrite each other's checkpoints.

    Yields whether the folder can be written to: where it cannot, nobody else works in it either.
    """
    if not main:
        yield True
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = open(folder / ".lock", "w")
    except OSError as error:
        if error.errno not in CLOSED:
            raise
        yield False
        return
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ChainError(
                f"another run is working in {folder}. Wait for it, or choose another output_dir=… on the command line. "
                "(If you launched only once, the launcher started independent runs: use a file of accelerate_configs/.)"
            ) from None
        yield True


def now() -> str:
    """UTC time to the microsecond, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat()


def kind_of(folder: str) -> str | None:
    """The kind of the finished stage in `folder`; None for other folders."""
    return (read_json(Path(folder) / FINISHED) or {}).get("kind")


def recorded(folder: str, section: str, key: str):
    """What the recipe of the stage in `folder` gave for `section.key`; None for other folders and keys not given."""
    made = read_json(Path(folder) / FINISHED) or {}
    return made.get("record", {}).get("sections", {}).get(section, {}).get(key)


def source_prefix(folder: str) -> str:
    """What the stage in `folder` was trained to find before every source, so that it gets it later too; "" for
    others.
    """
    return recorded(folder, "task", "prefix") or ""
