"""Talking to a model: the prompt is the one of training, the dialogue is kept, and a pipe gets the answer alone."""

import io
import json
import re
import sys

import pytest

from pipelines import __main__, files
from pipelines.commands import chat
from pipelines.errors import SetupError
from pipelines.generation import dialogue
from pipelines.generation.speaker import Settings, Speaker, plain
from pipelines.models import chat_template, tokenizer_setup

GREEDY = {"temperature": 0.0, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_gpt2):
    """A run's folder: a base without a template, an sft and a policy with chatml, a reward model, one not finished."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    run = tmp_path_factory.mktemp("run")
    for i, name in enumerate(("base", "policy", "sft")):  # the policy is finished last, though not the last by name
        tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
        torch.manual_seed(i)
        config = AutoConfig.from_pretrained(tiny_gpt2, n_positions=160, tie_word_embeddings=False)
        model = AutoModelForCausalLM.from_config(config)
        torch.nn.init.normal_(model.lm_head.weight)  # every model says something else
        silent = [i for token, i in tokenizer.get_vocab().items() if not re.fullmatch("Ġ?[a-z]+", token)]
        model.generation_config.suppress_tokens = silent  # no control characters, no end
        if name != "base":
            silent += tokenizer.convert_tokens_to_ids(tokenizer_setup.install_template(model, tokenizer, "chatml"))
        model.save_pretrained(run / name)
        tokenizer.save_pretrained(run / name)
    for name, day in (("base", 1), ("sft", 2), ("reward", 4), ("policy", 3)):
        files.write_json(run / name / files.FINISHED, {"finished": f"2026-01-0{day}", "record": {}})
    files.write_json(run / "reward" / "config.json", {"architectures": ["GPT2ForSequenceClassification"]})
    files.write_json(run / "next" / files.STARTED, {"started": "2026-01-05"})
    return run


@pytest.fixture
def sft(run):
    return Speaker(str(run / "sft"))


def answered(speaker, text, **settings):
    """`(answer, pieces it was streamed in, remarks)`."""
    pieces, remarks = [], []
    answer = speaker.answer(text, Settings(**{**GREEDY, **settings}), pieces.append, remarks.append)
    return answer, pieces, remarks


def expected(speaker, messages, tokens=8):
    """What the model's own greedy search writes after the prompt of training."""
    import torch

    ids = torch.tensor([chat_template.encode_prompt(speaker.tokenizer, messages)])
    out = speaker.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens)
    text = speaker.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return plain(text.lstrip() if speaker.keeps else text)


def test_a_word_names_a_model(run, tmp_path):
    assert chat.find(str(run)) == str(run / "policy")
    assert chat.find(str(run / "base")) == str(run / "base")
    assert chat.find("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    for word, said in [
        (run / "reward", "does not write text"),
        (run / "next", "when it is finished"),
        (run / "polcy", "did you mean policy"),
        (tmp_path / "no" / "such", "no such folder"),
    ]:
        with pytest.raises(SetupError, match=said):
            chat.find(str(word))


def test_an_answer_is_the_models_own_under_its_template_and_the_dialogue_is_kept(sft):
    first, *_ = answered(sft, "the cat")
    user = {"role": "user", "content": "the cat"}
    assert first == expected(sft, [user]) and first.strip()
    second, *_ = answered(sft, "a dog")
    dialogue = [user, {"role": "assistant", "content": first.strip()}, {"role": "user", "content": "a dog"}]
    assert second == expected(sft, dialogue) != expected(sft, dialogue[2:])


def test_a_base_model_continues_each_text_as_it_stands(run):
    base = Speaker(str(run / "base"))
    answered(base, "a dog")
    answer, pieces, _ = answered(base, "the cat likes", max_new_tokens=40)
    assert answer == expected(base, "the cat likes", 40) == "".join(pieces) and len(pieces) > 1  # as it is written
    with pytest.raises(SetupError, match="no chat template"):
        base.reset("be kind")


def test_what_does_not_fit_is_forgotten_oldest_first_and_said(sft):
    sft.reset("x")
    for word in ("cat", "dog"):
        answered(sft, word)
    said = []
    while not said:
        before = list(sft.messages)
        *_, said = answered(sft, "bird")
    gone = (len(before) + 2 - len(sft.messages)) // 2
    turns = "turn is" if gone == 1 else f"{gone} turns are"
    assert gone and said == [f"sft reads {sft.limit} tokens: the oldest {turns} forgotten"]
    assert sft.messages[0]["role"] == "system" and sft.messages[1:-2] == before[1 + 2 * gone :]
    kept = list(sft.messages)
    with pytest.raises(SetupError, match="this prompt has .* shorten it"):
        answered(sft, "cat " * 200)
    assert len(sft.messages) <= len(kept)
    assert answered(Speaker(sft.path), "cat " * 20, max_new_tokens=500)[0]  # as long as there is room


def test_sampling_follows_the_settings(sft):
    hot = {"temperature": 2.0, "top_p": 1.0}
    draws = []
    for seed in (1, 1, 2):
        sft.reset()
        draws.append(answered(sft, "the cat", seed=seed, **hot)[0])
    assert draws[0] == draws[1] != draws[2]
    sft.reset()
    greedy = answered(sft, "the cat")[0]
    sft.reset()
    assert greedy == answered(sft, "the cat", top_k=1, **hot)[0]


def test_commands(sft, capsys):
    out = io.StringIO()
    settings = Settings(max_new_tokens=4, seed=1)
    typed = [
        "/regenerate",
        "the cat",
        "/regenerate",
        "/set temperature=0 max_new_tokens=3",
        "/set top_p=7",
        "/sett",
        "/system be kind",
        "a dog",
        "/reset",
        "/help",
        "/quit",
        "never read",
    ]
    dialogue.talk([sft], settings, typed, out)
    said = out.getvalue()
    assert "no prompt yet" in said and "temperature=0.0 top_p=0.95 top_k=0 max_new_tokens=3" in said
    assert "must be a number from 0.001 to 1" in said and "did you mean /set?" in said and "Ctrl-C" in said
    assert settings == Settings(temperature=0.0, max_new_tokens=3, seed=2)  # /regenerate took the next seed
    assert sft.messages == [{"role": "system", "content": "be kind"}]  # /reset keeps what it is told beforehand
    sft.reset()
    dialogue.talk([sft], settings, ["the cat", "/regenerate"], out)
    assert [m["role"] for m in sft.messages] == ["user", "assistant"]


def test_ctrl_c_stops_the_answer_and_not_the_dialogue(sft, monkeypatch):
    def generate(streamer, input_ids, **_):
        streamer.put(input_ids)
        streamer.put(sft.tokenizer("the cat sees", return_tensors="pt")["input_ids"][0])
        raise KeyboardInterrupt

    monkeypatch.setattr(sft.model, "generate", generate)
    out = io.StringIO()
    dialogue.talk([sft], Settings(), ["who", "/set"], out)
    assert "the cat sees(stopped)" in out.getvalue() and "temperature" in out.getvalue()
    assert sft.messages[-1] == {"role": "assistant", "content": "the cat sees"}


def test_several_answer_side_by_side(run, monkeypatch):
    speakers = [Speaker(str(run / name)) for name in ("sft", "policy")]
    settings = Settings(**GREEDY)
    wanted = [expected(s, "the cat").split()[0] for s in speakers]
    monkeypatch.setenv("COLUMNS", "90")
    dialogue.talk(speakers, settings, ["the cat"], wide := io.StringIO())
    head, _, row, *_ = wide.getvalue().splitlines()
    assert head.index("policy") == 45 and row.startswith(wanted[0]) and row[45:].startswith(wanted[1])
    monkeypatch.setenv("COLUMNS", "60")
    dialogue.talk(speakers, settings, ["/reset", "the cat"], narrow := io.StringIO())
    assert "\nsft:\n" in narrow.getvalue() and "\npolicy:\n" in narrow.getvalue()
    lines = dialogue.side_by_side(["a", "b"], ["one two\nthree", ""], 6).splitlines()
    assert lines == ["a     b", "-     -", "one", "two", "thr", "ee", ""]


def test_what_a_model_writes_cannot_command_the_terminal():
    assert plain("a\x1b[2Jb\x9bc\td\ne é") == "a\ufffd[2Jb\ufffdc\td\ne é"


def test_from_a_pipe_only_the_answer_goes_to_stdout(run, sft, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n"))
    assert __main__.main(["chat", str(run / "sft"), "--temperature", "0", "--max-new-tokens", "8"]) == 0
    printed = capsys.readouterr()
    assert printed.out == expected(sft, "the cat") + "\n" and str(run / "sft") in printed.err
    for argv, piped, said in [
        ([], "", "nothing came through the pipe"),
        (["--temperature", "hot"], "x", "must be a number >= 0"),
    ]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(piped))
        assert __main__.main(["chat", str(run / "sft"), *argv]) == 2
        assert said in capsys.readouterr().err


def test_what_a_translation_stage_puts_before_a_text_is_put_there(tmp_path, tokenizer):
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    record = {"record": {"sections": {"task": {"prefix": "red "}}}, "finished": "2026"}
    (tmp_path / files.FINISHED).write_text(json.dumps(record))
    speaker = Speaker(chat.find(str(tmp_path)))
    ids = speaker.tokenizer("red cat", return_tensors="pt")["input_ids"]
    wanted = speaker.tokenizer.decode(
        speaker.model.generate(ids, max_new_tokens=8, do_sample=False)[0, 1:], skip_special_tokens=True
    )
    assert answered(speaker, "cat")[0] == wanted
