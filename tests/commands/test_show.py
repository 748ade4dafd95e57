"""`show` against what the stages train on: the same rows, of every kind, before and without any training."""

import copy
import json

import pytest

from pipelines import IGNORE_INDEX
from pipelines.__main__ import main
from pipelines.commands import show
from pipelines.kinds import KINDS
from pipelines.models import chat_template, tokenizer_setup
from pipelines.planning import unmade
from pipelines.recipe.recipe import load

GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64}
BERT = {
    "model_type": "bert",
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}


@pytest.fixture
def chain(recipe, write):
    """A recipe with a stage of every kind that gives rows to a model; nothing of it is made."""
    texts = write("text.jsonl", [{"text": f"the cat {i} sees a red dog. " * 3} for i in range(60)])
    answers = [{"prompt": "what colour", "completion": "red"}, {"prompt": "who", "completion": "a big cat " * 30}]
    turns = ["the cat", "a dog", "sees", "it"]
    dialogue = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    ranked = [
        {"prompt": "what", "completions": ["red fish", "red", "a tree"], "ranks": [2, 1, 2], "tags": [["long"], [], []]}
    ]
    unpaired = write("unpaired.jsonl", [{"prompt": "who", "completion": "the dog", "label": False}])
    prompts = write("prompts.jsonl", [{"prompt": "what colour"}, {"prompt": "cat " * 80}])
    labelled = write("labels.jsonl", [{"text": "a cat", "label": "good"}, {"text": "dog " * 40, "label": "bad"}] * 2)
    pairs = write("pairs.jsonl", [{"source": "the cat", "target": "a dog"}])
    stages = {
        "base": {
            "kind": "pretrain",
            "model": {"config": GPT2},
            "tokenizer": {"train": "bpe", "vocab_size": 300},
            "data": {"train": texts, "validation": 0.1},
            "args": {"max_length": 16},
        },
        "sft": {
            "kind": "sft",
            "model": {"model_name_or_path": "stage:base"},
            "data": {"train": [write("sft.jsonl", answers), write("turns.jsonl", [{"messages": dialogue}])]},
            "args": {"packing": True, "max_length": 64},
        },
        "samples": {
            "kind": "sample",
            "sample": {"models": ["stage:sft"], "completions": 2, "response_length": 16},
            "data": {"train": prompts},
        },
        "judge": {
            "kind": "reward",
            "model": {"model_name_or_path": "stage:sft"},
            "data": {"train": write("ranked.jsonl", ranked)},
            "args": {"tags": ["long"], "rank_margin": 0.5},
        },
        "direct": {
            "kind": "dpo",
            "model": {"model_name_or_path": "stage:sft"},
            "data": {"train": write("ranked.jsonl", ranked)},
        },
        "unpaired": {
            "kind": "kto",
            "model": {"model_name_or_path": "stage:sft"},
            "data": {"train": [write("ranked.jsonl", ranked), unpaired]},
        },
        "policy": {
            "kind": "ppo",
            "model": {"model_name_or_path": "stage:sft"},
            "reward": {"models": ["stage:judge"]},
            "data": {"train": prompts},
            "args": {"response_length": 16},
        },
        "encoder": {
            "kind": "mlm",
            "model": {"config": BERT},
            "tokenizer": {"train": "wordpiece", "vocab_size": 200},
            "data": {"train": texts},
            "args": {"max_length": 16},
        },
        "reviews": {"kind": "classify", "model": {"model_name_or_path": "stage:encoder"}, "data": {"train": labelled}},
        "translate": {
            "kind": "seq2seq",
            "model": {"config": {"model_type": "t5", "d_model": 16, "num_layers": 1}},
            "tokenizer": {"train": "bpe", "vocab_size": 300},
            "task": {"prefix": "in red: "},
            "data": {"train": pairs},
        },
    }
    return recipe(stages)


@pytest.fixture
def shown(chain, capsys):
    """`shown(stage, *words)` -> (rows, summary) of `show --json`."""

    def run(stage, *words):
        assert main(["show", str(chain), stage, "--json", "--rows", "1000", *words]) == 0
        *rows, last = map(json.loads, capsys.readouterr().out.splitlines())
        assert list(last) == ["summary"]
        return rows, last["summary"]

    return run


def test_every_kind_that_feeds_a_model_can_be_shown(shown, chain, tmp_path):
    stages = load(chain, read_data=False).stages
    assert {s.kind for s in stages} == KINDS.keys() - {"rank", "evaluate"}
    for stage in stages:
        rows, summary = shown(stage.name)
        tokenizer = unmade.tokenizer_of(stage, train=True)
        for row in rows:
            assert list(row)[:5] == ["where", "text", "input_ids", "labels", "learned"]
            assert row["text"] == tokenizer.decode(row["input_ids"]) and row["where"].startswith(str(tmp_path))
        assert rows and summary["kind"] == stage.kind and summary["train"]["length"]["longest"] > 0
    assert not (tmp_path / "out").exists()  # nothing was trained or kept


def test_windows_of_raw_text_cover_it_without_gaps(shown, chain):
    rows, summary = shown("base")
    train = [row for row in rows if row["where"]][: summary["train"]["windows"]]
    stage = load(chain, read_data=False)["base"]
    tokenizer = unmade.tokenizer_of(stage, train=True)
    text = "".join(row["text"] + tokenizer.eos_token for row in stage.module.raw_text.rows(stage, "train"))
    ids = tokenizer(text)["input_ids"]
    assert sum((row["input_ids"] for row in train), []) == ids[: len(ids) // 16 * 16]
    assert summary["train"]["tokens"] == len(ids)
    assert all(row["labels"] == [IGNORE_INDEX, *row["input_ids"][1:]] for row in rows)
    assert summary["validation"]["windows"] == len(rows) - len(train) > 0


def test_windows_do_not_depend_on_the_blocks_in_which_they_are_read(shown, monkeypatch):
    whole, _ = shown("base")
    monkeypatch.setattr("pipelines.training.raw_text.BLOCK", 1)
    assert shown("base")[0] == whole


def test_sft_rows_are_those_of_the_stage(shown, chain):
    rows, summary = shown("sft")
    stage = load(chain, read_data=False)["sft"]
    tokenizer = unmade.tokenizer_of(stage, train=True)
    short, dialogue = rows[0], rows[-1]
    prompt, answer = chat_template.encode_answer(tokenizer, "what colour", "red")
    assert short["input_ids"] == prompt + answer and short["labels"] == [IGNORE_INDEX] * len(prompt) + answer
    assert short["learned"] == [tokenizer.decode(answer)] and "red<|im_end|>" in short["learned"][0]
    assert [text.split("<")[0] for text in dialogue["learned"]] == ["a dog", "it"]
    train = summary["train"]
    assert (train["rows"], train["used"], train["dropped"], train["cut"]) == (3, 2, 1, 0)
    assert summary["packs"] == 2
    assert summary["packing_efficiency"] == pytest.approx(train["tokens"] / (2 * 64), abs=1e-4)
    _, summary = shown("sft", "stages.sft.data.too_long=truncate")
    assert (summary["train"]["used"], summary["train"]["cut"], summary["train"]["length"]["longest"]) == (3, 1, 64)


def test_a_ranking_is_its_prompt_and_the_answers_behind_it(shown, chain):
    (row,), summary = shown("judge")
    tokenizer = unmade.tokenizer_of(load(chain, read_data=False)["judge"], train=True)
    for ids, text in zip(row["completion_ids"], ("red fish", "red", "a tree"), strict=True):
        assert row["input_ids"] + ids == sum(chat_template.encode_answer(tokenizer, "what", text), [])
    assert [c.split("<")[0] for c in row["completions"]] == ["red fish", "red", "a tree"]
    assert (row["ranks"], row["margin"], row["tags"]) == ([2, 1, 2], [-1, -0.5, -1], [["long"], [], []])
    assert row["learned"] == [] and summary["train"]["sequences"] == 3
    (direct,), _ = shown("direct")
    same = ("text", "input_ids", "labels", "completions", "completion_ids", "ranks")
    assert [direct[key] for key in same] == [row[key] for key in same] and direct["learned"] == direct["completions"]
    (unpaired, single), summary = shown("unpaired")  # the third answer has no tag, and is not the best
    assert (unpaired["completion_ids"], unpaired["desirable"]) == (row["completion_ids"][:2], [False, True])
    assert single["completions"][0].startswith("the dog") and single["desirable"] == [False]
    assert (summary["train"]["desirable"], summary["train"]["undesirable"], summary["train"]["unlabelled"]) == (1, 2, 1)


def test_prompts_are_those_of_inference(shown, chain):
    stage = load(chain, read_data=False)["policy"]
    tokenizer = unmade.tokenizer_of(stage, train=True)
    rows, summary = shown("policy")
    assert rows[0]["input_ids"] == chat_template.encode_prompt(tokenizer, "what colour")
    assert summary["train"]["longer_than_the_limit"] == 1 and summary["train"]["limit"] == 64 - 16
    rows, summary = shown("samples")
    assert rows[0]["input_ids"] == chat_template.encode_prompt(tokenizer, "what colour")
    assert summary["train"]["dropped"] == 1


def test_what_is_hidden_named_and_translated_is_what_is_learned(shown):
    rows, _ = shown("encoder")
    for row in rows:
        hidden = [label for label in row["labels"] if label != IGNORE_INDEX]
        assert len(row["input_ids"]) == 16 and len(hidden) < 16
    assert any(row["learned"] and "[MASK]" in row["text"] for row in rows)
    rows, summary = shown("reviews")
    assert [row["learned"] for row in rows[:2]] == [["good"], ["bad"]] and rows[0]["labels"] == [1]
    assert summary["train"]["labels"] == {"bad": 2, "good": 2} and summary["train"]["cut"] == 2
    (row,), _ = shown("translate")
    assert row["text"].startswith("in red: the cat") and row["learned"][0].startswith("a dog")


def test_a_template_on_the_command_line_is_shown(shown):
    rows, _ = shown("sft", "stages.sft.model.chat_template=plain")
    assert rows[0]["text"].startswith("what colourred")


def test_for_people(chain, capsys, monkeypatch):
    assert main(["show", str(chain), "sft", "--rows", "1"]) == 0
    out = capsys.readouterr().out
    assert "sft.jsonl:1" in out and "learned: 'red<|im_end|>'" in out and "longest" in out and "% filled" in out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert main(["show", str(chain), "judge"]) == 0
    out = capsys.readouterr().out
    assert "rank 1" in out and f"{show.GREEN}red" in out and "tags long" in out


def test_what_cannot_be_shown_is_said(chain, recipe, write, tiny_gpt2, capsys):
    for words, hint in (
        (["sftt"], "did you mean sft?"),
        (["sft", "base"], "one stage"),
        (["sft", "--rows", "-1"], "must be 0 or more"),
    ):
        assert main(["show", str(chain), *words]) == 2
        assert hint in capsys.readouterr().err
    folder = tiny_gpt2
    stages = {
        "samples": {
            "kind": "sample",
            "sample": {"models": [str(folder)]},
            "data": {"train": write("p.jsonl", [{"prompt": "a"}])},
        },
        "people": {
            "kind": "rank",
            "rank": {"labeller": "data.bay.labeller:script_labeller"},
            "data": {"train": "stage:samples/samples.jsonl"},
        },
        "sft": {
            "kind": "sft",
            "model": {"model_name_or_path": str(folder)},
            "data": {"train": write("bad.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": 1}\n')},
        },
    }
    path = recipe(stages, name="other.yaml")
    assert main(["show", str(path), "people"]) == 2 and "no rows of its own" in capsys.readouterr().err
    assert main(["show", str(path), "sft"]) == 2 and "bad.jsonl:2" in capsys.readouterr().err
    no = {
        "sft": {
            "kind": "sft",
            "model": {"model_name_or_path": "nobody/nothing"},
            "data": {"train": write("a.jsonl", [{"prompt": "a", "completion": "b"}])},
        }
    }
    assert main(["show", str(recipe(no, name="third.yaml")), "sft"]) == 2
    assert "no tokenizer of 'nobody/nothing' at hand" in capsys.readouterr().err


def test_the_tokenizer_is_the_one_that_training_dresses(tiny_gpt2, tokenizer, recipe, write):
    rows = write("a.jsonl", [{"prompt": "a", "completion": "b"}])
    path = recipe({"sft": {"kind": "sft", "model": {"model_name_or_path": str(tiny_gpt2)}, "data": {"train": rows}}})
    found = unmade.tokenizer_of(load(path, read_data=False)["sft"])

    real = copy.deepcopy(tokenizer)
    tokenizer_setup.dress(real, None)
    assert found.get_vocab() == real.get_vocab() and found.chat_template == real.chat_template
    assert (found.eos_token, found.pad_token) == (real.eos_token, real.pad_token)


def test_rows_that_an_earlier_stage_will_write_are_left_out_and_named(tiny_gpt2, recipe, write, capsys):
    rows = write("rows.jsonl", [{"prompt": "the cat", "chosen": "sees", "rejected": "eats"}] * 3)
    stages = {
        "samples": {
            "kind": "sample",
            "sample": {"models": [str(tiny_gpt2)]},
            "data": {"train": write("p.jsonl", [{"prompt": "a"}])},
        },
        "people": {
            "kind": "rank",
            "rank": {"judgements": "judged.jsonl"},
            "data": {"train": "stage:samples/samples.jsonl"},
        },
        "judge": {
            "kind": "reward",
            "model": {"model_name_or_path": str(tiny_gpt2)},
            "data": {"train": [rows, "stage:people/rankings.jsonl"], "validation": "stage:people/rankings.jsonl"},
        },
        "late": {
            "kind": "reward",
            "model": {"model_name_or_path": str(tiny_gpt2)},
            "data": {"train": "stage:people/rankings.jsonl"},
        },
    }
    path = str(recipe(stages))
    assert main(["show", path, "judge", "--json", "--rows", "9"]) == 0
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 4 and "stage:people/rankings.jsonl" in told.err
    assert main(["show", path, "late"]) == 2 and "run people first" in capsys.readouterr().err


def test_columns_that_are_not_read_are_named(tiny_gpt2, recipe, write, capsys):
    rows = write("a.jsonl", [{"prompt": "a", "completion": "b", "mood": "good"}])
    path = recipe({"sft": {"kind": "sft", "model": {"model_name_or_path": str(tiny_gpt2)}, "data": {"train": rows}}})
    assert main(["show", str(path), "sft"]) == 0
    assert "ignored columns: mood" in capsys.readouterr().out
