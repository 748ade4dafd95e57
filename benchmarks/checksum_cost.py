"""What the checksums of a checkpoint cost: seconds of saving a model and its AdamW states, and of hashing them.

    python benchmarks/checksum_cost.py [--megabytes 1500] [--folder runs] [--times 5]

`write` is what safetensors and torch.save take, `sync` until it is on the disk, `sync and hash` the same with
`files.checksum`, which reads beside the waiting.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from pipelines import files


def main() -> None:
    """Save and hash, some times; print the best of each and the share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1500, help="of weights and states together (1500)")
    parser.add_argument("--folder", type=Path, default=Path("."), help="on which disk (here)")
    parser.add_argument("--times", type=int, default=5, help="the best of so many counts (5)")
    args = parser.parse_args()
    count = args.megabytes * 10**6 // 12  # weights, and two states of each, in fp32
    weights, states = {"w": torch.rand(count)}, {"state": {0: {"m": torch.rand(count), "v": torch.rand(count)}}}
    best = {"write": float("inf"), "sync": float("inf"), "sync and hash": float("inf")}

    def took(name: str, work) -> None:
        began = time.perf_counter()
        work()
        best[name] = min(best[name], time.perf_counter() - began)

    def sync(path: Path) -> None:
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())

    for _ in range(args.times):
        for name, end in (("sync", sync), ("sync and hash", lambda path: files.checksum(path, sync=True))):
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                one, two = (Path(folder) / name for name in ("model.safetensors", "optimizer.pt"))
                took("write", lambda one=one, two=two: (save_file(weights, one), torch.save(states, two)))
                took(name, lambda one=one, two=two, end=end: (end(one), end(two)))
    added = best["sync and hash"] - best["sync"]
    print(", ".join(f"{name} {seconds:.3f} s" for name, seconds in best.items()))
    print(f"{args.megabytes} MB: checksums add {100 * added / (best['write'] + best['sync']):.1f} % to saving")


if __name__ == "__main__":
    main()
