"""YAML text to plain values and the line of every key; overrides from the command line on top."""

from __future__ import annotations

import os
import re
from pathlib import Path

import yaml

from pipelines import errors
from pipelines.recipe.problems import Problem, RecipeError

# Far more than any recipe needs. Aliases of aliases grow without bound (a few lines of YAML can stand for 10^9 values).
BYTES, VALUES, DEPTH = 1_000_000, 20_000, 40


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but `2e-5` is a number (YAML 1.2) and nesting has an end."""

    depth = 0

    def compose_node(self, parent, index):
        self.depth += 1
        if self.depth > DEPTH:
            raise yaml.composer.ComposerError(
                None, None, f"nested deeper than {DEPTH} levels", self.peek_event().start_mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)$|^[-+]?\.(inf|Inf)$|^\.nan$|^[-+]?[0-9]*\.[0-9]+$"
    ),
    list("-+0123456789."),
)


def read_yaml(file: Path) -> tuple[dict, dict[str, int]]:
    """The recipe as plain values, and the line of every key path."""
    if not os.path.isfile(file):
        near = sorted(p.as_posix() for p in Path("recipes").glob("**/*.yaml"))
        what = "is a folder: give the recipe's file" if os.path.isdir(file) else "no such file"
        raise RecipeError(file, [Problem("", f"{what}{errors.meant(file.as_posix(), near)}")])
    try:
        if file.stat().st_size > BYTES:
            text = f"is larger than {BYTES // 1000} kB: a recipe is a short YAML file (data goes into files of its own)"
            raise RecipeError(file, [Problem("", text)])
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(file, [Problem("", f"not UTF-8 at byte {error.start}: save the file as UTF-8")]) from None
    except OSError as error:
        raise RecipeError(file, [Problem("", f"cannot be read: {error.strerror}")]) from None
    lines: dict[str, int] = {}
    problems: list[Problem] = []
    tree = parse(text, lines, problems)
    if problems:
        raise RecipeError(file, problems)
    if tree is None:
        raise RecipeError(file, [Problem("", "the file is empty; see recipes/ for examples")])
    if not isinstance(tree, dict):
        raise RecipeError(file, [Problem("", "a recipe is a mapping with `output_dir` and `stages`")])
    return tree, lines


def parse(text: str, lines: dict[str, int], problems: list[Problem], at: str = ""):
    """YAML as plain values (None where there are none), below the key path `at`; notes lines and problems."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            _Walk(lines, problems).visit(node, at)
        return None if node is None or problems else loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = " ".join((getattr(error, "problem", None) or str(error)).split())
        problems.append(Problem(at, f"not YAML: {what}", line=mark.line + 1 if mark else None))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:  # `!!int x`, the date 2024-13-45
        problems.append(Problem(at, f"not YAML: a value cannot be read ({error}); put it in quotes if it is text"))
    return None


class _Walk:
    """A walk over all nodes of a document, aliases followed: notes the line of every key path, and what is wrong."""

    def __init__(self, lines: dict[str, int], problems: list[Problem]):
        self.lines, self.problems = lines, problems
        self.count = 0
        self.above: list = []

    def bad(self, node, path: str, message: str) -> None:
        self.problems.append(Problem(path, message, line=node.start_mark.line + 1))

    def visit(self, node, path: str) -> None:
        """Note `node`, which stands at the key path `path`, and all below it."""
        self.count += 1
        self.lines.setdefault(path, node.start_mark.line + 1)
        if self.count > VALUES:
            if self.count == VALUES + 1:
                self.bad(node, path.split("[")[0], f"more than {VALUES} values (aliases counted): that is no recipe")
        elif id(node) in self.above:
            self.bad(node, path, "this alias holds itself: a recipe cannot be endless")
        elif isinstance(node, yaml.ScalarNode) and "\0" in node.value:
            self.bad(node, path, "holds a NUL character, which no path and no text may have")
        elif isinstance(node, yaml.MappingNode):
            self.above.append(id(node))
            self._mapping(node, path)
            self.above.pop()
        elif isinstance(node, yaml.SequenceNode):
            self.above.append(id(node))
            for i, value in enumerate(node.value):
                self.visit(value, f"{path}[{i}]")
            self.above.pop()

    def _mapping(self, node, path: str) -> None:
        seen: set = set()
        merged: list = []
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
                continue
            if not isinstance(key, yaml.ScalarNode):
                self.bad(key, path, "a key is a word, not a list or a mapping")
                continue
            inner = f"{path}.{key.value}".lstrip(".")
            kind = key.tag.rpartition(":")[2]
            if kind != "str" and not (kind == "int" and ".config." in inner):  # as in `id2label: {0: no}`
                self.bad(key, inner, f"a key is text; YAML reads this one as {kind}: put it in quotes")
            if key.value in seen:
                self.bad(key, inner, "duplicate key: keep one of the two")
            seen.add(key.value)
            self.visit(value, inner)
            self.lines[inner] = key.start_mark.line + 1
        for value in merged:  # what is written here wins over what `<<` brings
            self.visit(value, path)


def split_values(text: str) -> list[str] | None:
    """`a,b,[c, d]` as the texts of its values: split where YAML splits a list, not within brackets or quotes.

    None where it cannot be read so: a value is missing, or one holds what would have to stand in quotes.
    """
    whole = f"[{text}]"
    try:
        node = yaml.compose(whole, _Loader)
    except (yaml.YAMLError, ValueError):
        return None
    if node is None or node.end_mark.index != len(whole) or text.rstrip().endswith(","):
        return None
    return [whole[item.start_mark.index : item.end_mark.index] for item in node.value] or [""]


def line_of(lines: dict[str, int], path: str) -> int | None:
    """The line of the nearest enclosing key in the file (0: the command line)."""
    while path and path not in lines:
        path = path[: max(path.rfind("."), path.rfind("["), 0)]
    return lines.get(path) if path else None


def apply_override(tree: dict, lines: dict, override: str, problems: list[Problem]) -> None:
    path, sep, text = override.partition("=")
    keys = path.split(".")
    if not sep or not path:
        problems.append(Problem(override, "an override is written section.key=value"))
        return
    here = tree
    for i, key in enumerate(keys[:-1]):
        at_stage = i == 1 and keys[0] == "stages"
        if not isinstance(here.get(key), dict):
            if at_stage or (i == 0 and key not in tree):
                known = tree.get("stages") or {} if at_stage else tree
                problems.append(Problem(path, f"no {key!r} in this recipe{errors.meant(key, known)}"))
                return
            here[key] = {}
        here[key] = dict(here[key])  # a mapping that other stages share by a YAML alias stays theirs
        here = here[key]
    wrong: list[Problem] = []
    here[keys[-1]] = parse(text, {}, wrong, path)
    problems += wrong
    for inner in [path, *(line for line in lines if line.startswith((f"{path}.", f"{path}[")))]:
        lines[inner] = 0
