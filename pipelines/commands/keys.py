"""`pipelines keys KIND [SECTION]`: every key that a kind of stage accepts, with its meaning."""

from __future__ import annotations

import importlib
import sys
import textwrap

from pipelines import errors
from pipelines.commands import command_line
from pipelines.kinds import KINDS
from pipelines.recipe import schema
from pipelines.recipe.stage import section_class

EXAMPLES = """
pipelines keys sft
pipelines keys ppo reward   only this section
pipelines keys rank rank.judge
pipelines keys classify args | grep -A2 patience
"""


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = command_line(
        "keys", "Every key that a kind of stage accepts, with its type, default and meaning.", EXAMPLES
    )
    parser.add_argument("kind", help=", ".join(KINDS))
    parser.add_argument("section", nargs="?", help="only this section, e.g. args")
    args = parser.parse_args(argv)
    if args.kind not in KINDS:
        known = ", ".join(KINDS)
        print(f"error: no kind {args.kind!r}{errors.meant(args.kind, KINDS)}; there are {known}", file=sys.stderr)
        return 2
    kind = KINDS[args.kind]
    module = importlib.import_module(kind.module or f"pipelines.stages.{args.kind}")
    shown = {section: section_class(target) for section, target in kind.sections.items()}
    for section, cls in list(shown.items()):
        inner: dict[type, list[str]] = {}  # what stands inside as a mapping, and under which keys
        for field in schema.fields(cls).values():
            if field.keys:
                inner.setdefault(field.keys, []).append(f"{section}.{field.name}")
        shown |= {", ".join(places): keys for keys, places in inner.items()}
    if args.section and not any(args.section in place.split(", ") for place in shown):
        known = [place for places in shown for place in places.split(", ")]
        print(
            f"error: {args.kind} has no section {args.section!r}{errors.meant(args.section, known)}; it has "
            f"{', '.join(known)}",
            file=sys.stderr,
        )
        return 2
    print(module.__doc__)
    for places, cls in shown.items():
        if args.section is None or args.section in (places.split(".")[0], *places.split(", ")):
            print(f"{places}{'' if '.' not in places else ', as a mapping'}:   ({cls.__name__})")
            print_fields(cls, module.DEFAULTS if places == "args" else {})
    return 0


def print_fields(cls: type, defaults: dict) -> None:
    """Each key of a section with its type, default and meaning."""
    for field in schema.fields(cls).values():
        default = f"{defaults[field.name]!r} here" if field.name in defaults else field.default
        print(f"  {field.name}: {field.annotation} = {default}")
        if field.help:
            print(textwrap.fill(field.help, 110, initial_indent=" " * 6, subsequent_indent=" " * 6))
