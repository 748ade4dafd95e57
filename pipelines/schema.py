"""What keys a section accepts, and of what type: read from the source of the dataclasses, without importing them.

Importing `transformers.TrainingArguments` takes seconds, and building one touches hardware and global state. A recipe
must be checked in a moment and anywhere, so the dataclass fields are read with `ast` from the installed files (always
those of the installed version) and values are checked with pydantic against the evaluated annotations.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import typing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pydantic

# Names that these packages export lazily from their top level: where they are defined.
HOMES = {
    ("transformers", "TrainingArguments"): ("transformers", "training_args"),
    ("transformers", "Seq2SeqTrainingArguments"): ("transformers", "training_args_seq2seq"),
    ("transformers", "PretrainedConfig"): ("transformers", "configuration_utils"),
    ("transformers", "PreTrainedConfig"): ("transformers", "configuration_utils"),
}
ENUM_HOMES = ["transformers.trainer_utils", "transformers.training_args", "transformers.debug_utils"]


@dataclass(frozen=True)
class Field:
    """One key of a section: its annotation as written, its default as written, its help text."""

    name: str
    annotation: str
    default: str
    help: str
    choices: tuple = ()


@lru_cache(None)
def file_of(module: str) -> Path | None:
    """The source file of a dotted module name, found without importing the module or its parents' children."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent.joinpath(*rest) if rest else Path(spec.origin)
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@lru_cache(None)
def _tree(module: str) -> ast.Module | None:
    path = file_of(module)
    return None if path is None else ast.parse(path.read_text(encoding="utf-8"))


@lru_cache(None)
def fields(target: str) -> dict[str, Field]:
    """Fields of the dataclass `"package.module:Class"` with those of its bases, as a dataclass would order them."""
    module, _, name = target.partition(":")
    tree = _tree(module)
    if tree is None:
        raise ModuleNotFoundError(f"no module {module!r}; is its package installed?")
    node = _class(tree, name)
    if node is None:
        raise LookupError(f"{module} no longer defines {name}: this version of the package is not supported")
    found: dict[str, Field] = {}
    for base in reversed(node.bases):
        home = _home(module, tree, base)
        if home is not None:
            found.update(fields(home))
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            annotation = ast.unparse(item.annotation).strip("'\"")
            if annotation.startswith("ClassVar"):
                continue
            default, text, choices = _default(item.value)
            found[item.target.id] = Field(item.target.id, annotation, default, text, choices)
    return found


def _home(module: str, tree: ast.Module, base: ast.expr) -> str | None:
    """Where a base class is defined, as "module:Class"; None for what holds no fields (object, Generic, enums …)."""
    if not isinstance(base, ast.Name):
        return None
    if _class(tree, base.id):
        return f"{module}:{base.id}"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == base.id for a in node.names):
            source = node.module or ""
            if node.level:
                parts = module.split(".")
                source = ".".join([*parts[: len(parts) - node.level], *([source] if source else [])])
            package, _, inner = source.partition(".")
            source = ".".join(HOMES.get((source, base.id), (package, inner))).strip(".")
            known = package in ("transformers", "trl", "pipelines") and _class(_tree(source), base.id)
            return f"{source}:{base.id}" if known else None
    return None


def _class(tree: ast.Module | None, name: str) -> ast.ClassDef | None:
    return next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None) if tree else None


def _default(value: ast.expr | None) -> tuple[str, str, tuple]:
    if value is None:
        return "(required)", "", ()
    if not (isinstance(value, ast.Call) and getattr(value.func, "id", "") == "field"):
        return ast.unparse(value), "", ()
    default, text, choices = "(required)", "", ()
    for keyword in value.keywords:
        if keyword.arg == "default":
            default = ast.unparse(keyword.value)
        elif keyword.arg == "default_factory":
            default = ast.unparse(keyword.value) + "()"
        elif keyword.arg == "metadata" and isinstance(keyword.value, ast.Dict):
            for key, item in zip(keyword.value.keys, keyword.value.values, strict=True):
                try:
                    literal = ast.literal_eval(item)
                except ValueError:
                    continue  # a computed help text: only `keys` shows it
                if getattr(key, "value", "") == "help":
                    text = " ".join(str(literal).split())
                elif getattr(key, "value", "") == "choices":
                    choices = tuple(literal)
    return default, text, choices


@lru_cache(None)
def _names() -> dict[str, typing.Any]:
    """What annotations may mention: typing's names, and the enums of transformers as Literal of their values."""
    names = {n: getattr(typing, n) for n in typing.__all__}
    for module in ENUM_HOMES:
        tree = _tree(module)
        for node in tree.body if tree else []:
            if isinstance(node, ast.ClassDef) and any("Enum" in ast.unparse(b) for b in node.bases):
                values = [
                    item.value.value
                    for item in node.body
                    if isinstance(item, ast.Assign) and isinstance(item.value, ast.Constant)
                ]
                if values and all(isinstance(v, str) for v in values):
                    names[node.name] = typing.Literal[tuple(values)]
    return names


class _Lenient(dict):
    """Any other name in an annotation (a class this module does not know) accepts every value."""

    def __missing__(self, key):
        if key in __builtins__ if isinstance(__builtins__, dict) else hasattr(__builtins__, key):
            raise KeyError(key)
        return typing.Any


@lru_cache(None)
def _hint(annotation: str):
    return eval(annotation, {}, _Lenient(_names()))  # noqa: S307  the annotation of an installed package


@lru_cache(None)
def _adapter(annotation: str) -> pydantic.TypeAdapter:
    hint = _hint(annotation)
    # `SchedulerType | str` would accept any string: where an enum is offered, only its values are right.
    options = [a for a in typing.get_args(hint)] if typing.get_origin(hint) is not None else []
    if any(typing.get_origin(a) is typing.Literal for a in options) and str in options:
        hint = typing.Union[tuple(a for a in options if a is not str)]  # noqa: UP007  built at run time
    return pydantic.TypeAdapter(hint)


def check_value(field: Field, value) -> tuple[object, str | None]:
    """`(value as its type, None)` or `(value, what is wrong with it)`."""
    if field.choices and value is not None and value not in field.choices:
        return value, f"must be one of {', '.join(map(str, field.choices))}{meant(value, field.choices)}"
    bare = {part.strip() for part in field.annotation.replace("Optional[", "").replace("]", "").split("|")}
    if isinstance(value, bool) and "bool" not in bare and not bare & {"Any", "dict", "str"}:
        return value, f"must be {_words(field.annotation)}, not {str(value).lower()}"
    try:
        return _adapter(field.annotation).validate_python(value), None
    except pydantic.ValidationError as error:
        literals = [e["ctx"]["expected"] for e in error.errors() if e["type"] == "literal_error"]
        if literals:
            options = [o.strip("'") for o in literals[0].replace(" or ", ", ").split(", ")]
            shown = f"must be one of {', '.join(options)}" if len(options) <= 12 else "is none of the values known"
            return value, shown + meant(value, options)
        return value, f"must be {_words(field.annotation)}"


def _words(annotation: str) -> str:
    plain = annotation.replace("Optional[", "").replace("typing.", "").rstrip("]")
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "None": "null"}
    return " or ".join(words.get(part.strip(), part.strip()) for part in plain.split("|"))


def meant(word, known) -> str:
    """ " (did you mean X?)" for the closest of `known`, or nothing."""
    known = [str(k).strip("'") for k in known]
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def model_config_keys(model_type: str) -> tuple[set[str], list[str]]:
    """`(keys, types)`: keys that the config class of `model_type` takes (empty: unknown type), and all known types."""
    root = file_of("transformers").parent / "models"
    types = sorted(p.name for p in root.iterdir() if p.is_dir())
    module = model_type.replace("-", "_")
    if module not in types:
        return set(), types
    name = f"transformers.models.{module}.configuration_{module}"
    tree = _tree(name)
    keys: set[str] = set()
    for node in tree.body if tree else []:
        if isinstance(node, ast.ClassDef) and node.name.lower().replace("_", "") == f"{module}config".replace("_", ""):
            keys |= set(fields(f"{name}:{node.name}"))
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                    keys |= {a.arg for a in item.args.args if a.arg != "self"}
                if isinstance(item, ast.Assign) and getattr(item.targets[0], "id", "") == "attribute_map":
                    keys |= set(ast.literal_eval(item.value))
    return keys, types
