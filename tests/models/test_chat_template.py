"""What is trained on is what is seen at inference, answers end in EOS, and PAD is a token of its own."""

import copy

import pytest

from pipelines import IGNORE_INDEX, errors
from pipelines.models import chat_template, tokenizer_setup

DIALOGUE = [
    {"role": "user", "content": "what colour is a fish"},
    {"role": "assistant", "content": "blue"},
    {"role": "user", "content": "and a cat"},
    {"role": "assistant", "content": "not blue"},
]


@pytest.fixture
def model(tiny_gpt2):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_gpt2)


@pytest.fixture
def tok(tokenizer):
    return copy.deepcopy(tokenizer)


@pytest.mark.parametrize("template", ["chatml", "plain"])
def test_training_ids_begin_with_the_ids_of_inference_and_end_with_eos(model, tok, template):
    tokenizer_setup.install_template(model, tok, template)
    prompt, answer = chat_template.encode_answer(tok, "what colour is a fish", "blue")
    assert prompt == chat_template.encode_prompt(tok, "what colour is a fish")
    assert answer[-1] == tok.eos_token_id and answer.count(tok.eos_token_id) == 1
    assert tok.decode(answer[:-1]) == "blue"
    if template == "plain":
        assert tok.decode(prompt) == "what colour is a fish"


def test_only_assistant_answers_and_their_eos_are_labelled(model, tok):
    tokenizer_setup.install_template(model, tok, "chatml")
    ((ids, labels),) = chat_template.encode_dialogue(tok, DIALOGUE)
    learned = tok.decode([t for t in labels if t != IGNORE_INDEX])
    assert learned == "blue<|im_end|>not blue<|im_end|>"
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels))
    # the second prompt as inference builds it: everything before the second answer
    answer = tok("not blue<|im_end|>", add_special_tokens=False)["input_ids"]
    assert ids == chat_template.encode_prompt(tok, DIALOGUE[:3]) + answer


def test_an_eos_inside_the_answers_text_does_not_end_it_early(model, tok):
    tokenizer_setup.install_template(model, tok, "chatml")
    _, answer = chat_template.encode_answer(tok, "q", "say <|im_end|> please")
    assert tok.decode(answer).endswith("please<|im_end|>")


def test_a_template_is_installed_once_and_survives_saving(model, tok, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = model.get_input_embeddings().weight.shape[0]
    assert tokenizer_setup.install_template(model, tok, None) == ["<|im_start|>", "<|im_end|>"]
    assert model.get_input_embeddings().weight.shape[0] >= len(tok) == before + 2
    assert tokenizer_setup.install_template(model, tok, None) == []
    model.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    again, loaded = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert chat_template.encode_dialogue(again, DIALOGUE) == chat_template.encode_dialogue(tok, DIALOGUE)
    assert again.eos_token == "<|im_end|>" and again.pad_token_id != again.eos_token_id
    ends = loaded.generation_config.eos_token_id
    assert again.eos_token_id in (ends if isinstance(ends, list) else [ends])
    assert loaded.config.eos_token_id == again.eos_token_id and loaded.config.pad_token_id == again.pad_token_id


def test_pad_that_equals_eos_becomes_its_own_token(model, tok):
    tok.pad_token = tok.eos_token
    tokenizer_setup.install_template(model, tok, "plain")
    assert tok.pad_token_id != tok.eos_token_id


def test_templates_that_cannot_be_trained_on_are_refused(model, tok):
    tokenizer_setup.install_template(model, tok, "chatml")
    tok.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(errors.TemplateError, match="does not end an answer with the EOS"):
        chat_template.encode_answer(tok, "q", "a")
    tok.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    # one that rewrites what came before is learned as inference shows it
    prompt, answer = chat_template.encode_answer(tok, "q", "a")
    assert prompt == chat_template.encode_prompt(tok, "q") and tok.decode(answer) == "a" + tok.eos_token


def test_a_template_from_a_file(model, tok, tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt "
        "%}[assistant]{% endif %}"
    )
    tokenizer_setup.install_template(model, tok, str(path))
    prompt, answer = chat_template.encode_answer(tok, "hi", "ho")
    assert tok.decode(prompt).endswith("[assistant]") and tok.decode(answer) == "ho" + tok.eos_token
