"""What is wrong with a recipe, one `Problem` each, and the error that holds all of them."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.errors import SetupError


@dataclass
class Problem:
    """One thing wrong with a recipe: where it stands, the value found there, and what to do."""

    path: str
    message: str
    value: object = None
    line: int | None = None

    def __str__(self) -> str:
        where = f"line {self.line}" if self.line else "command line" if self.line == 0 else "recipe"
        shown = "" if self.value is None else f" = {_short(self.value)}"
        return f"  {where:<12} {self.path}{shown}\n{'':15}{self.message}"


class RecipeError(SetupError):
    """Everything that is wrong with a recipe, in one message."""

    def __init__(self, file, problems: list[Problem]):
        self.file, self.problems = file, problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{file}: {count}\n" + "\n".join(map(str, problems)))


def _short(value) -> str:
    text = repr(value)
    return text if len(text) < 70 else text[:67] + "…"
