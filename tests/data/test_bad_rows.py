"""`data.bad_rows`: an error that names the first, or dropped, counted, logged and recorded; never all of them."""

import pytest

from pipelines.data import mixing
from pipelines.errors import DataError
from pipelines.recipe.problems import RecipeError
from pipelines.recipe.recipe import load

GOOD = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
BAD = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: other\n\nAssistant: c"}  # part at once


def stage(path, **data):
    return {"kind": "reward", "data": {"train": path, **data}, "model": {"model_name_or_path": "M"}}


def test_bad_rows_are_an_error_or_dropped_and_counted(write, caplog):
    path, report = write("p.jsonl", [GOOD, BAD, GOOD, BAD]), {}
    with pytest.raises(DataError, match=r"p\.jsonl:2: "):
        list(mixing.stream({"train": path}, "train", "rankings", 0))
    rows = list(mixing.stream({"train": path, "bad_rows": "drop"}, "train", "rankings", 0, report=report))
    assert [row["where"].rpartition(":")[2] for row in rows] == ["1", "3"]
    assert report["bad_rows"] == {"p.jsonl": 2} and "2 rows left out (bad_rows: drop)" in caplog.text
    assert "p.jsonl:2: " in caplog.text


def test_a_stream_drops_them_in_every_round_and_ends_where_all_are_bad(write):
    section = {"train": write("p.jsonl", [GOOD, BAD]), "bad_rows": "drop"}
    found = mixing.first_block(section, "rankings", 0, 3)
    assert [row["where"].rpartition(":")[2] for row in found] == ["1"] * 3
    with pytest.raises(DataError, match="no rows that can be read; .*p2.jsonl:1"):
        mixing.first_block({"train": write("p2.jsonl", [BAD]), "bad_rows": "drop"}, "rankings", 0, 1)


def test_check_knows(write, recipe, tiny_gpt2):
    mixed, bad = write("p.jsonl", [GOOD] * 8 + [BAD]), write("q.jsonl", [BAD, BAD])
    load_it = lambda path, **data: load(
        recipe(
            {"r": {**stage(path, **data), "model": {"model_name_or_path": str(tiny_gpt2), "chat_template": "chatml"}}}
        )
    )
    load_it(mixed, bad_rows="drop")
    for path, data, words in (
        (mixed, {}, r"p\.jsonl:9: "),
        (bad, {"bad_rows": "drop"}, r"none of 2 rows can be read; .*q\.jsonl:1"),
        (mixed, {"bad_rows": "skip"}, "must be one of error, drop"),
    ):
        with pytest.raises(RecipeError, match=words):
            load_it(path, **data)
