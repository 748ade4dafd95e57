"""Evaluation of the models that a chain made: perplexity, tasks, classification, generation, judged answers, win rates.

    scores:
      kind: evaluate
      evaluate:
        models: [stage:sft, stage:policy]             # win rates and differences: later ones over earlier ones
        text: validation.jsonl                        # perplexity, bits per byte
        pairs: heldout_pairs.jsonl                    # BLEU, chrF, ROUGE of what they write
        tasks: [data/bay/tasks/bay_quiz.yaml]             # lm-eval: task files, or names of its own tasks
        shots: 2
        prompts: heldout_prompts.jsonl                # every model answers them,
        judge: stage:reward                           # and this judges: a reward model, a classifier (with
                                                      # `label: NAME`), or module:function
        best_of: 8                                    # and what the best of 8 answers is worth, by the judge and
        oracle: my_module:gold                        # by a second one

Classifiers get a stage of their own, with `labelled: test.jsonl`: accuracy, macro F1, Matthews, confusion matrix. So do
reward models (or policies of dpo and kto), with `preferences: test.jsonl`: accuracy per pair and per ranking, margin,
calibration.

The figures stand in `stage.json` (metrics, figures: value, low and high of each), the values of single items in
`values.json`; a table is printed. The work is done by `pipelines/evaluation`, which is also the verb `python -m
pipelines evaluate`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

from accelerate import PartialState

from pipelines import files, functions
from pipelines.data import overlap, sources
from pipelines.evaluation import checks
from pipelines.kinds import of_kind
from pipelines.recipe import data_checks
from pipelines.recipe.model_checks import named_models
from pipelines.recipe.stage import label_problems

logger = logging.getLogger(__name__)
ABSOLUTE = re.compile(r"(?<![\w.~])/(?:[^\s/:]+/)+")  # the folders of an absolute path

DEFAULTS: dict = {}
SHAPES = {  # of the rows of each file: pipelines/data/rows.py
    "text": ("text",),
    "labelled": ("labelled",),
    "pairs": ("sft", "seq2seq"),
    "prompts": ("prompts",),
    "rankings": ("rankings",),
    "preferences": ("rankings",),
}


def problems(stage, kinds) -> Iterator[tuple[str, str, object]]:
    """What is wrong with the stage as a whole: `(key path, message, value)`."""

    section = stage.sections.get("evaluate", {})
    for key, message, value in checks.problems(section):
        yield f"evaluate.{key}", message, value
    if section.get("models"):
        able, what = of_kind(writes_text=True), "language model"
        if section.get("labelled"):
            able, what = ("classify",), "classifier"
        elif section.get("preferences"):
            able = ("reward", *of_kind(implicit_reward=True))
            what = f"reward model or a policy of {' or '.join(able[1:])}"
        elif section.get("pairs") and not any(section.get(key) for key in ("text", "tasks", "prompts")):
            able = (*of_kind(writes_text=True), "seq2seq")
        yield from named_models(stage, kinds, "evaluate.models", section["models"], able, what)
    for key, shapes in SHAPES.items():
        path = section.get(key)
        if path and not path.startswith("stage:") and sources.is_local(path) and sources.files(path):
            found = [list(data_checks.wrong_rows({"path": path}, shape, limit=sources.TRIED)) for shape in shapes]
            yield from ((f"evaluate.{key}", message, None) for message in min(found, key=len))
    for key in ("judge", "oracle"):
        judge = section.get(key)
        if judge and functions.is_function(judge):
            if wrong := functions.problem(judge, "prompt", "completion"):
                yield f"evaluate.{key}", wrong, judge
        elif judge:
            able = ("reward", *(["classify"] if key == "judge" else []), *of_kind(implicit_reward=True))
            what = f"{able[0]} (or {', '.join(able[1:])}) stage or module:function"
            yield from named_models(stage, kinds, f"evaluate.{key}", judge, able, what)
            if key == "judge" and kinds.get(judge.removeprefix("stage:")) == "classify" and judge.startswith("stage:"):
                for message, value in label_problems(stage, judge, section.get("label")):
                    yield "evaluate.label", message, value


def training_data(stages) -> list[overlap.Source]:
    """The sources that stages of a recipe learn from, or answer and rank for learning, with the shape of their rows."""
    found = []
    for stage in stages:
        section = stage.sections.get("data", {})
        streamed = {"streaming": True} if section.get("streaming") else {}
        found += [({**source, **streamed}, stage.spec.rows) for source in sources.sources(section, "train")]
        found += [(source, "text") for source in sources.sources(section, "ptx")]
    return found


def evaluation_data(stages) -> list[overlap.Source]:
    """The sources that stages of a recipe are measured on, likewise: `data.validation`, and what `evaluate:` names."""
    found = []
    for stage in stages:
        section = stage.sections.get("data", {})
        found += [(source, stage.spec.rows) for source in sources.sources(section, "validation")]
        found += evaluation_files(stage.sections.get("evaluate", {}))
    return found


def evaluation_files(section: dict) -> list[overlap.Source]:
    """The files that the keys of an `evaluate:` section name."""
    found = []
    for key, shapes in SHAPES.items():
        if path := section.get(key):
            fits = lambda shape, path=path: not any(data_checks.wrong_rows({"path": path}, shape, limit=1))
            here = sources.is_local(path) and sources.files(path)
            found.append(({"path": path}, next(filter(fits, shapes), shapes[0]) if here else shapes[0]))
    return found


def run(stage) -> dict:
    """Measure, print the table; returns the figures and their intervals."""

    from pipelines.evaluation import best_of, figures, measure  # late: takes a second, and `check` does without

    settings = stage.section("evaluate")
    names = [name.removeprefix("stage:") for name in stage.sections["evaluate"].get("models", [])]
    values = measure.measure(dict(zip(names, settings.models or [], strict=True)), settings, stage.seed)
    found = figures.figures(values)
    if PartialState().is_main_process:
        found_twice = overlap.find(training_data(stage.earlier.values()), evaluation_data([stage]))
        if found_twice:
            logger.warning("%s: %s", stage.name, overlap.note(found_twice))
            stage.report["overlap"] = [ABSOLUTE.sub("", line) for line in found_twice]  # it may be published
        files.write_json(stage.folder / "values.json", values)
        print(figures.table(found) + figures.matrices(values), flush=True)
    tables = {"confusion_matrices": figures.confusion(values), "best_of": best_of.curves(found)}
    return {"figures": figures.named(found), **{name: table for name, table in tables.items() if table}}
