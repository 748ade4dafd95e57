"""The demo's scripted labeller: near to how answers were written, and deaf to what is held out."""

import gzip
import json
import sys
from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "data" / "bay"
sys.path.insert(0, str(DATA))

import labeller  # noqa: E402


def lines(name):
    data = (DATA / name).read_bytes()
    return [json.loads(line) for line in (gzip.decompress(data) if name.endswith(".gz") else data).splitlines()]


def test_it_sees_the_flaws_that_answers_were_written_with():
    rows = lines("rankings_validation.jsonl") + lines("rankings.jsonl.gz")[:400]
    pairs = [
        (set(found), set(written))
        for row in rows
        for found, written in zip(labeller.script_labeller(row["prompt"], row["completions"])[1], row["tags"])
    ]
    assert sum(found == written for found, written in pairs) / len(pairs) > 0.98
    assert {tag for found, _ in pairs for tag in found} == {"inappropriate", "irrelevant", "inaccurate"}


def test_it_ranks_by_them():
    ranks, tags = labeller.script_labeller(
        "Which drink does Nell love?",
        ["Nell drinks coffee.", "Nell drinks tea.", "Nell drinks tea. Now go away, dummy.", "Nell drinks", "It's tea."],
    )
    assert ranks == [3, 1, 2, 4, 4]
    assert tags == [["inaccurate"], [], ["inappropriate"], ["irrelevant"], ["irrelevant"]]


def test_it_knows_all_training_prompts_and_no_held_out_one():
    asked = {row["prompt"] for name in ("prompts.jsonl", "prompts_validation.jsonl") for row in lines(name)}
    assert set(labeller.questions()) == asked
    for row in lines("heldout_prompts.jsonl"):
        with pytest.raises(ValueError, match="training prompts only"):
            labeller.script_labeller(row["prompt"], ["a", "b"])


def test_it_does_not_ask_the_oracle(monkeypatch):
    for name in ("oracle", "claims", "parse_question"):
        monkeypatch.setattr(labeller.world, name, None)
    labeller.questions.cache_clear()
    assert labeller.script_labeller("Which drink does Nell love?", ["Nell drinks tea.", "No."])[0] == [1, 2]
