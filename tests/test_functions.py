"""Whatever a user's function gives, it is read as it is meant or it is one error that names the function and the row."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from pipelines import functions
from pipelines.errors import SetupError
from pipelines.evaluation.judges import judge
from pipelines.ppo.checks import check_rows, read_scores
from pipelines.stages.rank import scripted

ROWS = [{"prompt": p, "where": f"p.jsonl:{i}"} for i, p in enumerate("ab", 1)]
NUMBERS = [0, 1.5, True, np.float32(2), torch.tensor(3.0), torch.tensor([4]), Fraction(1, 2), Decimal("0.5")]
NO_NUMBERS = ["1", "", b"1", None, [1.0], (1,), {}, torch.tensor([1, 2]), 10**400, 1j, object()]
given = None  # what `gives` gives


def gives(*args, **columns):
    return given


@pytest.fixture
def returns(monkeypatch):
    return lambda value: monkeypatch.setattr(f"{__name__}.given", value)


def test_numbers_of_every_kind_are_numbers_and_nothing_else_is():
    assert [functions.number(value) for value in NUMBERS] == [float(value) for value in NUMBERS]
    for value in NO_NUMBERS:
        with pytest.raises(ValueError, match="is no number"):
            functions.number(value)


def test_rewards_are_a_number_or_none_for_each_answer():
    assert read_scores("f", NUMBERS, len(NUMBERS)) == [float(value) for value in NUMBERS]
    assert read_scores("f", np.array([1, 2]), 2) == read_scores("f", torch.tensor([1, 2]), 2) == [1.0, 2.0]
    assert read_scores("f", (None, 1), 2) == [None, 1.0] and math.isnan(read_scores("f", [math.nan], 1)[0])
    for value in NO_NUMBERS:
        if value is not None:
            with pytest.raises(SetupError, match=r"^p.jsonl:2: reward function f returned .* is no number"):
                read_scores("f", [1.0, value], 2, ["p.jsonl:1", "p.jsonl:2"])
    for value in (None, 1.0, "ab", {0: 1, 1: 2}, (x for x in "ab")):
        with pytest.raises(SetupError, match="reward function f must return one number for each answer, not "):
            read_scores("f", value, 2)
    with pytest.raises(SetupError, match="f returned 1 scores for 2 answers"):
        read_scores("f", [1.0], 2)


def test_what_a_function_returns_is_looked_at_when_it_is_tried_before_training(returns, monkeypatch):
    monkeypatch.setattr(gives, "try_rows", True, raising=False)
    returns(["1", 2])
    with pytest.raises(SetupError, match=r"p.jsonl:1: reward function gives returned '1' is no number"):
        check_rows([gives], ROWS)


@pytest.mark.parametrize("value", [*NO_NUMBERS, math.nan, math.inf, {"score": "1"}, {"score": 1, "a": None}])
def test_a_verdict_is_finite_numbers(returns, value):
    returns(value)
    with pytest.raises(SetupError, match=rf"judge {__name__}:gives"):
        judge(f"{__name__}:gives", ROWS, {"m": [[("x", True)], [("y", True)]]})


def uneven(prompt, answer):
    return {"score": 1.0} | ({"polite": 1.0} if answer == "x" else {})


def test_verdicts_on_the_answers_to_a_prompt_have_the_same_fields():
    with pytest.raises(SetupError, match=r"p.jsonl:1: judge .*uneven gives score, polite for one answer and score for"):
        judge(f"{__name__}:uneven", ROWS, {"m": [[("x", True), ("y", True)], [("x", True), ("x", True)]]})


@pytest.mark.parametrize(
    "value",
    [
        None,
        1,
        [1, 2, 3],
        ([1],),
        ([1, 2], [[], []], 0),
        "ab",
        ([1], [[]]),
        ([1, math.nan], None),
        ("ab", None),
        (None, None),
    ],
)
def test_a_labeller_gives_ranks_and_tags(returns, value):
    returns(value)
    with pytest.raises(SetupError, match=rf"labeller {__name__}:gives, asked about p.jsonl:1: "):
        scripted(f"{__name__}:gives", [{**ROWS[0], "completions": ["x", "y"]}])
