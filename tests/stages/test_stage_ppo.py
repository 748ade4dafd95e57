"""The ppo stage: what it refuses, what it improves, and that its folders are plain models."""

import json

import pytest
from tiny_words import WORDS

from pipelines import ranges
from pipelines.chain import chain
from pipelines.chain.record import differences
from pipelines.data.train_tokenizer import train_bpe
from pipelines.errors import ModelError, TemplateError
from pipelines.generation.logprobs import sequence_scores
from pipelines.models import chat_template
from pipelines.models.config import ModelSection
from pipelines.models.scorers import load_scorer
from pipelines.models.tag_heads import TagPenalty
from pipelines.ppo.config import PPOConfig
from pipelines.ppo.diagnosis import CHECKS
from pipelines.recipe.problems import RecipeError
from pipelines.recipe.recipe import load
from pipelines.stages.ppo import _critic_start, _gate, _same_template

PROMPTS = [{"prompt": f"what colour is the {w} {i}"} for i in range(8) for w in ("cat", "dog", "bird")]
ARGS = {"global_batch_size": 16, "max_steps": 2, "response_length": 8, "learning_rate": 1e-3, "allow_no_eos": True}


def count_of_red(prompts, completions, **columns):
    """A reward function: how often an answer says red."""
    return [float(c.count("red")) for c in completions]


@pytest.fixture
def chain_of(recipe, write, tiny_gpt2):
    """`chain_of(min_accuracy)`: sft, reward and ppo on a few rows."""
    rows = [{"prompt": p["prompt"], "completion": "it is red"} for p in PROMPTS]
    pairs = [{**p, "chosen": "it is red", "rejected": "it is blue"} for p in PROMPTS]

    def chain_of_(**reward):
        args = {"global_batch_size": 8, "num_train_epochs": 1, "max_length": 64}
        return recipe(
            {
                "sft": {
                    "kind": "sft",
                    "model": {"model_name_or_path": str(tiny_gpt2)},
                    "data": {"train": write("s.jsonl", rows)},
                    "args": args,
                },
                "reward": {
                    "kind": "reward",
                    "model": {"model_name_or_path": "stage:sft"},
                    "data": {"train": write("r.jsonl", pairs), "validation": 0.3},
                    "args": args,
                },
                "policy": {
                    "kind": "ppo",
                    "model": {"model_name_or_path": "stage:sft"},
                    "reward": {"models": ["stage:reward"], "min_accuracy": 0.0, **reward},
                    "data": {"train": write("p.jsonl", PROMPTS)},
                    "args": ARGS,
                },
            }
        )

    return chain_of_


def test_the_whole_flow_ends_in_plain_model_folders(chain_of):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    loaded = load(chain_of())
    chain.run(loaded)
    folder = loaded["policy"].folder
    AutoModelForCausalLM.from_pretrained(folder)
    critic = AutoModelForSequenceClassification.from_pretrained(folder / "critic")
    assert critic.config.num_labels == 1 and AutoTokenizer.from_pretrained(folder).chat_template
    before, after = (load_file(loaded[s].folder / "model.safetensors") for s in ("sft", "policy"))
    assert before.keys() == after.keys() and any(not torch.equal(before[k], after[k]) for k in before)
    samples = [json.loads(line) for line in open(folder / "samples.jsonl")]
    assert samples and {"prompt", "completion", "score"} <= samples[0].keys()


def test_without_a_critic_none_is_loaded_or_left(chain_of, caplog):
    path, own = chain_of(critic="none"), "stages.policy.args"
    with pytest.raises(RecipeError, match="gae .the default. trains a critic"):
        load(path)
    loaded = load(path, [f"{own}.advantage=grpo", f"{own}.num_generations=4", f"{own}.logging_steps=1"])
    chain.run(loaded)
    folder = loaded["policy"].folder
    assert (folder / "model.safetensors").is_file() and not (folder / "critic").exists()
    final = json.loads((folder / "stage.json").read_text())
    assert final["args"]["num_generations"] == 4 and final["args"]["kl_placement"] == "loss"
    history = [json.loads(line) for line in open(folder / "history.jsonl")]
    assert "objective/scores_alike" in next(entry for entry in history if "objective/kl" in entry)
    path = chain_of(critic="stage:reward")
    with pytest.raises(RecipeError, match="(?s)reward.critic.*advantage: rloo has no critic"):
        load(path, [f"{own}.advantage=rloo"])


def test_a_reward_model_that_cannot_judge_is_refused(chain_of, monkeypatch):
    monkeypatch.setitem(ranges.RANGES, "min_accuracy", ranges.ANY)  # more than any model can have
    with pytest.raises(ModelError, match="held-out accuracy of .* below reward.min_accuracy 1.01"):
        chain.run(load(chain_of(min_accuracy=1.01)))


def test_an_accuracy_that_is_not_on_record_is_said(tmp_path, caplog):

    assert _gate(str(tmp_path), 0.6) is None
    assert "no held-out accuracy on record" in caplog.text
    (tmp_path / "stage.json").write_text(json.dumps({"metrics": {"accuracy": 0.7}}))
    assert _gate(str(tmp_path), 0.6) == 0.7


def test_a_reward_model_with_a_fresh_head_is_refused(tiny_gpt2):

    with pytest.raises(ModelError, match=r"score\.weight"):
        load_scorer(ModelSection(model_name_or_path=str(tiny_gpt2)))


def test_policy_and_reward_model_must_read_the_same(tokenizer):
    import copy

    def with_template(name, base=tokenizer):
        out = copy.deepcopy(base)
        out.chat_template = name and (chat_template.TEMPLATES / f"{name}.jinja").read_text()
        if name == "chatml":
            out.eos_token = "<|im_end|>"
            out.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        return out

    plain, chatml, none = with_template("plain"), with_template("chatml"), with_template(None)
    _same_template(plain, copy.deepcopy(plain), "rm")
    _same_template(plain, none, "rm")  # plain text for both
    other = copy.deepcopy(chatml)
    other.chat_template = chatml.chat_template.replace("<|im_start|>", "<|im_start|>the ")
    with pytest.raises(TemplateError, match="reward.allow_other_template"):
        _same_template(chatml, other, "rm")
    with pytest.raises(TemplateError, match="has no chat template"):
        _same_template(chatml, none, "rm")
    _same_template(chatml, with_template("plain", train_bpe(["other words"] * 20, vocab_size=300)), "rm")


def test_a_classifier_is_the_reward_and_pretraining_text_is_mixed_in(recipe, write, tiny_gpt2):
    """Also: the head on the policy's trunk, through the chain."""
    labelled = [
        {"text": f"the {w} is {c} {i}", "label": int(c == "red")}
        for i in range(5)
        for w in "cat dog bird".split()
        for c in ("red", "blue")
    ]
    texts = [{"text": "the cat is red and the dog is blue"}] * 20
    small = {"global_batch_size": 8, "num_train_epochs": 1, "max_length": 32}
    policy = {
        "kind": "ppo",
        "model": {"model_name_or_path": str(tiny_gpt2), "chat_template": "plain"},
        "reward": {"models": ["stage:colour"], "label": "red", "critic": "shared", "min_accuracy": 0.0},
        "data": {"train": write("p.jsonl", PROMPTS), "ptx": write("t.jsonl", texts)},
        "args": {**ARGS, "ptx_coef": 1.0, "ptx_length": 16, "max_steps": 1, "logging_steps": 1},
    }
    stages = {
        "colour": {
            "kind": "classify",
            "model": {"model_name_or_path": str(tiny_gpt2)},
            "task": {"labels": ["other", "red"]},
            "data": {"train": write("l.jsonl", labelled), "validation": 0.3},
            "args": small,
        },
        "policy": policy,
    }
    loaded = load(recipe(stages))
    chain.run(loaded)
    record = json.loads((loaded["policy"].folder / "stage.json").read_text())
    (accuracy,) = record["rows"]["reward_accuracy"].values()
    assert 0 <= accuracy <= 1 and record["rows"]["ptx"]["context"] == 16
    assert "t.jsonl" in " ".join(record["record"]["data"]) and isinstance(record["metrics"]["diagnosis"], list)
    assert any("loss/ptx_avg" in line for line in open(loaded["policy"].folder / "history.jsonl"))
    assert [p.name for p in (loaded["policy"].folder / "critic").iterdir()] == ["value_head.safetensors"]

    other = json.loads(json.dumps(record["record"]))
    other["sections"]["args"]["diagnosis"] = "stop"  # such a run may go on with another setting of it
    assert differences(record["record"], other) == []
    del policy["reward"]["label"], policy["args"]["ptx_coef"]
    with pytest.raises(RecipeError, match="(?s)name the label whose log-odds.*PPO-ptx needs both"):
        load(recipe(stages))


@pytest.mark.parametrize("pairs", [False, True])
def test_an_encoder_is_the_reward_and_the_judge(pairs, recipe, write, tiny_gpt2, tmp_path, caplog):
    """BERT, whose tokenizer has no EOS: PPO's score of an answer and evaluate's are the log-odds of the text as trained
    on.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"abcdefghijklmnopqrstuvwxyz"]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.5,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(tmp_path / "bert")
    rows = [{"text": f"{w} is", "text_pair": c, "label": c} for w in ("cat", "dog") for c in ("red", "blue", "green")]
    rows = rows if pairs else [{"text": f"{r['text']} {r['text_pair']}", "label": r["label"]} for r in rows]
    stages = {
        "colour": {
            "kind": "classify",
            "model": {"model_name_or_path": str(tmp_path / "bert")},
            "data": {"train": write("l.jsonl", rows)},
            "args": {"global_batch_size": 6, "max_steps": 2, "max_length": 12},
        },
        "policy": {
            "kind": "ppo",
            "model": {"model_name_or_path": str(tiny_gpt2), "chat_template": "plain"},
            "reward": {"models": ["stage:colour"], "label": "red"},
            "data": {"train": write("p.jsonl", PROMPTS), "validation": write("v.jsonl", PROMPTS[:6])},
            "args": ARGS,
        },
        "scores": {
            "kind": "evaluate",
            "evaluate": {
                "models": ["stage:policy"],
                "prompts": write("v.jsonl", PROMPTS[:6]),
                "judge": "stage:colour",
                "label": "red",
                "response_length": 8,
            },
        },
    }
    loaded = load(recipe(stages))
    chain.run(loaded)
    folder = loaded["colour"].folder
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)

    def score(prompt, answer):
        texts = (prompt, answer) if pairs else (prompt + answer,)
        batch = tokenizer(*texts, truncation=True, max_length=12, return_tensors="pt")
        with torch.no_grad():
            p = model.eval()(**batch).logits[0].double().softmax(-1)[model.config.label2id["red"]]
        return (p / (1 - p)).log().item()

    samples = [json.loads(line) for line in open(loaded["policy"].folder / "samples.jsonl")]
    last = [row for row in samples if row["split"] == "eval" and row["step"] == 2][-6:]
    assert len({row["score"] for row in last}) > 1 and all("first" in row for row in last)
    for row in last:
        assert row["score"] == pytest.approx(score(row["prompt"], row["completion"]), abs=1e-3)
    assert "the critic starts from the policy's own model" in caplog.text
    value = json.loads((loaded["scores"].folder / "values.json").read_text())["policy"]["score"]
    assert len(value) == 6 and all(-10 < v < 10 for v in value)
    for key, message in (("policy.reward", "name the label whose log-odds"), ("scores.evaluate", "name the label")):
        with pytest.raises(RecipeError, match=message):
            load(recipe(stages), [f"stages.{key}.label=null"])
    with pytest.raises(RecipeError, match="has no such label, but red, blue"):
        load(recipe(stages), ["stages.colour.task.labels=[red, blue]", "stages.policy.reward.label=purple"])


def test_a_reward_model_with_another_vocabulary_does_not_become_the_critic(tmp_path, tokenizer, tiny_gpt2, caplog):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tiny_gpt2, num_labels=1)
    section, other = ModelSection(model_name_or_path="policy"), train_bpe(["quite other words"] * 20, vocab_size=300)
    assert _critic_start([model], [tokenizer], ["reward"], tokenizer, section) == "reward"
    assert _critic_start([model], [other], ["reward"], tokenizer, section) == "policy"
    assert "its vocabulary is not the policy's" in caplog.text
    assert _critic_start([], [], [], tokenizer, section) == "policy"


def test_reward_functions_alone_are_enough(recipe, write, tiny_gpt2):
    stage = {
        "kind": "ppo",
        "model": {"model_name_or_path": str(tiny_gpt2), "chat_template": "plain"},
        "reward": {"functions": ["tests.stages.test_stage_ppo:count_of_red"]},
        "data": {"train": write("p.jsonl", PROMPTS)},
        "args": {**ARGS, "allow_constant_scores": True},
    }
    loaded = load(recipe({"policy": stage}))
    chain.run(loaded)
    assert (loaded["policy"].folder / "model.safetensors").exists()


def test_a_policy_without_template_must_say_which(recipe, write, tiny_gpt2):
    stage = {
        "kind": "ppo",
        "model": {"model_name_or_path": str(tiny_gpt2)},
        "reward": {"functions": ["tests.stages.test_stage_ppo:count_of_red"]},
        "data": {"train": write("p.jsonl", PROMPTS)},
        "args": ARGS,
    }
    with pytest.raises(RecipeError, match="model.chat_template: plain"):
        load(recipe({"policy": stage}))


def test_what_cannot_work_is_found_before_it_starts(recipe, write, tiny_gpt2):
    data = {"train": write("p.jsonl", PROMPTS)}
    rows = {"train": write("s.jsonl", [{"prompt": "a", "completion": "b"}])}
    stages = {
        "sft": {"kind": "sft", "model": {"model_name_or_path": str(tiny_gpt2)}, "data": rows},
        "a": {"kind": "ppo", "model": {"model_name_or_path": "stage:sft"}, "data": data},
        "b": {
            "kind": "ppo",
            "model": {"model_name_or_path": "stage:sft"},
            "reward": {"models": ["stage:sft"], "weights": [1, 2]},
            "data": data,
        },
        "c": {
            "kind": "ppo",
            "model": {"model_name_or_path": "stage:sft"},
            "reward": {"functions": ["length"]},
            "data": data,
            "args": {"kl_estimator": "k4"},
        },
    }
    with pytest.raises(RecipeError) as error:
        load(recipe(stages))
    text = str(error.value)
    for words in [
        "what is an answer worth",
        "must be a reward (or classify, dpo",
        "needs 1 numbers",
        "package.module:function",
        "args.kl_estimator",
    ]:
        assert words in text


def test_tags_are_penalties(chain_of, tmp_path):
    """The score of an answer is the reward model's less penalty times the probability of the tag, and check
    knows tags.
    """
    import torch
    from safetensors.torch import load_file

    path = chain_of(tag_penalties={"red": 0.5})
    with pytest.raises(RecipeError, match="does not learn this tag"):
        load(path)
    rows = [{**p, "completions": ["it is red", "it is blue"], "ranks": [1, 2], "tags": [["red"], []]} for p in PROMPTS]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    loaded = load(path, ["stages.reward.args.tags=[red]"])
    chain.run(loaded)
    folder = loaded["reward"].folder
    plain, judge = (load_scorer(ModelSection(model_name_or_path=str(folder)))[0].eval() for _ in range(2))
    judge.tag_penalty = TagPenalty(folder, {"red": 0.5})
    ids = [[5, 6, 7], [8, 9]]
    head = load_file(folder / "tags.safetensors")["weight"]
    scores, penalised = (sequence_scores(m, ids, False, "cpu") for m in (plain, judge))
    states = [plain.base_model(torch.tensor([i])).last_hidden_state[0, -1] for i in ids]
    taken = [0.5 * torch.sigmoid(head[0] @ s).item() for s in states]
    assert (scores - penalised).tolist() == pytest.approx(taken, abs=1e-6) and max(taken) > 0.01
    assert (loaded["policy"].folder / "model.safetensors").exists()


def test_the_guide_explains_every_setting_and_every_diagnosis():
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs" / "ppo.md").read_text()
    own = [name for name in PPOConfig.__annotations__ if not name.startswith("allow_")]
    assert [name for name in own if f"`{name}`" not in text and f"`{name}:" not in text] == []
    assert [check.__name__ for check, _ in CHECKS if check.__name__.replace("_", " ") not in text] == []
