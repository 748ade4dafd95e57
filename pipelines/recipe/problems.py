"""What is wrong with a recipe, one `Problem` each, and the error that holds all of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipelines.errors import SetupError

# What tokens of the hub and of other services look like, and a name or password inside an address.
SECRET = re.compile(
    r"\b(hf_|sk-|ghp_|gho_|github_pat_|glpat-|xox[abp]-|AKIA|ya29\.|AIza)[A-Za-z0-9_\-]{12,}|://[^/\s:@]*:[^/\s@]+@"
)

# and keys that hold one
SECRET_KEYS = re.compile(r"(^|_)(hub_token|auth_token|access_token|api_key|apikey|password|passwd|secret)$|^token$")


@dataclass
class Problem:
    """One thing wrong with a recipe: the key path, the value there, and what to do."""

    path: str
    message: str
    value: object = None
    line: int | None = None

    def __str__(self) -> str:
        where = f"line {self.line}" if self.line else "command line" if self.line == 0 else "recipe"
        secret = SECRET_KEYS.search(self.path.rpartition(".")[2])
        shown = "" if self.value is None else " = …" if secret else f" = {_short(self.value)}"
        return f"  {where:<12} {self.path}{shown}\n{'':15}{self.message}"


class RecipeError(SetupError):
    """Everything that is wrong with a recipe, in one message."""

    def __init__(self, file, problems: list[Problem]):
        self.file, self.problems = file, problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{file}: {count}\n" + "\n".join(map(str, problems)))


def _short(value) -> str:
    text = SECRET.sub("…", repr(value))
    return text if len(text) < 70 else text[:67] + "…"
