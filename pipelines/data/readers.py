"""The rows in one file, as they are there: JSON lines, JSON, CSV, Parquet, Arrow and text, each also packed with gzip.

A file that is broken is one `DataError` with file and line. CSV is read here and not by `datasets`, which guesses
types (007 becomes 7, NA becomes nothing); JSON lines because of the errors that name the line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from pipelines.data.rows import READS
from pipelines.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".txt")
UTF16 = (b"\xff\xfe", b"\xfe\xff")
SPACE = re.compile(r"[ \t\n\r]*")  # what JSON takes for a blank
KNOWN = frozenset(name for names in READS.values() for name in names)  # a column of rows of any kind


def rows(path: Path, source: dict, place: dict) -> Iterator[tuple[str, dict]]:
    """`(where, row)` of a file from `place` on, which follows them: `line`, `byte`, `item` (see `sources.read`)."""
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix in (".parquet", ".arrow"):
        yield from _table(path, suffix, place)
    elif suffix == ".csv":
        yield from _csv(path, place)
    elif suffix == ".txt":
        yield from _text(path, source.get("sample_by", "line"), place)
    elif suffix in (".jsonl", ".json"):
        yield from _json(path, place, source.get("columns") or {})
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
                if b"\0" in line:
                    kind = "UTF-16" if number == 1 and line.startswith(UTF16) else "NUL bytes"
                    raise DataError(f"{path}:{number}: not UTF-8 text, but {kind}; convert the file")
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: not UTF-8 (byte {error.start} of the line); convert the file") from None
    except EOFError:
        raise DataError(f"{path}:{number}: the gzip file ends too early (after this line); copy it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}:{number}: the gzip file is broken (after this line): {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


# --- JSON


def _object(pairs: list[tuple]) -> dict:
    """An object; a key that is there twice is an error, where Python would take the last."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise DataError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} is there twice in one object")
    return made


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _json(path: Path, place: dict, columns: dict) -> Iterator[tuple[str, dict]]:
    """Rows of JSON lines; or of a file that holds one list of rows, rows under one key, or objects over
    several lines.
    """
    if place.get("item") or not place.get("line") and _is_document(path, columns):
        text = "".join(line for _, line in _lines(path, {}))
        for i, (at, row) in enumerate(_document(path, text, columns), 1):
            if i > place.get("item", 0):
                place["item"] = i
                yield f"{path}:{at}[{i}]", _checked(row, path, at)
        return
    for number, line in _lines(path, place):
        if not line.isspace():
            half = "\\ud" in line or "\\uD" in line  # the escape of half a surrogate pair, or of a whole one
            yield f"{path}:{number}", _checked(_parse(line, path, number), path, number, half)


def _is_document(path: Path, columns: dict) -> bool:
    """Whether a file is to be read as a whole, by its first two lines; what is broken in them is found later."""
    try:
        head = list(islice((line.strip() for _, line in _lines(path, {}) if not line.isspace()), 2))
    except DataError:
        return False
    if not head or head[0][0] not in "[{":
        return False
    first = _complete(head[0])
    if head[0][0] == "[" or first is None:
        broken = first is None and len(head) > 1 and isinstance(_complete(head[1]), dict)
        return not broken or head[0][-1] in "[{,:"
    return len(head) == 1 and isinstance(first, dict) and _rows_key(first, path, columns) is not None


def _complete(line: str):
    """The value of a line, or None where the line alone is no JSON."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
    except (ValueError, RecursionError):  # a number too long, nested too deep: all of it is on this line
        return {}


def _document(path: Path, text: str, columns: dict) -> Iterator[tuple[int, object]]:
    """`(line from 1, row)` of a list of rows, of rows under one key, or of objects one after the other."""
    at = SPACE.match(text).end()
    if text[at] == "[":
        yield from _items(path, text, at)
        return
    value, end = _value(path, text, at)
    if SPACE.match(text, end).end() == len(text):
        key = _rows_key(value, path, columns)
        if key is None:
            yield text.count("\n", 0, at) + 1, value
            return
        at += 1
        while True:  # walk to the list, to know its lines
            name, at = _value(path, text, SPACE.match(text, at).end())
            at = SPACE.match(text, SPACE.match(text, at).end() + 1).end()  # behind the colon
            if name == key:
                yield from _items(path, text, at)
                return
            at = SPACE.match(text, _value(path, text, at)[1]).end() + 1  # behind the comma
    line, done = 1, 0
    while at < len(text):
        line, done = line + text.count("\n", done, at), at
        value, at = _value(path, text, at)
        at = SPACE.match(text, at).end()
        yield line, value


def _items(path: Path, text: str, at: int) -> Iterator[tuple[int, object]]:
    """`(line from 1, item)` of the list that begins at character `at`."""
    line, done, at = text.count("\n", 0, at) + 1, at, SPACE.match(text, at + 1).end()
    if text[at : at + 1] == "]":
        return
    while True:
        line, done = line + text.count("\n", done, at), at
        value, at = _value(path, text, at)
        yield line, value
        at = SPACE.match(text, at).end()
        if text[at : at + 1] == "]":
            return
        if text[at : at + 1] != ",":
            line += text.count("\n", done, at)
            raise DataError(f"{path}:{line}: not JSON: a comma or ] must follow the item before")
        at = SPACE.match(text, at + 1).end()


def _value(path: Path, text: str, at: int) -> tuple[object, int]:
    """The JSON value that begins at character `at`, and where it ends."""
    try:
        return DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg} at character {error.colno}") from None
    except RecursionError:
        problem = "nested too deeply"
    except DataError as error:
        problem = str(error)
    except ValueError:
        problem = "a number of thousands of digits"
    raise DataError(f"{path}:{text.count(chr(10), 0, at) + 1}: {problem}")


def _rows_key(value, path: Path, columns: dict) -> str | None:
    """The key under which a file's one object holds its rows; None where the object is a row itself."""
    known = {*KNOWN, *columns.values()}
    if value and all(
        isinstance(v, list) and v and not any(isinstance(x, (dict, list)) for x in v) for v in value.values()
    ):
        if len({len(v) for v in value.values()}) == 1 and len(value) > 1 and value.keys() & known:
            raise DataError(
                f"{path}: holds one list for each column, not rows; write it as JSON lines, one object a row"
            )
    if value and all(isinstance(v, dict) and v and all(k.isdigit() for k in v) for v in value.values()):
        raise DataError(
            f"{path}: holds columns, not rows; write it as JSON lines (pandas: orient='records', lines=True)"
        )
    lists = [k for k, v in value.items() if isinstance(v, list) and v and all(isinstance(x, dict) for x in v)]
    if not lists or value.keys() & known:
        return None
    if len(lists) > 1:
        raise DataError(
            f"{path}: holds several lists of rows, under {', '.join(lists)}; write each to a file of its own"
        )
    return lists[0]


def _parse(line: str, path: Path, number: int):
    try:
        return DECODER.decode(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number}: not JSON: {error.msg} at character {error.colno}") from None
    except RecursionError:
        raise DataError(f"{path}:{number}: nested too deeply") from None
    except DataError as error:
        raise DataError(f"{path}:{number}: {error}") from None
    except ValueError:
        raise DataError(f"{path}:{number}: not a row: it holds a number of thousands of digits") from None


def _checked(row, path: Path, line: int, half=True) -> dict:
    """The row; raises `DataError` where it is none, or holds half a surrogate pair, which no tokenizer can read."""
    if not isinstance(row, dict):
        raise DataError(f"{path}:{line}: a row is a JSON object with named columns, not {type(row).__name__}")
    if half:
        for name, value in row.items():
            _whole_characters(name, "the name of a column", path, line)
            _whole_characters(value, name, path, line)
    return row


def _whole_characters(value, name: str, path: Path, line: int) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{path}:{line}: {name.encode(errors='replace').decode()}, character {error.start + 1}: half a "
                "surrogate "
                f"pair (\\u{ord(value[error.start]):04x}), which is no character; write the whole one or take it out"
            ) from None
    elif isinstance(value, dict):
        for key, item in value.items():
            _whole_characters(key, name, path, line)
            _whole_characters(item, name, path, line)
    elif isinstance(value, list):
        for item in value:
            _whole_characters(item, name, path, line)


# --- CSV, tables, text


def _csv(path: Path, place: dict) -> Iterator[tuple[str, dict]]:
    csv.field_size_limit(sys.maxsize)  # Python's own limit is 131,072 characters
    try:
        header = next(csv.reader((line for _, line in _lines(path, {})), strict=True), None)
        if header is None:
            return
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise DataError(f"{path}:1: the header names the column {twice[0]!r} twice")
        if len(header) == 1 and (other := next((c for c in ";\t|" if c in header[0]), None)):
            raise DataError(f"{path}:1: the columns are separated by {other!r}; write the file with commas")
        reader = csv.reader((line for _, line in _lines(path, place)), strict=True)
        begins = not place.get("line")
        for cells in reader:
            if begins or not cells:  # the header; an empty line
                begins = begins and not cells
                continue
            if len(cells) != len(header):
                problem = "more" if len(cells) > len(header) else "fewer"
                raise DataError(
                    f"{path}:{place['line']}: {problem} fields than the header has columns ({len(cells)}, not "
                    f"{len(header)}); quote the commas and line ends in cells"
                )
            yield f"{path}:{place['line']}", dict(zip(header, cells))
    except csv.Error as error:
        raise DataError(f"{path}:{place.get('line', 1)}: not CSV: {error}") from None


def _table(path: Path, suffix: str, place: dict) -> Iterator[tuple[str, dict]]:
    """Rows of Parquet or Arrow (a file or a stream). Values that are absent in nested objects are left out."""
    number, done = 0, place.get("line", 0)
    try:
        for count, batches in _batches(path, suffix):
            if count is not None and number + count <= done:
                number += count
                continue
            for batch in batches:
                batch.validate(full=True)  # what a broken file holds could crash the process later
                nested = [f.name for f in batch.schema if f.type.num_fields]
                for row in batch.to_pylist():
                    number += 1
                    if number > done:
                        place["line"] = number
                        for name in nested:
                            row[name] = without_none(row[name])
                        yield f"{path}[{number}]", row
    except DataError:
        raise
    except Exception as error:  # a broken file makes pyarrow raise about anything
        kind = "Parquet" if suffix == ".parquet" else "Arrow"
        raise DataError(f"{path}: not a whole {kind} file (after row {number}): {error}") from None


def _batches(path: Path, suffix: str) -> Iterator[tuple[int | None, Iterator]]:
    """Groups of record batches, and how many rows a group has where that is known without reading it."""
    import pyarrow
    import pyarrow.parquet

    source = io.BytesIO(gzip.open(path, "rb").read()) if path.suffix == ".gz" else str(path)
    if suffix == ".parquet":
        file = pyarrow.parquet.ParquetFile(source)
        twice = [name for name in file.schema_arrow.names if file.schema_arrow.names.count(name) > 1]
        if twice:
            raise DataError(f"{path}: has two columns {twice[0]!r}")
        for group in range(file.num_row_groups):
            yield file.metadata.row_group(group).num_rows, file.iter_batches(row_groups=[group])
        return
    with pyarrow.memory_map(source) if isinstance(source, str) else pyarrow.PythonFile(source) as data:
        whole = data.read(6) == b"ARROW1"
        data.seek(0)
        if whole:
            file = pyarrow.ipc.open_file(data)
            yield None, (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            yield None, iter(pyarrow.ipc.open_stream(data))


def without_none(value):
    """Without the keys that a table holds for all rows because one row has them."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


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
