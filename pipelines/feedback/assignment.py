"""Who gets which prompt next, and in which order its answers are shown.

With an overlap of 1 everybody is given every prompt. Below 1, that share of the prompts, chosen by their keys, is for
everybody, spread evenly over each labeller's work and in the same order for all, so that after any number of prompts
people have the same ones behind them and can be compared; each of the rest is for one labeller. Labellers begin at
different places of the list and go round.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection

# What stands for a key's place in a lottery that nobody can influence, the same in every version of Python.
_draw = lambda *parts: hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=8).digest()


def shared_keys(keys: list[str], overlap: float) -> list[str]:
    """The prompts of `keys` that everybody is to rank, in the order in which everybody gets them; all of them at 1."""
    if overlap >= 1:
        return keys
    count = max(1, round(overlap * len(keys))) if overlap > 0 else 0
    return sorted(keys, key=lambda key: _draw("shared", key))[:count]


def start(arrival: int, count: int) -> int:
    """Where the labeller who came as number `arrival` (from 0) begins: 0, 1/2, 1/4, 3/4, 1/8, … of `count` prompts."""
    place, part = 0.0, 0.5
    while arrival:
        place, arrival, part = place + part * (arrival % 2), arrival // 2, part / 2
    return int(place * count)


def next_key(
    keys: list[str],
    shared: list[str],
    mine: list[str],
    elsewhere: Collection[str] = (),
    taken: Collection[str] = (),
    others: Collection[str] = (),
    arrival: int = 0,
) -> str | None:
    """The prompt to show next to a labeller, None when there is nothing left for them.

    `keys` are all prompts and `shared` those for everybody, `mine` what of them this labeller has judged, in order,
    `elsewhere` what other tabs of theirs show; `taken` what other people have ranked, and `others` what their tabs
    show. A prompt that is shown somewhere comes last: that tab may never save it, and twice is better than not at all.
    """
    done, everyone = set(mine), set(shared)
    begin = start(arrival, len(keys))
    if own := [key for key in mine if key not in everyone or len(shared) == len(keys)]:
        begin = keys.index(own[-1]) + 1  # go on behind what was judged last
    round_ = [key for key in keys[begin:] + keys[:begin] if key not in done]
    if len(shared) == len(keys):
        left = round_
    else:
        alone = [key for key in round_ if key not in everyone and key not in taken]
        together = [key for key in shared if key not in done]
        had = sum(key in everyone for key in mine)
        due = (had + 1) * len(keys) <= len(shared) * (len(mine) + 1)
        left = together + alone if due else alone + together
    shown = set(elsewhere) | (set(others) - everyone)
    return next((key for key in left if key not in shown), left[0] if left else None)


def left_over(keys: list[str], shared: list[str], mine: Collection[str], taken: Collection[str]) -> int:
    """How many prompts are still to come for a labeller, if nobody else works on."""
    done, everyone = set(mine), set(shared)
    return sum(key not in done and (key in everyone or key not in taken) for key in keys)


def shuffled(row: dict, key: str, labeller: str) -> list[int]:
    """The order in which a labeller sees the distinct answers: positions in `row["completions"]`.

    It depends on the prompt and the labeller alone, in every version of Python: ranks that arrive after a restart are
    mapped back by it.
    """
    first = {text: i for i, text in reversed(list(enumerate(row["completions"])))}
    return sorted(first.values(), key=lambda i: hashlib.blake2b(f"{labeller}|{key}|{i}".encode()).digest())
