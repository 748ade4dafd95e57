"""Rows encoded once, by one process, and kept while nothing they are made of changes."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
from accelerate import PartialState
from datasets import Dataset

from pipelines.data import fingerprint
from pipelines.data.token_file import (
    FORMAT,
    digest,
    document_batches,
    plain_encoder,
    sealed,
    tokenizer_fingerprint,
    unsealed,
)
from pipelines.errors import SetupError
from pipelines.files import contents, damage, replacing, write_json

logger = logging.getLogger(__name__)


def encoded(documents: Iterable[str], tokenizer, separator_id: int) -> Iterator[np.ndarray]:
    """Each document's tokens and `separator_id`, as `tokenize_corpus` writes them: uint32 arrays."""
    with plain_encoder(tokenizer) as encode:
        for batch in document_batches(documents):
            yield from (np.array([*ids, separator_id], np.uint32) for ids in encode(batch))


def encoded_rows(stage, tokenizer, settings: dict, make) -> dict[str, tuple]:
    """The data sets that `make` encodes: by the first process while the others wait, and mapped from disk by all.

    They stay in `.tokens/STAGE` beside the stage's folder, and are taken from there while nothing changes that they are
    made of: the files' checksums, the sections `data`, `task` and `model`, the seed, the tokenizer with its template,
    and `settings`.

    Args:
        stage: gets in its `report` what `make` put there, now or then.
        settings: whatever else decides what the rows become (any JSON value).
        make: () -> {side: `datasets.Dataset` with a column `where`}, called where needed.

    Returns:
        For "train" and "validation" the data set without `where` and the names of its rows, or (None, None).

    Raises:
        ValueError: another process than the first finds nothing, because it does not see the same disk.
    """

    home = stage.folder.parent / ".tokens" / stage.name / "rows"
    words = [tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.model_input_names, tokenizer.padding_side]
    kept = {**stage.data, "train": None} if stage.data.get("streaming") else stage.data  # nothing is kept of a stream
    parts = [fingerprint.content(kept), stage.seed, *(stage.sections.get(name) for name in ("data", "task", "model"))]
    key = digest([FORMAT, *parts, tokenizer_fingerprint(tokenizer), words, settings])
    state = PartialState()
    with state.main_process_first():
        path = home / "index.json"
        index = _kept(path, key, verify=state.is_main_process)
        if index is not None:
            logger.info("%s: its rows are already encoded (%s)", stage.name, home)
        elif not state.is_main_process:
            raise SetupError(f"{home} is not what the first process has just written: all need one file system.")
        else:
            home.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            made = make()
            for side, rows in made.items():
                _write_table(rows.data.table, home / f"{side}.arrow")
            listed = contents(home, [f"{side}.arrow" for side in made])
            index = {"key": key, "files": listed, "report": stage.report}
            write_json(path, sealed(index))
    stage.report |= index["report"]
    sets = dict.fromkeys(("train", "validation"), (None, None))
    for side in (name.removesuffix(".arrow") for name in index["files"]):
        rows = Dataset.from_file(str(home / f"{side}.arrow"))
        sets[side] = (rows.remove_columns("where"), rows["where"])
    return sets


def _kept(path: Path, key: str, verify: bool) -> dict | None:
    """The index of rows that were encoded for this key and are still what was written; None where they are not."""
    try:
        if not path.is_file():
            return None
        index = unsealed(json.loads(path.read_bytes()), ("key", "files", "report"))
        if index["key"] != key:
            return None
        wrong = damage(path.parent, index["files"], quick=not verify)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s cannot be read (%s); the rows are encoded again", path, error)
        return None
    if wrong:
        logger.warning("%s: %s; the rows are encoded again", path.parent, "; ".join(wrong))
    return None if wrong else index


def _write_table(table, path: Path) -> None:

    with replacing(path, "wb") as out, pyarrow.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)  # rows that are read one by one are found faster
