"""What is odd about a public model or its tokenizer, one tiny model each: what is done about it, without a library's
warning.

`ODDITIES_TABLE=docs/models.md python -m pytest tests/models/test_oddities.py` writes the table of docs/models.md.
"""

import logging
import os
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from pipelines.generation import answers
from pipelines.models import chat_template, loading, tokenizer_setup
from pipelines.models.config import ModelSection

# name: (what is done about it, changes of the config, rows of embeddings beyond the tokenizer, of the tokenizer)
ODDITIES = {
    "tied embeddings": ("new tokens get one row", {"tie_word_embeddings": True}, 0, {}),
    "untied embeddings": ("new tokens get a row on both sides", {"tie_word_embeddings": False}, 0, {}),
    "more embeddings than tokens": ("spare rows are used first, none is cut", {}, 61, {}),
    "fewer embeddings than tokens": ("rows are added; a finished model answers with average ones, logged", {}, -3, {}),
    "tokens added to the tokenizer alone": ("as above", {}, 0, {"extend": ["<a>", "<b>"]}),
    "sliding window": ("window and cache are the model's own", {"sliding_window": 6, "model_type": "mistral"}, 0, {}),
    "`model_max_length` of 1e30": ("lengths are the model's positions", {}, 0, {"model_max_length": int(1e30)}),
    "`model_max_length` shorter than a text": (
        "texts are measured, then cut or dropped",
        {},
        0,
        {"model_max_length": 4},
    ),
    "no BOS": ("none is made up", {}, 0, {"bos_token": None}),
    "several EOS": ("all end an answer; the template's is learned", {"eos_token_id": [1, 5]}, 0, {}),
    "PAD equals EOS": ("a PAD of its own", {}, 0, {"pad": "eos"}),
}


@pytest.fixture(scope="module")
def table():
    rows = []
    yield rows
    text = "\n".join(
        ["| what is odd | what is done |", "| --- | --- |", *(f"| {odd} | {done} |" for odd, done in rows)]
    )
    print("\n" + text)
    target = os.environ.get("ODDITIES_TABLE")
    if target and len(rows) == len(ODDITIES):  # all of them passed
        page = Path(target).read_text()
        mark = r"(<!-- oddities -->\n).*(<!-- end of oddities -->)"
        Path(target).write_text(re.sub(mark, lambda m: m[1] + text + "\n" + m[2], page, flags=re.S))


@pytest.fixture
def warnings():
    """What transformers warns of, from now on."""
    found = []

    class Keeper(logging.Handler):
        def emit(self, record):
            found.append(record.getMessage())

    keeper, root = Keeper(logging.WARNING), transformers_logging.get_logger("transformers")
    root.addHandler(keeper)
    yield found
    root.removeHandler(keeper)


@pytest.mark.parametrize("odd", ODDITIES)
def test_what_is_odd(odd, tokenizer, tmp_path, table, warnings):
    done, changes, spare, own = ODDITIES[odd]
    folder = tmp_path / "base"
    tokenizer.save_pretrained(folder)
    words = AutoTokenizer.from_pretrained(folder)
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    ids = {"bos_token_id": None, "eos_token_id": words.eos_token_id, "pad_token_id": None}
    changes = {"model_type": "llama", "vocab_size": len(words) + spare, **small, **ids, **changes}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(changes.pop("model_type"), **changes))
    model.save_pretrained(folder)
    words.add_tokens(own.get("extend", []), special_tokens=True)
    words.model_max_length = own.get("model_max_length", words.model_max_length)
    if "bos_token" in own:
        words.bos_token = None
    if own.get("pad") == "eos":
        words.pad_token = words.eos_token
    words.save_pretrained(folder)

    model, found = answers.load(str(folder))  # as it came: any token that its tokenizer writes can be read
    model(torch.tensor([[len(found) - 1, 0]]))
    section = ModelSection(model_name_or_path=str(folder))
    words, model = loading.load_tokenizer(section), loading.load_model(section, "AutoModelForCausalLM")
    before = loading.vocabulary(model)
    tokenizer_setup.install_template(model, words, None)
    assert before <= loading.vocabulary(model) and len(words) <= loading.vocabulary(model)
    assert loading.vocabulary(model) == max(before, len(words))
    assert words.pad_token_id not in (None, words.eos_token_id)
    dialogue = [{"role": r, "content": f"the {c} is red"} for c in ("cat", "dog") for r in ("user", "assistant")]
    ((ids, labels),) = chat_template.encode_dialogue(words, dialogue)
    assert ids[: len(chat_template.encode_prompt(words, dialogue[:3]))] == chat_template.encode_prompt(
        words, dialogue[:3]
    )
    assert words.bos_token_id not in ids or words.bos_token_id == words.eos_token_id
    model.train()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.01), []
    for _ in range(3):
        loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "out")
    words.save_pretrained(tmp_path / "out")
    again, words = answers.load(str(tmp_path / "out"))
    torch.testing.assert_close(again(torch.tensor([ids])).logits, model(torch.tensor([ids])).logits)
    ends = answers.end_tokens(again, words)
    assert words.eos_token_id in ends and set(changes["eos_token_id"] if odd == "several EOS" else []) <= set(ends)
    [[(text, _)]] = answers.answers(again, words, ["the cat"], [[1]], response_length=4)
    assert isinstance(text, str)
    assert warnings == []
    table.append((odd, done))
