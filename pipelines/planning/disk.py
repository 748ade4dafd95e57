"""Whether a run's folder will hold what a recipe's stages write: known before the first of them starts."""

from __future__ import annotations

from pathlib import Path

from pipelines import files
from pipelines.errors import PlanError
from pipelines.planning import costs, job, unmade
from pipelines.planning.anatomy import examine
from pipelines.planning.planner import adapter
from pipelines.recipe.stage import Recipe, Stage

WEIGHT = 4  # bytes of one, and of a number of the optimizer's state: what is kept is in fp32 unless a recipe says else


def sizes(stage: Stage) -> tuple[float, float]:
    """`(bytes of its checkpoints at most, bytes of the model that it leaves)`. Raises `PlanError` where nobody knows
    yet.
    """
    args = {**stage.module.DEFAULTS, **stage.sections.get("args", {})}
    models = job._models(stage, unmade.at_hand(stage), set())
    trained = [model for name, model in models.items() if name in ("model", "critic")]
    lora = bool(stage.sections.get("model", {}).get("use_peft"))
    checkpoint = left = 0.0
    for model in trained:
        counts = examine(model.config, model.auto_class, adapter(stage) if lora else None)
        state = costs.optimizer_share(args.get("optim", "adamw_torch_fused"))
        checkpoint += WEIGHT * ((counts.trainable if lora else counts.parameters) + state * counts.trainable)
        left += WEIGHT * counts.parameters
    limit = args.get("save_total_limit", 2) or 1
    kept = 0 if args.get("save_strategy") == "no" else limit + 1  # a new one is written before an old one goes
    return kept * checkpoint, left


def warnings(recipe: Recipe) -> list[str]:
    """One line for the first stage that will find the disk full; none where there is room, or where nobody knows."""
    free, before = files.free_bytes(recipe.output_dir), 0.0
    for stage in recipe.stages:
        if free is None or not stage.spec.leaves_model or (Path(stage.folder) / files.FINISHED).is_file():
            continue
        try:
            checkpoints, left = sizes(stage)
        except PlanError:
            continue
        if before + checkpoints + left > free:
            others = f" beside {files.size(before)} of the stages before it" if before else ""
            return [
                f"{stage.name}: its checkpoints need about {files.size(checkpoints)} and its model "
                f"{files.size(left)}{others}, "
                f"but {recipe.output_dir} has {files.size(free)} free: make room, choose another output_dir, or lower "
                "args.save_total_limit"
            ]
        before += left
    return []
