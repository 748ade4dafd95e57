"""Which phrase answers hold now that the reference's own answers rarely did: a reward that one word satisfies shows so.

A phrase is a run of one to four tokens. What counts is the share of answers that hold it, not how often, so that
neither a long answer nor one that repeats itself outweighs the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

LONGEST = 4  # tokens of a phrase
KEPT = 256  # answers of the reference that are remembered
RARE = 0.05  # the largest share of the reference's answers that a phrase may be in


@dataclass(frozen=True)
class Phrase:
    """Tokens, and the shares (0 to 1) of the answers and of the reference's answers that hold them."""

    tokens: tuple[int, ...]
    share: float
    reference_share: float


def ngrams(answer: list[int], n: int) -> Iterable[tuple[int, ...]]:
    """Every run of `n` tokens of an answer, in order."""
    return zip(*(answer[i:] for i in range(n)))


def holders(answers: list[list[int]]) -> Counter:
    """Phrase -> how many of the answers hold it."""
    return Counter(
        phrase for answer in answers for phrase in {p for n in range(1, LONGEST + 1) for p in ngrams(answer, n)}
    )


def commonest(answers: list[list[int]], reference: list[list[int]]) -> Phrase | None:
    """Of the phrases that are rare in the reference's answers, the one that most of `answers` hold; the longest of
    equals.

    None where they hold none.
    """
    before = holders(reference)
    share = {
        phrase: (count / len(answers), before[phrase] / len(reference))
        for phrase, count in holders(answers).items()
        if before[phrase] <= RARE * len(reference)
    }
    if not share:
        return None
    tokens = max(share, key=lambda p: (share[p][0], -share[p][1], len(p), p))
    return Phrase(tokens, *share[tokens])


def distinct(answers: list[list[int]], n: int = 2) -> float:
    """Different runs of `n` tokens among all of them (Li et al. 2016, https://arxiv.org/abs/1510.03055); 1 where there
    are none.
    """
    every = [phrase for answer in answers for phrase in ngrams(answer, n)]
    return len(set(every)) / len(every) if every else 1.0
