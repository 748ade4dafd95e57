"""A stage of a recipe: its name, kind, checked sections and output folder."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.errors import SetupError, meant
from pipelines.kinds import KINDS, Kind


@dataclass
class Stage:
    """One entry of `stages:` after checking.

    `sections` holds only what the recipe says (values in their declared types); `section(name)` builds the dataclass.
    `parents` are the stages named by `stage:NAME` in it, in order of appearance.
    """

    name: str
    kind: str
    folder: Path
    sections: dict[str, dict]
    seed: int = 42
    parents: list[str] = field(default_factory=list)
    recipe: str = ""
    earlier: dict[str, Stage] = field(default_factory=dict, repr=False)  # the stages before it in the recipe, by name
    report: dict = field(default_factory=dict)  # row counts and what happened to rows, for stage.json
    resolved: dict = field(default_factory=dict)  # every training argument as it was used, for stage.json

    @property
    def spec(self) -> Kind:
        """What is known of the stage's kind without its module."""
        return KINDS[self.kind]

    @property
    def module(self):
        """The module of the stage's kind: `DEFAULTS`, `problems`, `run`."""
        return importlib.import_module(self.spec.module or f"pipelines.stages.{self.kind}")

    @property
    def data(self) -> dict:
        """The `data:` section, `stage:NAME/FILE` in it already turned into the path of the file that stage writes."""
        return resolve(self.sections.get("data", {}), self.folder.parent)

    @property
    def checkpoints(self) -> Path:
        """Where the trainer keeps what is needed to resume; removed when the stage is finished."""
        return self.folder / "checkpoints"

    def section_class(self, name: str) -> type:
        """The dataclass of a section of this kind."""
        return section_class(self.spec.sections[name])

    def section(self, name: str):
        """The section as an instance of its dataclass, `stage:NAME` already turned into folders."""
        target = self.section_class(name)
        values = {k: resolve(v, self.folder.parent) for k, v in self.sections.get(name, {}).items()}
        return target(**values)


def section_class(name: str) -> type:
    """The dataclass of a section as `kinds.KINDS` names it: of `pipelines.recipe.sections`, or
    "package.module:Class".
    """
    module, _, cls = name.rpartition(":")
    return getattr(importlib.import_module(module or "pipelines.recipe.sections"), cls)


def resolve(value, root: Path):
    """`stage:NAME` (or `stage:NAME/critic`) inside any value becomes the folder of that stage, `~/` and `~user/` home
    folders.
    """
    if isinstance(value, str) and value.startswith("stage:"):
        return str(root / value.removeprefix("stage:"))
    if isinstance(value, str) and re.match(r"~[\w.-]*/", value):
        return os.path.expanduser(value)
    if isinstance(value, list):
        return [resolve(v, root) for v in value]
    if isinstance(value, dict):
        return {k: resolve(v, root) for k, v in value.items()}
    return value


def references(value) -> list[str]:
    """Names of the stages that `value` (any nesting) refers to, in order of appearance."""
    if isinstance(value, str):
        return [value.removeprefix("stage:").split("/")[0]] if value.startswith("stage:") else []
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [name for item in items for name in references(item)]


def label_problems(stage: Stage, classifier: str, label: str | None) -> Iterator[tuple[str, object]]:
    """What is wrong with `label` of the classify stage `classifier` ("stage:NAME"), as far as its recipe tells:
    `(message, value)`.
    """
    earlier = stage.earlier.get(classifier.removeprefix("stage:"))
    task = earlier.sections.get("task", {}) if earlier else {}
    if task.get("problem_type") == "regression":
        return  # one number, no label
    if not label:
        yield f"{classifier} is a classifier: name the label whose log-odds are the score", None
    elif task.get("labels") and label not in task["labels"]:
        yield f"{classifier} has no such label, but {', '.join(task['labels'])}", label


@dataclass
class Recipe:
    """A checked recipe: its stages in file order, and the folder that holds one folder per stage."""

    file: Path
    output_dir: Path
    seed: int
    stages: list[Stage] = field(default_factory=list)

    def __getitem__(self, name: str) -> Stage:
        """The stage `name`; raises `SetupError` where there is none."""
        names = [stage.name for stage in self.stages]
        if name not in names:
            raise SetupError(f"no stage {name!r}{meant(name, names)}; {self.file} has {', '.join(names)}")
        return self.stages[names.index(name)]
