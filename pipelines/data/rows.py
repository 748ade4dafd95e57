"""Rows of any accepted form to the shape that a stage reads, with errors that name file and row.

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

from pipelines import errors
from pipelines.errors import DataError

NEEDS = {
    "text": ["text"],
    "sft": ["prompt", "completion"],
    "rankings": ["prompt", "chosen", "rejected"],  # or completions and ranks
    "prompts": ["prompt"],
    "samples": ["prompt", "completions"],
    "labelled": ["text", "label"],
    "seq2seq": ["source", "target"],
}
SHAREGPT = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}


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
            raise DataError(f"label {label!r} is none of {', '.join(names)}{errors.meant(label, names)}")
        return names.index(label)
    if label >= len(names):
        raise DataError(f"label {label} is out of range: there are {len(names)} labels (ids 0 to {len(names) - 1})")
    return label
