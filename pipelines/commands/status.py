"""`pipelines status RECIPE`: what is finished, due or changed, and whether it is still what was written."""

from __future__ import annotations

from pipelines import files
from pipelines.chain import chain
from pipelines.chain.record import stage_damage
from pipelines.commands import command_line, split_words
from pipelines.errors import ChainError
from pipelines.recipe import recipe
from pipelines.recipe.stage import Stage
from pipelines.training import checkpoints

EXAMPLES = """
pipelines status recipes/demo.yaml
pipelines status recipes/demo.yaml output_dir=runs/hot   of another run
pipelines status recipes/demo.yaml --verify   read every file and compare it with its checksum
"""


def main(argv: list[str]) -> int:
    """The command line; returns the exit code. Raises `ChainError` after the list where something keeps a
    stage back.
    """
    parser = command_line("status", "What of a recipe is finished, due or changed.", EXAMPLES)
    parser.add_argument("recipe", help="a YAML file; see recipes/")
    parser.add_argument("words", nargs="*", metavar="STAGE | KEY=VALUE", help="stages (default: all); overrides")
    parser.add_argument("--verify", action="store_true", help="read every file and compare it with its checksum")
    args = parser.parse_intermixed_args(argv)
    names, overrides = split_words(args.words)
    steps, refused = chain.survey(recipe.load(args.recipe, overrides, read_data=False), names)
    for step in steps:
        print(f"  {step.stage.name:<12} {step.action:<9} {step.stage.folder}")
    if args.verify:
        for step in [s for s in steps if s.action != "damaged"]:
            refused += [line for line in verify(step.stage) if line not in refused]
    if refused:
        raise ChainError("\n".join(refused))
    return 0


def verify(stage: Stage) -> list[str]:
    """Print how much of a stage's folder was read and found to be as written; returns what was not."""
    if not stage.folder.is_dir():
        return []
    wrong, count = [], 0
    for checkpoint in checkpoints.all_of(stage.checkpoints):
        if (checkpoint / checkpoints.COMPLETE).is_file():
            wrong += [f"{stage.name}: {checkpoint / line}" for line in checkpoints.damage(checkpoint)]
            count += 1
    final = files.read_record(stage.folder / files.FINISHED) or {}
    if final and "files" not in final:
        print(f"  {stage.name}: made by an earlier version, without checksums: nothing to compare with")
    wrong += [f"{stage.name}: {stage.folder / line}" for line in stage_damage(stage.folder, final, everything=True)]
    size = files.size(sum(of["bytes"] for of in final.get("files", {}).values()))
    print(
        f"  {stage.name}: {len(final.get('files', {}))} files, {size}, {count} checkpoints read; {len(wrong)} problems"
    )
    return wrong
