"""Loss per token, per word and per byte: against loops by hand, with EOS where it is documented to be, and as
one text.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_words import WORDS

from pipelines.evaluation.figures import figures, ratio
from pipelines.evaluation.measure import measure
from pipelines.evaluation.texts import running
from pipelines.recipe.sections import EvaluateSection

LINES = ["the cat sees the dog ", "", " = a red bird = ", "the fish is not very big"] * 5


def loaded(path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def by_hand(model, ids, size):
    """Nats and predicted tokens of windows that do not overlap, one after the other."""
    windows = [torch.tensor([ids[i : i + size]]) for i in range(0, len(ids), size)]
    with torch.no_grad():
        nats = [model(w, labels=w).loss.item() * (w.shape[1] - 1) for w in windows if w.shape[1] > 1]
    return sum(nats) / sum(w.shape[1] - 1 for w in windows)


@pytest.mark.parametrize("as_one", [False, True])
def test_text_by_rows_and_as_one(write, tiny_gpt2, as_one, caplog):
    model, tokenizer = loaded(tiny_gpt2)
    content = "\n".join(LINES)
    path = write("wiki.txt", content)
    with caplog.at_level("INFO"):
        of = measure({"m": str(tiny_gpt2)}, EvaluateSection(text=path, running_text=as_one, max_length=16), 0)["m"]
    rows = [line for line in LINES if line.strip()]
    text = content if as_one else "".join(rows)
    ids = (
        tokenizer(content)["input_ids"]
        if as_one
        else [t for r in rows for t in [*tokenizer(r)["input_ids"], tokenizer.eos_token_id]]
    )
    loss = by_hand(model, ids, 16)
    found = {name: value for name, (value, _, _) in figures({"m": of}).items()}
    assert found["m/loss_per_token"] == pytest.approx(loss, rel=1e-5)
    assert found["m/perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert found["m/perplexity_per_byte"] == pytest.approx(math.exp(loss * len(ids) / len(text)), rel=1e-4)
    assert found["m/bits_per_byte"] == pytest.approx(loss * len(ids) / len(text) / math.log(2), rel=1e-4)
    words = len(text.split()) if as_one else sum(len(r.split()) for r in rows)
    assert found["m/perplexity_per_word"] == pytest.approx(math.exp(loss * len(ids) / words), rel=1e-4)
    assert ("no EOS anywhere" if as_one else "15 rows, with <|endoftext|> after each") in caplog.text


def test_a_running_text_is_the_file(write):
    content = " = Head = \n\n a  b \n"
    assert running(write("t.txt", content), 0) == [content]
    assert running(write("t.jsonl", [{"text": "a"}, {"text": "b"}]), 0) == ["a\n\nb"]


def test_models_are_paired_where_their_windows_are_the_same(write, tiny_gpt2):
    path = write("t.txt", "\n".join(LINES))
    of = lambda **more: measure({"m": str(tiny_gpt2)}, EvaluateSection(text=path, **more), 0)["m"]
    one, other = of(max_length=16), of(max_length=32)
    found = figures({"one": one, "same": of(max_length=16), "other": other})
    assert found["same over one/loss_per_token"] == (0.0, 0.0, 0.0)
    assert "other over one/loss_per_token" not in found


def test_the_interval_of_a_ratio_covers_as_often_as_it_says():
    chance, covered = np.random.default_rng(1), []
    for _ in range(200):
        tokens = chance.integers(1, 40, 80)
        items = ratio(tokens * chance.normal(2, 0.5, 80), tokens)
        _, low, high = figures({"m": {"x": items}})["m/x"]
        covered.append(low < 2 < high)
    assert 0.88 < np.mean(covered) <= 0.99


def test_the_loss_of_given_answers(write, tiny_gpt2, caplog):
    from pipelines.evaluation.texts import pair_losses
    from pipelines.models import chat_template

    model, tokenizer = loaded(tiny_gpt2)
    rows = [{"prompt": " ".join(WORDS[:n]), "completion": " ".join(WORDS[n : n + 1 + n % 4])} for n in range(1, 12)]
    rows[3] = {"prompt": [{"role": "user", "content": "what is it"}], "completion": "a tree"}
    nats, count = 0.0, 0
    for row in rows:
        before, answer = chat_template.encode_answer(tokenizer, row["prompt"], row["completion"])
        with torch.no_grad():
            logp = model(torch.tensor([before + answer])).logits[0].log_softmax(-1)
        nats -= sum(logp[len(before) + k - 1, token].item() for k, token in enumerate(answer))
        count += len(answer)
        assert answer[-1] == tokenizer.eos_token_id
    settings = SimpleNamespace(max_length=None, batch_size=4)
    of = pair_losses("m", str(tiny_gpt2), model, tokenizer, settings, rows)
    assert of["loss_per_token"].draws[0] == pytest.approx(nats / count, rel=1e-5)
    assert of["perplexity"].draws[0] == pytest.approx(math.exp(nats / count), rel=1e-5)

    settings.max_length = 4  # prompts are cut at their beginning, and that is logged
    cut = pair_losses("m", str(tiny_gpt2), model, tokenizer, settings, [{**row, "where": "p:1"} for row in rows])
    assert "of 11 pairs are longer than 4 tokens" in caplog.text and math.isfinite(cut["loss_per_token"].draws[0])
