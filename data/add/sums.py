"""Sums of two numbers of three digits, the data written from them, and the judge of recipes/add.yaml.

    python data/add/sums.py        writes every data file of this folder, the same bytes each time

`examples.jsonl.gz` are worked examples for sft; `prompts.jsonl.gz`, `prompts_validation.jsonl` and
`prompts_heldout.jsonl` are sums with their `answer`, for training with a reward that checks it. No sum is in two of the
files. Standard library only.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from pathlib import Path

HERE = Path(__file__).parent
ROWS = {
    "examples.jsonl.gz": 1500,
    "prompts.jsonl.gz": 3000,
    "prompts_validation.jsonl": 200,
    "prompts_heldout.jsonl": 500,
}


def worked(a: int, b: int) -> str:
    """How two numbers of three digits are added, from the right: `8+5=13,4+7+1=12,3+2+1=6 #### 623` of 348 and 275."""
    steps, carry = [], 0
    for x, y in zip(reversed(f"{a:03}"), reversed(f"{b:03}"), strict=True):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        carry = total // 10
    return f"{','.join(steps)} #### {a + b}"


def right(prompt: str, completion: str) -> float:
    """The judge: 1.0 where an answer ends with `####` and the sum that its prompt asks for, and has no other `####`."""
    a, b = map(int, re.fullmatch(r"(\d+)\+(\d+)=", prompt).groups())
    return float(re.fullmatch(rf"[^#]*#### {a + b}", completion.strip()) is not None)


def write() -> None:
    """Write the data files."""
    draw, seen = random.Random("sums, 1"), set()
    for name, count in ROWS.items():
        lines = []
        while len(lines) < count:
            pair = draw.randint(100, 999), draw.randint(100, 999)
            if pair in seen:
                continue
            seen.add(pair)
            prompt = f"{pair[0]}+{pair[1]}="
            row = {"completion": worked(*pair)} if name.startswith("examples") else {"answer": str(sum(pair))}
            lines.append(json.dumps({"prompt": prompt, **row}) + "\n")
        data = "".join(lines).encode()
        (HERE / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)


if __name__ == "__main__":
    write()
