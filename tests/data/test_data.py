"""Rows of every shape are read, normalised, mixed and split; what is bad is named by file and row."""

import csv
import gzip
import json
from types import SimpleNamespace

import pytest

from pipelines.data import fingerprint, mixing, sources
from pipelines.data.rows import normalise
from pipelines.errors import DataError
from pipelines.recipe import data_checks


def errors(section, kind="sft", task=None):
    return [message for _, message, _ in data_checks.problems(section, kind, task, True)]


# --- shapes


def test_sft_shapes_come_out_alike():
    assert normalise({"prompt": "p", "completion": "c", "extra": 1}, "sft") == {"prompt": "p", "completion": "c"}
    assert normalise({"instruction": "do", "input": "this", "output": "done"}, "sft") == {
        "prompt": "do\n\nthis",
        "completion": "done",
    }
    assert normalise({"instruction": "do", "input": "", "output": "done"}, "sft")["prompt"] == "do"
    share = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}
    assert normalise(share, "sft")["messages"][1] == {"role": "assistant", "content": "ho"}


def test_pairs_with_and_without_prompt():
    user, good, bad = ({"role": r, "content": c} for r, c in [("user", "q"), ("assistant", "y"), ("assistant", "n")])
    implicit = normalise({"chosen": [user, good], "rejected": [user, bad]}, "rankings")
    explicit = normalise({"prompt": [user], "chosen": [good], "rejected": [bad]}, "rankings")
    assert implicit == explicit == {"prompt": [user], "completions": ["y", "n"], "ranks": [1, 2]}


@pytest.mark.parametrize(
    "kind, row, words",
    [
        ("sft", {"prompt": "p"}, "no column completion"),
        ("sft", {"prompt": "p", "completion": " "}, "completion is empty"),
        ("sft", {"prompt": "p", "completion": None}, "completion is empty"),
        ("sft", {"messages": [{"role": "tool", "content": "a"}]}, "does not follow the assistant"),
        ("sft", {"messages": [{"role": "user", "content": "a"}]}, "end with a message of the assistant"),
        ("sft", {"messages": [{"role": "bot", "content": "a"}]}, "unknown role 'bot'"),
        ("sft", {"messages": [{"role": "user", "content": ""}]}, "message 1 (user) is empty"),
        ("rankings", {"prompt": "p", "chosen": "x", "rejected": "x"}, "same answer"),
        ("prompts", {"text": "p"}, "no column prompt"),
        ("labelled", {"text": "t", "label": 7}, "out of range"),
        ("labelled", {"text": "t", "label": "goood"}, "did you mean good?"),
        ("labelled", {"text": "t", "label": -1}, "out of range"),
        ("text", {"text": 3}, "must be text"),
        ("seq2seq", {"source": "s", "target": ""}, "target is empty"),
    ],
)
def test_bad_rows_say_what_is_wrong(kind, row, words):
    with pytest.raises(DataError, match=None) as error:
        normalise(row, kind, task={"labels": ["bad", "good"]})
    assert words in str(error.value)


def test_columns_are_mapped_and_missing_ones_suggested():
    assert normalise({"q": "p", "a": "c"}, "sft", {"prompt": "q", "completion": "a"}) == {
        "prompt": "p",
        "completion": "c",
    }
    with pytest.raises(DataError, match="data.columns"):
        normalise({"q": "p", "a": "c"}, "sft")
    with pytest.raises(DataError, match="no column 'x'"):
        normalise({"q": "p"}, "sft", {"prompt": "x"})


# --- files


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": 'what, "now"?', "completion": "naïve\nline"}, {"prompt": "p2", "completion": "c2"}]
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as stream:
        stream.write(lines)
    with open(tmp_path / "a.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    for name in ["a.jsonl", "a.json", "b.jsonl.gz", "a.csv", "a.parquet", "a.parquet.gz"]:
        train, validation = mixing.load({"train": str(tmp_path / name)}, "sft", 0)
        assert [(r["prompt"], r["completion"]) for r in train] == [(r["prompt"], r["completion"]) for r in rows], name
        assert validation == [] and name.split(".")[0] in train[0]["where"]


def test_text_files_by_line_paragraph_and_document(write):
    path = write("t.txt", "one\ntwo\n\nthree\n")
    by = lambda how: [r["text"] for _, r in sources.read({"path": path, "sample_by": how})]
    assert by("line") == ["one", "two", "three"]
    assert by("paragraph") == ["one\ntwo", "three"]
    assert by("document") == ["one\ntwo\n\nthree\n"]


def test_broken_files_are_named_with_their_row(tmp_path, write):
    good = json.dumps({"prompt": "p", "completion": "c"})
    assert "bad.jsonl:2: not JSON" in errors({"train": write("bad.jsonl", good + "\n{oops\n")})[0]
    (tmp_path / "latin.jsonl").write_bytes(good.encode() + b'\n{"prompt": "\xe9"}\n')
    assert "latin.jsonl:2: not UTF-8" in errors({"train": str(tmp_path / "latin.jsonl")})[0]
    packed = gzip.compress((good + "\n").encode() * 5000)
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    assert "gzip file ends too early" in errors({"train": str(tmp_path / "cut.jsonl.gz")})[-1]
    (tmp_path / "no.parquet").write_bytes(b"PAR1nonsense")
    assert "not a whole Parquet file" in errors({"train": str(tmp_path / "no.parquet")})[0]
    (tmp_path / "wide.csv").write_text("prompt,completion\na,b,c\n")
    assert "more fields than the header" in errors({"train": str(tmp_path / "wide.csv")})[0]
    assert "no rows" in errors({"train": write("empty.jsonl", "")})[0]


def test_bad_rows_are_shown_first_few_and_counted(write):
    rows = [{"prompt": "p", "completion": "" if i % 2 else "c"} for i in range(40)]
    found = errors({"train": write("x.jsonl", rows)})
    assert len(found) == sources.SHOWN + 1
    assert "x.jsonl:2: completion is empty" in found[0] and "15 more bad rows" in found[-1] and "20 of 40" in found[-1]


# --- mixing and splitting


def test_fraction_splits_by_prompt_and_does_not_depend_on_order(write):
    rows = [{"prompt": f"p{i % 50}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(500)]
    sides = mixing.load({"train": write("a.jsonl", rows), "validation": 0.2}, "rankings", 1)
    train, validation = ({r["prompt"] for r in side} for side in sides)
    assert not train & validation and len(train | validation) == 50 and 3 <= len(validation) <= 20
    shuffled = mixing.load({"train": write("b.jsonl", rows[::-1]), "validation": 0.2}, "rankings", 1)
    assert {r["prompt"] for r in shuffled[1]} == validation
    assert {
        r["prompt"] for r in mixing.load({"train": write("a.jsonl", rows), "validation": 0.2}, "rankings", 2)[1]
    } != validation


def test_weights_say_how_often_a_row_is_seen(write):
    one = write("one.jsonl", [{"text": f"one {i}"} for i in range(1000)])
    two = write("two.jsonl", [{"text": f"two {i}"} for i in range(10)])
    section = {"train": [{"path": one, "weight": 0.5}, {"path": two, "weight": 3}]}
    rows = [r["text"] for r in mixing.stream(section, "train", "text", 0)]
    assert 430 < sum(r.startswith("one") for r in rows) < 570
    assert sum(r.startswith("two") for r in rows) == 30
    assert rows == [r["text"] for r in mixing.stream(section, "train", "text", 0)]


def test_row_limit_and_globs(write, tmp_path):
    for i in range(3):
        write(f"part{i}.jsonl", [{"text": f"{i} {j}"} for j in range(4)])
    rows = list(sources.read({"path": str(tmp_path / "part*.jsonl"), "rows": 6}))
    assert len(rows) == 6 and rows[4][0].endswith("part1.jsonl:1")


def test_section_mistakes(write):
    path = write("a.jsonl", [{"text": "x"}])
    assert "did you mean weight?" in errors({"train": {"path": path, "wieght": 2}}, "text")[0]
    assert "between 0 and 1" in errors({"train": path, "validation": 1.5}, "text")[0]
    assert "must be above 0" in errors({"train": {"path": path, "weight": -1}}, "text")[0]
    assert "needs a source" in errors({}, "text")[0]


def test_a_hub_id_without_network_is_one_clear_error():
    with pytest.raises(DataError, match="nobody/nothing: cannot be loaded"):
        list(sources.read({"path": "nobody/nothing"}))


def test_fingerprint_changes_with_the_content(write):
    section = {"train": write("a.jsonl", [{"text": "x"}])}
    before = fingerprint.fingerprint(section)
    assert before == fingerprint.fingerprint(section)
    write("a.jsonl", [{"text": "y"}])
    assert fingerprint.fingerprint(section) != before


def test_what_is_kept_of_hub_data_is_known_by_the_commit_they_stand_at(tmp_path, monkeypatch):
    import huggingface_hub

    commits = {"main": "a1", "v2": "b2"}

    def info(self, path, revision=None, **_):
        if not commits:
            raise ConnectionError("no network")
        return SimpleNamespace(sha=commits[revision or "main"])

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit = lambda **more: fingerprint.content({"train": {"path": "owner/rows", **more}})["owner/rows"]["commit"]
    assert (commit(), commit(revision="v2")) == ("a1", "b2")
    commits["main"] = "a2"
    assert commit() == "a2"
    commits.clear()
    assert commit() is None
    (tmp_path / "datasets--owner--rows/refs").mkdir(parents=True)
    (tmp_path / "datasets--owner--rows/refs/main").write_text("a1\n")
    assert commit() == "a1"  # without network: what lies in the cache
