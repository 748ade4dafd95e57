"""Evaluation: perplexity, zero- and few-shot tasks, judged answers and win rates of the models that a chain made.

    scores:
      kind: evaluate
      evaluate:
        models: [stage:sft, stage:policy]             # win rates and differences: later ones over earlier ones
        text: validation.jsonl                        # perplexity, bits per byte
        tasks: [data/tasks/bay_quiz.yaml]             # lm-eval: task files, or names of its own tasks
        shots: 2
        prompts: heldout_prompts.jsonl                # every model answers them,
        judge: stage:reward                           # and this judges: a reward model, or module:function

The figures stand in `stage.json` (metrics, figures: value, low and high of each), the values of single items in
`values.json`; a table is printed. The work is done by `pipelines/evaluation.py`, which is also the verb `python -m pipelines evaluate`.
"""

from __future__ import annotations

from collections.abc import Iterator

SECTIONS = {"evaluate": "pipelines.sections:EvaluateSection"}
ROWS = None
DEFAULTS: dict = {}
FILES = (("evaluate", "text"), ("evaluate", "tasks"), ("evaluate", "prompts"), ("evaluate", "rankings"))


def problems(stage, kinds) -> Iterator[tuple[str, str, object]]:
    """What is wrong with the stage as a whole: `(key path, message, value)`."""
    from pipelines import evaluation
    from pipelines.stage import writer_problems

    section = stage.sections.get("evaluate", {})
    for key, message, value in evaluation.problems(section):
        yield f"evaluate.{key}", message, value
    if section.get("models"):
        yield from writer_problems("evaluate.models", section["models"], kinds)
    judge = section.get("judge") or ""
    kind = kinds.get(judge.removeprefix("stage:"), "reward") if judge.startswith("stage:") else "reward"
    if kind not in ("reward", "?"):
        yield "evaluate.judge", f"must be a reward stage or module:function, this stage is of kind {kind}", judge


def run(stage) -> dict:
    """Measure, print the table; returns the figures and their intervals."""
    from accelerate import PartialState

    from pipelines import artifact, evaluation

    settings = stage.section("evaluate")
    names = [name.removeprefix("stage:") for name in stage.sections["evaluate"].get("models", [])]
    values = evaluation.measure(dict(zip(names, settings.models or [], strict=True)), settings, stage.seed)
    found = evaluation.figures(values)
    if PartialState().is_main_process:
        artifact.write_json(stage.folder / "values.json", values)
        print(evaluation.table(found), flush=True)
    return {"figures": evaluation.named(found)}
