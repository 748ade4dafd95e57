"""Raw text to a file of token ids that training reads in place.

Documents stream through the tokenizer in batches; neither the corpus nor its tokens are ever in memory as a
whole. Training then maps the file and cuts it into windows, so a corpus may be larger than memory, and starts
at once when it was tokenised before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from pipelines import IGNORE_INDEX
from pipelines.data.plain_text import control_pattern, ordinary_pieces, tokenize
from pipelines.errors import SetupError
from pipelines.files import checksum, replacing

logger = logging.getLogger(__name__)

FORMAT = 2  # raise it when the meaning of the files changes: old ones are then made anew
KEYS = ("tokens", "documents", "dtype", "separator_id", "key", "xxh3")  # of an index
BATCH_CHARACTERS, BATCH_DOCUMENTS = 2**20, 4096  # a batch ends at whichever comes first


def tokenize_corpus(
    documents: Iterable[str], tokenizer, folder: str | Path, *, separator_id: int, key: object = None
) -> dict:
    """Write all documents' tokens, `separator_id` after each, to `folder/tokens.bin`; nothing to do the
    second time.

    The index is written last, so an interrupted run leaves nothing that looks finished. With a `key`, a
    finished file for the same key, tokenizer and separator is taken as it is and `documents` is not touched.

    Args:
        documents: texts, consumed lazily; empty ones are left out. No special tokens are added to them.
        tokenizer: of transformers; its truncation and padding are ignored.
        folder: made if missing; other files in it are left alone.
        separator_id: token after each document, usually EOS.
        key: says what the documents are (any JSON value, such as checksums of the files). Without one the documents
            are tokenised every time, since nobody can know that they are the same.

    Returns:
        The index: `tokens`, `documents`, `dtype`, `separator_id`, `key`; `control_text`, how many documents hold the
        text of a special token, where some do.

    Raises:
        ValueError: no document holds any text.
    """
    folder = Path(folder)
    with plain_encoder(tokenizer) as encode:
        content_key = digest([FORMAT, key, separator_id, tokenizer_fingerprint(tokenizer)])
        if (
            key is not None
            and (index := read_index(folder))
            and index["key"] == content_key
            and _as_written(folder, index)
        ):
            logger.info("%s: %d tokens already there", folder, index["tokens"])
            return index
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "index.json").unlink(missing_ok=True)
        dtype = np.dtype("uint16" if max(len(tokenizer), separator_id + 1) <= 2**16 else "uint32")
        tokens = count = 0
        control, held = control_pattern(tokenizer), []  # the documents, counted from 1, that hold such text
        with replacing(folder / "tokens.bin", "wb") as out, _progress_bar() as bar:
            for batch in document_batches(documents):
                block = np.concatenate([np.array([*ids, separator_id], dtype) for ids in encode(batch)])
                out.write(block)
                held += [count + i for i, text in enumerate(batch, 1) if control.search(text)]
                tokens, count = tokens + len(block), count + len(batch)
                bar.update(len(block))
            if not count:
                raise SetupError(f"no text for {folder}: the documents are none or all empty.")
    index = {
        "tokens": tokens,
        "documents": count,
        "dtype": dtype.name,
        "separator_id": separator_id,
        "key": content_key,
        "xxh3": checksum(folder / "tokens.bin"),
        **({"control_text": len(held)} if held else {}),
    }
    with replacing(folder / "index.json", "wb") as out:
        out.write(json.dumps(sealed(index), indent=1).encode())
    logger.info("%s: %d tokens of %d documents", folder, tokens, count)
    if held:
        logger.warning(
            "%s: %d of %d documents hold the text of a control token, which is read as plain text (the first: "
            "document %d)",
            folder,
            len(held),
            count,
            held[0],
        )
    return index


def _as_written(folder: Path, index: dict) -> bool:
    """Whether every token is the one that was written. The first process looks; an index without checksum passes."""
    if os.environ.get("RANK", "0") != "0" or "xxh3" not in index:
        return True
    if checksum(folder / "tokens.bin") == index["xxh3"]:
        return True
    logger.warning("%s: tokens.bin holds other bytes than were written; tokenising again", folder)
    return False


def sealed(index: dict) -> dict:
    """`index` with the checksum of its values, for `unsealed`."""
    index = json.loads(json.dumps(index, default=str))  # as it is read again: texts for keys
    return {**index, "checksum": digest(index)}


def unsealed(index: dict, keys: tuple[str, ...]) -> dict:
    """What `sealed` was given; one with these `keys` alone is of an earlier version and passes. Raises ValueError."""
    kept = {key: value for key, value in index.items() if key != "checksum"}
    if set(index) != set(keys) and index.get("checksum") != digest(kept):
        raise ValueError("it holds other values than were written")
    return kept


def read_index(folder: str | Path) -> dict | None:
    """The index of a finished token file; None where there is none or the file is not the size it says."""
    folder = Path(folder)
    try:
        index = unsealed(json.loads((folder / "index.json").read_bytes()), KEYS)
        expected = index["tokens"] * np.dtype(index["dtype"]).itemsize
        size = (folder / "tokens.bin").stat().st_size
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s: the index cannot be read (%s); tokenising again", folder, error)
        return None
    if size != expected:
        logger.warning("%s: tokens.bin has %d bytes, not %d; tokenising again", folder, size, expected)
        return None
    return index


def document_batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in documents:
        if not text:
            continue
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@contextlib.contextmanager
def plain_encoder(tokenizer):
    """An encoder of text batches to lists of ids: the Rust tokenizer with no truncation, padding or special
    tokens.

    Saved tokenizers often carry a truncation (sentence-transformers' cut at 128 tokens) that would go
    unnoticed.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # sentencepiece and other slow tokenizers
        how = {"add_special_tokens": False, "truncation": False, "padding": False}
        yield lambda batch: tokenize(tokenizer, batch, **how)["input_ids"]
        return
    halves = ordinary_pieces(tokenizer)
    truncation, padding, split = backend.truncation, backend.padding, backend.encode_special_tokens
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # as `plain_text.tokenize`
    try:
        whole = lambda batch: [e.ids for e in backend.encode_batch_fast(batch, add_special_tokens=False)]
        part = lambda ids: [i for token in ids for i in halves.get(token, [token])]
        yield (lambda batch: [part(ids) for ids in whole(batch)]) if halves else whole
    finally:
        backend.encode_special_tokens = split
        if truncation:
            backend.enable_truncation(**truncation)
        if padding:
            backend.enable_padding(**padding)


def tokenizer_fingerprint(tokenizer) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return digest(backend.to_str() if backend else [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _progress_bar():
    from tqdm import tqdm

    elsewhere = os.environ.get("RANK", "0") != "0"
    return tqdm(desc="tokenising", unit=" tokens", unit_scale=True, disable=elsewhere, leave=False)


class Windows(torch.utils.data.Dataset):
    """Item i is the i-th stretch of `context` tokens: {"input_ids": (context,) int64, "row": i}.

    Windows do not overlap; the tokens after the last full one are left out. Labels are the same ids, shifted
    inside the loss. The file is mapped when first read, in each process for itself, so workers and pickles
    cost nothing.
    """

    def __init__(self, folder: str | Path, context: int):
        """Raises ValueError where `folder` holds no finished token file or less than one window."""
        self.folder, self.context = Path(folder), context
        self.index = read_index(self.folder)
        if self.index is None:
            raise SetupError(f"{self.folder} holds no finished token file: run tokenize_corpus first.")
        if len(self) == 0:
            raise SetupError(
                f"{self.folder} holds {self.index['tokens']} tokens, less than one window of {context}: add "
                "text or shorten the context."
            )
        self._tokens: np.ndarray | None = None

    def __len__(self) -> int:
        return self.index["tokens"] // self.context

    def __getitem__(self, i: int) -> dict:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        """Several items at once, which is how PyTorch's data loader asks."""
        if self._tokens is None:
            self._tokens = np.memmap(self.folder / "tokens.bin", self.index["dtype"], "r")
        items = []
        for i in indices:
            i = range(len(self))[i]  # negative indices, and IndexError
            ids = self._tokens[i * self.context : (i + 1) * self.context].astype(np.int64)
            items.append({"input_ids": torch.from_numpy(ids), "row": i})
        return items

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_tokens": None}

    @property
    def where(self) -> _Names:
        """Names for the rows, as messages show them: `where[i]` is a string."""
        return _Names(self)


class _Names:
    """Lazy list of a data set's row names."""

    def __init__(self, windows: Windows):
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> str:
        start = i * self.windows.context
        return f"{self.windows.folder.name} window {i} (tokens {start} to {start + self.windows.context - 1})"


def stack_windows(items: list[dict]) -> dict[str, torch.Tensor]:
    """Windows -> {"input_ids", "labels"} (windows, context) int64 and "row" (windows,).

    The first label of each window is -100: nothing precedes it, and counting it as a target would make the
    mean loss come out low by (context - 1) / context.
    """
    ids = torch.stack([item["input_ids"] for item in items])
    labels = ids.clone()
    labels[:, 0] = IGNORE_INDEX
    return {"input_ids": ids, "labels": labels, "row": torch.tensor([item["row"] for item in items])}


def counting(documents: Iterable[str]) -> Iterator[str]:
    seen = False
    for text in documents:
        seen = seen or bool(text)
        yield text
    if not seen:
        raise SetupError("no text to train a tokenizer on: the documents are none or all empty.")
