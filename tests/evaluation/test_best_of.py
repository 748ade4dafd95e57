"""Best of n: the estimator against all choices, its places in the table and the report, and what is refused."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.chain import chain
from pipelines.evaluation import best_of
from pipelines.recipe.problems import RecipeError
from pipelines.recipe.recipe import load
from pipelines.report import page


def length(prompt, completion):
    return float(len(completion))


def minus_length(prompt, completion):
    return {"score": -float(len(completion)), "other": 1.0}


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-9, 9)), min_size=1, max_size=7), st.data())
def test_the_estimate_is_the_mean_over_all_choices_of_n(rows, data):
    """Where several share the best score each of them is as likely: the mean over all orders of breaking ties."""
    n = data.draw(st.integers(1, len(rows)))
    expected = []
    for chosen in itertools.combinations(rows, n):
        best = [value for score, value in chosen if score == max(s for s, _ in chosen)]
        expected.append(np.mean(best))
    chances = best_of.chances([score for score, _ in rows], n)
    assert chances.sum() == pytest.approx(1)
    assert chances @ np.array([value for _, value in rows]) == pytest.approx(np.mean(expected), abs=1e-9)


def test_the_ends_are_the_mean_and_the_best():
    found = best_of.values(3, [[1.0, 5.0, 3.0], [2.0, 2.0, 2.0]], [[7.0, 8.0, 9.0], [1.0, 2.0, 3.0]])
    assert list(found) == [f"best_of_{n}/{name}" for n in (1, 2, 3) for name in ("score", "oracle")]
    assert found["best_of_1/score"] == pytest.approx([3, 2]) and found["best_of_3/score"] == [5, 2]
    assert found["best_of_3/oracle"] == pytest.approx([8, 2])
    assert best_of.sizes(8) == [1, 2, 4, 8] and best_of.sizes(6) == [1, 2, 4, 6] and best_of.sizes(1) == [1]
    assert best_of.kl_bound(1) == 0 and best_of.kl_bound(8) == pytest.approx(math.log(8) - 7 / 8)
    assert best_of.chances(list(range(5000)), 4)[-1] == pytest.approx(4 / 5000)  # large numbers stay numbers


def test_a_chain_draws_the_curve_of_judge_and_oracle(recipe, write, tiny_gpt2, tmp_path, capsys):
    section = {
        "models": [str(tiny_gpt2)],
        "prompts": write("p.jsonl", [{"prompt": f"what colour is {i}"} for i in range(6)]),
        "judge": "tests.evaluation.test_best_of:length",
        "oracle": "tests.evaluation.test_best_of:minus_length",
        "best_of": 4,
        "samples": 6,
        "response_length": 8,
    }
    loaded = load(recipe({"scores": {"kind": "evaluate", "evaluate": section}}))
    chain.run(loaded)
    folder, name = loaded["scores"].folder, str(tiny_gpt2)
    made = json.loads((folder / "stage.json").read_text())["metrics"]
    [curves] = made["best_of"].values()
    scores, oracle = ([point["value"] for point in curves[key]] for key in ("score", "oracle"))
    assert [point["n"] for point in curves["score"]] == [1, 2, 4]
    assert scores == sorted(scores) and scores[0] < scores[-1]
    assert oracle == pytest.approx([-score for score in scores])
    assert made["figures"][f"{name}/score"]["value"] == pytest.approx(scores[0])
    printed = capsys.readouterr().out
    assert "0.636" in printed and "the best of n answers" in printed and "best_of_" not in printed
    assert "best of n (KL to the model at most 0.636 nats)" in page.write(tmp_path / "out").read_text()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"best_of": 0}, "at least 1"),
        ({"best_of": 4, "samples": 2}, "fewer than best_of 4"),
        ({"best_of": 4, "temperature": 0}, "all answers are the same"),
        ({"best_of": 4, "prompts": None, "judge": None, "text": "{text}"}, "goes with prompts and a judge"),
        ({"oracle": "tests.evaluation.test_best_of:length"}, "goes with best_of"),
        ({"best_of": 4, "oracle": "tests.evaluation.test_best_of:none"}, "evaluate.oracle"),
        ({"best_of": 4, "oracle": "stage:none"}, "names no earlier stage"),
        ({"best_of": 4, "oracle": "./none"}, "evaluate.oracle"),
    ],
)
def test_what_makes_no_sense_is_refused(change, words, recipe, write, tiny_gpt2):
    section = {
        "models": [str(tiny_gpt2)],
        "prompts": write("p.jsonl", [{"prompt": "a"}]),
        "judge": "tests.evaluation.test_best_of:length",
        **change,
    }
    if "text" in section:
        section["text"] = write("t.jsonl", [{"text": "a b"}])
    with pytest.raises(RecipeError, match=words):
        load(recipe({"scores": {"kind": "evaluate", "evaluate": section}}))
