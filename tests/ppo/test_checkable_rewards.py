r"""Rewards that a program checks: a table of hard cases, properties, and what is refused before training."""

import json
import math
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import SetupError
from pipelines.ppo import checkable
from pipelines.ppo.checkable import json_matches, json_valid, number_matches, pattern_matches
from pipelines.ppo.checks import check_rows
from pipelines.ppo.final_number import final_number
from pipelines.recipe.problems import RecipeError
from pipelines.recipe.recipe import load

THE_NUMBER = {  # answers that end with a number, by what it is
    "42": r"""#### 42 | ####42 | #### 42. | #### $42 | #### 42% | #### 42 apples | 6*7=42 #### 42 | #### **42** | #### +42
        | \boxed{42} | \boxed {42} | \fbox{42} | \boxed{\boxed{42}} | \boxed{{42}} | $\boxed{42}$. | \boxed{x = 42}
        | \boxed{x=6*7=42} | \boxed{\text{42}} | \boxed{\mathrm{42}} | \boxed{42.} | \boxed{42.0} | \boxed{42\%}
        | \boxed{42\text{ cm}^2} | \boxed{42 \text{ km/h}} | \boxed{42^\circ} | \boxed{42^{\circ}} | \boxed{\$42}
        | \boxed{3} and then \boxed{42} | #### 3 but no: \boxed{42} | \boxed{3} #### 42
        | The answer is 42. | The answer is 42! | It is 42... | (42) | "42" | **42** | *42* | _42_ | `42` | **Answer:** 42
        | **Answer: 42** | $42$ | $$42$$ | \(42\) | \[42\] | <answer>42</answer> | - 42 apples | x=42 | 40 + 2 = 42
        | 6*7=42 | 42 kg | 42kg | 42 cm^2 | 42 m/s^2 | 42 m² | 42 m2 of H2O | 42, says GPT-4 | 42 % | 42 percent | 42 USD
        | 42€ | € 42 | Rs.42 | 042 | 42.000 | 84/2 | 84 / 2 | \frac{84}{2} | ٤٢ | 0.42e2 | 4.2 \times 10^1 | 4.2×10^{1}
        | #### ＋42 | 42 K | 300 K - 258 K = 42 K | 3.5 dozen | ４２""",
    "-42": r"""#### -42 | #### −42 | \boxed{-42} | \boxed{- 42} | \boxed{x=-42} | x = - 42 | It is -42. | -$42 | $-42 | −42
        | -42.0 | (-42) | –42 | #### –42 | －42 | ﹣42 | -84/2 | -\frac{84}{2} | \frac{-84}{2} | \boxed{-\dfrac{84}{2}}""",
    "1234567/2": r"""617,283.5 | #### $617,283.50 | 6,17,283.5 | \boxed{617{,}283.5} | \boxed{617\,283.5}
        | \frac{1,234,567}{2} | 1234567/2 | 617283 1/2 | 617283\frac12 | 617283½ | 6.172835e5""",
    "3000000": "3 million | 3,000,000 | 3e6 | 0.003 billion people | \\boxed{3\\times10^6} | 3000 thousand | 3 Million | #### 3 MILLION",
    "1/8": r".125 | 0.125 | 1/8 | \frac18 | \tfrac{1}{8} | ⅛ | - ⅛ of it, so +⅛ | 12.5 × 10^-2 | 125E-3",
}
NO_NUMBER = r"""12:30 | 1.2.3 | 1,00 | 1,234,56 | 3,14 | 3,4 | (3,4) | 10-3 | 2024-05-03 | 3–4 | 6 * 7 | 6*7 | 40 + 2
    | 10 - 3 | 6 \times 7 | 2^5 | 2**5 | 5² | 0x10 | 4x2 | 2x | x = ±2 | \pm 2 | √2 | \sqrt{2} | \sqrt2 | 2\sqrt{3} | 2\pi
    | 1/2/3 | 1/0 | \frac{1}{0} | \frac{\pi}{4} | \frac{1}{x} | \frac{x}{2} | forty-two | nan | ∞ | - | #### | \boxed | x2
    | \boxed{} | \boxed{1, 2} | \boxed{(3,4)} | \boxed{x^2} | \boxed{x \le 5} | \boxed{42 or 43} | 42 \boxed{none} | \boxed{4
    | 42, at 12:30 | 1e99999 | log_2 | 1 234 | #### 1 234 | 1 234 567 | 1'234 | 1.5k | $3M | 3bn | --5 | +-5 | ₋5 | #### ⁻5
    | it is —5 | 10⁻³ | 3×10⁻³ | 3 – 4"""


@pytest.mark.parametrize("value", THE_NUMBER)
def test_the_number_at_the_end_is_read(value):
    read = {text.strip(): final_number(text) for text in THE_NUMBER[value].split(" | ")}
    assert {
        text: found and found.value for text, found in read.items() if not found or found.value != Fraction(value)
    } == {}


def test_what_holds_digits_and_is_no_number_is_none():
    assert {text: final_number(text) for text in NO_NUMBER.split(" | ") if final_number(text) is not None} == {}
    assert final_number("") is None and final_number("9" * 5000) is None


def test_a_heading_is_no_final_answer_and_what_follows_one_is_not_read():
    assert final_number("#### Step 2: add\nThe answer is 42.").value == 42
    assert final_number("#### 1. Add them\nThe answer is 42").value == 42
    assert final_number("#### 42\nQuestion: how much is 17?").value == 42
    assert final_number("####\n42").value == 42
    assert final_number("1\u202f234").value == 1234


def test_a_percent_sign_is_a_unit_or_hundredths():
    pairs = [("25%", "25"), ("25%", "0.25"), ("0.25", "25%"), ("25 percent", "25%")]
    assert [number_matches([a], [b]) for a, b in pairs] == [[1.0]] * 4
    assert number_matches(["25%", "0.25"], ["2500%", "25"]) == [0.0, 0.0]


def test_a_worked_solution_is_an_answer_and_null_does_not_apply():
    gsm8k = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nAltogether 48+24 = <<48+24=72>>72.\n#### 72"
    answers = [gsm8k, "1,000", 72, 0.5, None, "72"]
    said = ["so 72.", "#### 1000", "\\boxed{72}", "\\frac{1}{2}", "72", "about seventy-two"]
    assert number_matches(said, answers) == [1.0, 1.0, 1.0, 1.0, None, 0.0]


numbers = st.fractions(min_value=-(10**7), max_value=10**7, max_denominator=10**4)
DRESS = [
    "{}",
    "#### {}",
    "\\boxed{{{}}}",
    "The answer is {}.",
    "It costs ${} now",
    "x = {}",
    "**{}**",
    "[5, 6] so {} cm^2",
]


@settings(max_examples=300, deadline=None)
@given(st.decimals(min_value=-(10**8), max_value=10**8, places=3), numbers, st.sampled_from(DRESS), st.data())
def test_any_number_is_found_however_it_is_dressed_and_no_other_is(decimal, fraction, dress, data):
    value = Fraction(decimal)
    written = data.draw(st.sampled_from([str(decimal), f"{decimal:,}", f"{decimal:,}".replace(",", "{,}")]))
    assert final_number(dress.format(written)).value == value
    ratio = f"\\frac{{{fraction.numerator}}}{{{fraction.denominator}}}"
    plain = f"{fraction.numerator}/{fraction.denominator}"
    assert final_number(dress.format(data.draw(st.sampled_from([ratio, plain])))).value == fraction
    assert number_matches([dress.format(written)], [str(decimal + 1)]) == [0.0]


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=r"0123456789.,-+*/^{}()$%# \boxedfrac=:x½²√π−", max_size=40), st.text(max_size=20))
def test_no_text_is_too_strange(text, more):
    found = final_number(text + more)
    assert found is None or math.isfinite(found.value)
    json_valid([text, more])


@pytest.mark.parametrize(
    "part", ["1 ", "1/", "1,", "1,111", "1-", "{", "\\boxed{", "#### ", "1e1", " ", "-", "_", "*", "1 x 10^"]
)
def test_no_text_takes_long(part):
    began = time.process_time()
    final_number(part * 5000 + "1")
    assert time.process_time() - began < 2


def test_patterns_are_of_the_whole_answer():
    tags = r"<think>.*</think>\s*<answer>\d+</answer>"
    said = ["<think>a</think>\n<answer>42</answer>", " <think>a\nb</think><answer>4</answer>\n", "<answer>42</answer>"]
    assert pattern_matches(said, [tags] * 3) == [1.0, 0.0, 0.0]
    assert pattern_matches(said, ["(?s)" + tags] * 3) == [1.0, 1.0, 0.0]
    assert pattern_matches(["a"] * 3, [None, "b", ""]) == [None, 0.0, 0.0]


def test_a_pattern_that_cannot_be_read_or_never_ends_is_named(monkeypatch):
    with pytest.raises(SetupError, match=r"p.jsonl:3: pattern: '\(' is no regular expression"):
        pattern_matches(["a"], ["("], where=["p.jsonl:3"])
    with pytest.raises(SetupError, match="row 0: pattern: 3 is no regular expression"):
        pattern_matches(["a"], [3])
    with pytest.raises(SetupError, match="row 0: pattern: .* is no regular expression: maximum recursion"):
        pattern_matches(["a"], ["(" * 5000 + ")" * 5000])
    monkeypatch.setattr(checkable, "SECONDS", 0.05)
    with pytest.raises(SetupError, match=r"took more than 0.05 s on an answer of 40 characters"):
        pattern_matches(["a" * 40], ["(a|aa)+b"])


JSON = [  # answer, the row's, whether they are equal
    ('{"a": 1, "b": [true, null]}', '{"b":[true,null],"a":1.0}', True),
    (' {"a": "ä"}\n', '{"a": "\\u00e4"}', True),
    ("1e2", "100", True),
    ("0.1", "0.10000000000000001", False),
    ("9" * 5000, "9" * 5000, True),
    ("true", "1", False),
    ("1", "true", False),
    ('"1"', "1", False),
    ("null", "false", False),
    ("[]", "{}", False),
    ("[1, 2]", "[2, 1]", False),
    ("[1]", "[1, 1]", False),
    ('{"a": 1}', '{"a": 1, "b": null}', False),
    ('{"a": 1, "a": 1}', '{"a": 1}', False),
    ("NaN", "null", False),
    ("{'a': 1}", '{"a": 1}', False),
    ('{"a": 1,}', '{"a": 1}', False),
    ('Here it is: {"a": 1}', '{"a": 1}', False),
    ('```json\n{"a": 1}\n```', '{"a": 1}', False),
    ('{"a": 1', '{"a": 1}', False),
    ("", "null", False),
    ("[" * 100_000, "[]", False),
    ("1e99999999999999999999", "1e99999999999999999999", True),
    ("1e99999999999999999999", "1e88888888888888888888", False),
]


@pytest.mark.parametrize("answer, right, equal", JSON, ids=range(len(JSON)))
def test_json_is_equal_exactly(answer, right, equal):
    assert json_matches([answer], [right]) == [float(equal)]


@settings(max_examples=200, deadline=None)
@given(st.from_regex(r"-?(0|[1-9][0-9]{0,5})(\.[0-9]{1,3})?([eE][+-]?[0-9]{1,25})?", fullmatch=True))
def test_every_number_of_json_is_json_and_equal_to_itself(number):
    assert json_valid([number, f"[{number}]"]) == json_matches([number, f" {number}"], [number] * 2) == [1.0, 1.0]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from("-−–－﹣"), st.integers(1, 10**6), st.sampled_from([*"#=:(", "is", "####", "x ="]))
def test_whatever_looks_like_a_minus_is_one(minus, number, before):
    assert final_number(f"{before} {minus}{number}").value == -number
    assert final_number(f"\\boxed{{{minus}{number:,}}}").value == -number


@given(st.integers(1, 999), st.lists(st.integers(0, 999), min_size=1, max_size=3), st.sampled_from(" '’"))
def test_no_part_of_a_number_in_groups_is_taken_for_the_number(first, groups, mark):
    written = mark.join([str(first), *(f"{group:03}" for group in groups)])
    assert [final_number(f"{dress}{written}") for dress in ("", "It is ", "#### ")] == [None] * 3


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(values, values)
def test_json_survives_any_way_of_writing_it(one, other):
    compact, sorted_ = json.dumps(one, separators=(",", ":")), json.dumps(one, sort_keys=True, indent=1)
    assert json_matches([compact, sorted_], [sorted_, json.dumps(one)]) == [1.0, 1.0]
    assert json_valid([compact, compact + "]", "x" + compact]) == [1.0, 0.0, 0.0]
    if json.dumps(one, sort_keys=True) != json.dumps(other, sort_keys=True) and one != other:
        assert json_matches([compact], [json.dumps(other)]) == [0.0]


# --- before training ----------------------------------------------------------------------------------------


@pytest.fixture
def policy(recipe, write, tiny_gpt2):
    """`policy(rows, function, **reward)`: the path of a recipe with one ppo stage."""

    def policy_(rows, *functions, **reward):
        reward |= {"functions": [f"pipelines.ppo.checkable:{name}" for name in functions]}
        data = rows if isinstance(rows, str) else write("p.jsonl", rows)
        stage = {
            "kind": "ppo",
            "model": {"model_name_or_path": str(tiny_gpt2), "chat_template": "plain"},
            "reward": reward,
            "data": {"train": data},
            "args": {"max_steps": 1, "response_length": 8},
        }
        return recipe({"policy": stage})

    return policy_


ROWS = [{"prompt": f"what is {i} + 1", "answer": str(i + 1)} for i in range(20)]


def test_right_rows_are_accepted_and_a_missing_column_is_named(policy):
    load(policy(ROWS, "number_matches"))
    load(policy("openai/gsm8k", "number_matches"))  # nobody knows its columns yet
    with pytest.raises(
        RecipeError, match=r"(?s)reward.functions\[0\].*missing a required argument: 'pattern'.*columns: {OURS"
    ):
        load(policy(ROWS, "pattern_matches"))


@pytest.mark.parametrize(
    "function, column, value, message",
    [
        ("number_matches", "answer", "twelve", r"p.jsonl:8: answer: there is no number at the end of 'twelve'"),
        ("number_matches", "answer", "at 12:30", r"p.jsonl:8: answer: there is no number"),
        ("number_matches", "answer", True, r"p.jsonl:8: answer: there is no number at the end of True"),
        ("number_matches", "answer", None, r"p.jsonl:8: number_matches does not apply to this row"),
        ("json_matches", "answer", "{'a': 1}", r"p.jsonl:8: answer: .* is no JSON text"),
        ("json_matches", "answer", {"a": 1}, r"p.jsonl:8: answer: .*: write it as text \(json.dumps\)"),
        ("pattern_matches", "pattern", "[", r"p.jsonl:8: pattern: '\[' is no regular expression"),
    ],
)
def test_check_names_the_row_that_a_function_cannot_read(policy, function, column, value, message):
    rows = [{**row, column: row["answer"]} for row in ROWS]
    rows[7] = {**rows[7], column: value}
    with pytest.raises(RecipeError, match=message):
        load(policy(rows, function))


def test_rows_of_several_tasks_are_mixed_where_something_rewards_each():
    rows = [{"prompt": "a", "answer": "1", "pattern": None}, {"prompt": "b", "answer": None, "pattern": "b"}]
    check_rows([number_matches, pattern_matches], rows)
    check_rows([number_matches], rows, models=1)  # a reward model judges the other row
    check_rows([number_matches, lambda **columns: 1 / 0], rows)  # as might a function of the user's: not called
    with pytest.raises(SetupError, match="number_matches, pattern_matches does not apply"):
        check_rows([number_matches, pattern_matches], rows, [1.0, 0.0])
