"""A small part of `benchmarks/torture.py`: real kills, damaged files, full disks, on real launches."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "torture.py"


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_is_false():
    asked = ["--kills", "4", "--corruptions", "6", "--disks", "2", "--worlds", "one"]
    line = [sys.executable, str(SCRIPT), *asked, "--only", "base", "sft", "lora", "--seed", "1"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    rows = [row.rpartition("1 process")[2].split() for row in done.stdout.splitlines() if "1 process  " in row]
    tried = {int(row[0]) for row in rows}
    assert {1, 4, 18} <= tried and all(row[:3] == [row[0]] * 3 and row[3:] == ["0", "0"] for row in rows)
    if 2 not in tried:
        assert "full disks: skipped" in done.stdout
