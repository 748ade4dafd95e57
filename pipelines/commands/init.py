"""`pipelines init [NAME]`: copy a recipe that comes with the package, and the small data that it names, to
this folder.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from pipelines import shipped
from pipelines.commands import command_line
from pipelines.errors import SetupError, meant

EXAMPLES = """
  pipelines init                         the recipes there are, with the first line of each
  pipelines init demo                    demo.yaml and the files of data/ that it names
  pipelines init demo --as mine.yaml     under another name
  pipelines check demo.yaml              then: look through it, change it, run it
"""


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    about = (
        "Copy a recipe that comes with the package, and the small data that it names, to this folder. "
        "Nothing that is here already is overwritten."
    )
    parser = command_line("init", about, EXAMPLES)
    parser.add_argument("name", nargs="?", metavar="NAME", help="a recipe; alone: list them")
    parser.add_argument("--as", dest="target", type=Path, metavar="FILE", help="where to (default: NAME.yaml)")
    args = parser.parse_args(argv)
    recipes = {path.stem: path for path in sorted(shipped("recipes").glob("*.yaml"))}
    if args.name is None:
        for name, path in recipes.items():
            print(f"  {name:<18} {_headline(path)}")
        return 0
    name = Path(args.name).stem if args.name.endswith(".yaml") else args.name
    if name not in recipes:
        raise SetupError(f"no recipe {name!r}{meant(name, recipes)}; there are {', '.join(recipes)}")
    target = args.target or Path(f"{name}.yaml")
    if target.exists():
        raise SetupError(f"{target} is here already: move it away, or choose another name with --as FILE")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(recipes[name], target)
    print(f"  {target}")
    for source, path in _named(recipes[name].read_text(encoding="utf-8")):
        if path.exists():
            print(f"  {path} (here already, kept)")
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)
        print(f"  {path}")
    print(f"next: pipelines check {target}, then pipelines run {target}")
    return 0


def _headline(recipe: Path) -> str:
    """The first sentence of the comment that a recipe begins with."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    head = " ".join(line.lstrip("# ") for line in lines[: next(i for i, s in enumerate(lines) if s[:1] != "#")])
    return re.split(r"(?<=[.:]) ", head)[0][:100]


def _named(text: str) -> list[tuple[Path, Path]]:
    """`(file of the package, its place here)` for every file of the shipped `data/` that a recipe, or one of them,
    names.

    They are named as paths (`data/quiz.jinja`) and as modules (`data.labeller:rank`, or `import world` of a file
    beside).
    """
    home, found, unread = shipped("data"), {}, [(text, Path())]
    while unread:
        words, folder = unread.pop()
        names = re.findall(r"\bdata/([\w./-]+)", words)
        names += [name.replace(".", "/") + ".py" for name in re.findall(r"\bdata\.([\w.]+)", words)]
        names += [str(folder / name) + ".py" for name in re.findall(r"^\s*(?:import|from) (\w+)", words, re.MULTILINE)]
        for name in names:
            source = home / name
            if source.is_file() and name not in found:
                found[name] = source
                if source.suffix in (".py", ".yaml"):
                    unread.append((source.read_text(encoding="utf-8"), Path(name).parent))
    return [(source, Path("data") / name) for name, source in sorted(found.items())]
