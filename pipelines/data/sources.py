"""Sources of a `data:` section and the rows in them, as they are in the file.

A source is a local file (.jsonl .json .csv .parquet .txt, each also .gz; globs work), a folder, a hub id, or a file
that an earlier stage writes (`stage:NAME/samples.jsonl`).
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path

from pipelines.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
TRIED = 1000  # rows of a streamed source that `check` reads; the others are checked when they are read
SHOWN = 5  # problems shown per source; the rest are counted


def sources(section: dict, side: str) -> list[dict]:
    """The sources of `section[side]` (one of `SIDES`) in full form; none when it is absent or a fraction."""
    value = section.get(side)
    if value is None or isinstance(value, (int, float)):
        return []
    items = value if isinstance(value, list) else [value]
    base = {"columns": section.get("columns") if side != "ptx" else None}  # those are names of the prompts' columns
    return [{**base, "path": i} if isinstance(i, str) else {**base, **i} for i in items]


def fraction(section: dict) -> float:
    """The share of training rows held out for validation: 0 when validation is absent or a source of its own."""
    value = section.get("validation")
    return float(value) if isinstance(value, (int, float)) else 0.0


def is_local(path: str) -> bool:
    """Whether `path` is meant as a local file or folder rather than a hub id."""
    plain = path.removesuffix(".gz")
    return plain.endswith(SUFFIXES) or path.startswith(("/", ".", "~")) or "*" in path or Path(path).exists()


def files(path: str) -> list[Path]:
    """The files a local path or glob stands for, sorted; a folder stands for itself (read by `datasets`)."""
    return sorted(Path(p) for p in glob.glob(str(Path(path).expanduser()), recursive=True))


def read(source: dict, place: dict | None = None, order: str | None = None) -> Iterator[tuple[str, dict]]:
    """`(where, row)` for every row of a source as it stands in the file; at most `rows` of them.

    `place` (empty at first, plain values) says where to begin, without reading what lies before it, and always where
    the row given last ends: keep a copy to go on from there. `order` is the seed of the order of several files (None: by
    name).
    """
    streaming, place = place is not None, {} if place is None else place
    limit, path = source.get("rows"), source["path"]
    parts = files(path) if is_local(path) else []
    if is_local(path) and not parts:
        raise DataError(f"{path}: no such file (looked in {Path.cwd()})")
    on_hub = not parts or parts[0].is_dir()
    if order is not None:
        random.Random(order).shuffle(parts)
    for number in range(place.setdefault("file", 0), 1 if on_hub else len(parts)):
        for item in _hub(source, place, streaming) if on_hub else _file(parts[number], source, place):
            place["rows"] = place.get("rows", 0) + 1
            if limit is not None and place["rows"] > limit:
                return
            yield item
        place |= {"file": number + 1, "line": 0, "byte": 0, "item": 0}


def _file(path: Path, source: dict, place: dict) -> Iterator[tuple[str, dict]]:
    """The rows of a file from `place` on, which follows them: `line` and `byte` of text, `line` of Parquet rows."""
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix == ".parquet":
        yield from _parquet(path, place)
    elif suffix == ".csv":
        yield from _csv(path, place)
    elif suffix == ".txt":
        yield from _text(path, source.get("sample_by", "line"), place)
    elif suffix in (".jsonl", ".json"):
        yield from _json(path, place)
    else:
        raise DataError(f"{path}: unknown kind of file; use one of {', '.join(SUFFIXES)} (each also .gz)")


def _lines(path: Path, place: dict) -> Iterator[tuple[int, str]]:
    """`(number from 1, line)`, decoded line by line so that an error names the line."""
    number, byte = place.get("line", 0), place.get("byte", 0)
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as stream:
            if byte:
                stream.seek(byte)  # of what is unpacked, where the file is packed
            for line in stream:
                number, byte = number + 1, byte + len(line)
                place["line"], place["byte"] = number, byte
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: not UTF-8 (byte {error.start} of the line); convert the file") from None
    except EOFError:
        raise DataError(f"{path}:{number}: the gzip file ends too early (after this line); copy it again") from None
    except (gzip.BadGzipFile, OSError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _json(path: Path, place: dict) -> Iterator[tuple[str, dict]]:
    done = place.get("item", 0)  # of an array, which is read as a whole
    if done:
        place |= {"line": 0, "byte": 0}
    begins = not place.get("line")
    lines = _lines(path, place)
    first = next(((n, text) for n, text in lines if text.strip()), None)
    if first is None:
        return
    if begins and first[1].lstrip().startswith("["):
        text = first[1] + "".join(line for _, line in lines)
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
        for i, row in enumerate(rows[done:], done + 1):
            place["item"] = i
            yield f"{path}[{i}]", _mapping(row, f"{path}[{i}]")
        return
    for number, line in [first]:
        yield f"{path}:{number}", _mapping(_parse(line, path, number), f"{path}:{number}")
    for number, line in lines:
        if line.strip():
            yield f"{path}:{number}", _mapping(_parse(line, path, number), f"{path}:{number}")


def _parse(line: str, path: Path, number: int):
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number}: not JSON: {error.msg} at character {error.colno}") from None


def _mapping(row, where: str) -> dict:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row is a JSON object with named columns, not {type(row).__name__}")
    return row


def _csv(path: Path, place: dict) -> Iterator[tuple[str, dict]]:
    header = csv.DictReader(line for _, line in _lines(path, {})).fieldnames if place.get("line") else None
    reader = csv.DictReader((line for _, line in _lines(path, place)), header)
    try:
        for row in reader:
            if None in row:
                raise DataError(f"{path}:{place['line']}: more fields than the header has columns; quote the commas")
            yield f"{path}:{place['line']}", row
    except csv.Error as error:
        raise DataError(f"{path}:{place.get('line', 0)}: not CSV: {error}") from None


def _parquet(path: Path, place: dict) -> Iterator[tuple[str, dict]]:
    import pyarrow
    import pyarrow.parquet

    try:
        raw = gzip.open(path, "rb").read() if path.suffix == ".gz" else None
        table = pyarrow.parquet.ParquetFile(io.BytesIO(raw) if raw is not None else path)
        number, done = 0, place.get("line", 0)
        for group in range(table.num_row_groups):
            if number + table.metadata.row_group(group).num_rows <= done:
                number += table.metadata.row_group(group).num_rows
                continue
            for batch in table.iter_batches(row_groups=[group]):
                for row in batch.to_pylist():
                    number += 1
                    if number > done:
                        place["line"] = number
                        yield f"{path}[{number}]", row
    except (pyarrow.ArrowInvalid, EOFError, OSError) as error:
        raise DataError(f"{path}: not a whole Parquet file: {error}") from None


def _text(path: Path, sample_by: str, place: dict) -> Iterator[tuple[str, dict]]:
    if sample_by == "document":
        text = "".join(line for _, line in _lines(path, place))
        if text.strip():
            yield f"{path}:1", {"text": text}
        return
    start, paragraph = 0, []
    for number, line in _lines(path, place):
        if sample_by == "line":
            if line.strip():
                yield f"{path}:{number}", {"text": line.rstrip("\r\n")}
        elif line.strip():
            start = start or number
            paragraph.append(line)
        elif paragraph:
            yield f"{path}:{start}", {"text": "".join(paragraph).rstrip("\r\n")}
            start, paragraph = 0, []
    if paragraph:
        yield f"{path}:{start}", {"text": "".join(paragraph).rstrip("\r\n")}


def _hub(source: dict, place: dict, streaming: bool) -> Iterator[tuple[str, dict]]:
    import datasets

    path, split = source["path"], source.get("split", "train")
    try:
        # With a row limit only the rows that are read are downloaded; without one the data set is kept on disk.
        rows = datasets.load_dataset(
            path,
            source.get("name"),
            split=split,
            revision=source.get("revision"),
            streaming=streaming or source.get("rows") is not None,
        )
        if place.get("state"):
            rows.load_state_dict(place["state"])
    except Exception as error:  # whatever the hub client raises becomes one message that names the source
        raise DataError(
            f"{path}: cannot be loaded ({type(error).__name__}: {error}). A hub id needs network access or the hub's "
            "cache; a local file needs a path that exists."
        ) from error
    number, stream_ = place.get("line", 0), iter(rows)
    while True:
        try:
            row = next(stream_, None)
        except Exception as error:  # a broken file, or the network went away in the middle
            raise DataError(f"{path}[{split}]: after row {number}: {type(error).__name__}: {error}") from error
        if row is None:
            return
        number += 1
        if streaming:
            place |= {"line": number, "state": rows.state_dict()}
        yield f"{path}[{split}][{number}]", row
