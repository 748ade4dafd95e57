"""Rows that the chat template of their stage refuses or does not show in full, found before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from pipelines.data.mixing import SIDES
from pipelines.data.rows import normalise
from pipelines.data.sources import SHOWN, TRIED, is_local, read, sources
from pipelines.errors import DataError, SetupError, TemplateError
from pipelines.kinds import KINDS
from pipelines.models import chat_template
from pipelines.planning import unmade
from pipelines.recipe.problems import Problem, RecipeError
from pipelines.recipe.stage import Recipe, Stage

DIALOGUES = ("sft", "rankings", "unpaired", "prompts")  # shapes of rows that go through a chat template


def check_dialogues(loaded: Recipe) -> None:
    """Raise `RecipeError` for local rows whose stage's template does not take them, where its tokenizer is at hand.

    Of rows of the same shape (the same roles in the same order, with the same keys) the first is tried.
    """
    problems = [problem for stage in loaded.stages for problem in template_problems(stage)]
    if problems:
        raise RecipeError(loaded.file, problems)


def template_problems(stage: Stage) -> Iterator[Problem]:
    """What is wrong with a stage's template, or with rows under it: the first few."""
    if KINDS[stage.kind].rows not in DIALOGUES:
        return
    try:
        tokenizer = unmade.tokenizer_of(stage)
    except TemplateError as error:
        yield Problem(f"stages.{stage.name}.model", str(error))
        return
    except SetupError:
        return  # it is not at hand: the stage itself will look at its rows
    wrong = 0
    for side, row in _one_of_each_shape(stage):
        try:
            chat_template.check_row(tokenizer, row)
        except TemplateError as error:
            wrong += 1
            yield Problem(f"stages.{stage.name}.data.{side}", str(error))
            if wrong == SHOWN:
                return


def _one_of_each_shape(stage: Stage) -> Iterator[tuple[str, dict]]:
    seen = set()
    for side in SIDES[:2]:
        for source in sources(stage.data, side):
            if not is_local(source["path"]):
                continue
            try:
                for where, raw in islice(read(source), TRIED if stage.data.get("streaming") else None):
                    try:
                        row = {**normalise(raw, KINDS[stage.kind].rows, source.get("columns")), "where": where}
                    except DataError:
                        continue  # reported, or dropped, where rows are read
                    if (shape := chat_template.shape(row)) not in seen:
                        seen.add(shape)
                        yield side, row
            except DataError:
                continue  # reported where rows are read
