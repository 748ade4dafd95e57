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
    print(module.__doc__)
    for section, target in kind.sections.items():
        if args.section in (None, section):
            print(f"{section}:   ({target.rpartition(':')[2]})")
            defaults = module.DEFAULTS if section == "args" else {}
            for field in schema.fields(section_class(target)).values():
                default = f"{defaults[field.name]!r} here" if field.name in defaults else field.default
                print(f"  {field.name}: {field.annotation} = {default}")
                if field.help:
                    print(textwrap.fill(field.help, 110, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return 0
