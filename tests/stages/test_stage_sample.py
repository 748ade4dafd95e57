"""Samples, rankings of them, and a reward model from those: one chain, whose later stages read what earlier
ones wrote.
"""

import json

import pytest

from pipelines import errors
from pipelines.chain import chain
from pipelines.data import mixing
from pipelines.errors import DataError, SetupError
from pipelines.generation import answers
from pipelines.recipe.problems import RecipeError
from pipelines.recipe.recipe import load
from pipelines.stages import sample
from pipelines.stages.rank import winners
from pipelines.stages.sample import _read, collect

PROMPTS = [{"prompt": f"what colour is the {w} {i}"} for i in range(6) for w in ("cat", "dog", "tree")]


def by_length(prompt, completions):
    """A labeller: shorter is better, and long answers are tagged."""
    return [len(c) for c in completions], [["long"] if len(c) > 12 else [] for c in completions]


def one_rank(prompt, completions):
    return [1], [[]]


@pytest.fixture
def stages(write, tiny_gpt2):
    prompts = write("prompts.jsonl", [*PROMPTS, PROMPTS[0], {"prompt": "a very long question " * 20}])
    return {
        "other": {
            "kind": "sft",
            "model": {"model_name_or_path": str(tiny_gpt2), "chat_template": "plain"},
            "data": {"train": write("s.jsonl", [{**p, "completion": "it is red"} for p in PROMPTS])},
            "args": {"max_steps": 1, "global_batch_size": 8, "max_length": 64},
        },
        "samples": {
            "kind": "sample",
            "sample": {"models": [str(tiny_gpt2), "stage:other"], "completions": 4, "response_length": 6},
            "data": {"train": prompts},
        },
        "rankings": {
            "kind": "rank",
            "rank": {"labeller": "tests.stages.test_stage_sample:by_length"},
            "data": {"train": "stage:samples/samples.jsonl"},
        },
        "reward": {
            "kind": "reward",
            "model": {"model_name_or_path": "stage:other"},
            "data": {"train": ["stage:rankings/rankings.jsonl"]},
            "args": {"max_steps": 2, "global_batch_size": 8, "max_length": 64, "tags": ["long"]},
        },
    }


def rows(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def test_what_models_wrote_is_ranked_and_learned_from(recipe, stages, caplog):
    path = recipe(stages)
    loaded = load(path)  # the files of later stages do not exist yet
    assert loaded["reward"].parents == ["other", "rankings"]
    chain.run(loaded)
    folder = loaded["samples"].folder
    samples, record = rows(folder / "samples.jsonl"), json.loads((folder / "stage.json").read_text())
    assert len(samples) == len(PROMPTS) == record["metrics"]["rows"] and "1 of 19 rows are longer" in caplog.text
    assert samples[0].keys() == {"prompt", "completions", "models", "ended"}
    for row in samples:
        assert len(row["completions"]) == len(set(row["completions"])) == len(row["models"]) == len(row["ended"]) <= 4
    written = sum(len(row["completions"]) for row in samples)
    counts = record["rows"]["answers"]
    assert written + counts["duplicates"] + counts["empty"] == 4 * len(PROMPTS)
    assert {m for row in samples for m in row["models"]} == {"other", stages["samples"]["sample"]["models"][0]}
    assert not (folder / "README.md").exists() and not (folder / "checkpoints").exists()

    best = loaded["rankings"].folder / "best.jsonl"
    whole = {(s["prompt"], c) for s in samples for c, ended in zip(s["completions"], s["ended"], strict=True) if ended}
    assert {(row["prompt"], row["completion"]) for row in rows(best)} <= whole
    won = json.loads((loaded["rankings"].folder / "stage.json").read_text())["metrics"]
    assert won["winners"] == len(rows(best)) and won["winners"] + won["winners_cut_off"] + won["undecided"] == len(
        samples
    )
    assert not rows(best) or len(list(mixing.stream({"train": str(best)}, "train", "sft", 0))) == len(rows(best))
    rankings = rows(loaded["rankings"].folder / "rankings.jsonl")
    assert [r["ranks"] for r in rankings] == [[len(c) for c in s["completions"]] for s in samples]
    assert rankings[0]["labeller"] == "by_length" and rankings[0]["models"] == samples[0]["models"]
    reward = json.loads((loaded["reward"].folder / "stage.json").read_text())
    assert list(reward["record"]["data"]) == ["stage:rankings/rankings.jsonl"]
    assert [step.action for step in chain.plan(load(path))] == ["finished"] * 4
    # the rows are part of what the reward model was made from
    with open(loaded["rankings"].folder / "rankings.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(rankings[0]) + "\n")
    with pytest.raises(errors.ChainError, match="reward: finished with other settings: data.stage:rankings"):
        chain.plan(load(path))


def test_an_interrupted_stage_goes_on_to_the_same_file(recipe, stages, monkeypatch, tmp_path):

    monkeypatch.setattr(sample, "BATCHES", 1)
    stages = {name: stages[name] for name in ("other", "samples")}
    stages["samples"]["sample"]["batch_size"] = 8
    whole = load(recipe(stages, "whole.yaml", output_dir=str(tmp_path / "whole")))
    chain.run(whole)
    stopped = load(recipe(stages, "stopped.yaml"))
    real, asked = answers.answers, []

    def failing(model, tokenizer, prompts, *args, **kwargs):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(prompts)
        return real(model, tokenizer, prompts, *args, **kwargs)

    monkeypatch.setattr(answers, "answers", failing)
    with pytest.raises(KeyboardInterrupt):
        chain.run(stopped)
    log = stopped["samples"].checkpoints / "answers.jsonl"
    with open(log, "a") as file:
        file.write('{"model": 0, "pro')  # killed while it wrote a line
    seen = []
    monkeypatch.setattr(answers, "answers", lambda m, t, p, *a, **k: seen.append(p) or real(m, t, p, *a, **k))
    chain.run(load(recipe(stages, "stopped.yaml")))
    assert len(seen) + len(asked) == 2 * 5  # five chunks of four prompts for each model, none twice
    a, b = ((r["samples"].folder / "samples.jsonl").read_text() for r in (whole, stopped))
    assert a == b


def test_duplicates_are_credited_to_each_model_in_turn():
    group = [[("red", True), ("blue", True)], [("red", True), ("", True)]]
    rows_, counts = collect(["p", "q", "r"], {0: group, 1: group, 2: [[("a", True)] * 2] * 2}, ["x", "y"])
    assert [dict(zip(r["completions"], r["models"])) for r in rows_] == [
        {"red": "x", "blue": "x"},
        {"red": "y", "blue": "x"},
    ]
    assert counts == {"duplicates": 1 + 1 + 3, "empty": 2, "prompts_without_choice": 1}


def test_people_rank_when_they_are_named(recipe, stages, tmp_path, capsys):
    judgements = tmp_path / "judged.jsonl"
    stages = {name: stages[name] for name in ("other", "samples", "rankings")}
    stages["rankings"]["rank"]["judgements"] = str(judgements)
    path = recipe(stages)
    with pytest.raises(SetupError, match=r"waiting for people(.|\n)*python -m pipelines rank .*samples.jsonl"):
        chain.run(load(path))
    loaded = load(path)
    samples = rows(loaded["samples"].folder / "samples.jsonl")
    judged = [
        {
            "prompt": s["prompt"],
            "completions": s["completions"][::-1],
            "ranks": [1] * len(s["completions"]),
            "labeller": n,
        }
        for s, n in ((samples[0], "ann"), (samples[0], "bob"), (samples[2], "ann"))
    ]
    judgements.write_text("".join(json.dumps(r) + "\n" for r in [*judged, {**judged[0], "prompt": "another"}]))
    chain.run(loaded)
    found = rows(loaded["rankings"].folder / "rankings.jsonl")
    assert [r["labeller"] for r in found] == ["ann", "bob", "ann"]
    assert found[0]["models"] == samples[0]["models"][::-1]
    report = json.loads((loaded["rankings"].folder / "stage.json").read_text())["rows"]["judgements"]
    assert report["about_other_answers"] == 1 and report["samples_without"] == len(samples) - 2
    judgements.write_text(json.dumps(judged[0]) + "\n")  # other judgements: the stage is stale
    with pytest.raises(errors.ChainError, match="judged.jsonl"):
        chain.plan(load(path))


def test_the_winners_of_rankings_are_rows_for_sft():
    rankings = [
        {"prompt": "a", "completions": ["x", "y", "z"], "ranks": [2, 1, 3], "tags": [[], [], []]},
        {"prompt": "b", "completions": ["x", "y", "z"], "ranks": [1, 1, 2], "tags": [["rude"], [], []]},
        {"prompt": "c", "completions": ["x", "y"], "ranks": [1, 2], "tags": [["rude"], []]},  # its best one is rude
        {"prompt": "d", "completions": ["x", "y"], "ranks": [1, 1]},  # decides nothing
        {"prompt": "e", "completions": ["x", "y"], "ranks": [2.5, 0.5]},
    ]
    best = lambda *samples: [(row["prompt"], row["completion"]) for row in winners(rankings, list(samples))[0]]
    assert best() == best({"prompt": "a", "completions": ["x", "y", "z"]}) == [("a", "y"), ("b", "y"), ("e", "y")]
    cut = [{"prompt": p, "completions": ["y", "x"], "ended": [False, True]} for p in "abc"]  # in another order
    assert best(*cut) == [("e", "y")] and winners(rankings, cut)[1] == 2
    rankings[1]["tags"] = None  # then x is as good
    assert best(*cut) == [("b", "x"), ("e", "y")] and winners(rankings, cut)[1] == 1
    assert winners(rankings[3:4], []) == ([], 0)


def test_a_labeller_that_answers_nonsense_is_named(recipe, stages):
    stages["rankings"] |= {"rank": {"labeller": "tests.stages.test_stage_sample:one_rank"}}
    stages.pop("reward")
    with pytest.raises(DataError, match=r"one_rank, asked about .*samples.jsonl:1: ranks must be a list"):
        chain.run(load(recipe(stages)))


def test_mistakes_are_found_before_anything_runs(recipe, write, tiny_gpt2):
    prompts = {"train": write("p.jsonl", PROMPTS)}
    stages = {
        "a": {
            "kind": "sample",
            "sample": {"models": [str(tiny_gpt2), "gpt2"], "completions": 3, "top_p": 0},
            "data": prompts,
        },
        "b": {"kind": "rank", "rank": {}, "data": {"train": "stage:a"}},
        "c": {"kind": "sample", "sample": {"models": ["stage:b"]}, "data": prompts},
        "d": {
            "kind": "reward",
            "model": {"model_name_or_path": "stage:a"},
            "data": {"train": "stage:zzz/rankings.jsonl"},
        },
    }
    with pytest.raises(RecipeError) as error:
        load(recipe(stages))
    text = str(error.value)
    for words in [
        "multiple of 2",
        "sample.top_p",
        "who ranks?",
        "name the file that the stage writes",
        "this stage is of kind rank",
        "of kind sample and leaves no model",
        "`stage:zzz` names no earlier stage",
    ]:
        assert words in text


def test_long_prompts_can_be_an_error(recipe, stages):
    stages["samples"]["data"]["too_long"] = "error"
    stages = {name: stages[name] for name in ("other", "samples")}
    with pytest.raises(DataError, match="1 of 19 rows are longer than .*prompts.jsonl:20"):
        chain.run(load(recipe(stages)))


def test_an_interrupted_log_may_hold_what_python_takes_for_line_ends(tmp_path):

    rows = [{"model": 0, "prompt": i, "answers": ["a\x85b\u2028c"]} for i in range(2)]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + '{"model": 0, "pr')
    assert _read(log) == {(0, 0): ["a\x85b\u2028c"], (0, 1): ["a\x85b\u2028c"]}
    assert len(_read(log)) == 2  # what was cut off is gone
