"""The public forms of dialogues, preferences and files, as docs/data-formats.md shows them."""

import json
import re
from pathlib import Path

import pytest

from pipelines.data import mixing, sources
from pipelines.data.dialogues import LEARNED, NOT_LEARNED
from pipelines.data.rows import normalise
from pipelines.errors import DataError

USER, ANSWER, OTHER = ({"role": r, "content": c} for r, c in [("user", "q"), ("assistant", "a"), ("assistant", "b")])
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"town": "Ulm"}}}


def sft(**row):
    return normalise(row, "sft")


def test_alpaca_with_system_and_history():
    row = {"instruction": "now", "input": "this", "output": "done", "system": "be brief", "history": [["q", "a"]]}
    roles = [(m["role"], m["content"]) for m in sft(**row)["messages"]]
    assert roles == [
        ("system", "be brief"),
        ("user", "q"),
        ("assistant", "a"),
        ("user", "now\n\nthis"),
        ("assistant", "done"),
    ]
    assert sft(instruction="now", output="done", system="", history=[]) == {"prompt": "now", "completion": "done"}
    system = {"role": "system", "content": "be brief"}
    assert sft(prompt="p", completion="c", system="be brief")["prompt"] == [system, {"role": "user", "content": "p"}]
    asked = [USER, ANSWER, USER]
    assert normalise({"prompt": asked, "system": "be brief"}, "prompts") == {"prompt": [system, *asked]}
    with pytest.raises(DataError, match="twice"):
        sft(messages=[{"role": "system", "content": "x"}, USER, ANSWER], system="y")


def test_sharegpt_with_system_and_calls():
    row = {
        "system": "You have tools.",
        "tools": json.dumps([{"name": "weather", "parameters": {}}]),
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": {"town": "Ulm"}})},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "a"},
        ],
    }
    out = sft(**row)
    assert [m["role"] for m in out["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
    assert out["messages"][2]["tool_calls"][0]["function"] == CALL["function"]
    assert out["tools"] == [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    with pytest.raises(DataError, match="unknown role 'narrator'"):
        sft(conversations=[{"from": "narrator", "value": "x"}])


def test_tool_calls_reasoning_and_parts():
    written = {**CALL, "function": {"name": "weather", "arguments": '{"town": "Ulm"}'}}  # as OpenAI writes them
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [written]}]
    turns += [{"role": "tool", "tool_call_id": "c1", "content": ""}, {**ANSWER, "reasoning": "hm"}]
    out = sft(messages=turns)["messages"]
    assert out[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert out[2] == {"role": "tool", "content": "", "tool_call_id": "c1"} and out[3] == {
        **ANSWER,
        "reasoning_content": "hm",
    }
    out = sft(prompt=[USER], completion=turns[1:])
    assert out["prompt"] == [USER] and [m["role"] for m in out["completion"]] == ["assistant", "tool", "assistant"]
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert sft(messages=[{**USER, "content": parts}, ANSWER])["messages"][0]["content"] == "one two"
    for bad, words in [
        ([{"type": "image_url", "image_url": {}}], "'image_url'; only text"),
        (["x"], "part 1"),
        (3, "must be text, not int"),
    ]:
        with pytest.raises(DataError, match=words):
            sft(messages=[{**USER, "content": bad}, ANSWER])
    for column in ("images", "functions", "chat_template_kwargs"):
        with pytest.raises(DataError, match=column):
            sft(prompt="p", completion="c", **{column: [{"x": 1}]})


@pytest.mark.parametrize("name", [*LEARNED, *NOT_LEARNED])
def test_an_answer_marked_as_not_to_be_learned_is_not(name):
    off, on = (0, 1) if name in LEARNED else (True, False)
    out = sft(messages=[USER, {**OTHER, name: off}, USER, {**ANSWER, name: on}])["messages"]
    assert out[1] == {**OTHER, "learn": False} and out[3] == ANSWER
    with pytest.raises(DataError, match="not to be learned"):
        sft(messages=[USER, {**ANSWER, name: off}])
    with pytest.raises(DataError, match="must be 0 or 1"):
        sft(messages=[USER, {**ANSWER, name: 0.5}])


def test_marks_that_cannot_be_honoured_are_errors():
    for message in (
        {**ANSWER, "train_detail": [{"begin": 0}]},
        {**ANSWER, "mask": True},
        {**ANSWER, "weight": 1, "loss": False},
    ):
        with pytest.raises(DataError, match="learned|weight"):
            sft(messages=[USER, message])
    with pytest.raises(DataError, match="only messages of the assistant"):
        sft(messages=[{**USER, "train": True}, ANSWER])
    ignored = set()
    normalise({"messages": [{**USER, "weight": 0}, {**ANSWER, "timestamp": 3}]}, "sft", None, None, ignored)
    assert ignored == {"messages[].timestamp"}


def test_the_order_of_messages():
    again = [USER, USER, ANSWER, OTHER]
    assert sft(messages=again)["messages"] == again  # the template decides
    for bad, words in [
        ([USER], "end with a message of the assistant"),
        ([USER, {**ANSWER, "content": " "}], "is empty"),
        ([{"role": "tool", "content": "x"}, ANSWER], "does not follow"),
        ([], "no message"),
    ]:
        with pytest.raises(DataError, match=words):
            sft(messages=bad)


def test_preferences_as_the_best_known_sets_have_them():
    pair = {"prompt": [USER], "completions": ["a", "b"], "ranks": [1, 2]}
    hh = "\n\nHuman: {}\n\nAssistant: {}"
    for row in (
        {"chosen": hh.format("q", "a"), "rejected": hh.format("q", "b")},
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": hh.format("q", "a"), "rejected": hh.format("q", "b")},
        {"prompt": "q", "prompt_id": "x", "chosen": [USER, ANSWER], "rejected": [USER, OTHER], "score_chosen": 8.0},
        {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"prompt": [USER], "chosen": ANSWER, "rejected": [OTHER]},
    ):
        assert normalise(row, "rankings") == pair, row
    longer = normalise(
        {"chosen": hh.format("q", "a") + hh.format("r", "c"), "rejected": hh.format("q", "a") + hh.format("r", "d")},
        "rankings",
    )
    assert [m["content"] for m in longer["prompt"]] == ["q", "a", "r"] and longer["completions"] == ["c", "d"]
    for row, words in [
        ({"chosen": [USER, ANSWER, USER, ANSWER], "rejected": [USER, OTHER, USER, ANSWER]}, "part at message 2"),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "same answer"),
        ({"prompt": "something", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, "neither how"),
        ({"chosen": hh.format("q", "a"), "rejected": "b"}, "no column prompt"),
        ({"prompt": "q", "chosen": {**ANSWER, "weight": 0}, "rejected": "b"}, "it is ranked"),
    ]:
        with pytest.raises(DataError, match=words):
            normalise(row, "rankings")


# --- files


def rows_of(path, **source):
    return [row for _, row in sources.read({"path": str(path), **source})]


@pytest.mark.parametrize(
    "text, lines",
    [
        ('[\n {"text": "a"},\n {"text":\n "b"}\n]', ["2[1]", "3[2]"]),
        ('{"version": 1, "data": [{"text": "a"}, {"text": "b"}]}', ["1[1]", "1[2]"]),
        ('{\n "data": [\n  {"text": "a"},\n  {"text": "b"}\n ],\n "n": [1]}', ["3[1]", "4[2]"]),
        ('{\n "text": "a"\n}\n\n{\n "text": "b"\n}\n', ["1[1]", "5[2]"]),
        ('\ufeff{"text": "a"}\n\n{"text": "b"}\n', ["1", "3"]),
    ],
)
def test_json_in_all_its_shapes(text, lines, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    found = list(sources.read({"path": str(path)}))
    assert [row for _, row in found] == [{"text": "a"}, {"text": "b"}]
    assert [where.partition("a.json:")[2] for where, _ in found] == lines
    place = {}  # and it goes on in the middle
    again = sources.read({"path": str(path)}, place)
    next(again)
    assert [row for _, row in sources.read({"path": str(path)}, dict(place))] == [{"text": "b"}]


def test_one_dialogue_alone_in_a_file_is_a_row(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"messages": [USER, ANSWER]}))
    (tmp_path / "b.json").write_text(json.dumps({"dialog": [USER, ANSWER]}, indent=1))
    assert len(rows_of(tmp_path / "a.json")) == len(rows_of(tmp_path / "b.json", columns={"messages": "dialog"})) == 1


def test_long_cells_are_read(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "word " * 40000 + ",1\n")
    assert len(rows_of(tmp_path / "a.csv")[0]["text"]) == 200000


def test_folders_of_save_to_disk_and_arrow_files(tmp_path):
    import datasets
    import pyarrow

    turns = [[USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}], [USER, ANSWER]]
    table = datasets.Dataset.from_list([{"messages": t} for t in turns])
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(str(tmp_path / "two"))
    with (
        pyarrow.OSFile(str(tmp_path / "file.arrow"), "wb") as out,
        pyarrow.ipc.new_file(out, table.data.schema) as writer,
    ):
        writer.write_table(table.data.table)
    stream = next((tmp_path / "one").glob("*.arrow"))
    for path in ("one", "two", "file.arrow", stream):
        assert [normalise(row, "sft")["messages"] for row in rows_of(tmp_path / path)] == turns, path
    assert len(rows_of(tmp_path / "two", split="test")) == 1
    place = {}
    next(sources.read({"path": str(tmp_path / "one")}, place))
    assert len(list(sources.read({"path": str(tmp_path / "one")}, dict(place)))) == 1
    with pytest.raises(DataError, match="no split 'x', but train, test"):
        rows_of(tmp_path / "two", split="x")
    stream.write_bytes(stream.read_bytes()[:-900])
    with pytest.raises(DataError, match="one.*cannot be read|one: after row"):
        rows_of(tmp_path / "one")
    shuffled = table.shuffle(seed=1)
    shuffled.save_to_disk(str(tmp_path / "three"))
    assert rows_of(tmp_path / "three")[0]["messages"][-1]["content"] == shuffled[0]["messages"][-1]["content"]


def test_every_example_of_the_documentation_is_read():
    text = (Path(__file__).parents[2] / "docs" / "data-formats.md").read_text()
    found = re.findall(r"```json (\w+)\n(.*?)```", text, re.DOTALL)
    assert {kind for kind, _ in found} >= {
        "text",
        "sft",
        "rankings",
        "unpaired",
        "prompts",
        "samples",
        "labelled",
        "seq2seq",
    }
    for kind, block in found:
        for line in block.strip().splitlines():
            row = json.loads(line)
            task = {"problem_type": "multi_label_classification"} if isinstance(row.get("label"), list) else {}
            assert normalise(row, kind, None, task), line


def test_a_row_that_is_read_is_read_alike_when_it_is_written_back(write):
    rows = [
        {"messages": [USER, {**OTHER, "weight": 0}, USER, ANSWER]},
        {"instruction": "i", "output": "o", "system": "s"},
    ]
    first = list(mixing.stream({"train": write("a.jsonl", rows)}, "train", "sft", 0))
    second = list(mixing.stream({"train": write("a.jsonl", first)}, "train", "sft", 0))
    assert first == second
