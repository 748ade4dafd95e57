"""What can be wrong with the settings of an evaluation, found before any model is loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from pipelines import functions, ranges
from pipelines.data import sources
from pipelines.generation import with_vllm

NEEDS = {
    "text": "a causal language model",
    "tasks": "a causal language model",
    "prompts": "a causal language model",
    "pairs": "a causal language model or an encoder-decoder",
    "labelled": "a sequence classifier",
    "preferences": "a reward model or a policy of dpo or kto",
}
FILES = ("text", "labelled", "preferences", "pairs", "prompts", "rankings")  # keys that name one
ALONE = {"labelled": "classifier", "preferences": "reward model"}  # what only models of another kind can do


def problems(section: dict):
    """What is wrong with the settings, files and packages that are not there included: `(key, message, value)`."""

    asked = [key for key in NEEDS if section.get(key)]
    if not asked and not section.get("rankings"):
        yield f"{', '.join(NEEDS)}, rankings", "nothing to measure: give at least one of them", None
    if not section.get("models") and asked:
        what = ALONE[asked[0]] if asked[0] in ALONE else "language model"
        yield "models", f"needs at least one {what}: stage:NAME, a folder or a hub id", None
    for key in ALONE.keys() & asked:
        if len(asked) > 1 and not (
            key == "preferences" and "labelled" not in asked
        ):  # a policy of dpo can do the rest, too
            other = next(o for o in asked if o != key)
            yield (
                key,
                f"is for {ALONE[key]}s, {other} for {ALONE.get(other, 'models that write')}: measure them apart",
                None,
            )
    if section.get("running_text") and not section.get("text"):
        yield "running_text", "goes with text: it says how that file is read", section["running_text"]
    if bool(section.get("prompts")) != bool(section.get("judge")):
        yield "judge", "goes with prompts: models answer the one, the other judges", section.get("judge")
    judge = section.get("judge") or ""
    classifier = judge and (judge.startswith("stage:") or not functions.is_function(judge))
    if section.get("label") and not classifier and not section.get("preferences"):
        yield "label", "is for a classifier as judge: drop this key", section["label"]
    if section.get("use_vllm") and not {"prompts", "pairs"} & set(asked):
        yield "use_vllm", "writes answers to prompts or pairs, which are not asked for: drop this key", True
    yield from with_vllm.problems(section)
    most = section.get("best_of")
    if most and not section.get("prompts"):
        yield "best_of", "goes with prompts and a judge: models answer the one, the other picks the best", most
    if section.get("oracle") and not most:
        yield "oracle", "goes with best_of: it scores what the judge picked", section["oracle"]
    if most and 1 < section.get("samples", 1) < most:
        yield "samples", f"are fewer than best_of {most}: give at least as many, or drop this key", section["samples"]
    if most and section.get("temperature") == 0:
        yield "temperature", "with 0 all answers are the same: best_of needs different ones", 0
    yield from ranges.problems(section, "evaluate")
    if section.get("tasks") and importlib.util.find_spec("lm_eval") is None:
        yield "tasks", "need lm-eval: pip install 'finetune-pipelines[evaluate]'", None
    paths = [(key, section[key]) for key in FILES if section.get(key)]
    paths += [("tasks", task) for task in section.get("tasks") or [] if task.endswith(".yaml")]
    named = [*paths, *((key, section[key]) for key in FILES if section.get(key) == "")]
    named += [("tasks", task) for task in section.get("tasks") or []]
    for key, path in named:
        if not path.strip():
            yield key, "is empty: name a file, or drop the key", path
    for key, path in [(key, path) for key, path in paths if path.strip()]:
        local = path.endswith(".yaml") or sources.is_local(path)
        if local and not path.startswith("stage:") and not sources.files(path):
            yield key, f"no such file (looked in {Path.cwd()})", path
