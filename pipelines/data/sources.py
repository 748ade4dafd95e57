"""Sources of a `data:` section and the rows in them, as they are in the file.

A source is a local file (.jsonl .json .csv .parquet .arrow .txt, each also .gz; globs work), a folder (of
`save_to_disk`, or as `datasets.load_dataset` takes it), a hub id, or a file that an earlier stage writes
(`stage:NAME/samples.jsonl`).
"""

from __future__ import annotations

import glob
import os
import random
from collections.abc import Iterator
from pathlib import Path

from pipelines.data import readers
from pipelines.data.readers import SUFFIXES
from pipelines.errors import DataError

SAVED = ("dataset_dict.json", "state.json")  # a folder that `save_to_disk` wrote holds one of them
TRIED = 1000  # rows of a streamed source that `check` reads; the others are checked when they are read
SHOWN = 5  # problems shown per source; the rest are counted


def sources(section: dict, side: str) -> list[dict]:
    """The sources of `section[side]` (one of `SIDES`) in full form; none when it is absent or a fraction."""
    value = section.get(side)
    if value is None or isinstance(value, (int, float)):
        return []
    items = value if isinstance(value, list) else [value]
    base = {"columns": section.get("columns") if side != "ptx" else None}  # those are names of the prompts' columns
    full = lambda item: {**base, **item} if isinstance(item, dict) else item  # `check` refuses anything else
    return [{**base, "path": i} if isinstance(i, str) else full(i) for i in items]


def fraction(section: dict) -> float:
    """The share of training rows held out for validation: 0 when validation is absent or a source of its own."""
    value = section.get("validation")
    return float(value) if isinstance(value, (int, float)) else 0.0


def is_local(path: str) -> bool:
    """Whether `path` is meant as a local file or folder rather than a hub id."""
    plain = path.removesuffix(".gz")
    return plain.endswith(SUFFIXES) or path.startswith(("/", ".", "~")) or "*" in path or os.path.exists(path)


def files(path: str) -> list[Path]:
    """The files a local path or glob stands for, sorted; a folder stands for itself (read by `datasets`)."""
    return sorted(Path(p) for p in glob.glob(os.path.expanduser(path), recursive=True))


def read(source: dict, place: dict | None = None, order: str | None = None) -> Iterator[tuple[str, dict]]:
    """`(where, row)` for every row of a source as it is in the file; at most `rows` of them.

    `place` (empty at first, plain values) says where to begin, without reading what lies before it, and always where
    the row given last ends: keep a copy to go on from there. `order` is the seed of the order of several files (None:
    by name).
    """
    streaming, place = place is not None, {} if place is None else place
    limit, path = source.get("rows"), source["path"]
    parts = files(path) if is_local(path) else []
    if is_local(path) and not parts:
        raise DataError(f"{path}: no such file (looked in {Path.cwd()})")
    if len(parts) > 1 and (folder := next((part for part in parts if part.is_dir()), None)):
        raise DataError(f"{path}: names the folder {folder} beside other files; a folder is a source of its own")
    if order is not None:
        random.Random(order).shuffle(parts)
    for number in range(place.setdefault("file", 0), max(1, len(parts))):
        for item in _part(source, parts[number] if parts else None, place, streaming):
            place["rows"] = place.get("rows", 0) + 1
            if limit is not None and place["rows"] > limit:
                return
            yield item
        place |= {"file": number + 1, "line": 0, "byte": 0, "item": 0}


def _part(source: dict, path: Path | None, place: dict, streaming: bool) -> Iterator[tuple[str, dict]]:
    """The rows of one file or folder of a source, or (None) of a hub data set."""
    if path is None or path.is_dir() and not any((path / name).is_file() for name in SAVED):
        return _hub(source, place, streaming)
    return _folder(path, source, place) if path.is_dir() else readers.rows(path, source, place)


def _folder(path: Path, source: dict, place: dict) -> Iterator[tuple[str, dict]]:
    """The rows of a folder that `save_to_disk` of `datasets` wrote, in its order."""
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
        if isinstance(found, datasets.DatasetDict):
            split = source.get("split", "train")
            if split not in found:
                raise DataError(f"{path}: has no split {split!r}, but {', '.join(found)}; set `split` of the source")
            found = found[split]
        elif "split" in source:
            raise DataError(f"{path}: holds one data set without splits; drop `split` of the source")
    except DataError:
        raise
    except Exception as error:  # a broken folder makes `datasets` raise about anything
        raise DataError(f"{path}: cannot be read as a folder of save_to_disk: {error}") from None
    number = place.get("line", 0)
    try:  # in batches, as that is far faster than row by row
        for batch in found.skip(number).iter(batch_size=1000):
            for values in zip(*batch.values()):
                number += 1
                place["line"] = number
                row = {name: readers.without_none(value) for name, value in zip(batch, values)}
                yield f"{path}[{number}]", row
    except Exception as error:
        raise DataError(f"{path}: after row {number}: {type(error).__name__}: {error}") from None


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
