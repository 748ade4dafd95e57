"""YAML text to plain values and the line of every key; overrides from the command line on top."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from pipelines import errors
from pipelines.recipe.problems import Problem, RecipeError


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but `2e-5` is a number (YAML 1.2) and a key that stands twice is an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)$|^[-+]?\.(inf|Inf)$|^\.nan$|^[-+]?[0-9]*\.[0-9]+$"
    ),
    list("-+0123456789."),
)


def read_yaml(file: Path) -> tuple[dict, dict[str, int]]:
    """The recipe as plain values, and the line of every key path."""
    if not file.is_file():
        near = sorted(p.as_posix() for p in Path("recipes").glob("**/*.yaml"))
        raise RecipeError(file, [Problem("", f"no such file{errors.meant(file.as_posix(), near)}")])
    lines: dict[str, int] = {}
    problems: list[Problem] = []
    try:
        loader = _Loader(file.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:
            raise RecipeError(file, [Problem("", "the file is empty; see recipes/ for examples")])
        _walk(node, "", lines, problems)
        tree = loader.construct_document(node)
    except UnicodeDecodeError as error:
        raise RecipeError(file, [Problem("", f"not UTF-8 at byte {error.start}: save the file as UTF-8")]) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        text = getattr(error, "problem", None) or str(error)
        raise RecipeError(file, [Problem("", f"not YAML: {text}", line=mark.line + 1 if mark else None)]) from None
    if problems:
        raise RecipeError(file, problems)
    if not isinstance(tree, dict):
        raise RecipeError(file, [Problem("", "a recipe is a mapping with `output_dir` and `stages`")])
    return tree, lines


def _walk(node, path: str, lines: dict[str, int], problems: list[Problem]) -> None:
    lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            inner = f"{path}.{key.value}".lstrip(".")
            if key.value in seen:
                problems.append(Problem(inner, "this key stands twice; keep one", line=key.start_mark.line + 1))
            seen.add(key.value)
            _walk(value, inner, lines, problems)
            lines[inner] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _walk(value, f"{path}[{i}]", lines, problems)


def line_of(lines: dict[str, int], path: str) -> int | None:
    """The line of the nearest enclosing key that stands in the file (0: the command line)."""
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
    try:
        here[keys[-1]] = yaml.load(text, Loader=_Loader)  # noqa: S506  a SafeLoader
    except yaml.YAMLError as error:
        problems.append(Problem(path, f"the value is not YAML: {error}", text))
    lines[path] = 0
