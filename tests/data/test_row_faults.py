"""Whatever a file holds, its rows are read or refused by one `DataError` that names file and line."""

import gzip
import json
import random
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.data import labels, mixing
from pipelines.data.rows import NEEDS, READS, normalise
from pipelines.errors import DataError
from pipelines.recipe import data_checks

FEW = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
TASKS = [
    {},
    {"labels": ["bad", "good"]},
    {"problem_type": "regression"},
    {"problem_type": "multi_label_classification"},
]
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
GOOD = {
    "text": [{"text": "a text"}],
    "sft": [
        {"prompt": "p", "completion": "c"},
        {"instruction": "do", "input": "this", "output": "done", "system": "s", "history": [["a", "b"]]},
        {"messages": TURNS, "tools": [{"name": "t"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 1}], "system": "s"},
        {
            "messages": [
                TURNS[0],
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
                {"role": "tool", "content": "1", "name": "f"},
                TURNS[1],
            ]
        },
    ],
    "rankings": [
        {"prompt": "p", "chosen": "c", "rejected": "r", "margin": 1.0},
        {
            "prompt": TURNS[:1],
            "completions": ["a", "b", "c"],
            "ranks": [1, 2, 2],
            "tags": [[], ["x"], []],
            "models": ["m", "n", "o"],
        },
        {"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "b"}]},
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    ],
    "unpaired": [
        {"prompt": "p", "completion": "c", "label": True},
        {"instruction": "do", "input": "this", "output": "done", "label": "0", "history": [["a", "b"]]},
        {"prompt": TURNS[:1], "completions": ["a", "b", "c"], "ranks": [1, 2, 2], "tags": [[], ["x"], []]},
        {"prompt": "p", "chosen": "c", "rejected": "r", "margin": 1.0, "models": ["m", "n"]},
    ],
    "prompts": [{"prompt": "p", "answer": "4"}, {"prompt": TURNS[:1], "tools": "[]"}],
    "samples": [{"prompt": "p", "completions": ["a", "b"], "models": ["m", "n"], "ended": [True, False]}],
    "labelled": [
        {"text": "t", "label": "good"},
        {"text": "t", "text_pair": "u", "label": 1},
        {"text": "t", "label": [0, 1]},
    ],
    "seq2seq": [{"source": "s", "target": "t"}],
}

words = st.sampled_from(
    [
        "",
        " ",
        "a",
        "²",
        "--1",
        "-1",
        "1",
        "nan",
        "inf",
        "1_0",
        "[1, 2]",
        "[{'role': 'user'}]",
        '{"a": 1}',
        "\0",
        "\ufeff",
        "\n\nHuman: a\n\nAssistant: b",
        "\n\nHuman:",
        "user",
        "assistant",
        "tool",
        "function",
        "9" * 5000,
        "😀",
    ]
)
keys = st.sampled_from(
    [
        "role",
        "content",
        "from",
        "value",
        "type",
        "text",
        "name",
        "function",
        "arguments",
        "tool_calls",
        "weight",
        "loss",
        "train_detail",
        "reasoning_content",
        "thinking",
        "id",
        "tool_call_id",
        "x",
        "images",
    ]
)
scalars = (
    st.none()
    | st.booleans()
    | words
    | st.text(max_size=4)
    | st.integers()
    | st.sampled_from([10**400, -(10**30), 2**53])
    | st.floats()
)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(keys, v, max_size=4), max_leaves=8)


def places(value, at=()):
    """The path of every value inside a row."""
    found = [at] if at else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*at, key))
    return found


def put(value, at, new):
    """A copy of the row with `new` at a path."""
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[at[0]] = new if len(at) == 1 else put(value[at[0]], at[1:], new)
    return copy


@pytest.mark.parametrize("kind", list(NEEDS))
@given(data=st.data())
@FEW
def test_any_value_anywhere_gives_a_row_or_an_error(kind, data):
    row = data.draw(st.sampled_from(GOOD[kind]))
    for _ in range(data.draw(st.integers(1, 2))):
        if (spots := places(row)) and data.draw(st.booleans()):
            row = put(row, data.draw(st.sampled_from(spots)), data.draw(values))
        else:
            row = {**row, data.draw(st.sampled_from(READS[kind])): data.draw(values)}
    task = data.draw(st.sampled_from(TASKS))
    before, ignored = repr(row), set()
    try:
        out = normalise(row, kind, None, task, ignored)
    except DataError as error:
        assert str(error) and "\n" not in str(error).replace("\\n", "")[:20]
        return
    finally:
        assert repr(row) == before, "the row itself was changed"
    for message in [m for c in ("messages", "prompt") if isinstance(out.get(c), list) for m in out[c]]:
        assert isinstance(message["content"], str) and message["role"] in (
            "system",
            "developer",
            "user",
            "assistant",
            "tool",
        )
        assert message.keys() <= {"role", "content", "reasoning_content", "tool_calls", "name", "tool_call_id", "learn"}
    if kind in ("sft", "rankings"):  # what was read is read alike when it is read again
        assert normalise(out, kind) == out
    for column in out.keys() & {"label", "ranks", "margin"}:
        for number in out[column] if isinstance(out[column], list) else [out[column]]:
            assert isinstance(number, str) or abs(float(number)) < 3.1e38
    unread = {name for name in row if name not in READS[kind]}
    if kind not in ("prompts", "samples"):
        assert {n for n in unread if row[n] not in (None, "", [], {})} <= ignored


def write_as(path, rows, suffix):
    """The rows in a file of one kind; values that CSV cannot hold become text."""
    if suffix == ".json":
        raw = json.dumps(rows, indent=1).encode()
    elif suffix in (".parquet", ".arrow"):
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist(rows)
        if suffix == ".parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            with pyarrow.OSFile(str(path), "wb") as out, pyarrow.ipc.new_stream(out, table.schema) as writer:
                writer.write_table(table)
        return
    elif suffix == ".csv":
        raw = ("prompt,completion\n" + "".join(f'"{r["prompt"]}","{r["completion"]}"\n' for r in rows)).encode()
    else:
        raw = "".join(json.dumps(r) + "\n" for r in rows).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet", "a.arrow", "a.txt"])
def test_broken_bytes_anywhere_give_rows_or_an_error_that_names_the_file(name, tmp_path):
    rows = [{"prompt": f"What is {i}? ünd", "completion": f"It is {i}."} for i in range(40)]
    path, suffix = tmp_path / name, "." + name.split(".")[1]
    write_as(path, rows, suffix)
    whole, rng, errors = path.read_bytes(), random.Random(name), 0
    kind = "text" if suffix == ".txt" else "sft"
    for _ in range(150):
        raw, at = bytearray(whole), rng.randrange(len(whole))
        how = rng.choice(["flip", "cut", "insert", "drop", "zero"])
        if how == "flip":
            raw[at] ^= 1 << rng.randrange(8)
        elif how == "cut":
            raw = raw[:at]
        elif how == "insert":
            raw[at:at] = bytes(rng.randrange(256) for _ in range(3))
        elif how == "drop":
            del raw[at : at + rng.randrange(1, 5)]
        else:
            raw[at : at + 4] = b"\0" * 4
        path.write_bytes(raw)
        try:
            for row in mixing.stream({"train": str(path)}, "train", kind, 0):
                assert re.search(r"a\.\w+(\.gz)?[:\[]\d+", row["where"])
        except DataError as error:
            errors += 1
            assert name in str(error), (how, at, error)
        list(data_checks.problems({"train": str(path)}, kind, None, True))  # and `check` gives no traceback either
    assert errors > 20


def problems(section, kind="sft", task=None):
    return [f"{path}: {message}" for path, message, _ in data_checks.problems(section, kind, task, True)]


@pytest.mark.parametrize(
    "name, content, kind, words",
    [
        ("i.jsonl", '{"instruction": 3, "output": 4}', "sft", "i.jsonl:1: instruction must be text, not int"),
        ("c.jsonl", '{"conversations": "hello"}', "sft", "c.jsonl:1: conversations must be a list of messages"),
        ("l.jsonl", '{"conversations": ["hello"]}', "sft", "l.jsonl:1: conversations: message 1 must be an object"),
        ("h.jsonl", '{"prompt": "p", "completion": "ok \\ud83d"}', "sft", "h.jsonl:1: completion, character 4: half"),
        ("t.jsonl", '{"text": "x \\udc00"}', "text", "t.jsonl:1: text, character 3: half"),
        (
            "n.jsonl",
            '{"messages": [{"role": "user", "content": "\\uD83D"}]}',
            "sft",
            "n.jsonl:1: messages, character 1",
        ),
        ("d.jsonl", '{"text": "a", "text": "b"}', "text", "d.jsonl:1: the key 'text' is there twice"),
        ("d.json", '[{"text": "a"},\n{"text": "a", "text": "b"}]', "text", "d.json:2: the key 'text' is there twice"),
        ("deep.jsonl", '{"text": ' + "[" * 9999 + "]" * 9999 + "}", "text", "deep.jsonl:1: nested too deeply"),
        ("long.jsonl", '{"text": "a", "n": ' + "9" * 9999 + "}", "text", "long.jsonl:1: not a row"),
        ("deep.json", "[" * 9999, "text", "deep.json:1: nested too deeply"),
        ("u.csv", "text,text\na,b\n", "text", "u.csv:1: the header names the column 'text' twice"),
        ("f.csv", "text,label\na\n", "labelled", "f.csv:2: fewer fields"),
        ("q.csv", 'text,label\n"a,1\nb,0\n', "labelled", "q.csv:3: not CSV"),
        ("s.csv", "text;label\na;1\n", "labelled", "s.csv:1: the columns are separated by ';'"),
        ("b.csv", "text,label\na,\n", "labelled", "b.csv:2: label is empty"),
        ("m.csv", "messages\n\"[{'role': 'user', 'content': 'a'}]\"\n", "sft", "list written into a cell"),
        (
            "p.csv",
            "prompt,completion\n\"[{'role': 'user', 'content': 'a'}]\",b\n",
            "sft",
            "prompt is text that holds a list",
        ),
        ("ll.csv", 'text,label\na,"[0, 1]"\n', "labelled", "is a list written as text"),
        (
            "keys.json",
            '{"train": [{"text": "a"}], "test": [{"text": "b"}]}',
            "text",
            "several lists of rows, under train, test",
        ),
        ("cols.json", '{"text": ["a", "b"], "label": [0, 1]}', "labelled", "one list for each column"),
        ("pandas.json", '{"text": {"0": "a", "1": "b"}}', "text", "holds columns, not rows"),
        ("e.jsonl", '{"prompt": "p"\n{"prompt": "p", "completion": "c"}', "sft", "e.jsonl:1: not JSON"),
        ("square.jsonl", '{"text": "a", "label": "\u00b2"}\n{"text": "a", "label": "--1"}\n', "labelled", ""),
        ("bool.jsonl", '{"text": "a", "label": true}', "labelled", "class id or name, not True"),
        (
            "ties.jsonl",
            '{"prompt": "p", "completions": ["a", "b"], "ranks": [1, 1]}',
            "rankings",
            "train: all 1 rankings are ties",
        ),
        (
            "inf.jsonl",
            '{"prompt": "p", "completions": ["a", "b"], "ranks": [1, Infinity]}',
            "rankings",
            "ranks must be numbers",
        ),
        ("nan.jsonl", '{"prompt": "p", "chosen": "a", "rejected": "b", "margin": NaN}', "rankings", "margin must be"),
        ("huge.jsonl", '{"prompt": "p", "completions": ["a", "b"], "ranks": [1, 1e300]}', "rankings", "ranks must be"),
        ("one.jsonl", '{"text": "a", "label": "x"}\n' * 3, "labelled", "train: all rows have the same label 'x'"),
        ("same.jsonl", '{"chosen": [], "rejected": []}', "rankings", "no column prompt"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(name, content, kind, words, tmp_path):
    (tmp_path / name).write_text(content)
    found = problems({"train": str(tmp_path / name)}, kind)
    assert words in "\n".join(found) and bool(found) == bool(words), found


def test_utf16_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}', encoding="utf-16")
    assert "a.jsonl:1: not UTF-8 text, but UTF-16" in problems({"train": str(tmp_path / "a.jsonl")}, "text")[0]
    (tmp_path / "b.jsonl").write_text('{"text": "a"}', encoding="utf-8-sig")
    assert problems({"train": str(tmp_path / "b.jsonl")}, "text") == []


def test_numbers_of_a_regression_and_lists_of_labels():
    number, several = {"problem_type": "regression"}, {"problem_type": "multi_label_classification"}
    label = lambda value, task: normalise({"text": "t", "label": value}, "labelled", None, task)["label"]
    assert label("1.5", number) == 1.5 and label(2, number) == 2.0
    for bad in (float("nan"), float("inf"), "nan", "1_0", True, 10**400, "", None, [1]):
        with pytest.raises(DataError, match="label"):
            label(bad, number)
    assert label([0, 2], several) == [0, 2] and label([], several) == [] and label([0, 1], several) == [0, 1]
    for bad in ([0, 1, 0], [1, 0, 0], [True, False], [1.0, 0.0], [1, 1], "[0, 1]", [None], [[]]):
        with pytest.raises(DataError, match="label"):
            label(bad, several)


def test_doubtful_labels_are_warned_of(write, caplog):
    rows = [
        {"text": str(i), "label": ["Good", "good", "bad", "bad ", "odd"][i % 5 if i < 10 else i % 4]} for i in range(30)
    ]
    rows.append({"text": "x", "label": "single"})
    assert problems({"train": write("a.jsonl", rows)}, "labelled") == []
    assert "'Good', 'good' differ only" in caplog.text and "'bad', 'bad ' differ only" in caplog.text
    assert "one row alone has the label 'single'" in caplog.text
    assert labels.doubtful({0: 5, "good": 5}) and labels.doubtful({"good": 2, "bad": 9}) == []


def test_validation_must_have_the_labels_of_training(write):
    train = write("a.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    validation = write("b.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "z"}])
    found = problems({"train": train, "validation": validation}, "labelled")
    assert len(found) == 1 and "b.jsonl:2: no training row has the label 'z'" in found[0]


# --- columns


def test_columns_may_exchange_names_and_are_checked(write):
    row = {"prompt": "an answer", "completion": "a question"}
    swapped = normalise(row, "sft", {"prompt": "completion", "completion": "prompt"})
    assert swapped == {"prompt": "a question", "completion": "an answer"}
    path = write("a.jsonl", [{"question": "q", "answer": "a"}])
    assert problems({"train": path, "columns": {"prompt": "question", "completion": "answer"}}) == []
    found = problems({"train": path, "columns": {"question": "prompt", "answer": "completion"}})
    assert len(found) == 2 and "{prompt: question}, ours first" in found[0]
    ignored = set()
    normalise({"prompt": "p", "question": "q", "completion": "c"}, "sft", {"prompt": "question"}, None, ignored)
    assert ignored == {"prompt"}


@pytest.mark.parametrize(
    "kind, row",
    [
        ("rankings", {"chosen": "a", "rejected": "b"}),
        ("sft", {"prompt": "p", "system": "s"}),
        ("labelled", {"label": 1, "text_pair": "p"}),
        ("seq2seq", {"target": "t"}),
        ("rankings", {"prompt": "p", "rejected": "b"}),
        ("unpaired", {"prompt": "p", "completion": "b"}),
    ],
)
def test_no_column_is_proposed_that_is_needed_elsewhere(kind, row):
    with pytest.raises(DataError) as error:
        normalise(row, kind)
    advice = str(error.value).partition("e.g. ")[2]
    assert advice and not any(f": {column}" in advice for column in row)


def test_a_mapping_goes_before_a_dialogue_and_what_is_left_is_named(write, caplog):
    row = {"messages": TURNS, "prompt": "p", "answer": "c", "id": 7, "note": None}
    ignored = set()
    assert normalise(row, "sft", {"completion": "answer"}, None, ignored) == {"prompt": "p", "completion": "c"}
    assert ignored == {"messages", "id"}
    report = {}
    path = write("a.jsonl", [{**row, "messages": [{"role": "user", "content": str(i)}, TURNS[1]]} for i in range(20)])
    mixing.load({"train": path, "validation": 0.5}, "sft", 3, report=report)
    assert report["ignored_columns"] == ["answer", "id", "prompt"] and caplog.text.count("ignored columns") == 1


def test_prompts_have_the_same_columns_whatever_the_first_row_holds(write):
    from datasets import Dataset

    rows = [
        {"prompt": "p", "where": "x"},
        {"question": "q", "answer": 4},
        {"prompt": TURNS[:1], "answer": {"n": ["4", 4]}},
    ]
    rows[1]["prompt"] = rows[1].pop("question")
    path = write("a.jsonl", rows)
    train, _ = mixing.load({"train": path}, "prompts", 0)
    table = Dataset.from_list(train, on_mixed_types="use_json")
    assert table["answer"][:] == [None, 4, {"n": ["4", 4]}] and table["prompt"][:] == ["p", "p", TURNS[:1]][:1] + [
        "q",
        TURNS[:1],
    ]
    assert mixing.columns({"train": write("b.jsonl", rows[1:2])}, "prompts") == ["answer", "prompt", "where"]
    with pytest.raises(DataError, match="64 bits"):
        normalise({"prompt": "p", "answer": 2**64}, "prompts")
