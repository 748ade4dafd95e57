"""`pipelines check RECIPE [KEY=VALUE …]`: find every mistake in a recipe, start nothing."""

from __future__ import annotations

from pipelines.commands import command_line, split_words
from pipelines.recipe import recipe

EXAMPLES = """
pipelines check recipes/demo.yaml
pipelines check recipes/demo.yaml stages.sft.args.learning_rate=1e-4   with a key changed, as `run` would have it
"""


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = command_line("check", "Find every mistake in a recipe, start nothing.", EXAMPLES)
    parser.add_argument("recipe", help="a YAML file; see recipes/")
    parser.add_argument("words", nargs="*", metavar="STAGE | KEY=VALUE", help="stages (default: all); overrides")
    args = parser.parse_intermixed_args(argv)
    names, overrides = split_words(args.words)
    loaded = recipe.load(args.recipe, overrides, ask_hub=True)
    for name in names:
        loaded[name]
    for stage in loaded.stages:
        base = stage.sections.get("model", {}).get("model_name_or_path") or ", ".join(stage.parents) or "a new model"
        print(f"  {stage.name:<12} {stage.kind:<9} from {base}  ->  {stage.folder}")
        print("".join(f"{'':25}{line}\n" for line in recipe.adapters(stage)), end="")
    print(f"{args.recipe}: {len(loaded.stages)} stages, no problems")
    return 0
