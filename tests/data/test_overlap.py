"""Rows of evaluation data that also stand in training data: what is found, what is not, and how fast."""

import random
import time

import numpy as np

from pipelines import __main__
from pipelines.data import overlap
from pipelines.data.overlap import find

WORDS = [f"w{i}" for i in range(3000)]


def text(seed, count):
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def prompts(write, name, *texts):
    return {"path": write(name, [{"prompt": t} for t in texts])}, "prompts"


def test_the_same_but_for_case_and_space_is_found_and_counted_once(write):
    held = prompts(write, "held.jsonl", "What is  it?", "another", "what is it?")
    trained = prompts(write, "train.jsonl", "x", "WHAT is\nit?")
    [found] = find([trained, trained], [held, ({**held[0], "columns": None}, held[1])])
    assert found == f"{held[0]['path']}: 2 of 3 rows, as 'what is it?' (:1, {trained[0]['path']}:2)"


def test_a_file_that_two_kinds_evaluate_on_is_one_line(write):
    row = {"prompt": "What is it?", "completions": ["a clock", "a mill"], "ranks": [1, 2], "tags": [[], []]}
    path = write("ranked.jsonl", [row])
    assert len(find([({"path": path}, "rankings")], [({"path": path}, "rankings"), ({"path": path}, "unpaired")])) == 1


def test_thirteen_words_in_a_row_are_found_in_any_form_of_data(write):
    shared = text(1, 13)
    held = prompts(write, "held.jsonl", f"tell me: {shared}!", text(2, 40), text(3, 12))
    document = {"path": write("t.jsonl", [{"text": f"{text(4, 30)} {shared.upper().replace(' ', ', ')} {text(5, 9)}"}])}
    dialogue = {
        "path": write(
            "d.jsonl",
            [
                {
                    "messages": [
                        {"role": "system", "content": text(2, 40)},
                        {"role": "user", "content": f"a {shared}"},
                        {"role": "assistant", "content": "b"},
                    ]
                }
            ],
        )
    }
    pairs = {"path": write("r.jsonl", [{"prompt": shared, "chosen": "a", "rejected": "b"}])}
    for source, kind in ((document, "text"), (dialogue, "sft"), (pairs, "rankings")):
        [found] = find([(source, kind)], [held])
        assert "1 of 3 rows by 13 words in a row, as " in found, kind
    [found] = find([(document, "text"), prompts(write, "e.jsonl", text(3, 12).upper())], [held])
    assert "2 of 3 rows (1 word for word, 1 by 13 words in a row), as " in found
    assert find([prompts(write, "n.jsonl", " ".join(shared.split()[:12]), text(9, 40))], [held]) == []


def test_what_all_prompts_begin_with_does_not_count(write):
    form = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    held = prompts(write, "held.jsonl", *(f"{form} {text(i, 5)}" for i in range(5)))
    assert find([prompts(write, "many.jsonl", *(f"{form} {text(i, 5)}" for i in range(100, 130)))], [held]) == []
    [found] = find([prompts(write, "few.jsonl", f"{form} {text(100, 5)}")], [held])
    assert "5 of 5 rows" in found


def test_texts_labels_and_sources_are_compared_under_their_columns(write):
    label = {"path": write("l.jsonl", [{"t": "A b", "label": ["x", "y"]}]), "columns": {"text": "t"}}
    held = {"path": write("h.jsonl", [{"text": "a  B", "label": 3}])}
    assert len(find([(label, "labelled")], [(held, "labelled")])) == 1
    source = {"path": write("s.jsonl", [{"source": "c d", "target": "e"}])}
    assert len(find([(source, "seq2seq")], [({**source, "rows": 1}, "seq2seq")])) == 1


def test_what_is_not_compared_is_named(write):
    held = prompts(write, "held.jsonl", "a")
    sources = [
        ({"path": held[0]["path"], "streaming": True}, "prompts"),
        ({"path": "org/data"}, "prompts"),
        ({"path": "./gone.jsonl"}, "prompts"),
        ({"path": write("bad.jsonl", "{")}, "prompts"),
        ({"path": "stage:samples/samples.jsonl"}, "rankings"),
    ]
    [found] = find(sources, [held])
    for words in ("(streamed)", "org/data (on the hub)", "gone.jsonl (not here)", "bad.jsonl (cannot be read)"):
        assert words in found
    assert "stage:" not in found and find(sources, []) == []


def test_the_bound_is_kept_and_named(write):
    held = prompts(write, "held.jsonl", *(f"q{i}" for i in range(30)))
    trained = prompts(write, "train.jsonl", *(f"q{29 - i}" for i in range(30)))
    found = find([trained], [held], most=20)
    assert "10 of 20 rows" in found[0] and "at most 20 rows" in found[1]


def test_runs_are_those_of_words_and_never_of_two_rows(write):
    """Property: two texts share a run exactly where they share 13 words in a row."""
    n = overlap.LENGTH
    of = lambda words: {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
    for seed in range(60):
        rng = random.Random(seed)
        a, b = ([rng.choice("xyz") for _ in range(rng.randrange(60))] for _ in range(2))
        if seed % 2 and len(a) > n:
            at = rng.randrange(len(a) - n + 1)
            b[5:5] = a[at : at + n]
        row = [0] * len(a) + [1] * len(b)
        words = np.array([hash(word) for word in [*a, *b]], np.int64).view(np.uint64)
        runs, rows = overlap._runs(words, np.array(row, int))
        assert len(np.intersect1d(runs[rows == 0], runs[rows == 1])) == len(of(a) & of(b))


def test_it_is_fast(write):
    held = prompts(write, "held.jsonl", *(text(i, 40) for i in range(500)))
    trained = prompts(write, "train.jsonl", *(text(i + 10**6, 60) for i in range(10_000)))
    began = time.process_time()
    assert find([trained], [held]) == []
    assert time.process_time() - began < 4  # about half a second on a free core


def test_check_and_evaluate_warn(recipe, write, tiny_gpt2, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # records keep relative paths
    rows = [{"prompt": f"what colour is {i}", "completion": "it is red"} for i in range(8)]
    write("train.jsonl", rows)
    write("held.jsonl", [{"prompt": "What colour is 3"}, {"prompt": "something else"}])
    write("validation.jsonl", [rows[5], {"prompt": "new", "completion": "red"}])
    path = recipe(
        {
            "sft": {
                "kind": "sft",
                "model": {"model_name_or_path": str(tiny_gpt2), "chat_template": "plain"},
                "data": {"train": "train.jsonl", "validation": "validation.jsonl"},
                "args": {"max_steps": 1, "global_batch_size": 4, "max_length": 32},
            },
            "scores": {
                "kind": "evaluate",
                "evaluate": {
                    "models": ["stage:sft"],
                    "prompts": "held.jsonl",
                    "judge": "tests.evaluation.test_best_of:length",
                    "response_length": 4,
                },
            },
        },
        output_dir="out",
    )
    assert __main__.main(["check", str(path), "--offline"]) == 0
    out = capsys.readouterr().out
    assert out.count("note: ") == 1 and f"note: {overlap.ADVICE}\n  validation.jsonl: 1 of 2 rows, as " in out
    assert "  held.jsonl: 1 of 2 rows, as 'what colour is 3' (:1, train.jsonl:4)\n" in out
    from pipelines.chain import chain
    from pipelines.recipe.recipe import load

    loaded = load(path)
    chain.run(loaded)
    text_ = (loaded["scores"].folder / "stage.json").read_text()
    assert "held.jsonl: 1 of 2 rows" in text_ and "validation.jsonl" not in text_
    capsys.readouterr()
    command = ["evaluate", "out/sft", "--prompts", "held.jsonl", "--judge", "tests.evaluation.test_best_of:length"]
    assert __main__.main([*command, "--response-length", "4"]) == 0
    assert f"note: {overlap.ADVICE}\n  held.jsonl: 1 of 2 rows" in capsys.readouterr().out
