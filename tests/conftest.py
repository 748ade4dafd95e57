"""Tiny models and data, built in memory or in tmp_path: no test needs a network or anything outside this folder."""

import json
import os

os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while waiting make shared machines crawl
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
from tiny_words import WORDS  # noqa: E402

from pipelines.data.train_tokenizer import train_bpe


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer as GPT-2's over a few words: EOS, and a PAD of its own."""

    text = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]
    return train_bpe(text, vocab_size=400)


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory, tokenizer):
    """A folder with a GPT-2 of about 30k parameters, random weights, no dropout."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def write(tmp_path):
    """`write(name, rows)` writes JSON lines (or text as it stands) below tmp_path and returns the path as text."""

    def write_(name, rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(r) + "\n" for r in rows))
        return str(path)

    return write_


@pytest.fixture
def recipe(tmp_path):
    """`recipe(stages, **top)` writes a recipe file below tmp_path and returns its path."""
    import yaml

    def recipe_(stages, name="recipe.yaml", **top):
        path = tmp_path / name
        path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "out"), "stages": stages, **top}, sort_keys=False))
        return path

    return recipe_
