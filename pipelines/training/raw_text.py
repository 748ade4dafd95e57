"""Raw text of pretrain and mlm: its rows, the tokenizer trained on it, its files of token ids, its windows to
look at.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from pipelines.data import encoded_rows, fingerprint, mixing, sources, streaming, token_file, train_tokenizer
from pipelines.models import loading

logger = logging.getLogger(__name__)

BLOCK = 2000  # rows whose windows are shown at a time


def rows(stage, side: str) -> Iterator[dict]:
    """The rows of a side with `text` and `where`; those of a streamed side never end."""
    if stage.data.get("streaming") and side == "train":
        places: list[dict] = [{} for _ in sources.sources(stage.data, side)]
        return mixing.endless(stage.data, stage.spec.rows, stage.seed, places, stage.report)
    return mixing.stream(stage.data, side, stage.spec.rows, stage.seed, report=stage.report)


def kept_sides(stage) -> list[str]:
    """The sides whose tokens are written to a file; a streamed side is not."""
    return ([] if stage.data.get("streaming") else ["train"]) + (["validation"] if stage.data.get("validation") else [])


def home(stage) -> Path:
    """Where tokenizer and tokens are kept: beside the stage's folder, for when the stage is made again."""
    return stage.folder.parent / ".tokens" / stage.name


def own_tokenizer(stage, folder: Path):
    """The tokenizer that `tokenizer.train` asks for, kept in `folder` and taken from there while the data is
    the same.
    """
    texts = (row["text"] for row in rows(stage, "train"))
    return train_tokenizer.trained_tokenizer(folder, stage.section("tokenizer"), texts, _key(stage))


def load_tokenizer(stage):
    """The tokenizer of the model that the stage starts from, or the one that it trains."""
    section, words = stage.section("model"), stage.section("tokenizer")
    if words.train and not section.model_name_or_path:
        return own_tokenizer(stage, home(stage))
    if words.train:
        logger.warning("tokenizer.train is not used: %s brings its tokenizer", section.model_name_or_path)
    return loading.load_tokenizer(section)


def tokenize(stage, tokenizer, separator_id: int) -> None:
    """Write the tokens of every kept side, `separator_id` after each document; nothing to do where they are there."""
    for side in kept_sides(stage):
        texts = (row["text"] for row in rows(stage, side))
        key = {**_key(stage), "side": side}
        token_file.tokenize_corpus(texts, tokenizer, home(stage) / side, separator_id=separator_id, key=key)


def _key(stage) -> dict:
    return {"data": fingerprint.content(stage.data), "section": stage.data, "seed": stage.seed}


def windows(stage, side: str, tokenizer, separator_id: int, context: int) -> Iterator[dict]:
    """The windows of a side as training cuts them, `{"input_ids", "where", "row"}`, without a file.

    Of a streamed side those of its first block. Counts go to `stage.report[side]`.
    """
    streamed = stage.data.get("streaming") and side == "train"
    source = rows(stage, side)
    if streamed:
        source = islice(source, stage.section("data").buffer_size)
    left: list[tuple[dict, np.ndarray]] = []  # what fills no window yet: (row, its tokens)
    report = stage.report[side] = {"documents": 0, "tokens": 0, "windows": 0, "context": context}
    while block := list(islice(source, BLOCK)):
        texts = encoded_rows.encoded([row["text"] for row in block], tokenizer, separator_id)
        pieces = [*left, *zip(block, texts, strict=True)]
        report["documents"] += len(block)
        report["tokens"] += sum(len(ids) for _, ids in pieces[len(left) :])
        if sum(len(ids) for _, ids in pieces) < context:
            left = pieces
            continue
        items, counts = streaming.windows(context)([row for row, _ in pieces], [ids for _, ids in pieces])
        for item in items:
            yield {**item, "row": report["windows"]}
            report["windows"] += 1
        left, rest = [], counts["tokens_read"] % context
        for row, ids in reversed(pieces):
            if rest > 0:
                left.insert(0, (row, ids[-rest:]))
                rest -= len(ids)
