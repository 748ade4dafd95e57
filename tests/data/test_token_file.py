"""Text becomes tokens that read back as naive encoding gives them; nothing half-written is ever taken for
whole."""

import json
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from pipelines.data import encoded_rows, token_file, train_tokenizer

ODD = [
    "emoji 🐈‍⬛ and 漢字",
    "tabs\tand\n\nnew lines \n",
    "  spaces  ",
    "ünïcödé – “quotes”",
    "<|endoftext|> inside",
    "\x00\x7f",
]
TEXTS = [f"the cat number {i} sat on the mat and said hello to the {i * 7} dogs. " * (i % 5 + 1) for i in range(300)]


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer.train_bpe(TEXTS, 400, special_tokens=("<|im_start|>",))


@pytest.fixture(scope="module")
def wordpiece():
    return train_tokenizer.train_wordpiece(TEXTS + [t.upper() for t in TEXTS], 300)


def test_bpe_is_gpt2_like(bpe):
    assert type(bpe).__name__ == "GPT2Tokenizer" and len(bpe) <= 400
    assert (bpe.eos_token, bpe.pad_token) == (
        "<|endoftext|>",
        "<|pad|>",
    ) and bpe.pad_token_id != bpe.eos_token_id
    assert max(bpe.get_vocab().values()) == len(bpe) - 1
    assert len(bpe("the cat said hello").input_ids) < 12  # merges were learned
    assert bpe.convert_ids_to_tokens(bpe("<|im_start|>user").input_ids)[0] == "<|im_start|>"
    for text in ODD:
        assert bpe.decode(bpe(text).input_ids) == text
    assert bpe("a b").input_ids == bpe("a").input_ids + bpe(" b").input_ids  # no special tokens, spaces lead words


@pytest.mark.parametrize("name", ["bpe", "wordpiece"])
def test_tokenizers_survive_saving(name, request, tmp_path):
    tokenizer = request.getfixturevalue(name)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(tokenizer) and loaded.get_vocab() == tokenizer.get_vocab()
    for text in ODD + TEXTS[:5]:
        assert dict(loaded(text)) == dict(tokenizer(text))
    assert (loaded.pad_token_id, loaded.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


def test_wordpiece_is_bert_like(wordpiece):
    encoded = wordpiece("The cat", "a dog")
    assert type(wordpiece).__name__ == "BertTokenizer"
    tokens = wordpiece.convert_ids_to_tokens(encoded["input_ids"])
    assert tokens[0] == "[CLS]" and tokens.count("[SEP]") == 2 and tokens[-1] == "[SEP]"
    assert set(encoded["token_type_ids"]) == {0, 1} and wordpiece.pad_token_id == 0
    assert wordpiece("THE CAT").input_ids == wordpiece("the cat").input_ids
    cased = train_tokenizer.train_wordpiece(TEXTS + [t.upper() for t in TEXTS], 300, lowercase=False)
    assert cased("THE CAT").input_ids != cased("the cat").input_ids
    assert cased.unk_token_id not in cased("THE CAT").input_ids


def test_vocabulary_too_small_is_told():
    with pytest.raises(ValueError, match="at least 258"):
        train_tokenizer.train_bpe(TEXTS, 257)
    with pytest.raises(ValueError, match="too small"):
        train_tokenizer.train_wordpiece(TEXTS, 50)


def naive(tokenizer, texts):
    separator = tokenizer.eos_token_id
    return [
        i
        for t in texts
        if t
        for i in [*tokenizer(t, add_special_tokens=False, split_special_tokens=True).input_ids, separator]
    ]


def tokens(folder):
    index = token_file.read_index(folder)
    return np.fromfile(folder / "tokens.bin", index["dtype"]).tolist()


def test_token_file_equals_naive_encoding(bpe, tmp_path, monkeypatch):
    texts = TEXTS + ["", *ODD]
    monkeypatch.setattr(token_file, "BATCH_DOCUMENTS", 7)
    index = token_file.tokenize_corpus(iter(texts), bpe, tmp_path / "a", separator_id=bpe.eos_token_id)
    expected = naive(bpe, texts)
    assert tokens(tmp_path / "a") == expected
    assert index["tokens"] == len(expected) and index["documents"] == len(texts) - 1 and index["dtype"] == "uint16"
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["index.json", "tokens.bin"]


def test_saved_truncation_and_padding_are_ignored_and_kept(bpe, tmp_path):
    backend = bpe.backend_tokenizer
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    try:
        token_file.tokenize_corpus(TEXTS, bpe, tmp_path, separator_id=0)
        assert backend.truncation["max_length"] == 4 and backend.padding["length"] == 9
    finally:
        backend.no_truncation()
        backend.no_padding()
    assert tokens(tmp_path) == naive(bpe, TEXTS)


def test_large_vocabulary_takes_four_bytes(bpe, tmp_path):
    index = token_file.tokenize_corpus(TEXTS[:2], bpe, tmp_path, separator_id=70_000)
    assert index["dtype"] == "uint32" and tokens(tmp_path)[-1] == 70_000


def explode():
    raise AssertionError("the documents were read")
    yield


def test_second_call_is_free_and_the_key_decides(bpe, wordpiece, tmp_path):
    first = token_file.tokenize_corpus(TEXTS, bpe, tmp_path, separator_id=0, key={"sha": 1})
    assert token_file.tokenize_corpus(explode(), bpe, tmp_path, separator_id=0, key={"sha": 1}) == first
    with pytest.raises(AssertionError, match="were read"):
        token_file.tokenize_corpus(explode(), bpe, tmp_path, separator_id=0, key={"sha": 2})
    assert token_file.read_index(tmp_path) is None  # the old tokens are not those of the new key
    again = token_file.tokenize_corpus(TEXTS, bpe, tmp_path, separator_id=0, key={"sha": 1})
    assert again == first
    for change in (dict(separator_id=1), dict(tokenizer=wordpiece), dict(key=None)):
        settings = dict(tokenizer=bpe, separator_id=0, key={"sha": 1}) | change
        tokenizer = settings.pop("tokenizer")
        token_file.tokenize_corpus(TEXTS, bpe, tmp_path, separator_id=0, key={"sha": 1})
        with pytest.raises(AssertionError, match="were read"):
            token_file.tokenize_corpus(explode(), tokenizer, tmp_path, **settings)


@pytest.mark.parametrize("when", ["while reading", "before the index"])
def test_a_crash_leaves_no_valid_cache(bpe, tmp_path, monkeypatch, when):
    token_file.tokenize_corpus(TEXTS[:3], bpe, tmp_path, separator_id=0, key="old")

    def documents():
        yield from TEXTS
        if when == "while reading":
            raise OSError("disk gone")

    if when == "before the index":
        monkeypatch.setattr(token_file.json, "dumps", lambda *a, **k: (_ for _ in ()).throw(OSError("disk gone")))
        monkeypatch.setattr(token_file, "digest", lambda value: "k")
    with pytest.raises(OSError, match="disk gone"):
        token_file.tokenize_corpus(documents(), bpe, tmp_path, separator_id=0, key="new")
    monkeypatch.undo()
    assert token_file.read_index(tmp_path) is None
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    with pytest.raises(ValueError, match="no finished token file"):
        token_file.Windows(tmp_path, 8)
    token_file.tokenize_corpus(TEXTS, bpe, tmp_path, separator_id=0, key="new")
    assert tokens(tmp_path) == naive(bpe, TEXTS)


def test_a_corrupt_cache_is_noticed_and_made_again(bpe, tmp_path, caplog):
    key = {"sha": 1}
    first = token_file.tokenize_corpus(TEXTS, bpe, tmp_path, separator_id=0, key=key)
    with open(tmp_path / "tokens.bin", "r+b") as f:
        f.truncate(100)
    with pytest.raises(ValueError, match="no finished token file"):
        token_file.Windows(tmp_path, 8)
    assert "has 100 bytes" in caplog.text
    assert token_file.tokenize_corpus(TEXTS, bpe, tmp_path, separator_id=0, key=key) == first
    (tmp_path / "index.json").write_text('{"tokens": 5')
    assert token_file.read_index(tmp_path) is None
    token_file.tokenize_corpus(TEXTS, bpe, tmp_path, separator_id=0, key=key)
    assert json.loads((tmp_path / "index.json").read_text()) == token_file.sealed(first)


def test_empty_corpus_is_told(bpe, tmp_path):
    with pytest.raises(ValueError, match="none or all empty"):
        token_file.tokenize_corpus(["", ""], bpe, tmp_path, separator_id=0)
    section = SimpleNamespace(train="bpe", vocab_size=300, lowercase=True, max_documents=None)
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer.trained_tokenizer(tmp_path, section, iter([]))


def test_documents_are_consumed_lazily(bpe, tmp_path, monkeypatch):
    """Never more than a batch ahead of what is written, however long the corpus."""
    monkeypatch.setattr(token_file, "BATCH_DOCUMENTS", 10)
    ahead, written = [], 0
    real = np.concatenate

    def concatenate(parts):
        nonlocal written
        written += len(parts)
        return real(parts)

    monkeypatch.setattr(token_file.np, "concatenate", concatenate)

    def documents():
        for i in range(95):
            ahead.append(i - written)
            yield "hello there"

    token_file.tokenize_corpus(documents(), bpe, tmp_path, separator_id=0)
    assert written == 95 and max(ahead) <= 10


def test_windows(bpe, tmp_path):
    token_file.tokenize_corpus(TEXTS, bpe, tmp_path, separator_id=0)
    everything = torch.tensor(tokens(tmp_path))
    windows = token_file.Windows(tmp_path, 32)
    assert len(windows) == len(everything) // 32 == windows.index["tokens"] // 32
    for i in (0, 5, len(windows) - 1):
        item = windows[i]
        assert item["input_ids"].dtype == torch.int64 and item["row"] == i
        assert torch.equal(item["input_ids"], everything[i * 32 : (i + 1) * 32])
    assert torch.equal(windows[-1]["input_ids"], windows[len(windows) - 1]["input_ids"])
    with pytest.raises(IndexError):
        windows[len(windows)]
    assert windows.where[2] == f"{tmp_path.name} window 2 (tokens 64 to 95)"
    windows[0]["input_ids"].zero_()  # an item is a copy: training cannot change the corpus
    assert torch.equal(windows[0]["input_ids"], everything[:32])
    with pytest.raises(ValueError, match="less than one window"):
        token_file.Windows(tmp_path, 10**6)


def test_windows_in_a_data_loader(bpe, tmp_path):
    token_file.tokenize_corpus(TEXTS, bpe, tmp_path, separator_id=0)
    windows = token_file.Windows(tmp_path, 32)
    windows[0]
    assert len(pickle.dumps(windows)) < 1000  # the map is not in the pickle
    batches = {}
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(windows, 4, num_workers=workers, collate_fn=token_file.stack_windows)
        batches[workers] = list(loader)
    for a, b in zip(batches[0], batches[2], strict=True):
        assert torch.equal(a["input_ids"], b["input_ids"]) and torch.equal(a["row"], b["row"])
    batch = batches[0][1]
    assert batch["input_ids"].shape == (4, 32) and batch["row"].tolist() == [4, 5, 6, 7]
    assert (batch["labels"][:, 0] == -100).all() and torch.equal(batch["labels"][:, 1:], batch["input_ids"][:, 1:])


STREAM = """
import resource, sys
from transformers import AutoTokenizer
from pipelines.data import token_file
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
line = "the cat sat on the mat and said hello to the dogs. "
token_file.tokenize_corpus(["warm " + line] , tokenizer, sys.argv[2], separator_id=0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
text = line * 400                                    # 20 kB, and 2000 of them: 40 MB of text
index = token_file.tokenize_corpus((text + str(i) for i in range(2000)), tokenizer, sys.argv[2], separator_id=0)
windows = token_file.Windows(sys.argv[2], 64)
windows[len(windows) - 1]
print(index["tokens"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_a_corpus_larger_than_the_memory_it_may_use(bpe, tmp_path):
    """40 MB of text (10 MB of tokens) grow the process by less than the text, let alone its token lists."""
    bpe.save_pretrained(tmp_path / "tokenizer")
    command = [sys.executable, "-c", STREAM, str(tmp_path / "tokenizer"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, grown = map(int, done.stdout.split())
    assert count > 5_000_000
    unit = 1024 if sys.platform == "linux" else 1  # ru_maxrss
    assert grown * unit < 35e6, grown


def test_trained_tokenizer_follows_the_section_and_is_kept(tmp_path):
    section = SimpleNamespace(train="bpe", vocab_size=300, lowercase=True, max_documents=20)
    seen = []

    def documents():
        for text in TEXTS:
            seen.append(text)
            yield text

    first = train_tokenizer.trained_tokenizer(tmp_path, section, documents(), key={"sha": 1})
    assert len(first) <= 300 and len(seen) == 20
    again = train_tokenizer.trained_tokenizer(tmp_path, section, explode(), key={"sha": 1})
    assert again.get_vocab() == first.get_vocab() and again.pad_token == "<|pad|>"
    # the process that trained it and those that load it must agree, or the latter write the token files anew
    assert token_file.tokenizer_fingerprint(again) == token_file.tokenizer_fingerprint(first)
    section.vocab_size = 320
    with pytest.raises(AssertionError, match="were read"):
        train_tokenizer.trained_tokenizer(tmp_path, section, explode(), key={"sha": 1})
    section.train = "wordpiece"
    assert train_tokenizer.trained_tokenizer(tmp_path, section, iter(TEXTS)).cls_token == "[CLS]"


def test_tokenizer_training_is_deterministic():
    assert train_tokenizer.train_bpe(TEXTS, 350).get_vocab() == train_tokenizer.train_bpe(iter(TEXTS), 350).get_vocab()


def test_wordpiece_is_the_same_in_every_process():
    """Hash order differs from process to process: the vocabulary must not."""
    code = (
        "from pipelines.data.train_tokenizer import train_wordpiece\n"
        "text = [f'the {a} {b} stands at the mill .' for a in ('red', 'green') for b in ('otter', 'kettle', 'wagon')]\n"
        "print(sorted(train_wordpiece(text * 5, 120).get_vocab().items()))"
    )
    found = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout for _ in range(3)}
    assert len(found) == 1 and "otter" in found.pop()


# Encoded rows


def test_encoded_rows_are_made_once_and_anew_whenever_anything_they_are_made_of_changes(tokenizer, tmp_path, write):
    import copy
    from types import SimpleNamespace

    from datasets import Dataset

    tokenizer, made = copy.deepcopy(tokenizer), []
    section = {"train": write("rows.jsonl", [{"text": "a cat"}])}
    stage = SimpleNamespace(
        name="s", folder=tmp_path / "out/s", data=section, sections={"data": section}, seed=1, report={}
    )

    def make():
        made.append(1)
        stage.report["train"] = {"rows": len(made)}
        return {"train": Dataset.from_dict({"ids": [[len(made)], []], "where": ["a:1", "a:2"]})}

    def rows(**settings):
        stage.report = {}
        sets = encoded_rows.encoded_rows(stage, tokenizer, settings, make)
        assert sets["validation"] == (None, None)
        train, where = sets["train"]
        assert train.column_names == ["ids"] and list(where) == ["a:1", "a:2"]
        assert stage.report == {"train": {"rows": train[0]["ids"][0]}}  # what was said when they were made
        return train[0]["ids"][0]

    assert rows() == rows() == 1
    write("rows.jsonl", [{"text": "a dog"}])
    assert rows() == rows() == 2
    assert rows(context=8) == rows(context=8) == 3
    tokenizer.chat_template = "{{ messages }}"
    assert rows(context=8) == rows(context=8) == 4
    tokenizer.add_tokens(["zebra"])
    assert rows(context=8) == rows(context=8) == 5
    stage.seed = 2
    assert rows(context=8) == rows(context=8) == 6
    stage.sections["task"] = {"prefix": "say: "}
    assert rows(context=8) == rows(context=8) == 7
    file = tmp_path / "out/.tokens/s/rows/train.arrow"
    file.write_bytes(file.read_bytes()[:-1])  # cut off by whatever cuts files off
    assert rows(context=8) == rows(context=8) == 8
    assert len(made) == 8


def test_any_flipped_bit_of_an_index_is_found(tmp_path):
    """Its figures go into the record of the stage, and a key that is misspelt must not pass for one that is missing."""
    index = dict(zip(token_file.KEYS, (5, 2, "uint16", 0, "k", "4e1f"), strict=True))
    text = json.dumps(token_file.sealed(index)).encode()
    assert token_file.unsealed(json.loads(text), token_file.KEYS) == index
    assert token_file.unsealed(index, token_file.KEYS) == index  # of an earlier version
    for at in range(8 * len(text)):
        flipped = bytearray(text)
        flipped[at // 8] ^= 1 << at % 8
        try:
            found = token_file.unsealed(json.loads(flipped), token_file.KEYS)
        except (ValueError, AttributeError):
            continue
        assert found == index, bytes(flipped)
