"""Thoughts are taken from answers; a template's variables and a tokenizer's surplus tokens are the same everywhere."""

import copy
import json

import pytest
import torch
from dialogue_families import tokenizer_of
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

from pipelines.errors import TemplateError
from pipelines.generation import answers
from pipelines.generation.speaker import Settings, Speaker
from pipelines.models import chat_template, thoughts, tokenizer_setup


@pytest.fixture(scope="module")
def thinking():
    tokenizer = tokenizer_of("thoughts")
    tokenizer_setup.dress(tokenizer, None)
    return tokenizer


@pytest.mark.parametrize(
    "text, answer, thought",
    [
        ("<think>\n2+2\n</think>\n\nfour<|im_end|>", "four", True),
        ("<think>\n\n</think>\n\nfour<|im_end|>", "four", False),
        ("four<|im_end|>", "four", False),
        ("<think>\n2+2 is not yet", "", True),  # broken off
    ],
)
def test_nothing_of_a_thought_is_an_answer(thinking, text, answer, thought):
    ids = thinking(text)["input_ids"]
    ((found,), (had,)) = thoughts.split(thinking, [ids])
    assert (found.strip(), had) == (answer, thought)
    words = tokenizer_of("chatml")  # one that has no token for the marks
    ((found,), (had,)) = thoughts.split(words, [words(text)["input_ids"]])
    assert (found.strip(), had) == (answer, thought)


@pytest.mark.parametrize(
    "text, answer, thought",
    [
        (
            "<|channel|>analysis<|message|>2+2<|end|><|start|>assistant<|channel|>final<|message|>four<|return|>",
            "four",
            1,
        ),
        ("<|channel|>final<|message|>four<|return|>", "four", 0),
        ("<|channel|>analysis<|message|>2+2 is", "", 1),
        ("<|channel|>analysis<|message|>2+2<|end|><|start|>assistant<|channel|>fin", "", 1),
    ],
)
def test_channels_of_harmony(text, answer, thought):
    tokenizer = tokenizer_of("chatml")
    tokenizer.add_tokens(
        [AddedToken(f"<|{n}|>", special=True) for n in "channel message start end return".split()], True
    )
    assert thoughts.split(tokenizer, [tokenizer(text)["input_ids"]]) == ([answer], [bool(thought)])


def test_a_prompt_that_opens_the_thought():
    tokenizer = tokenizer_of("open thought")
    tokenizer_setup.dress(tokenizer, None)
    assert thoughts.opens_thought(tokenizer)
    ids = [tokenizer(text)["input_ids"] for text in ("2+2\n</think>\n\nfour</s>", "2+2 is", "\n</think>\n\nfour</s>")]
    assert thoughts.split(tokenizer, ids) == (["\n\nfour", "", "\n\nfour"], [True, True, False])


def test_thoughts_are_left_out_of_samples_unless_the_recipe_keeps_them(thinking, monkeypatch):
    ids = thinking("<think>\n2+2\n</think>\n\nfour<|im_end|>")["input_ids"]
    monkeypatch.setattr(answers, "generate", lambda *a, **k: ([ids], None))
    monkeypatch.setattr(answers, "end_tokens", lambda *a: [thinking.eos_token_id])
    ask = lambda **how: answers.answers(None, thinking, ["2+2?"], [[0]], response_length=8, **how)[0]
    assert ask() == [("four", True)]
    assert ask(keep_thoughts=True) == [("<think>\n2+2\n</think>\n\nfour", True)]


def test_variables_of_a_template_are_saved_with_it(thinking, tmp_path):
    quiet = copy.deepcopy(thinking)
    tokenizer_setup.dress(quiet, None, {"enable_thinking": False})
    quiet.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for tokenizer in (quiet, again):
        assert tokenizer.decode(chat_template.encode_prompt(tokenizer, "hi")).endswith("<think>\n\n</think>\n\n")
        _, answer = chat_template.encode_answer(tokenizer, "hi", "ho")
        assert tokenizer.decode(answer) == "ho<|im_end|>"
    template = again.chat_template
    tokenizer_setup.dress(again, None, {"enable_thinking": False})
    assert again.chat_template == template  # a later stage that says the same
    loud = again.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    assert "<think>" not in loud
    for wrong in ({"enable_thinkin": False}, {"messages": []}):
        with pytest.raises(TemplateError, match="model.chat_template_kwargs: .* is no variable of the chat template"):
            tokenizer_setup.dress(copy.deepcopy(thinking), None, wrong)
    odd = {"a": 'say "x"\n\\ é🙂', "b": [1, None, {"c": True}]}
    other = copy.deepcopy(thinking)
    other.chat_template = "{{ a }}|{{ b | tojson }}" + other.chat_template
    tokenizer_setup.set_variables(other, odd)
    text = chat_template.render_template(other, [{"role": "user", "content": "x"}], True)
    assert text.startswith(odd["a"] + "|" + json.dumps(odd["b"]))


def test_a_tokenizer_with_more_tokens_than_its_model_answers(tiny_gpt2, tmp_path, caplog):
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    tokenizer_setup.dress(tokenizer, "chatml")
    AutoModelForCausalLM.from_pretrained(tiny_gpt2).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, loaded = answers.load(str(tmp_path))
    assert "2 tokens that the model never learned" in caplog.text
    assert answers.answers(model, loaded, ["the cat"], [[1]], response_length=2)
    speaker = Speaker(str(tmp_path))
    with torch.no_grad():
        assert isinstance(speaker.answer("the cat", Settings(max_new_tokens=2), lambda _: None, print), str)


def test_generation_ends_where_learned_answers_end(tiny_gpt2):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_gpt2), tokenizer_of("observed")
    tokenizer_setup.install_template(model, tokenizer, None)
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|user|>")}
    assert ends <= set(answers.end_tokens(model, tokenizer)) and tokenizer.eos_token == "<|endoftext|>"
