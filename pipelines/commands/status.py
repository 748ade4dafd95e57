"""`pipelines status RECIPE`: what is finished, due or changed."""

from __future__ import annotations

from pipelines.chain import chain
from pipelines.commands import command_line, split_words
from pipelines.recipe import recipe

EXAMPLES = """
pipelines status recipes/demo.yaml
pipelines status recipes/demo.yaml output_dir=runs/hot   of another run
"""


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = command_line("status", "What of a recipe is finished, due or changed.", EXAMPLES)
    parser.add_argument("recipe", help="a YAML file; see recipes/")
    parser.add_argument("words", nargs="*", metavar="STAGE | KEY=VALUE", help="stages (default: all); overrides")
    args = parser.parse_intermixed_args(argv)
    names, overrides = split_words(args.words)
    for step in chain.plan(recipe.load(args.recipe, overrides, read_data=False), names):
        print(f"  {step.stage.name:<12} {step.action:<9} {step.stage.folder}")
    return 0
