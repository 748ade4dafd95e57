"""The rank stage with models as labellers: reward models, a language model that runs here, an endpoint, and people."""

import json
import logging
import re

import pytest
import torch

from pipelines.chain import chain
from pipelines.errors import SetupError
from pipelines.evaluation.judges import model_scores
from pipelines.feedback import endpoint
from pipelines.models import chat_template
from pipelines.recipe.problems import RecipeError
from pipelines.recipe.recipe import load
from tests.feedback.stand_in_judge import completion, serving

SAMPLES = [
    {
        "prompt": f"what colour is the bird {i}",
        "completions": ["red", "the red bird", "fish and red"],
        "models": ["a", "b", "a"],
    }
    for i in range(4)
]


@pytest.fixture
def reward(tiny_gpt2, tmp_path):
    """A folder with a tiny reward model, random weights."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_pretrained(tiny_gpt2, num_labels=1).save_pretrained(tmp_path / "reward")
    AutoTokenizer.from_pretrained(tiny_gpt2).save_pretrained(tmp_path / "reward")
    return str(tmp_path / "reward")


def ranked(recipe, write, rank, name="recipe.yaml", **top):
    """The rows and `stage.json` of a rank stage with this section."""
    stages = {"rankings": {"kind": "rank", "rank": rank, "data": {"train": write("samples.jsonl", SAMPLES)}}}
    loaded = load(recipe(stages, name, **top))
    chain.run(loaded)
    folder = loaded["rankings"].folder
    rows = [json.loads(line) for line in (folder / "rankings.jsonl").read_text().splitlines()]
    return rows, json.loads((folder / "stage.json").read_text())


def test_a_reward_model_ranks_as_it_scores(recipe, write, reward):
    rows, made = ranked(recipe, write, {"judge": reward})
    groups = [[(c, True) for c in s["completions"]] for s in SAMPLES]
    for row, scores in zip(rows, model_scores(reward, SAMPLES, groups), strict=True):
        assert sorted(range(3), key=lambda i: -scores[i]) == sorted(range(3), key=lambda i: row["ranks"][i])
        assert row["labeller"] == "reward" and row["models"] == ["a", "b", "a"]
    assert made["metrics"]["winners"] == 4 and made["metrics"]["judges"]["reward"]["not_ranked"] == 0


def test_people_come_first_and_judges_are_compared_with_them(recipe, write, reward, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    judged = [
        {**SAMPLES[0], "completions": SAMPLES[0]["completions"][::-1], "ranks": [3, 2, 1], "labeller": "ann"},
        {**SAMPLES[1], "ranks": [1, 2, 3], "labeller": "ann"},
        {**SAMPLES[1], "ranks": [3, 2, 1]},
    ]
    with serving() as server:
        lm = {"endpoint": server.url, "model": "org/judge-8b", "concurrency": 1}
        rank = {"judgements": str(tmp_path / "people.jsonl"), "judge": [reward, lm]}
        with pytest.raises(SetupError, match="waiting for people"):
            ranked(recipe, write, rank)
        assert server.asked == []
        write("people.jsonl", judged)
        rows, made = ranked(recipe, write, rank)
    assert [row["labeller"] for row in rows if "labeller" in row] == ["ann", "ann", *["reward"] * 2, *["judge-8b"] * 2]
    assert [row["prompt"][-1] for row in rows] == list("011" + "23" + "23")
    lm_row = rows[-1]
    assert lm_row["ranks"] == [1, 2, 2] and lm_row["tags"] == [[], [], ["irrelevant"]]
    pairs = {tuple(p["labellers"]): p for p in made["metrics"]["agreement"]["pairs"]}
    assert pairs["ann", "judge-8b"]["prompts"] == 2 and pairs["ann", "judge-8b"]["tau"] == pytest.approx(
        0.8165, abs=1e-3
    )
    assert pairs["judge-8b", "people"]["tau"] == pytest.approx(-0.8165, abs=1e-3)
    assert pairs["judge-8b", "reward"]["prompts"] == 4
    assert made["metrics"]["judges"]["judge-8b"]["first_preferred"] == 0.5
    assert made["metrics"]["tagged_irrelevant"] == 2
    assert "judge judge-8b: replies_refused 0" in caplog.text


def test_tools_of_the_samples_stay_with_their_rankings(recipe, write, tmp_path):
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
    given = [{**SAMPLES[0], "tools": tools}, SAMPLES[1]]
    with serving() as server:
        rank = {"judge": {"endpoint": server.url, "model": "m"}}
        stages = {"rankings": {"kind": "rank", "rank": rank, "data": {"train": write("t.jsonl", given)}}}
        loaded = load(recipe(stages))
        chain.run(loaded)
    for name in ("rankings.jsonl", "best.jsonl"):
        rows = [json.loads(line) for line in (loaded["rankings"].folder / name).read_text().splitlines()]
        assert rows[0]["tools"] == tools and not rows[1].get("tools"), name


def test_the_report_shows_how_judges_did(recipe, write, tmp_path):
    from pipelines.report import page

    with serving() as server:
        ranked(recipe, write, {"judge": [{"endpoint": server.url, "model": n, "tags": []} for n in ("one", "two")]})
    text = page.write(tmp_path / "out").read_text()
    assert "first preferred" in text and "one and two" in text


def test_no_key_is_in_anything_that_a_run_leaves(recipe, write, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)
    secret = "planted-key-9876543210"
    monkeypatch.setenv("JUDGE_KEY", secret)
    caplog.set_level(logging.DEBUG)
    failing = lambda h, n, _: n % 2 and (h.reply(500, secret.encode()) or True)
    with serving(failing) as server:
        ranked(recipe, write, {"judge": {"endpoint": server.url, "model": "m", "key_env": "JUDGE_KEY"}})
        assert set(server.keys) == {f"Bearer {secret}"}
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert any(path.name == "judge.jsonl" for path in left)
    assert [path for path in left if secret.encode() in path.read_bytes()] == [] and secret not in caplog.text


def test_a_judge_that_ranks_nothing_is_an_error_with_its_counts(recipe, write):
    with serving(lambda h, *_: h.reply(200, completion("No.")) or True) as server:
        with pytest.raises(SetupError, match='no prompt was ranked.*"replies_unparsed": 8'):
            ranked(recipe, write, {"judge": {"endpoint": server.url, "model": "m"}})


def test_a_language_model_that_runs_here_ranks(recipe, write, tmp_path):
    """One that always writes the same: all that it prefers is a place, so every pair is a tie."""
    constant_model(tmp_path / "constant", '{"ranks": {"A": 1, "B": 2, "C": 3}, "tags": {"A": ["rude"]}}')
    rank = {
        "judge": {"model": str(tmp_path / "constant"), "response_length": 80, "tags": ["rude", "odd"], "name": "me"}
    }
    rows, made = ranked(recipe, write, rank)
    assert [(row["ranks"], row["tags"], row["labeller"]) for row in rows] == [([1, 1, 1], [[], [], []], "me")] * 4
    counts = made["metrics"]["judges"]["me"]
    assert counts["first_preferred"] == counts["orders_disagree"] == counts["pairs_tied"] == 1
    constant_model(tmp_path / "talker", "I like A")
    with pytest.raises(SetupError, match='no prompt was ranked.*"replies_unparsed": 8'):
        ranked(
            recipe, write, {"judge": {"model": str(tmp_path / "talker")}}, "other.yaml", output_dir=str(tmp_path / "b")
        )


def constant_model(folder, text: str):
    """Save a causal model that writes `text` and ends, whatever it reads: the text is one token of its vocabulary."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from pipelines.data.train_tokenizer import train_bpe

    tokenizer = train_bpe(["a b c"] * 9, vocab_size=300)
    tokenizer.add_tokens([text])
    tokenizer.chat_template = chat_template.PLAIN
    it, end = tokenizer.convert_tokens_to_ids(text), tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=4096,
        n_embd=8,
        n_layer=1,
        n_head=1,
        tie_word_embeddings=False,
        eos_token_id=end,
        bos_token_id=end,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "ln_f.weight" not in name:
                weights.zero_()
        model.transformer.wte.weight[:, 0] = 1  # every token leads to the text,
        model.transformer.wte.weight[it] = torch.eye(8)[1]  # and the text to the end
        model.lm_head.weight[it, 0] = model.lm_head.weight[end, 1] = 9
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


WRONG = [
    ({"judge": 5}, "rank.judge"),
    ({"judge": {}}, "who ranks|rank.judge"),
    ({"judge": []}, "who ranks"),
    ({"judge": ""}, "who ranks"),
    ({"judge": [5]}, r"rank.judge\[0\]"),
    ({"judge": "stage:none"}, "names no earlier stage"),
    ({"judge": "./none"}, "no such folder"),
    ({"judge": "{gpt2}"}, "no classifier or reward model"),
    ({"judge": {"model": "./none"}}, "rank.judge.model"),
    ({"judge": {"modle": "x"}}, "did you mean model"),
    ({"judge": {"endpoint": "http://127.0.0.1:1/v1"}}, "which model judges"),
    ({"judge": {"endpoint": "127.0.0.1:1/v1", "model": "m"}}, "must be an address"),
    ({"judge": {"endpoint": "ftp://x/v1", "model": "m"}}, "must be an address"),
    ({"judge": {"endpoint": "http://x/v1?key=1", "model": "m"}}, "must be an address"),
    ({"judge": {"endpoint": "http://me:pw@x/v1", "model": "m"}}, "token or password"),
    ({"judge": {"endpoint": "http://x/v1", "model": "m", "api_key": "k"}}, "holds a token"),
    ({"judge": {"endpoint": "http://x/v1", "model": "m", "key_env": "NOT_SET_ANYWHERE"}}, "no such variable"),
    ({"judge": {"endpoint": "http://x/v1", "model": "stage:none"}}, "knows no stages"),
    ({"judge": {"endpoint": "http://x/v1", "model": "m", "concurrency": 0}}, "at least 1"),
    ({"judge": {"endpoint": "http://x/v1", "model": "m", "timeout": 0}}, "above 0"),
    ({"judge": {"endpoint": "http://x/v1", "model": "m", "requests_per_minute": -1}}, "above 0"),
    ({"judge": {"endpoint": "http://x/v1", "model": "m", "response_length": 0}}, "at least 1"),
    ({"judge": {"endpoint": "http://x/v1", "model": "m", "tags": "rude"}}, "rank.judge.tags"),
    ({"judge": {"endpoint": "http://x/v1", "model": "m", "tags": [" "]}}, "1 to 64 characters"),
    ({"judge": {"endpoint": "http://x/v1", "model": "m", "parameters": {"n": 2}}}, "set by the stage"),
    ({"judge": {"model": "{gpt2}", "concurrency": 2}}, "goes with an endpoint"),
    ({"judge": [{"model": "{gpt2}"}, {"model": "{gpt2}"}]}, "another `name`"),
    ({"judge": {"model": "{gpt2}"}, "labeller": "json:loads"}, "one of the two"),
]


@pytest.mark.parametrize("rank, words", WRONG, ids=[str(rank["judge"])[:60] for rank, _ in WRONG])
def test_wrong_judges_are_found_before_anything_runs(rank, words, recipe, write, tiny_gpt2):
    rank = json.loads(json.dumps(rank).replace("{gpt2}", str(tiny_gpt2)))
    stages = {"rankings": {"kind": "rank", "rank": rank, "data": {"train": write("s.jsonl", SAMPLES)}}}
    with pytest.raises(RecipeError) as error:
        load(recipe(stages))
    assert re.search(words, str(error.value)), error.value


def test_a_key_in_a_recipe_is_refused_and_not_shown(recipe, write):
    judge = {
        "endpoint": "http://x/v1",
        "model": "m",
        "api_key": "planted-key-123",
        "parameters": {"password": "planted-2"},
    }
    stages = {"rankings": {"kind": "rank", "rank": {"judge": judge}, "data": {"train": write("s.jsonl", SAMPLES)}}}
    with pytest.raises(RecipeError) as error:
        load(recipe(stages))
    assert "rank.judge.api_key" in str(error.value) and "planted" not in str(error.value)
