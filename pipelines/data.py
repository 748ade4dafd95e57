"""One `data:` section for all stages: sources to checked rows, with errors that name file and row.

A source is a local file (.jsonl .json .csv .parquet .txt, each also .gz; globs work), a folder, a hub id, or a file
that an earlier stage writes (`stage:NAME/samples.jsonl`). Rows come out normalised, one shape per use (the stage's
`ROWS`):

    text       text                                             pretrain, mlm
    sft        prompt + completion, or messages                 (instruction/input/output, ShareGPT are converted)
    rankings   prompt, completions, ranks (1 is best)           reward (prompt, chosen, rejected are a ranking of two)
               (+ margin, tags, models: one for each answer)
    prompts    prompt, and any further columns                  ppo, sample
    samples    prompt, completions (+ models, ended)            rank
    labelled   text (+ text_pair), label                        classify
    seq2seq    source, target                                   seq2seq

Every row carries `where` ("data/x.jsonl:17"), so whatever happens to it later can be said by name.
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import io
import json
import logging
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from pipelines import schema

logger = logging.getLogger(__name__)

NEEDS = {
    "text": ["text"],
    "sft": ["prompt", "completion"],
    "rankings": ["prompt", "chosen", "rejected"],  # or completions and ranks
    "prompts": ["prompt"],
    "samples": ["prompt", "completions"],
    "labelled": ["text", "label"],
    "seq2seq": ["source", "target"],
}
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
SHAREGPT = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
SIDES = ("train", "validation", "ptx")  # the last in ppo only: pretraining text beside the prompts
STREAMED = ("pretrain", "mlm", "sft")  # the kinds that can read their rows while they train
TRIED = 1000  # rows of a streamed source that `check` reads; the others are checked when they are read
SHOWN = 5  # problems shown per source; the rest are counted


class DataError(ValueError):
    """Data that cannot be used, with file, row and fix."""


# --- the section -------------------------------------------------------------------------------------------------


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


def problems(section: dict, kind: str, task: dict | None, read_rows: bool) -> Iterator[tuple[str, str, object]]:
    """`(key path below data, what is wrong, value)` for the section and, with `read_rows`, for every local row."""
    if not section.get("train"):
        yield "train", "needs a source: a file, a glob or a hub id", None
    value = section.get("validation")
    if isinstance(value, (int, float)) and not 0 < value < 1:
        yield "validation", "a fraction lies between 0 and 1 (or give a source)", value
    known = schema.fields("pipelines.sections:SourceSection")
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
    if kind not in STREAMED:
        message = f"is for {', '.join(STREAMED)}: this stage reads all its rows before it trains; drop the key"
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
            yield f"{at}.{key}", f"unknown key{schema.meant(key, known)}", value
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


# --- reading -----------------------------------------------------------------------------------------------------


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


# --- one row -----------------------------------------------------------------------------------------------------


def normalise(row: dict, kind: str, columns: dict | None = None, task: dict | None = None) -> dict:
    """The row in the shape of `kind`; raises `DataError` saying what is wrong with it."""
    row = dict(row)
    for ours, theirs in (columns or {}).items():
        if theirs not in row:
            raise DataError(f"no column {theirs!r} (mapped to {ours}); the row has {', '.join(row) or 'none'}")
        row[ours] = row.pop(theirs)
    if kind == "sft":
        return _sft(row)
    if kind == "rankings":
        return _ranking(row)
    missing = [c for c in NEEDS[kind] if row.get(c) is None]
    if missing:
        raise DataError(_missing(missing, row, kind))
    if kind == "text":
        return {"text": _filled(row, "text")}
    if kind == "seq2seq":
        return {"source": _filled(row, "source"), "target": _filled(row, "target")}
    if kind == "labelled":
        out = {"text": _filled(row, "text"), "label": _label(row["label"], task or {})}
        return {**out, "text_pair": _filled(row, "text_pair")} if row.get("text_pair") is not None else out
    if kind == "samples":
        return {**row, "prompt": _prompt(row["prompt"]), "completions": _answers(row)}
    assert kind == "prompts", kind
    return {**row, "prompt": _prompt(row["prompt"])}


def _sft(row: dict) -> dict:
    if row.get("conversations") is not None and row.get("messages") is None:
        turns = row["conversations"]
        unknown = [t.get("from") for t in turns if t.get("from") not in SHAREGPT]
        if unknown:
            raise DataError(f"conversations: unknown speaker {unknown[0]!r}; known: {', '.join(SHAREGPT)}")
        row["messages"] = [{"role": SHAREGPT[t["from"]], "content": t.get("value")} for t in turns]
    if row.get("messages") is not None:
        return {"messages": _dialogue(row["messages"], "messages", ends_with="assistant")}
    if row.get("instruction") is not None and row.get("output") is not None and row.get("prompt") is None:
        extra = row.get("input") or ""
        row["prompt"] = row["instruction"] + ("\n\n" + extra if extra.strip() else "")
        row["completion"] = row["output"]
    missing = [c for c in NEEDS["sft"] if row.get(c) is None]
    if missing:
        raise DataError(_missing(missing, row, "sft"))
    return {"prompt": _prompt(row["prompt"]), "completion": _answer(row, "completion")}


def _missing(missing: list[str], row: dict, kind: str) -> str:
    also = {"sft": " (or messages, or instruction and output)", "rankings": " (or completions and ranks)"}.get(kind, "")
    empty = [c for c in missing if c in row]
    if empty:
        return f"{empty[0]} is empty"
    return (
        f"no column {', '.join(missing)}{also}; the row has {', '.join(row) or 'none'}. "
        f"Name the columns with data.columns, e.g. {{{missing[0]}: {next(iter(row), 'their_name')}}}"
    )


def _filled(row: dict, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"{column} must be text, not {type(value).__name__}")
    if not value.strip():
        raise DataError(f"{column} is empty")
    return value


def _prompt(value):
    if isinstance(value, str):
        if not value.strip():
            raise DataError("prompt is empty")
        return value
    return _dialogue(value, "prompt", ends_with="user")


def _answer(row: dict, column: str) -> str:
    """An answer as text; one given as a message list holds exactly one assistant message."""
    value = row[column]
    if isinstance(value, list):
        if len(value) != 1 or value[0].get("role") != "assistant":
            raise DataError(f"{column} must be one assistant message (what comes before it belongs into prompt)")
        value = value[0].get("content")
    return _filled({column: value}, column)


def _ranking(row: dict) -> dict:
    """`prompt, completions, ranks`; a pair of chosen and rejected is a ranking of two."""
    if row.get("completions") is None:
        if row.get("prompt") is None and isinstance(row.get("chosen"), list):
            return _ranking(_implicit_prompt(row))
        if missing := [c for c in NEEDS["rankings"] if row.get(c) is None]:
            raise DataError(_missing(missing, row, "rankings"))
        answers = [_answer(row, "chosen"), _answer(row, "rejected")]
        if answers[0] == answers[1]:
            raise DataError("chosen and rejected are the same answer: there is nothing to learn from the pair")
        margin = row.get("margin")
        beside = _beside({"margin": [margin, 0] if _is_number(margin) else margin}, [1, 2])
        return {"prompt": _prompt(row["prompt"]), "completions": answers, "ranks": [1, 2], **beside}
    if missing := [c for c in ("prompt", "ranks") if row.get(c) is None]:
        raise DataError(_missing(missing, row, "rankings"))
    answers, ranks = _answers(row), row["ranks"]
    if not isinstance(ranks, list) or len(ranks) != len(answers):
        raise DataError(f"ranks must be a list of {len(answers)} numbers, one for each of the completions")
    if not all(map(_is_number, ranks)):
        raise DataError(f"ranks must be numbers, 1 being the best and equals sharing one; found {ranks}")
    if len({(a, r) for a, r in zip(answers, ranks)}) > len(set(answers)):
        raise DataError("the same answer has two different ranks")
    return {"prompt": _prompt(row["prompt"]), "completions": answers, "ranks": ranks, **_beside(row, ranks)}


def _beside(row: dict, ranks: list) -> dict:
    """What a ranking may hold for each answer beside its rank, where it does: `margin`, `tags`, `models`."""
    found = {name: row[name] for name in ("margin", "tags", "models") if row.get(name) is not None}
    for name, values in found.items():
        if not isinstance(values, list) or len(values) != len(ranks):
            raise DataError(f"{name} must be a list of {len(ranks)}, one for each answer; found {values!r}")
    margin = found.get("margin", [0] * len(ranks))
    if not all(map(_is_number, margin)):
        raise DataError(f"margin must be numbers, a pair's margin being their difference; found {margin}")
    if any(a < b and x < y for a, x in zip(ranks, margin) for b, y in zip(ranks, margin)):
        raise DataError(f"margin {margin} puts a worse answer above a better one (ranks {ranks}: 1 is best)")
    for name, kind in (("tags", list), ("models", str)):
        if not all(isinstance(value, kind) for value in found.get(name, [])):
            raise DataError(f"{name} must hold {'a list of tags' if kind is list else 'a name'} for each answer")
    if not all(isinstance(tag, str) for answer in found.get("tags", []) for tag in answer):
        raise DataError(f"tags must be texts; found {found['tags']}")
    return found


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _answers(row: dict) -> list[str]:
    """The answers of a row that holds several to one prompt."""
    completions = row["completions"]
    if not isinstance(completions, list) or len(completions) < 2:
        raise DataError("completions must be a list of two or more answers")
    return [_answer({"completions": c}, "completions") for c in completions]


def _implicit_prompt(row: dict) -> dict:
    """chosen and rejected as whole dialogues with a common beginning: that beginning is the prompt."""
    chosen, rejected = row["chosen"], row["rejected"]
    if not isinstance(rejected, list) or chosen[:-1] != rejected[:-1] or len(chosen) < 2:
        raise DataError("no column prompt, and chosen and rejected do not share all turns but the last")
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _dialogue(messages, column: str, ends_with: str) -> list[dict]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{column} must be text or a list of messages with role and content")
    out = []
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict) or "role" not in message:
            raise DataError(f"{column}: message {i} has no role")
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            raise DataError(f"{column}: message {i} ({message['role']}) is empty")
        out.append({"role": message["role"], "content": message["content"]})
    turns = [m["role"] for m in out if m["role"] != "system"]
    if any(m["role"] == "system" for m in out[1:]):
        raise DataError(f"{column}: a system message may only come first")
    for i, role in enumerate(turns):
        if role not in ("user", "assistant"):
            raise DataError(f"{column}: unknown role {role!r}; use system, user, assistant")
        if role != ("user", "assistant")[i % 2]:
            raise DataError(f"{column}: roles must alternate user, assistant, …; found {', '.join(turns)}")
    if not turns or turns[-1] != ends_with:
        raise DataError(f"{column} must end with a message of the {ends_with}")
    return out


def _label(label, task: dict):
    kind, names = task.get("problem_type", "single_label_classification"), task.get("labels")
    if kind == "regression":
        try:
            return float(label)
        except (TypeError, ValueError):
            raise DataError(f"label must be a number for regression, not {label!r}") from None
    if kind == "multi_label_classification":
        if not isinstance(label, list):
            raise DataError(f"label must be a list of labels for multi-label classification, not {label!r}")
        return [_class(item, names) for item in label]
    return _class(label, names)


def _class(label, names: list[str] | None):
    """A class as its id where names are known (an id or a name may stand in the data), else as it stands."""
    if isinstance(label, str) and label.lstrip("-").isdigit():
        label = int(label)  # CSV has no numbers
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise DataError(f"label must be a class id or name, not {label!r}")
    if isinstance(label, int) and label < 0:
        raise DataError(f"label {label} is out of range: ids start at 0")
    if names is None:
        return label
    if isinstance(label, str):
        if label not in names:
            raise DataError(f"label {label!r} is none of {', '.join(names)}{schema.meant(label, names)}")
        return names.index(label)
    if label >= len(names):
        raise DataError(f"label {label} is out of range: there are {len(names)} labels (ids 0 to {len(names) - 1})")
    return label


# --- whole sides -------------------------------------------------------------------------------------------------


def stream(section: dict, side: str, kind: str, seed: int, task: dict | None = None) -> Iterator[dict]:
    """Normalised rows of one side, one after the other, with `where`: weights and the validation fraction applied.

    Which rows are held out or left out by a weight depends only on the seed and the row itself (its prompt, where it
    has one), never on its place, so a growing file keeps its split and the same prompt is never on both sides.
    """
    share = fraction(section)
    origin = "train" if side == "validation" and share else side
    for source in sources(section, origin):
        weight = float(source.get("weight", 1.0)) if side == "train" else 1.0
        for where, raw in read(source):
            try:
                row = normalise(raw, kind, source.get("columns"), task)
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
            if share and (_draw(row, seed, "split") < share) != (side == "validation"):
                continue
            copies = int(weight) + (_draw(row, seed, where) < weight - int(weight))
            for _ in range(copies):
                yield {**row, "where": where}


def load(section: dict, kind: str, seed: int, task: dict | None = None) -> tuple[list[dict], list[dict]]:
    """`(train rows, validation rows)` in memory; the second is empty where the recipe has no validation, the first where
    it streams them."""
    streaming = section.get("streaming")
    train = [] if streaming else list(stream(section, "train", kind, seed, task))
    has_validation = section.get("validation") is not None
    validation = list(stream(section, "validation", kind, seed, task)) if has_validation else []
    if not train and not streaming:
        raise DataError("data.train: no rows are left for training")
    if has_validation and not validation:
        raise DataError(f"data.validation: no rows ({section['validation']!r} of {len(train)}); raise the fraction")
    return train, validation


def endless(section: dict, kind: str, seed: int, places: list[dict]) -> Iterator[dict]:
    """Normalised training rows without end, with `where`; a source that ends begins again.

    The next row comes from the source that is furthest behind its `weight`'s share of all rows (D'Hondt's method), so
    that the mixture is the same from beginning to end. `places` (an empty mapping for each source, or a copy of what
    it held earlier) says where to begin and is kept up to date, as in `read`. Several files of a source come in another
    order each time.
    """
    found = sources(section, "train")
    readers = [_again(source, kind, seed, place) for source, place in zip(found, places, strict=True)]
    weights = [float(source.get("weight", 1.0)) for source in found]
    while True:
        behind = max(range(len(found)), key=lambda i: weights[i] / (places[i].get("taken", 0) + 1))
        row = next(readers[behind])
        places[behind]["taken"] = places[behind].get("taken", 0) + 1
        yield row


def _again(source: dict, kind: str, seed: int, place: dict) -> Iterator[dict]:
    while True:
        epoch = place.setdefault("epoch", 0)
        for where, raw in read(source, place, f"{seed}|{epoch}"):
            try:
                row = normalise(raw, kind, source.get("columns"))
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
            yield {**row, "where": where}
        if not place.get("rows"):
            raise DataError(f"{source['path']}: no rows")
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


def content(section: dict) -> dict[str, dict]:
    """`fingerprint`, and the commit at which hub data now stand: by this, what is made of the rows may be kept."""
    out = fingerprint(section)
    for source in out.values():
        if "hub" in source:
            source["commit"] = _commit(source["hub"], source["revision"])
    return out


def _commit(path: str, revision: str | None) -> str | None:
    """The commit of a hub data set; without network that which lies in the hub's cache and will be read, if any."""
    from huggingface_hub import HfApi, constants

    try:
        return HfApi().dataset_info(path, revision=revision, timeout=10).sha
    except Exception:  # no network, or offline by choice: what cannot be read either is said when it is read
        known = Path(constants.HF_HUB_CACHE) / f"datasets--{path.replace('/', '--')}" / "refs" / (revision or "main")
        return known.read_text().strip() if known.is_file() else None


def fingerprint(section: dict) -> dict[str, dict]:
    """What the rows come from: SHA-256 and size of every local file, id and revision of every hub source."""
    out: dict[str, dict] = {}
    for side in SIDES:
        for source in sources(section, side):
            if not is_local(source["path"]):
                out[source["path"]] = {"hub": source["path"], "revision": source.get("revision")}
                continue
            for path in files(source["path"]):
                for part in sorted(path.rglob("*")) if path.is_dir() else [path]:
                    if part.is_file():
                        with open(part, "rb") as stream_:
                            digest = hashlib.file_digest(stream_, "sha256").hexdigest()
                        out[str(part)] = {"sha256": digest, "bytes": part.stat().st_size}
    return out
