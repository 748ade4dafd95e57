"""Texts that look like control tokens stay text wherever no template writes them: classify, seq2seq, pretrain, mlm."""

import pytest
import torch
from dialogue_families import FAMILIES, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertTokenizer

from pipelines.chain import chain
from pipelines.data import encoded_rows, plain_text, token_file, train_tokenizer
from pipelines.data.labels import encode
from pipelines.files import read_json
from pipelines.recipe.recipe import load

TEXTS = ["the cat is big", "a dog sees the small fish and likes it very much", "what is red is not blue"] * 20
ALL = (*FAMILIES, "bpe", "wordpiece")


def tokenizer_named(name):
    """Families of chat models, and the three kinds that the pipeline trains itself."""
    if name not in FAMILIES:
        tokenizer = TRAINED.get(name)
        if tokenizer is None:
            train = {
                "bpe": lambda: train_tokenizer.train_bpe(TEXTS, 300),
                "wordpiece": lambda: train_tokenizer.train_wordpiece(TEXTS, 120),
            }[name]
            TRAINED[name] = tokenizer = train()
        return tokenizer
    return TRAINED.setdefault(name, tokenizer_of(name))


TRAINED: dict = {}


def special_ids(tokenizer):
    return set(map(tokenizer.convert_tokens_to_ids, marks_of(tokenizer)))


def marks_of(tokenizer):
    """The special tokens that are more than the one for unknown words (GPT-2's end of text is that one, too)."""
    known = [t for t in tokenizer.all_special_tokens if t != tokenizer.unk_token]
    return [*known, *({tokenizer.eos_token} - {None, *known})]


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_no_text_becomes_a_control_token(name, data):
    tokenizer = tokenizer_named(name)
    marks = marks_of(tokenizer)
    parts = st.sampled_from([*marks, *(m[:-1] for m in marks), " ", "\n", "the", "cat", "é", "🙂", ""])
    text = "".join(data.draw(st.lists(parts, max_size=8)))
    around = plain_text.tokenize(tokenizer, "cat")["input_ids"]
    allowed = [i for i in around if i in special_ids(tokenizer)]  # what the tokenizer puts around any text
    ids = plain_text.tokenize(tokenizer, text)["input_ids"]
    assert [i for i in ids if i in special_ids(tokenizer)] == allowed
    (raw,) = encoded_rows.encoded([text or "x"], tokenizer, separator_id=0)
    assert not special_ids(tokenizer) & set(raw[:-1].tolist())
    held = any(mark in text for mark in marks)
    assert bool(plain_text.control_pattern(tokenizer).search(text)) == held
    if not held:
        assert ids == tokenizer(text)["input_ids"]


def test_a_classifier_reads_marks_as_text_and_they_are_counted(write, recipe, tmp_path, caplog):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[", "]", "sep", "mask", "good", "bad", "film"]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    features, _ = encode(tokenizer, [{"text": "good [SEP] film [MASK]", "where": "a:1"}], 32)
    tokens = tokenizer.convert_ids_to_tokens(features[0]["input_ids"])
    assert tokens == "[CLS] good [ sep ] film [ mask ] [SEP]".split()
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=32, pad_token_id=0, **shape)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    rows = [{"text": f"{'good' if i % 2 else 'bad'} film{' [SEP]' * (i < 3)}", "label": i % 2} for i in range(8)]
    stage = {
        "kind": "classify",
        "model": {"model_name_or_path": str(tmp_path / "bert")},
        "data": {"train": write("c.jsonl", rows)},
        "args": {"max_steps": 1, "global_batch_size": 4, "max_length": 16},
    }
    chain.run(load(recipe({"c": stage})))
    assert read_json(tmp_path / "out" / "c" / "stage.json")["rows"]["train"]["control_text"] == 3
    assert "3 of 8 rows hold the text of a control token" in caplog.text and "c.jsonl:1" in caplog.text


def test_a_separator_within_a_document_is_text_and_counted(tmp_path, caplog):
    bpe = tokenizer_named("bpe")
    texts = ["the cat", f"the dog{bpe.eos_token}a fish", "red"]
    index = token_file.tokenize_corpus(texts, bpe, tmp_path, separator_id=bpe.eos_token_id, key={"a": 1})
    assert index["control_text"] == 1 and "the first: document 2" in caplog.text
    found = token_file.Windows(tmp_path, index["tokens"])[0]["input_ids"].tolist()
    assert found.count(bpe.eos_token_id) == len(texts)
    assert not bpe.backend_tokenizer.encode_special_tokens  # as it was


def test_a_stream_gives_notice_once(caplog):
    notice = plain_text.Notice(lambda row: "<s>" in row["text"])
    for i, text in enumerate(["a", "b<s>", "<s>"]):
        notice({"text": text, "where": f"f:{i}"})
    assert caplog.text.count("holds the text of a control token") == 1 and "f:1" in caplog.text


def test_saved_tokenizers_read_as_before(tmp_path):
    bpe = tokenizer_named("bpe")
    plain_text.tokenize(bpe, "x")
    bpe.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(bpe.eos_token)["input_ids"] == [bpe.eos_token_id]  # a template's own marks stay control
