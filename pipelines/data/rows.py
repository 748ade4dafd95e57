"""Rows of any accepted form to the shape that a stage reads, with errors that name file and row.

    text       text                                             pretrain, mlm
    sft        prompt + completion, or messages                 (instruction/input/output, ShareGPT are converted)
    rankings   prompt, completions, ranks (1 is best)           reward (prompt, chosen, rejected are a ranking of two)
               (+ margin, tags, models: one for each answer)
    unpaired   prompt, completions, labels                      kto (from prompt, completion, label, or from rankings)
    prompts    prompt, and any further columns                  ppo, sample
    samples    prompt, completions (+ models, ended)            rank
    labelled   text (+ text_pair), label                        classify
    seq2seq    source, target                                   seq2seq

A prompt is text or messages, an answer text or, where it holds more than text, messages; messages are in the shape of
`pipelines.data.dialogues`, and rows with tools have `tools`. Every row carries `where` ("data/x.jsonl:17"), so whatever
happens to it later can be said by name. docs/data-formats.md shows all forms that are accepted.
"""

from __future__ import annotations

import json
import re

from pipelines import errors
from pipelines.data import dialogues
from pipelines.data.dialogues import text, type_name, written_list
from pipelines.errors import DataError

NEEDS = {
    "text": ["text"],
    "sft": ["prompt", "completion"],
    "rankings": ["prompt", "chosen", "rejected"],  # or completions and ranks
    "unpaired": ["prompt", "completion", "label"],  # or a ranking
    "prompts": ["prompt"],
    "samples": ["prompt", "completions"],
    "labelled": ["text", "label"],
    "seq2seq": ["source", "target"],
}
DIALOGUE = ("prompt", "instruction", "input", "system", "history", "tools")
# All columns that a kind of rows reads.
READS = {
    "text": ("text",),
    "sft": (*DIALOGUE, "completion", "output", "messages", "conversations"),
    "rankings": (*DIALOGUE, "chosen", "rejected", "completions", "ranks", "margin", "tags", "models"),
    "unpaired": (*DIALOGUE, "completion", "output", "label", "chosen", "rejected", "completions", "ranks", "tags"),
    "prompts": DIALOGUE,
    "samples": (*DIALOGUE, "completions", "models", "ended"),
    "labelled": ("text", "text_pair", "label"),
    "seq2seq": ("source", "target"),
}
KEEPS = ("prompts", "samples")  # kinds whose further columns are kept: reward functions get them
# Further columns of prompts that would collide with what a reward function is given, or with our own.
TAKEN = ("prompts", "completions", "completion_ids", "where")
USUAL = {  # what others call our columns, for the advice when one is missing
    "prompt": ("question", "query", "instruction", "prompts", "problem", "input", "text", "messages"),
    "completion": ("answer", "response", "output", "solution", "target", "reply"),
    "chosen": ("preferred", "better", "accepted", "response_chosen", "chosen_response"),
    "rejected": ("dispreferred", "worse", "response_rejected", "rejected_response"),
    "completions": ("responses", "answers", "candidates", "outputs"),
    "ranks": ("rank", "ranking"),
    "text": ("content", "sentence", "review", "document", "body", "comment", "tweet", "article", "premise"),
    "label": ("labels", "class", "category", "target", "sentiment", "score", "rating", "stars"),
    "source": ("input", "document", "article", "src", "text", "en"),
    "target": ("output", "summary", "highlights", "tgt", "translation", "label"),
}
SAFE = 2.0**24  # ranks up to here are told apart as 32-bit numbers
LARGEST = 3.0e38  # what a 32-bit number holds


def normalise(
    row: dict, kind: str, columns: dict | None = None, task: dict | None = None, ignored: set[str] | None = None
) -> dict:
    """The row in the shape of `kind`; raises `DataError` saying what is wrong with it.

    `columns` maps our names to theirs; `ignored` gets the names of columns (and keys of messages) that hold something
    and are not read.
    """
    ignored = set() if ignored is None else ignored
    if columns:
        for ours, theirs in columns.items():
            if theirs not in row:
                raise DataError(f"no column {theirs!r} (mapped to {ours}); the row has {', '.join(row) or 'none'}")
        taken = set(columns.values())
        ignored |= {name for name in columns if name in row and name not in taken}
        rest = {name: value for name, value in row.items() if name not in taken}
        row = rest | {ours: row[theirs] for ours, theirs in columns.items()}
    else:
        row = dict(row)
    if kind == "sft":
        out = _sft(row, columns or {}, ignored)
    elif kind == "rankings":
        out = _ranking(row, ignored)
    elif kind == "unpaired":
        out = _unpaired(row, ignored)
    elif kind in KEEPS:
        return _kept(row, kind, ignored)
    else:
        if missing := [c for c in NEEDS[kind] if row.get(c) is None]:
            raise DataError(_missing(missing, row, kind))
        if kind == "labelled":
            out = {"text": text(row.pop("text"), "text"), "label": _label(row.pop("label"), task or {})}
            if (pair := row.pop("text_pair", None)) is not None:
                out["text_pair"] = text(pair, "text_pair")
        else:
            out = {column: text(row.pop(column), column) for column in NEEDS[kind]}
        if row:
            ignored |= {name for name, value in row.items() if value is not None and value != ""}
        return out
    if row:
        dialogues.unused_columns(row, ignored)
    return out


def _sft(row: dict, columns: dict, ignored: set[str]) -> dict:
    found = next((c for c in ("messages", "conversations") if row.get(c) is not None), None)
    if found and not ("prompt" in columns or "completion" in columns):
        tools = dialogues.tools(row)
        dialogue = dialogues.messages(row.pop(found), found, ignored)
        dialogue = dialogues.with_context(row, dialogue, found)
        dialogues.order(dialogue, found, ("assistant",))
        if all(m.get("learn") is False for m in dialogue if m["role"] == "assistant"):
            raise DataError(f"{found}: every answer is marked as not to be learned: leave the row out")
        return {"messages": dialogue, **tools}
    history = row.get("history")
    asked, answer, tools = _example(row, "sft", ignored)
    if isinstance(answer, list) and all(m.get("learn") is False for m in answer if m["role"] == "assistant"):
        raise DataError("the answer is marked as not to be learned: leave the row out")
    if history:  # the format says that its answers are learned, too
        answer = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
        return {"messages": [*asked, *answer], **tools}
    return {"prompt": asked, "completion": answer, **tools}


def _example(row: dict, kind: str, ignored: set[str]) -> tuple[str | list[dict], str | list[dict], dict]:
    """`(prompt, answer, {"tools": …} or {})` of a row with one answer, which are taken out of it."""
    alpaca = row.get("prompt") is None and row.get("instruction") is not None
    learned = "output" if alpaca and row.get("completion") is None and "output" in row else "completion"
    needed = [learned if c == "completion" else c for c in NEEDS[kind]]
    if missing := [c for c in needed if row.get(c) is None and not (c == "prompt" and alpaca)]:
        raise DataError(_missing(missing, row, kind))
    tools, asked = dialogues.tools(row), dialogues.prompt(row, ignored)
    return asked, dialogues.answer(row.pop(learned), learned, ignored), tools


def _unpaired(row: dict, ignored: set[str]) -> dict:
    """`prompt, completions, labels`: of each answer whether it is desirable, None where nobody knows.

    A row has one answer with its label, or is a ranking, from which `desirable` has them.
    """
    if row.get("completions") is not None or row.get("chosen") is not None:
        ignored |= {name for name in ("margin", "models") if row.get(name) is not None}
        ranking = _ranking(row, ignored)
        labels = desirable(ranking["ranks"], ranking.get("tags"))
        keys = [_key(answer) for answer in ranking["completions"]]
        if len({(key, label) for key, label in zip(keys, labels, strict=True)}) > len(set(keys)):
            raise DataError("the same answer stands twice, once with a tag and once without: which is it?")
        kept = {name: ranking[name] for name in ("prompt", "completions", "tools") if name in ranking}
        return {**kept, "labels": labels}
    asked, answer, tools = _example(row, "unpaired", ignored)
    _need_marks_off([answer], "labelled")
    return {"prompt": asked, "completions": [answer], "labels": [_yes_or_no(row.pop("label"))], **tools}


def desirable(ranks: list[float], tags: list[list[str]] | None) -> list[bool | None]:
    """Which answers of a ranking are desirable, and which are not: None for those of which it says neither.

    An answer with a tag is undesirable, wherever it ranks; one without that no other beats is desirable. Where no
    answer of the row has a tag (pairs, say), the last are undesirable, and if all rank alike nothing is known.
    """
    first, last = min(ranks), max(ranks)
    if any(tags or ()):
        return [False if tagged else True if rank == first else None for rank, tagged in zip(ranks, tags, strict=True)]
    if first == last:
        return [None] * len(ranks)
    return [True if rank == first else False if rank == last else None for rank in ranks]


def _yes_or_no(label) -> bool:
    """A label of an answer; text, because CSV has no booleans."""
    known = {"true": True, "1": True, "false": False, "0": False}
    if isinstance(label, (bool, int)) and label in (0, 1):
        return bool(label)
    if isinstance(label, str) and label.strip().lower() in known:
        return known[label.strip().lower()]
    raise DataError(f"label must be true (a desirable answer) or false (an undesirable one), not {_short(label)}")


def _missing(missing: list[str], row: dict, kind: str) -> str:
    also = {
        "sft": " (or messages, or instruction and output)",
        "rankings": " (or completions and ranks)",
        "unpaired": " (or completions and ranks, or chosen and rejected)",
    }.get(kind, "")
    empty = [c for c in missing if c in row]
    if empty:
        return f"{empty[0]} is empty"
    names: dict = {}
    for column in missing:
        free = [c for c in row if isinstance(c, str) and c not in READS[kind] and c not in names.values()]
        near = [c for c in USUAL.get(column, ()) if c in free]
        names[column] = near[0] if near else "THEIR_NAME"
    return (
        f"no column {', '.join(missing)}{also}; the row has {', '.join(map(str, row)) or 'none'}. "
        f"Name the columns with data.columns, e.g. "
        f"{{{', '.join(f'{ours}: {theirs}' for ours, theirs in names.items())}}}"
    )


def _ranking(row: dict, ignored: set[str]) -> dict:
    """`prompt, completions, ranks`; a pair of chosen and rejected is a ranking of two."""
    tools = dialogues.tools(row)
    if row.get("completions") is None:
        if missing := [c for c in ("chosen", "rejected") if row.get(c) is None]:
            _need_prompt(row, missing)
        asked, answers = _pair(row, ignored)
        margin, ranks = row.pop("margin", None), [1, 2]
        beside = _beside({**row, "margin": [margin, 0] if _is_number(margin) else margin}, ranks)
    else:
        _need_prompt(row, [c for c in ("ranks",) if row.get(c) is None])
        asked, answers = dialogues.prompt(row, ignored), _answers(row, ignored)
        ranks = row.pop("ranks")
        if not isinstance(ranks, list) or len(ranks) != len(answers):
            raise DataError(
                f"ranks must be a list of {len(answers)} numbers, one for each of the completions{written_list(ranks)}"
            )
        if not all(map(_is_number, ranks)):
            raise DataError(f"ranks must be numbers, 1 being the best and equals sharing one; found {_short(ranks)}")
        if any(abs(rank) > SAFE for rank in ranks):
            raise DataError(f"ranks must lie within ±{SAFE:.0f}; found {_short(ranks)}")
        keys = [_key(a) for a in answers]
        if len(set(zip(keys, ranks))) > len(set(keys)):
            raise DataError("the same answer has two different ranks")
        beside = _beside(row, ranks)
    for name in ("margin", "tags", "models"):
        row.pop(name, None)
    _need_marks_off(answers, "ranked")
    return {"prompt": asked, "completions": answers, "ranks": ranks, **tools, **beside}


def _need_marks_off(answers: list, done: str) -> None:
    if any(m.get("learn") is False for a in answers if isinstance(a, list) for m in a):
        raise DataError(f"an answer is marked as not to be learned, but it is {done}: leave the row or the mark out")


def _need_prompt(row: dict, missing: list[str]) -> None:
    if row.get("prompt") is None and row.get("instruction") is None:
        missing = ["prompt", *missing]
    if missing:
        raise DataError(_missing(missing, row, "rankings"))


def _pair(row: dict, ignored: set[str]) -> tuple[str | list[dict], list]:
    """`(prompt, [better answer, worse answer])` of a row with chosen and rejected."""
    chosen, rejected = row.pop("chosen"), row.pop("rejected")
    if dialogues.is_whole(chosen) and dialogues.is_whole(rejected):
        better = dialogues.whole(chosen, "chosen", ignored)
        return dialogues.split_pair(row, better, dialogues.whole(rejected, "rejected", ignored), ignored)
    if row.get("prompt") is None and row.get("instruction") is None:
        wrong = [v for v in (chosen, rejected) if not isinstance(v, (str, list, dict))]
        if wrong:
            raise DataError(f"chosen and rejected must be text or messages, not {type_name(wrong[0])}")
        raise DataError(_missing(["prompt"], {**row, "chosen": chosen, "rejected": rejected}, "rankings"))
    asked = dialogues.prompt(row, ignored)
    answers = [dialogues.answer(chosen, "chosen", ignored), dialogues.answer(rejected, "rejected", ignored)]
    if answers[0] == answers[1]:
        raise DataError("chosen and rejected are the same answer: there is nothing to learn from the pair")
    return asked, answers


def _beside(row: dict, ranks: list) -> dict:
    """What a ranking may hold for each answer beside its rank, where it does: `margin`, `tags`, `models`."""
    found = {name: row[name] for name in ("margin", "tags", "models") if row.get(name) is not None}
    for name, values in found.items():
        if not isinstance(values, list) or len(values) != len(ranks):
            raise DataError(
                f"{name} must be a list of {len(ranks)}, one for each answer; found "
                f"{_short(values)}{written_list(values)}"
            )
    margin = found.get("margin", [0] * len(ranks))
    if not all(map(_is_number, margin)):
        raise DataError(f"margin must be numbers, a pair's margin being their difference; found {_short(margin)}")
    if any(a < b and x < y for a, x in zip(ranks, margin) for b, y in zip(ranks, margin)):
        raise DataError(f"margin {_short(margin)} puts a worse answer above a better one (ranks {ranks}: 1 is best)")
    for name, kind in (("tags", list), ("models", str)):
        if not all(isinstance(value, kind) for value in found.get(name, [])):
            raise DataError(f"{name} must hold {'a list of tags' if kind is list else 'a name'} for each answer")
    if not all(isinstance(tag, str) for answer in found.get("tags", []) for tag in answer):
        raise DataError(f"tags must be texts; found {_short(found['tags'])}")
    return found


def _is_number(value) -> bool:
    """Whether a value is a number that 32-bit arithmetic can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def _short(value) -> str:
    try:
        shown = repr(value)
    except ValueError:  # a whole number of more than 4300 digits
        return "a number of thousands of digits"
    return shown if len(shown) < 80 else shown[:77] + "…"


def _key(answer):
    """The same for the same answer; can be put into a set."""
    return answer if isinstance(answer, str) else json.dumps(answer, sort_keys=True)


def _answers(row: dict, ignored: set[str]) -> list:
    """The answers of a row that holds several to one prompt."""
    completions = row.pop("completions")
    if not isinstance(completions, list) or len(completions) < 2:
        raise DataError(f"completions must be a list of two or more answers{written_list(completions)}")
    return [dialogues.answer(c, "completions", ignored) for c in completions]


def _kept(row: dict, kind: str, ignored: set[str]) -> dict:
    """A row of prompts or samples: what is read of it, and all that it holds beside."""
    alpaca = row.get("prompt") is None and row.get("instruction") is not None
    if missing := [c for c in NEEDS[kind] if row.get(c) is None and not (c == "prompt" and alpaca)]:
        raise DataError(_missing(missing, row, kind))
    out = {"prompt": dialogues.prompt(row, ignored), **dialogues.tools(row)}
    if kind == "samples":
        out["completions"] = _answers(row, ignored)
        if not all(isinstance(answer, str) for answer in out["completions"]):
            raise DataError("completions: answers with tool calls or reasoning cannot be compared by people; give text")
        for name, type_ in (("models", str), ("ended", bool)):
            if (values := row.get(name)) is not None and not (
                isinstance(values, list)
                and len(values) == len(out["completions"])
                and all(isinstance(value, type_) for value in values)
            ):
                raise DataError(
                    f"{name} must be a list of {len(out['completions'])} {'names' if type_ is str else 'booleans'}, "
                    f"one for each of the completions; found {_short(values)}"
                )
    for name in TAKEN if kind == "prompts" else ("where",):
        if row.pop(name, None) is not None:
            ignored.add(name)
    rest = {}
    for name, value in row.items():
        if name in dialogues.INSTEAD or name in dialogues.NOT_TEXT:
            dialogues.unused_columns({name: value}, ignored)
        if isinstance(value, (list, dict, int)):
            dialogues.plain(value, name)
        rest[name] = value
    return {**rest, **out}


def _label(label, task: dict):
    kind, names = task.get("problem_type", "single_label_classification"), task.get("labels")
    if kind == "regression":
        return _target(label)
    if kind == "multi_label_classification":
        if not isinstance(label, list):
            raise DataError(
                f"label must be a list of labels for multi-label classification, not "
                f"{_short(label)}{written_list(label)}"
            )
        if len(label) > 1 and all(isinstance(item, (bool, float)) or item in (0, 1) for item in label):
            if any(isinstance(item, (bool, float)) for item in label) or len(label) > 2 or label[0] == label[1]:
                raise DataError(
                    f"label {_short(label)} looks like a 0 or 1 for each class; give the ids or names of the classes "
                    f"that the text has, here {[i for i, item in enumerate(label) if item]}"
                )
        found = [_class(item, names) for item in label]
        if len(set(found)) < len(found):
            raise DataError(f"label {_short(label)} holds a label twice")
        return found
    return _class(label, names)


def _target(label) -> float:
    """The number that a regression is to predict."""
    number = label
    if isinstance(label, str):
        if not label.strip():
            raise DataError("label is empty")
        try:
            number = float(label) if label.isascii() and "_" not in label else None
        except ValueError:
            number = None
    if not _is_number(number):
        raise DataError(f"label must be a (finite) number for regression, not {_short(label)}")
    return float(number)


def _class(label, names: list[str] | None):
    """A class as its id where names are known (the data may hold an id or a name), else the label itself."""
    if isinstance(label, str):
        if not label or label.isspace():
            raise DataError("label is empty")
        if re.fullmatch(r"-?[0-9]{1,18}", label):
            label = int(label)  # CSV has no numbers
        elif label[0] == "[" and label.rstrip()[-1] == "]":
            raise DataError(
                f"label {_short(label)} is a list written as text: write the rows as JSON lines, and set "
                "task.problem_type: multi_label_classification"
            )
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise DataError(f"label must be a class id or name, not {_short(label)}")
    if isinstance(label, int) and not 0 <= label < 10**18:
        raise DataError(f"label {_short(label)} is out of range: ids start at 0")
    if names is None:
        return label
    if isinstance(label, str):
        if label not in names:
            raise DataError(f"label {_short(label)} is none of {', '.join(names)}{errors.meant(label, names)}")
        return names.index(label)
    if label >= len(names):
        raise DataError(f"label {label} is out of range: there are {len(names)} labels (ids 0 to {len(names) - 1})")
    return label
