"""Raw text to a file of token ids that training reads in place, tokenizers trained on the same text, and the encoded
rows of the other stages kept in the same way.

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
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from pipelines import SetupError, data

logger = logging.getLogger(__name__)

FORMAT = 1  # raise it when the meaning of the files changes: old ones are then made anew
BATCH_CHARACTERS, BATCH_DOCUMENTS = 2**20, 4096  # a batch ends at whichever comes first


# ------------------------------------------------------------------------------------------------------------
# Text -> token file
# ------------------------------------------------------------------------------------------------------------


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
        key: says what the documents are (any JSON value, such as checksums of the files). Without one the
        documents
            are tokenised every time, since nobody can know that they are the same.

    Returns:
        The index: `tokens`, `documents`, `dtype`, `separator_id`, `key`.

    Raises:
        ValueError: no document holds any text.
    """
    folder = Path(folder)
    with _bare(tokenizer) as encode:
        content_key = _digest([FORMAT, key, separator_id, _fingerprint(tokenizer)])
        if key is not None and (index := read_index(folder)) and index["key"] == content_key:
            logger.info("%s: %d tokens already there", folder, index["tokens"])
            return index
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "index.json").unlink(missing_ok=True)
        dtype = np.dtype("uint16" if max(len(tokenizer), separator_id + 1) <= 2**16 else "uint32")
        tokens = count = 0
        with _replacing(folder / "tokens.bin") as out, _progress_bar() as bar:
            for batch in _batches(documents):
                block = np.concatenate([np.array([*ids, separator_id], dtype) for ids in encode(batch)])
                out.write(block)
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
    }
    with _replacing(folder / "index.json") as out:
        out.write(json.dumps(index, indent=1).encode())
    logger.info("%s: %d tokens of %d documents", folder, tokens, count)
    return index


def encoded(documents: Iterable[str], tokenizer, separator_id: int) -> Iterator[np.ndarray]:
    """Each document's tokens and `separator_id`, as `tokenize_corpus` writes them: uint32 arrays."""
    with _bare(tokenizer) as encode:
        for batch in _batches(documents):
            yield from (np.array([*ids, separator_id], np.uint32) for ids in encode(batch))


def read_index(folder: str | Path) -> dict | None:
    """The index of a finished token file; None where there is none or the file is not the size it says."""
    folder = Path(folder)
    try:
        index = json.loads((folder / "index.json").read_bytes())
        expected = index["tokens"] * np.dtype(index["dtype"]).itemsize
        size = (folder / "tokens.bin").stat().st_size
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s: the index cannot be read (%s); tokenising again", folder, error)
        return None
    if size != expected:
        logger.warning("%s: tokens.bin has %d bytes, not %d; tokenising again", folder, size, expected)
        return None
    return index


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
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
def _bare(tokenizer):
    """An encoder of text batches to lists of ids: the Rust tokenizer with no truncation, padding or special
    tokens.

    Saved tokenizers often carry a truncation (sentence-transformers' cut at 128 tokens) that would go
    unnoticed.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # sentencepiece and other slow tokenizers
        yield lambda batch: tokenizer(batch, add_special_tokens=False, truncation=False, padding=False)["input_ids"]
        return
    truncation, padding = backend.truncation, backend.padding
    backend.no_truncation()
    backend.no_padding()
    try:
        yield lambda batch: [e.ids for e in backend.encode_batch_fast(batch, add_special_tokens=False)]
    finally:
        if truncation:
            backend.enable_truncation(**truncation)
        if padding:
            backend.enable_padding(**padding)


def _fingerprint(tokenizer) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return _digest(backend.to_str() if backend else [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


@contextlib.contextmanager
def _replacing(path: Path):
    """A file that appears under its name only when all of it is on disk. Each process writes its own
    temporary."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
        parent = os.open(path.parent, os.O_RDONLY)
        os.fsync(parent)
        os.close(parent)
    finally:
        temporary.unlink(missing_ok=True)


def _progress_bar():
    from tqdm import tqdm

    elsewhere = os.environ.get("RANK", "0") != "0"
    return tqdm(desc="tokenising", unit=" tokens", unit_scale=True, disable=elsewhere, leave=False)


# ------------------------------------------------------------------------------------------------------------
# Token file -> training examples
# ------------------------------------------------------------------------------------------------------------


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
        self._tokens = None

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
    labels[:, 0] = -100
    return {"input_ids": ids, "labels": labels, "row": torch.tensor([item["row"] for item in items])}


# ------------------------------------------------------------------------------------------------------------
# Rows -> encoded rows on disk
# ------------------------------------------------------------------------------------------------------------


def encoded_rows(stage, tokenizer, settings: dict, make) -> dict[str, tuple]:
    """The data sets that `make` encodes: by the first process while the others wait, and mapped from disk by all.

    They stay in `.tokens/STAGE` beside the stage's folder, and are taken from there while nothing changes that they are
    made of: the files' checksums, the sections `data`, `task` and `model`, the seed, the tokenizer with its template, and
    `settings`.

    Args:
        stage: gets in its `report` what `make` put there, now or then.
        settings: whatever else decides what the rows become (any JSON value).
        make: () -> {side: `datasets.Dataset` with a column `where`}, called where needed.

    Returns:
        For "train" and "validation" the data set without `where` and the names of its rows, or (None, None).

    Raises:
        ValueError: another process than the first finds nothing, because it does not see the same disk.
    """
    from accelerate import PartialState
    from datasets import Dataset

    home = stage.folder.parent / ".tokens" / stage.name / "rows"
    words = [tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.model_input_names, tokenizer.padding_side]
    kept = {**stage.data, "train": None} if stage.data.get("streaming") else stage.data  # nothing is kept of a stream
    parts = [data.content(kept), stage.seed, *(stage.sections.get(name) for name in ("data", "task", "model"))]
    key = _digest([FORMAT, *parts, _fingerprint(tokenizer), words, settings])
    state = PartialState()
    with state.main_process_first():
        path = home / "index.json"
        index = json.loads(path.read_bytes()) if path.is_file() else {}
        if index.get("key") == key and all(_size(home / f"{side}.arrow") == n for side, n in index["bytes"].items()):
            logger.info("%s: its rows are already encoded (%s)", stage.name, home)
        elif not state.is_main_process:
            raise SetupError(f"{home} is not what the first process has just written: all need one file system.")
        else:
            home.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            made = make()
            for side, rows in made.items():
                _write_table(rows.data.table, home / f"{side}.arrow")
            sizes = {side: _size(home / f"{side}.arrow") for side in made}
            index = {"key": key, "bytes": sizes, "report": stage.report}
            with _replacing(path) as out:
                out.write(json.dumps(index, indent=1).encode())
    stage.report |= index["report"]
    sets = dict.fromkeys(("train", "validation"), (None, None))
    for side in index["bytes"]:
        rows = Dataset.from_file(str(home / f"{side}.arrow"))
        sets[side] = (rows.remove_columns("where"), rows["where"])
    return sets


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _write_table(table, path: Path) -> None:
    import pyarrow

    with _replacing(path) as out, pyarrow.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)  # rows that are read one by one are found faster


# ------------------------------------------------------------------------------------------------------------
# Training tokenizers
# ------------------------------------------------------------------------------------------------------------


def train_bpe(
    documents: Iterable[str],
    vocab_size: int,
    special_tokens: tuple[str, ...] = (),
    eos_token: str = "<|endoftext|>",
    pad_token: str = "<|pad|>",
):
    """Byte-level BPE as GPT-2's, trained on these texts: any text round-trips, there is no unknown token.

    EOS has id 0 and PAD, a token of its own (or the model would never learn to stop), id 1.

    Args:
        documents: texts, consumed lazily, once.
        vocab_size: entries wanted, special tokens included; a small corpus may give fewer.
        special_tokens: further tokens never split, such as chat markers.

    Returns:
        transformers' GPT2Tokenizer (EOS serves as BOS and UNK too, as in GPT-2).

    Raises:
        ValueError: the vocabulary cannot hold the 256 bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import GPT2Tokenizer

    special = [eos_token, pad_token, *special_tokens]
    if vocab_size < 256 + len(special):
        raise SetupError(
            f"a byte-level vocabulary of {vocab_size} cannot hold 256 bytes and {len(special)} special "
            f"tokens: ask for at least {256 + len(special)}."
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    _train(backend, documents, trainer, vocab_size)
    # v4's vocab_file=/merges_file= would silently give a vocabulary of one token in transformers 5
    return GPT2Tokenizer(
        tokenizer_object=backend,
        bos_token=eos_token,
        eos_token=eos_token,
        unk_token=eos_token,
        pad_token=pad_token,
        extra_special_tokens=list(special_tokens),
    )


def train_wordpiece(
    documents: Iterable[str], vocab_size: int, lowercase: bool = True, special_tokens: tuple[str, ...] = ()
):
    """WordPiece as BERT's: [CLS] text [SEP], with token_type_ids; PAD has id 0.

    Args:
        documents: texts, consumed lazily, once.
        vocab_size: entries wanted, special tokens included; a small corpus may give fewer.
        lowercase: fold case and strip accents, as uncased BERT.
        special_tokens: further tokens never split.

    Returns:
        transformers' BertTokenizer. Characters that are rare in the corpus become [UNK].

    Raises:
        ValueError: the vocabulary cannot hold the special tokens and an alphabet.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *special_tokens]
    if vocab_size < 100 + len(special):
        raise SetupError(f"a WordPiece vocabulary of {vocab_size} is too small: ask for {100 + len(special)} or more.")
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    # Left to itself the trainer numbers the "##x" entries in the order of a hash map, another one in each process, and
    # ties between merges follow: so the alphabet is counted first, and given in a fixed order.
    with tempfile.TemporaryFile("w+", encoding="utf-8") as spool:
        letters: Counter[str] = Counter()
        for text in documents:
            letters.update(backend.normalizer.normalize_str(text))
            spool.write(json.dumps(text) + "\n")
        spool.seek(0)
        common = sorted((c for c in letters if not c.isspace()), key=lambda c: (-letters[c], c))
        # every character of the alphabet takes two entries (x and ##x): leave room for words
        alphabet = sorted(common[: min(1000, vocab_size // 4)])
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            special_tokens=[*special, *alphabet, *(f"##{c}" for c in alphabet)],
            limit_alphabet=len(alphabet),
            show_progress=False,
        )
        _train(backend, (json.loads(line) for line in spool), trainer, vocab_size)
    # The letters were special only to the trainer: as such they would be cut out of words.
    entries = backend.get_vocab()
    backend = Tokenizer(models.WordPiece(entries, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    backend.add_special_tokens(special)
    # the generic fast class would leave out token_type_ids
    return BertTokenizer(tokenizer_object=backend, do_lower_case=lowercase, extra_special_tokens=list(special_tokens))


def _train(backend, documents: Iterable[str], trainer, vocab_size: int) -> None:
    backend.train_from_iterator(_batches(documents), trainer)
    if backend.get_vocab_size() < vocab_size:
        logger.info("the corpus gives %d of the %d entries asked for", backend.get_vocab_size(), vocab_size)


def trained_tokenizer(folder: str | Path, section, documents: Iterable[str], key: object = None):
    """The tokenizer a recipe's `tokenizer:` section describes, trained on `documents` and kept in
    `folder/tokenizer`.

    Args:
        folder: where it is kept; with the same `key` (as in `tokenize_corpus`) it is loaded instead of
        trained. section: has `train` ("bpe" or "wordpiece"), `vocab_size`, `lowercase`, `max_documents`.
        documents: texts, consumed lazily up to `max_documents`.

    Raises:
        ValueError: no document holds any text, or the vocabulary is too small.
    """
    from itertools import islice

    from transformers import AutoTokenizer

    home, settings = Path(folder) / "tokenizer", [section.train, section.vocab_size, section.lowercase]
    content_key = _digest([FORMAT, key, *settings, section.max_documents])
    if key is not None and (home / "key").is_file() and (home / "key").read_text() == content_key:
        return AutoTokenizer.from_pretrained(home)
    texts = _counted(islice(documents, section.max_documents))
    if section.train == "wordpiece":
        tokenizer = train_wordpiece(texts, section.vocab_size, section.lowercase)
    else:
        tokenizer = train_bpe(texts, section.vocab_size)
    home.mkdir(parents=True, exist_ok=True)
    (home / "key").unlink(missing_ok=True)
    tokenizer.save_pretrained(home)
    with _replacing(home / "key") as out:
        out.write(content_key.encode())
    return AutoTokenizer.from_pretrained(home)  # as every other process will see it: its fingerprint is in the keys


def _counted(documents: Iterable[str]) -> Iterator[str]:
    seen = False
    for text in documents:
        seen = seen or bool(text)
        yield text
    if not seen:
        raise SetupError("no text to train a tokenizer on: the documents are none or all empty.")
