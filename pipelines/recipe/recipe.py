"""A recipe file to a checked `Recipe`: every problem of every stage at once, each with file, line, key, value
and fix.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipelines.recipe.checks import check_recipe
from pipelines.recipe.model_checks import hub_problems, leaves_critic, without_weights
from pipelines.recipe.problems import Problem, RecipeError
from pipelines.recipe.stage import Recipe, Stage
from pipelines.recipe.yaml_with_lines import apply_override, line_of, read_yaml


def load(file, overrides: Sequence[str] = (), *, read_data: bool = True, ask_hub: bool = False) -> Recipe:
    """Read and check the recipe `file` with `overrides` (`stages.sft.args.max_steps=10`) applied.

    `read_data` also reads every local data file, checks every row and looks for the weights of models; `ask_hub` also
    asks for every hub id whether it is in the hub's cache or can be had. Raises `RecipeError` with all problems, in the
    order of their lines.
    """
    file = Path(file)
    tree, lines = read_yaml(file)
    problems: list[Problem] = []
    for override in overrides:
        apply_override(tree, lines, override, problems)
    recipe = check_recipe(file, tree, problems, read_data)
    for stage in recipe.stages:
        missing = [*(without_weights(stage) if read_data else ()), *(hub_problems(stage) if ask_hub else ())]
        problems += [Problem(f"stages.{stage.name}.{key}", message, name) for key, message, name in missing]
    if problems:
        for problem in problems:
            problem.line = line_of(lines, problem.path)
        raise RecipeError(file, sorted(problems, key=lambda problem: problem.line or 0))
    return recipe


def adapters(stage: Stage) -> list[str]:
    """What a stage's adapters sit on and merge into, for people to read; empty where it trains all weights."""
    model, reward = stage.sections.get("model", {}), stage.sections.get("reward", {})
    if not model.get("use_peft"):
        return []
    bits = 4 if model.get("load_in_4bit") else 8 if model.get("load_in_8bit") else None
    base, into = model.get("model_name_or_path"), "the base, loaded again at full precision" if bits else "the base"
    scorers, shares = reward.get("models") or [], reward.get("share_base")
    critic = reward.get("critic") or (scorers or [base])[0]
    on = f"{base} ({'policy' if stage.kind == 'ppo' else 'frozen'})"
    own_critic = leaves_critic(stage)
    if own_critic and not shares:
        on += f" and {critic} (critic)"
    lines = [f"LoRA, r {model.get('lora_r', 16)}, on {on}" + (f", in {bits} bits" if bits else "")]
    if shares:
        adapted = [f"of {path} (reward)" for path in scorers]
        adapted += [f"{'a new one' if critic == base else 'of ' + critic} (critic, trained on)"] if own_critic else []
        lines.append(f"adapters on the same base, which is held once: {', '.join(adapted)}")
    if stage.kind == "ppo":
        lines.append("the reference is the policy without its adapter")
    lines.append(f"merged into {into} -> {stage.folder}; the adapter alone -> {stage.folder}/adapter")
    if own_critic:
        lines.append(f"the critic likewise -> {stage.folder}/critic; its adapter -> {stage.folder}/critic/adapter")
    return lines
