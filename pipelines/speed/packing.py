"""Sequences of any length in one row: packs, their seams, and the collators that make them.

A pack is one row (1, tokens) of sequences laid end to end, with `cu_seq_lens_q` marking the seams (the names
are those of transformers' flash-attention path, so the same batch serves both).
"""

from __future__ import annotations

import bisect
import dataclasses
from dataclasses import dataclass

import torch

from pipelines import IGNORE_INDEX
from pipelines.errors import SetupError


@dataclass(frozen=True)
class OnHost:
    """What the host knows of a packed batch, so that it need not ask, and wait for, the device that the batch
    goes to.
    """

    lengths: tuple[int, ...]  # tokens of each sequence
    targets: int  # labels that are learned
    groups: tuple[tuple[int, ...], ...] = ()  # of `pack_branches`: of each sequence the beginning and its branches


def plan_packs(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: which sequences share a pack.

    TRL's `pack_dataset` packs dataset rows with the same rule; this one packs plain indices, for batches that
    are born in memory (PPO) and for samplers. Deterministic: equal lengths keep their order.

    Args:
        lengths: tokens of each sequence.
        capacity: most tokens in a pack.

    Returns:
        Packs as lists of indices into `lengths`; empty sequences are in none.

    Raises:
        ValueError: a sequence longer than the capacity.
    """
    too_long = [i for i, n in enumerate(lengths) if n > capacity]
    if too_long:
        raise SetupError(
            f"{len(too_long)} of {len(lengths)} sequences exceed the pack's {capacity} tokens (the first is "
            f"number {too_long[0]} with {lengths[too_long[0]]}): truncate them or raise the capacity."
        )
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, pack), sorted: bisect finds the tightest fit
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[i] == 0:
            continue
        at = bisect.bisect_left(room, (lengths[i], -1))
        if at < len(room):
            free, pack = room.pop(at)
        else:
            free, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(i)
        bisect.insort(room, (free - lengths[i], pack))
    return packs


def pack(sequences: list[list[int]], labels: list[list[int]] | None = None) -> dict[str, torch.Tensor | int | OnHost]:
    """Lay sequences end to end in one row, under the names transformers gives to packed batches.

    Args:
        sequences: token ids of each sequence, none empty.
        labels: same shape, -100 where nothing is learned; None learns every token.

    Returns:
        input_ids, labels, position_ids: (1, tokens) int64; cu_seq_lens_q, cu_seq_lens_k: (sequences + 1,)
        int32; max_length_q, max_length_k: int; on_host: `OnHost`. The first token of each sequence is never a target:
        nothing precedes it.

    Raises:
        ValueError: no or empty sequences, or labels that do not fit them.
    """
    labels = sequences if labels is None else labels
    lengths = [len(ids) for ids in sequences]
    if not sequences or 0 in lengths:
        raise SetupError("a pack needs at least one sequence, each of at least one token.")
    if lengths != [len(part) for part in labels]:
        raise SetupError("each sequence needs as many labels as it has tokens.")
    ids = torch.tensor([i for part in sequences for i in part])
    targets = torch.tensor([i for part in labels for i in part])
    return _packed_batch(ids, targets, torch.tensor(lengths))


def pack_branches(groups: list[list[list[int]]], share: bool = True) -> dict[str, torch.Tensor | int]:
    """As `pack`, for groups of sequences that begin alike (answers to one prompt): the beginning is laid down once.

    A group becomes one sequence of the pack, its common beginning and then what follows it in each member. A token sees
    the beginning and what precedes it in its own branch, at the position it would have alone, so every member is
    computed as if it stood by itself (tests/test_packing.py). With `share` False each member is a sequence of its own.

    Returns:
        `input_ids`, `position_ids`, `cu_seq_lens_*`, `max_length_*` and `on_host` as `pack`; `last` (members,) int64,
        the place of each member's last token; and with `share` `branches` (tokens,) int64, 0 in the beginning of a
        group, 1, 2, … in its members.
    """
    groups = groups if share else [[ids] for group in groups for ids in group]
    ids, positions, branches, last, parts = [], [], [], [], []
    for group in groups:
        # of a member at least the last token stands in its own branch
        common = alike(group) if len(group) > 1 else 0
        ids += group[0][:common]
        positions += range(common)
        branches += [0] * common
        for number, member in enumerate(group, 1):
            ids += member[common:]
            positions += range(common, len(member))
            branches += [number] * (len(member) - common)
            last.append(len(ids) - 1)
        parts.append((common, *(len(member) - common for member in group)))
    out = _packed_batch(torch.tensor(ids), torch.tensor(ids), torch.tensor([sum(part) for part in parts]))
    del out["labels"]
    if share:
        out["on_host"] = dataclasses.replace(out["on_host"], groups=tuple(parts))
    out |= {"position_ids": torch.tensor(positions)[None], "last": torch.tensor(last)}
    return out | ({"branches": torch.tensor(branches)} if share else {})


def alike(group: list[list[int]]) -> int:
    """With how many tokens all members begin, at most all but the last one of the shortest."""
    most = min(map(len, group)) - 1
    first = group[0]
    return next((n for n in range(most) if any(member[n] != first[n] for member in group)), most)


def _packed_batch(ids: torch.Tensor, targets: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor | int]:
    ends = lengths.cumsum(0)
    starts = ends - lengths
    targets[starts] = IGNORE_INDEX
    seams = torch.cat([starts[:1], ends]).to(torch.int32)
    longest = int(lengths.max())
    return {
        "input_ids": ids[None],
        "labels": targets[None],
        "position_ids": packed_positions(starts, lengths)[None],
        "cu_seq_lens_q": seams,
        "cu_seq_lens_k": seams,
        "max_length_q": longest,
        "max_length_k": longest,
        "on_host": OnHost(tuple(lengths.tolist()), int((targets != IGNORE_INDEX).sum())),
    }


def packed_positions(starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """0, 1, 2, … within each sequence: (tokens,) int64."""
    return torch.arange(int(lengths.sum()), device=lengths.device) - starts.repeat_interleave(lengths)


class PackedCollator:
    """Dataset rows -> one packed batch (see `pack`).

    Rows hold `input_ids`, `labels` (or TRL's `completion_mask` / `assistant_masks`; without any of them every
    token is learned) and, where a row is itself a pack, `seq_lengths` (TRL's `pack_dataset` writes it). Any
    other column is dropped. Sequences of length 0 vanish.
    """

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor | int]:
        lengths = torch.tensor([n for row in rows for n in row.get("seq_lengths", [len(row["input_ids"])]) if n])
        ids = torch.cat([torch.as_tensor(row["input_ids"], dtype=torch.int64) for row in rows])
        targets = torch.cat([self._labels(row) for row in rows])
        if not len(ids) == len(targets) == int(lengths.sum()):
            raise SetupError(
                f"{len(ids)} tokens, {len(targets)} labels and seq_lengths of {int(lengths.sum())} in all do "
                "not belong together: check the rows' columns."
            )
        return _packed_batch(ids, targets, lengths)

    @staticmethod
    def _labels(row: dict) -> torch.Tensor:
        if "labels" in row:
            return torch.tensor(row["labels"], dtype=torch.int64)
        labels = torch.tensor(row["input_ids"], dtype=torch.int64)
        for mask in ("completion_mask", "assistant_masks"):
            if mask in row:
                labels[torch.tensor(row[mask]) == 0] = IGNORE_INDEX
        return labels


class PaddedCollator:
    """Dataset rows -> one right-padded batch with the same losses, for architectures that cannot be packed.

    Gives input_ids, attention_mask and labels, (rows, longest) int64; labels are -100 on padding and, as in a pack, on
    the first token of each row.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        columns = {"input_ids": [], "attention_mask": [], "labels": []}
        for row in rows:
            ids, labels = torch.as_tensor(row["input_ids"]).long(), torch.as_tensor(row["labels"]).long().clone()
            labels[0] = IGNORE_INDEX
            for name, value in zip(columns, (ids, torch.ones_like(ids), labels), strict=True):
                columns[name].append(value)
        fill = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORE_INDEX}
        return {
            name: torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill[name])
            for name, parts in columns.items()
        }
