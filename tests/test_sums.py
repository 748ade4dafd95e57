"""The sums in data/add: right, each in one file only, written as they lie there; their judge."""

import gzip
import json
import shutil
import sys
from pathlib import Path

from pipelines.ppo.checkable import number_matches

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "data" / "add"))
import sums  # noqa: E402  beside its data


def rows(name):
    opened = gzip.open if name.endswith(".gz") else open
    return [json.loads(line) for line in opened(sums.HERE / name, "rt")]


def test_every_row_is_right_and_in_one_file_only():
    prompts = [row["prompt"] for name in sums.ROWS for row in rows(name)]
    assert len(set(prompts)) == len(prompts) == sum(sums.ROWS.values())
    for row in rows("examples.jsonl.gz"):
        steps, _, total = row["completion"].partition(" #### ")
        assert int(total) == eval(row["prompt"].rstrip("="))
        for step in steps.split(","):
            left, _, right = step.partition("=")
            assert eval(left) == int(right)
        assert sums.right(row["prompt"], row["completion"]) == 1.0
    for name in list(sums.ROWS)[1:]:
        answers = [row["answer"] for row in rows(name)]
        assert number_matches([f"so #### {eval(row['prompt'].rstrip('='))}" for row in rows(name)], answers) == [
            1.0
        ] * len(answers)


def test_the_files_are_what_the_script_writes(tmp_path, monkeypatch):
    shutil.copytree(sums.HERE, tmp_path / "add")
    monkeypatch.setattr(sums, "HERE", tmp_path / "add")
    before = {name: (tmp_path / "add" / name).read_bytes() for name in sums.ROWS}
    sums.write()
    unpacked = lambda name, data: gzip.decompress(data) if name.endswith(".gz") else data  # zlib's versions differ
    for name, data in before.items():
        assert unpacked(name, (tmp_path / "add" / name).read_bytes()) == unpacked(name, data)


def test_the_judge_wants_the_sum_at_the_end_and_once():
    assert sums.right("348+275=", "8+5=13,4+7+1=12,3+2+1=6 #### 623") == 1.0
    for wrong in (
        "623",
        "#### 622",
        "#### 6230",
        "#### 623 #### 623",
        "#### 622 #### 623",
        "#### 623 or so",
        "####623",
    ):
        assert sums.right("348+275=", wrong) == 0.0
