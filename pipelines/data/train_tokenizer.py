"""Tokenizers trained on the raw text of a stage: byte-level BPE as GPT-2 has it, WordPiece as BERT has it."""

from __future__ import annotations

import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BertTokenizer, GPT2Tokenizer

from pipelines.data.token_file import FORMAT, counting, digest, document_batches
from pipelines.errors import SetupError
from pipelines.files import contents, damage, write_json

logger = logging.getLogger(__name__)


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
    backend.train_from_iterator(document_batches(documents), trainer)
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

    home, settings = Path(folder) / "tokenizer", [section.train, section.vocab_size, section.lowercase]
    content_key = digest([FORMAT, key, *settings, section.max_documents])
    if key is not None and _is_kept(home, content_key):
        return AutoTokenizer.from_pretrained(home)
    texts = counting(islice(documents, section.max_documents))
    if section.train == "wordpiece":
        tokenizer = train_wordpiece(texts, section.vocab_size, section.lowercase)
    else:
        tokenizer = train_bpe(texts, section.vocab_size)
    home.mkdir(parents=True, exist_ok=True)
    (home / "key").unlink(missing_ok=True)
    tokenizer.save_pretrained(home)
    names = sorted(path.name for path in home.iterdir() if path.is_file() and not path.name.startswith("."))
    write_json(home / "key", {"key": content_key, "files": contents(home, names)})
    return AutoTokenizer.from_pretrained(home)  # as every other process will see it: its fingerprint is in the keys


def _is_kept(home: Path, content_key: str) -> bool:
    """Whether `home` holds the tokenizer that was trained for this key, and nothing happened to its files since."""
    text = (home / "key").read_text(encoding="utf-8", errors="replace") if (home / "key").is_file() else ""
    if text == content_key:  # written by an earlier version, without checksums
        return True
    try:
        kept = json.loads(text)
        wrong = damage(home, kept["files"]) if kept["key"] == content_key else None
    except (ValueError, KeyError, TypeError):
        return False
    if wrong:
        logger.warning("%s: %s; the tokenizer is trained again", home, "; ".join(wrong))
    return wrong == []
