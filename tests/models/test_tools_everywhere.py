"""A row's tools, nulls and thoughts reach the template wherever a model is given the row: ppo, its judges, evaluate."""

import pytest
from dialogue_families import tokenizer_of

from pipelines.errors import DataError
from pipelines.evaluation import judges, measure, texts
from pipelines.models import chat_template, tokenizer_setup
from pipelines.ppo.rewards import read_anew
from pipelines.recipe.sections import EvaluateSection
from pipelines.stages.ppo import Rows

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "the weather",
            "parameters": {"type": "object", "properties": {"unit": {"type": "string", "default": None}}},
        },
    }
]
PROMPT = [{"role": "user", "content": "is it warm"}]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tokenizer_of("thoughts")
    tokenizer_setup.dress(tokenizer, None)
    return tokenizer


def test_rows_of_ppo_stay_as_they_were_read():
    rows = [{"prompt": PROMPT, "tools": TOOLS, "where": "a:1"}, {"prompt": "hi", "tools": None, "where": "a:2"}]
    data = Rows(rows)
    assert data[[1, 0]]["tools"] == [None, TOOLS] and data["prompt"] == [PROMPT, "hi"] and data[0] == rows[0]
    assert len(data) == 2 and data.column_names == ["prompt", "tools", "where"]


def test_judges_read_the_tools(tokenizer):
    with_tools, without = (chat_template.encode_answer(tokenizer, PROMPT, "yes", t) for t in (TOOLS, None))
    assert with_tools != without
    (ids,) = read_anew(tokenizer, [([1], [2])], [PROMPT], ["yes"], [2], [TOOLS])
    assert ids == with_tools
    assert judges._dialogue(tokenizer, {"prompt": PROMPT, "tools": TOOLS}, "yes", True) == ids


def test_evaluate_asks_with_the_tools_and_keeps_thoughts_where_asked(tokenizer, monkeypatch):
    given = []
    monkeypatch.setattr(measure, "fitting", lambda model, tokenizer, prompts, length, tools: range(len(prompts)))
    monkeypatch.setattr(measure.generation_answers, "answers", lambda *a, **how: given.append(how) or [[("yes", True)]])
    rows = [{"prompt": PROMPT, "tools": TOOLS, "where": "a:1"}, {"prompt": "hi", "where": "a:2"}]
    for keep in (True, False):
        measure.answered("m", None, tokenizer, rows, [[0], [1]], 1.0, EvaluateSection(keep_thoughts=keep))
    assert [how["tools"] for how in given] == [[TOOLS, None]] * 2
    assert [how["keep_thoughts"] for how in given] == [True, False]


def test_pairs_are_the_whole_answer(tokenizer):
    row = {"messages": [*PROMPT, {"role": "assistant", "content": "yes"}], "tools": TOOLS, "where": "a:1"}
    (found,), _ = texts._answers(tokenizer, [row], 1000)
    assert found == chat_template.encode_answer(tokenizer, PROMPT, "yes", TOOLS)
    assert texts.text_of_answer(row) == "yes"
    asked = {**row, "messages": [*row["messages"], {"role": "user", "content": "and now"}]}
    assert texts.split_row(asked) == texts.split_row(row)  # the last answer, not the last message
    call = {"function": {"name": "weather", "arguments": {}}, "type": "function"}
    calls = {**row, "messages": [*PROMPT, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    with pytest.raises(DataError, match="a:1: its answer calls tools"):
        texts.text_of_answer(calls)
    with pytest.raises(DataError, match="a:1: no answer"):
        texts.split_row({"messages": PROMPT, "where": "a:1"})
