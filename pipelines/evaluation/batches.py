"""Many rows through a model: sorted by length, in batches, shared out over the processes, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from pipelines import errors
from pipelines.data import mixing


def rows_of(path: str, kind: str, seed: int) -> list[dict]:
    """The rows of a file in the shape `kind`; `DataError` where there are none."""
    rows = list(mixing.stream({"train": path}, "train", kind, seed))
    if not rows:
        raise errors.DataError(f"{path}: no rows")
    return rows


@torch.no_grad()
def by_length(lengths: list[int], batch_size: int, work: Callable[[list[int]], list], title: str) -> list:
    """`work(positions)` (a result for each of them) of all positions of `lengths`, batch by batch, in their order.

    Rows of like length are in a batch together, so that there is little padding. Every process calls this and gets all
    results, having done its share. The longest come first: what does not fit into memory is known at once.
    """
    state = PartialState()
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    mine, found = order[state.process_index :: state.num_processes], []
    with tqdm(total=len(mine), desc=title, unit=" rows", disable=not state.is_main_process, mininterval=0.5) as bar:
        for start in range(0, len(mine), batch_size):
            some = mine[start : start + batch_size]
            found += zip(some, work(some), strict=True)
            bar.update(len(some))
    out: list = [None] * len(lengths)
    for i, result in gather_object(found) if state.num_processes > 1 else found:
        out[i] = result
    return out
