"""The ppo stage: what it refuses, what it improves, and that its folders are plain models."""

import json

import pytest

from pipelines import chain
from pipelines import recipe as recipes
from pipelines.chat import TemplateError
from pipelines.models import ModelError
from pipelines.recipe import RecipeError

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
                "sft": {"kind": "sft", "model": {"model_name_or_path": str(tiny_gpt2)}, "data": {"train": write("s.jsonl", rows)}, "args": args},
                "reward": {"kind": "reward", "model": {"model_name_or_path": "stage:sft"}, "data": {"train": write("r.jsonl", pairs), "validation": 0.3}, "args": args},
                "policy": {"kind": "ppo", "model": {"model_name_or_path": "stage:sft"}, "reward": {"models": ["stage:reward"], "min_accuracy": 0.0, **reward}, "data": {"train": write("p.jsonl", PROMPTS)}, "args": ARGS},
            }
        )  # fmt: skip

    return chain_of_


def test_the_whole_flow_ends_in_plain_model_folders(chain_of):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    loaded = recipes.load(chain_of())
    chain.run(loaded)
    folder = loaded["policy"].folder
    AutoModelForCausalLM.from_pretrained(folder)
    critic = AutoModelForSequenceClassification.from_pretrained(folder / "critic")
    assert critic.config.num_labels == 1 and AutoTokenizer.from_pretrained(folder).chat_template
    before, after = (load_file(loaded[s].folder / "model.safetensors") for s in ("sft", "policy"))
    assert before.keys() == after.keys() and any(not torch.equal(before[k], after[k]) for k in before)
    samples = [json.loads(line) for line in open(folder / "samples.jsonl")]
    assert samples and {"prompt", "completion", "score"} <= samples[0].keys()


def test_a_reward_model_that_cannot_judge_is_refused(chain_of):
    with pytest.raises(ModelError, match="held-out accuracy of .* below reward.min_accuracy 1.01"):
        chain.run(recipes.load(chain_of(min_accuracy=1.01)))


def test_reward_functions_alone_are_enough(recipe, write, tiny_gpt2):
    stage = {
        "kind": "ppo",
        "model": {"model_name_or_path": str(tiny_gpt2), "chat_template": "plain"},
        "reward": {"functions": ["tests.test_stage_ppo:count_of_red"]},
        "data": {"train": write("p.jsonl", PROMPTS)},
        "args": {**ARGS, "allow_constant_scores": True},
    }
    loaded = recipes.load(recipe({"policy": stage}))
    chain.run(loaded)
    assert (loaded["policy"].folder / "model.safetensors").exists()


def test_a_policy_without_template_must_say_which(recipe, write, tiny_gpt2):
    stage = {
        "kind": "ppo",
        "model": {"model_name_or_path": str(tiny_gpt2)},
        "reward": {"functions": ["tests.test_stage_ppo:count_of_red"]},
        "data": {"train": write("p.jsonl", PROMPTS)},
        "args": ARGS,
    }
    with pytest.raises(TemplateError, match="model.chat_template: plain"):
        chain.run(recipes.load(recipe({"policy": stage})))


def test_what_cannot_work_is_found_before_it_starts(recipe, write, tiny_gpt2):
    data = {"train": write("p.jsonl", PROMPTS)}
    rows = {"train": write("s.jsonl", [{"prompt": "a", "completion": "b"}])}
    stages = {
        "sft": {"kind": "sft", "model": {"model_name_or_path": str(tiny_gpt2)}, "data": rows},
        "a": {"kind": "ppo", "model": {"model_name_or_path": "stage:sft"}, "data": data},
        "b": {"kind": "ppo", "model": {"model_name_or_path": "stage:sft"}, "reward": {"models": ["stage:sft"], "weights": [1, 2]}, "data": data},
        "c": {"kind": "ppo", "model": {"model_name_or_path": "stage:sft"}, "reward": {"functions": ["length"]}, "data": data, "args": {"kl_estimator": "k4"}},
    }  # fmt: skip
    with pytest.raises(RecipeError) as error:
        recipes.load(recipe(stages))
    text = str(error.value)
    for words in ["what is an answer worth", "must be a reward stage", "needs 1 numbers", "package.module:function", "args.kl_estimator"]:  # fmt: skip
        assert words in text


def test_tags_are_penalties(chain_of, tmp_path):
    """The score of an answer is the reward model's less penalty times the probability of the tag, and check knows tags."""
    import torch
    from safetensors.torch import load_file

    from pipelines.ppo.forward import sequence_scores
    from pipelines.sections import ModelSection
    from pipelines.stages.ppo import scorer
    from pipelines.tag_heads import TagPenalty

    path = chain_of(tag_penalties={"red": 0.5})
    with pytest.raises(RecipeError, match="does not learn this tag"):
        recipes.load(path)
    rows = [{**p, "completions": ["it is red", "it is blue"], "ranks": [1, 2], "tags": [["red"], []]} for p in PROMPTS]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    loaded = recipes.load(path, ["stages.reward.args.tags=[red]"])
    chain.run(loaded)
    folder = loaded["reward"].folder
    plain, judge = (scorer(str(folder), ModelSection(model_name_or_path=str(folder))).eval() for _ in range(2))
    judge.tag_penalty = TagPenalty(folder, {"red": 0.5})
    ids = [[5, 6, 7], [8, 9]]
    head = load_file(folder / "tags.safetensors")["weight"]
    scores, penalised = (sequence_scores(m, ids, False, "cpu") for m in (plain, judge))
    states = [plain.base_model(torch.tensor([i])).last_hidden_state[0, -1] for i in ids]
    taken = [0.5 * torch.sigmoid(head[0] @ s).item() for s in states]
    assert (scores - penalised).tolist() == pytest.approx(taken, abs=1e-6) and max(taken) > 0.01
    assert (loaded["policy"].folder / "model.safetensors").exists()
