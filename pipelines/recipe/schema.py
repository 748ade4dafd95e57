"""What keys a section accepts, and of what type: read from the dataclasses themselves, values checked with pydantic.

Importing `transformers.TrainingArguments` and TRL's configs takes seconds; it is the price of checking against what the
stage will really build. `--help`, `report`, `push` and `rank` do without this module.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pydantic

from pipelines import ranges
from pipelines.errors import meant


@dataclass(frozen=True)
class Field:
    """One key of a section: its type, its default as text, its help text and the values allowed (empty: any).

    `keys`: where its value may be a mapping, or a list of them, the dataclass with the keys of that.
    """

    name: str
    hint: Any
    default: str
    help: str
    choices: tuple = ()
    keys: type | None = None

    @property
    def annotation(self) -> str:
        """The type for people to read: "int | None"."""
        return _words(self.hint, code=True)


@lru_cache(None)
def fields(cls: type) -> dict[str, Field]:
    """The keys of a section's dataclass, in its order."""
    hints, found = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        default = "(required)"
        if field.default is not dataclasses.MISSING:
            value = field.default.value if isinstance(field.default, enum.Enum) else field.default
            default = repr(value)
        elif field.default_factory is not dataclasses.MISSING:
            factory: Any = field.default_factory
            plain = factory in (list, dict) or getattr(factory, "__name__", "") == "<lambda>"
            default = repr(factory()) if plain else f"{getattr(factory, '__name__', 'made')}()"
        text = " ".join(str(field.metadata.get("help") or "").split())
        choices = tuple(field.metadata.get("choices") or ())
        keys = field.metadata.get("keys")
        found[field.name] = Field(field.name, hints[field.name], default, text, choices, keys)
    return found


def _plain(hint):
    """`hint` with enums as the literals that YAML can hold, and `Any` for classes that YAML cannot."""
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return typing.Literal[tuple(member.value for member in hint)]
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        options = [_plain(part) for part in parts]
        # `SchedulerType | str` would accept any string: where an enum is offered, only its values are right.
        if any(typing.get_origin(option) is typing.Literal for option in options):
            options = [option for option in options if option is not str]
        return typing.Union[tuple(options)]  # noqa: UP007  built at run time
    if origin in (list, tuple, dict):
        return origin[tuple(part if part is Ellipsis else _plain(part) for part in parts)]
    if isinstance(hint, type) and hint.__module__ not in ("builtins", "pathlib"):
        return Any
    return hint


@lru_cache(None)
def _adapter(hint) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(_plain(hint))


def _options(hint) -> tuple:
    """The alternatives of a hint: itself, or the members of a union."""
    plain = _plain(hint)
    return typing.get_args(plain) if typing.get_origin(plain) in (typing.Union, types.UnionType) else (plain,)


def check_value(field: Field, value) -> tuple[object, str | None]:
    """`(value as its type, None)` or `(value, what is wrong with it)`."""
    options = _options(field.hint)
    literals = [v for o in options if typing.get_origin(o) is typing.Literal for v in typing.get_args(o)]
    choices = field.choices or tuple(literals)
    if isinstance(value, bool) and str in map(type, choices) and bool not in options:
        # YAML 1.1 reads no, off, yes and on as truth values: where a choice has that name, it is meant.
        names = ("no", "off", "false") if value is False else ("yes", "on", "true")
        value = next((name for name in names if name in choices), value)
    if field.choices and value is not None and value not in field.choices:
        return value, f"must be one of {', '.join(map(str, field.choices))}{meant(value, field.choices)}"
    loose = any(o is Any or o is str or o is bool or (typing.get_origin(o) or o) is dict for o in options)
    if isinstance(value, bool) and not loose:
        return value, f"must be {_words(field.hint)}, not {str(value).lower()}"
    try:
        return _adapter(field.hint).validate_python(value), None
    except pydantic.ValidationError:
        if literals:
            known = ", ".join(map(str, literals))
            shown = f"must be one of {known}" if len(literals) <= 12 else "is none of the values known"
            return value, shown + meant(value, literals)
        return value, f"must be {_words(field.hint)}"


def wrong_keys(section: dict, cls: type, at: str, name: str) -> Iterator[tuple[str, str, object]]:
    """`(key path, message, value)` of what is wrong with a mapping inside a section: keys, types, ranges.

    `at` is its own key path, and `name` what `ranges` calls it.
    """
    known = fields(cls)
    for key, value in section.items():
        if key not in known:
            yield f"{at}.{key}", f"unknown key{meant(key, known)}", value
        elif wrong := check_value(known[key], value)[1]:
            yield f"{at}.{key}", wrong, value
    for key, message, value in ranges.problems(section, name):
        yield f"{at}.{key}", message, value


def _words(hint, code: bool = False) -> str:
    """A type in words: "a whole number or null", or with `code` as Python has it: "int | None"."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    out = []
    for option in _options(hint):
        if option is type(None):
            text = "None" if code else "null"
        elif typing.get_origin(option) is typing.Literal:
            text = " | ".join(map(repr, typing.get_args(option))) if code else "one of the known names"
        elif isinstance(option, type) and not typing.get_args(option):
            text = option.__name__ if code else words.get(option, option.__name__)
        else:
            text = str(option).replace("typing.", "")
        out.append(text)
    return (" | " if code else " or ").join(out)


def model_config_keys(model_type: str) -> tuple[set[str], list[str]]:
    """`(keys, types)`: keys that the config class of `model_type` takes (empty: unknown type), and all known types."""
    from transformers import CONFIG_MAPPING

    known = sorted(CONFIG_MAPPING.keys())
    if model_type not in known:
        return set(), known
    cls = CONFIG_MAPPING[model_type]
    keys = set(getattr(cls, "attribute_map", {}))
    if dataclasses.is_dataclass(cls):
        keys |= {field.name for field in dataclasses.fields(cls)}
    for base in cls.__mro__:
        if "__init__" in vars(base):
            keys |= set(inspect.signature(vars(base)["__init__"]).parameters)
    return keys - {"self", "kwargs", "args"}, known
