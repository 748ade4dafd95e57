r"""Rewards that a program can check: the number at the end of an answer, a pattern, JSON. For `reward.functions`.

    reward: {functions: ["pipelines.ppo.checkable:number_matches"]}

Each gives 1.0 or 0.0, and None ("does not apply", as in TRL) where a row has nothing in the column that it compares
with, so that tasks can be mixed. What a column holds must be readable: each function is tried on all rows before
training (`try_rows`), and a wrong one is an error then, with file and line.
"""

from __future__ import annotations

import functools
import json
from decimal import Decimal, InvalidOperation

import regex

from pipelines.errors import SetupError
from pipelines.ppo.final_number import final_number, same_number

SECONDS = 1.0  # that a pattern may take on one answer


def number_matches(completions: list[str], answer: list, **columns) -> list[float | None]:
    """1.0 where the number at the end of an answer equals that of the row's `answer` (text or a number).

    `answer` may be a whole worked solution that ends with its number, as GSM8K's. Raises `SetupError` where there is
    none in it.
    """
    rewards: list[float | None] = []
    for i, (completion, given) in enumerate(zip(completions, answer, strict=True)):
        if given is None:
            rewards.append(None)
            continue
        right = None if isinstance(given, bool) else final_number(str(given))
        if right is None:
            raise SetupError(
                f"{_at(columns, i)}answer: there is no number at the end of {_short(given)}. Give the number, or null "
                "where number_matches does not apply"
            )
        found = final_number(completion)
        rewards.append(float(found is not None and same_number(found, right)))
    return rewards


def pattern_matches(completions: list[str], pattern: list, **columns) -> list[float | None]:
    """1.0 where the whole answer, without white space around it, matches the row's regular expression `pattern`.

    `(?s)` lets a dot match line ends. Raises `SetupError` for a pattern that cannot be read, and for one that takes
    more than `SECONDS` on an answer.
    """
    rewards: list[float | None] = []
    for i, (completion, given) in enumerate(zip(completions, pattern, strict=True)):
        if given is None:
            rewards.append(None)
            continue
        try:
            rewards.append(float(matches(given, completion)))
        except (regex.error, TypeError, RecursionError) as error:
            raise SetupError(f"{_at(columns, i)}pattern: {_short(given)} is no regular expression: {error}") from None
        except TimeoutError:
            raise SetupError(
                f"{_at(columns, i)}pattern: {given!r} took more than {SECONDS:g} s on an answer of {len(completion)} "
                "characters: write it so that it does not try every way to cut the text (no `(a+)+`)"
            ) from None
    return rewards


def json_matches(completions: list[str], answer: list, **columns) -> list[float | None]:
    """1.0 where the answer is JSON that is equal to the row's `answer`, which holds JSON as text.

    Names of an object may come in any order; `1` equals `1.0`, but not `true` or `"1"`. The answer must be JSON from
    its first to its last character (white space aside): text or a Markdown fence around it is wrong. Raises
    `SetupError` where the row's is not.
    """
    rewards: list[float | None] = []
    for i, (completion, given) in enumerate(zip(completions, answer, strict=True)):
        if given is None:
            rewards.append(None)
            continue
        try:
            right = parsed(given)
        except (ValueError, TypeError, RecursionError) as error:
            hint = "" if isinstance(given, str) else ": write it as text (json.dumps)"
            raise SetupError(f"{_at(columns, i)}answer: {_short(given)} is no JSON text ({error}){hint}") from None
        try:
            rewards.append(float(same_json(parsed(completion), right)))
        except (ValueError, RecursionError):
            rewards.append(0.0)
    return rewards


def json_valid(completions: list[str], **columns) -> list[float]:
    """1.0 where the answer is JSON from its first to its last character (RFC 8259; each name of an object once)."""
    rewards = []
    for completion in completions:
        try:
            parsed(completion)
            rewards.append(1.0)
        except (ValueError, RecursionError):
            rewards.append(0.0)
    return rewards


for _function in (number_matches, pattern_matches, json_matches):
    _function.try_rows = True  # type: ignore[attr-defined]


def matches(pattern: str, answer: str) -> bool:
    """Whether the whole answer, without white space around it, matches a regular expression.

    For a pattern that is the same for all rows write a function of two lines with it. Raises `TimeoutError` after
    `SECONDS`.
    """
    return _compiled(pattern).fullmatch(answer.strip(), timeout=SECONDS) is not None


_compiled = functools.lru_cache(maxsize=1024)(regex.compile)


def parsed(text: str):
    """JSON as Python values, numbers exact (`Decimal`); `ValueError` for NaN, a name twice, anything around it."""
    if not isinstance(text, str):
        raise TypeError(f"it is a {type(text).__name__}")
    return json.loads(text, parse_int=_number, parse_float=_number, parse_constant=_refuse, object_pairs_hook=_object)


def same_json(one, other) -> bool:
    """Whether two values of `parsed` are the same: a truth value is no number."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    return type(one) is type(other) and one == other


def _number(text: str) -> Decimal | tuple[str]:
    """A number exactly; one whose power is more than `Decimal` holds, as it is written."""
    try:
        return Decimal(text)
    except InvalidOperation:
        return (text,)


def _refuse(name: str):
    raise ValueError(f"{name} is no JSON")


def _object(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a name twice")
    return found


def _at(columns: dict, i: int) -> str:
    where = columns.get("where")
    return f"{where[i]}: " if where else f"row {i}: "


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:20]} … {text[-35:]}"
