"""Texts to token ids; the characters of a control token in somebody's text stay text.

A tokenizer finds `[SEP]` or `<|endoftext|>` wherever it stands, so a film review could end its own sequence. Only what
the tokenizer itself puts around a text is control. Dialogues, where a template writes control tokens too, have
`pipelines/models/control_tokens.py`.
"""

from __future__ import annotations

import functools
import logging
import re
import weakref
from collections.abc import Callable, Iterable

logger = logging.getLogger(__name__)

_MADE: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # tokenizer -> (its size, its `ordinary_pieces`)


def tokenize(tokenizer, *texts, **how):
    """`tokenizer(*texts, **how)`, with texts that look like special tokens read as text; what is too long for the
    model is no warning, as the callers cut and count it.
    """
    backend, halves = getattr(tokenizer, "backend_tokenizer", None), ordinary_pieces(tokenizer)
    mask = {"return_special_tokens_mask": True} if halves else {}
    read = functools.partial(tokenizer, *texts, split_special_tokens=True, verbose=False, **mask)
    try:
        found = read(**how)
        while halves and how.get("truncation") and (more := _parted(found, halves)["added"]):
            how["max_length"] -= more  # the halves need room, too
            found = read(**how)
    finally:
        if backend is not None:  # transformers leaves it set, for whoever asks the backend directly
            backend.encode_special_tokens = getattr(tokenizer, "split_special_tokens", False)
    return _parted(found, halves)["encoding"] if halves else found


def ordinary_pieces(tokenizer) -> dict[int, list[int]]:
    """Special tokens that the vocabulary also holds as an ordinary piece (of T5's kind of vocabulary it is `</s>`):
    their ids, and the ids of their text in two halves, which is what such text is read as.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    made = _MADE.get(tokenizer)
    if made is None or made[0] != len(tokenizer):
        halves = {}
        for text in special_texts(tokenizer) if backend else ():
            own = tokenizer.convert_tokens_to_ids(text)
            if own in (piece.id for piece in backend.model.tokenize(text)):
                halves[own] = [piece.id for half in (text[:1], text[1:]) for piece in backend.model.tokenize(half)]
        made = _MADE[tokenizer] = (len(tokenizer), halves)
    return made[1]


def _parted(found, halves: dict[int, list[int]]) -> dict:
    """An encoding with the halves of special tokens that stand in texts, and how many ids that adds at most to one."""
    several = bool(found["input_ids"]) and isinstance(found["input_ids"][0], list)
    rows = [{key: found[key][i] for key in found} for i in range(len(found["input_ids"]))] if several else [found]
    out, added = [], 0
    for row in rows:
        mask = row["special_tokens_mask"]
        new: dict[str, list] = {key: [] for key in row if key != "special_tokens_mask"}
        for at, token in enumerate(row["input_ids"]):
            ids = [token] if mask[at] else halves.get(token, [token])
            for key, values in new.items():
                values += ids if key == "input_ids" else [row[key][at]] * len(ids)
        added = max(added, len(new["input_ids"]) - len(mask))
        out.append(new)
    return {"encoding": {key: [row[key] for row in out] for key in out[0]} if several else out[0], "added": added}


def special_texts(tokenizer) -> set[str]:
    """The texts of special tokens, but for one that only stands for unknown words, as any text may."""
    added = tokenizer.added_tokens_decoder.values()
    special = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
    others = {text for role, text in tokenizer.special_tokens_map.items() if role != "unk_token"}  # GPT-2: one for all
    return special - ({tokenizer.unk_token} - others)


def control_pattern(tokenizer) -> re.Pattern:
    """Finds any of `special_texts`."""
    return one_of(special_texts(tokenizer))


def one_of(texts: Iterable[str]) -> re.Pattern:
    """Finds any of some texts, the longest that fits; nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def report(report: dict, side: str, rows: list[dict], holds: Callable[[dict], bool]) -> None:
    """Count, log and record (`control_text`) the rows of a side that hold the text of a control token."""
    where = [row["where"] for row in rows if holds(row)]
    if where:
        report.setdefault(side, {})["control_text"] = len(where)
        what = "hold the text of a control token, which is read as plain text"
        logger.warning("%s: %d of %d rows %s (the first: %s)", side, len(where), len(rows), what, where[0])


def report_texts(to: dict, side: str, rows: list[dict], tokenizer, *columns: str) -> None:
    """`report` on texts in `columns` of rows, some of which may be None."""
    pattern = control_pattern(tokenizer)
    report(to, side, rows, lambda row: any(pattern.search(row.get(column) or "") for column in columns))


class Notice:
    """Logs the first row of a stream that holds the text of a control token; a stream has no end to count at."""

    def __init__(self, holds: Callable[[dict], bool]):
        self.holds, self.given = holds, False

    def __call__(self, row: dict) -> None:
        """Look at one row."""
        if not self.given and self.holds(row):
            self.given = True
            logger.warning(
                "%s holds the text of a control token, which is read as plain text, here and in later rows",
                row["where"],
            )
