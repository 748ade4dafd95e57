"""`pipelines check RECIPE [KEY=VALUE …]`: find every mistake in a recipe, start nothing."""

from __future__ import annotations

from pipelines.commands import command_line, split_words
from pipelines.data import overlap
from pipelines.planning import disk
from pipelines.planning.dialogue_rows import check_dialogues
from pipelines.recipe import model_checks, recipe
from pipelines.stages import evaluate

EXAMPLES = """
pipelines check recipes/demo.yaml
pipelines check recipes/demo.yaml stages.sft.args.learning_rate=1e-4   with a key changed, as `run` would have it
"""


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = command_line("check", "Find every mistake in a recipe, start nothing.", EXAMPLES)
    parser.add_argument("recipe", help="a YAML file; see recipes/")
    parser.add_argument("words", nargs="*", metavar="STAGE | KEY=VALUE", help="stages (default: all); overrides")
    parser.add_argument("--offline", action="store_true", help="do not ask the hub; list what was left out")
    args = parser.parse_intermixed_args(argv)
    names, overrides = split_words(args.words)
    loaded = recipe.load(args.recipe, overrides, ask_hub=not args.offline)
    check_dialogues(loaded)
    for stage in [loaded[name] for name in names] or loaded.stages:
        base = stage.sections.get("model", {}).get("model_name_or_path") or ", ".join(stage.parents) or "a new model"
        print(f"  {stage.name:<12} {stage.kind:<9} from {base}  ->  {stage.folder}")
        print("".join(f"{'':25}{line}\n" for line in recipe.adapters(stage)), end="")
    shared = overlap.find(evaluate.training_data(loaded.stages), evaluate.evaluation_data(loaded.stages))
    for warning in disk.warnings(loaded):
        print(f"warning: {warning}")
    if shared:
        print(f"note: {overlap.note(shared)}")
    print(f"{args.recipe}: {len(loaded.stages)} stages, no problems")
    left_out = [line for stage in loaded.stages for line in model_checks.left_out(stage)] if args.offline else []
    if left_out:
        print("not checked, because the hub was not asked:\n" + "".join(f"  {line}\n" for line in left_out), end="")
    return 0
