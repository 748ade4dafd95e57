"""Several reward models as one: `reward.combine`, and a policy of DPO as a reward model and as a judge."""

import json

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from tiny_words import WORDS

from pipelines import files
from pipelines.chain import chain
from pipelines.errors import SetupError
from pipelines.evaluation.judges import judge
from pipelines.generation.implicit_reward import load_reward
from pipelines.models import chat_template
from pipelines.models.config import ModelSection
from pipelines.planning.job import describe
from pipelines.ppo.checks import check_combine
from pipelines.ppo.rewards import combined, disagreement
from pipelines.ppo.rollouts import RewardScorer
from pipelines.recipe.problems import RecipeError
from pipelines.recipe.recipe import load

PROMPTS = [{"prompt": f"what colour is the {w} {i}"} for i in range(8) for w in ("cat", "dog", "bird")]
ARGS = {"global_batch_size": 16, "max_steps": 2, "response_length": 8, "learning_rate": 1e-3, "allow_no_eos": True}


def scorer(weights, models, combine="sum", coefficient=0.0):
    """A scorer of `models` reward models and functions without any of them being there, for `total`."""
    one = RewardScorer.__new__(RewardScorer)
    one.functions = [torch.nn.Linear(1, 1) for _ in range(models)] + [len] * (len(weights) - models)
    one.weights, one.combine, one.uncertainty_coef = weights, combine, coefficient
    return one


def test_combinations_are_those_of_their_definition():
    scores = torch.tensor([[1.0, 4.0, 1.0], [2.0, 2.0, 2.0], [-3.0, 0.0, 3.0]])
    deviation = torch.tensor([2**0.5, 0.0, 6**0.5])
    torch.testing.assert_close(disagreement(scores), deviation)
    assert combined(scores, "mean").tolist() == [2.0, 2.0, 0.0]
    assert combined(scores, "min").tolist() == [1.0, 2.0, -3.0]
    torch.testing.assert_close(combined(scores, "uncertainty", 0.5), torch.tensor([2.0, 2.0, 0.0]) - 0.5 * deviation)
    torch.testing.assert_close(combined(scores, "uncertainty", 0.0), combined(scores, "mean"))


def test_models_are_combined_and_functions_are_added():
    """Weights scale a model's score before; a model of weight 0 is only watched."""
    rewards = torch.tensor([[1.0, 3.0, 99.0, 10.0], [2.0, 1.0, -99.0, 20.0]])
    weights, applies = [1.0, 2.0, 0.0, 0.1], torch.ones(2, 4, dtype=torch.bool)
    total = lambda *how: scorer(weights, 3, *how).total(rewards, applies)
    torch.testing.assert_close(total("min"), torch.tensor([1.0 + 1.0, 2.0 + 2.0]))
    torch.testing.assert_close(total("mean"), torch.tensor([3.5 + 1.0, 2.0 + 2.0]))
    torch.testing.assert_close(total("uncertainty", 2.0), torch.tensor([3.5 - 2 * 2.5 + 1.0, 2.0 + 2.0]))
    assert torch.equal(total(), torch.where(applies, rewards, 0.0) @ torch.tensor(weights))
    torch.testing.assert_close(scorer(weights, 3, "min").disagreement(rewards), torch.tensor([2.5, 0.0]))
    assert scorer(weights, 3).disagreement(rewards) is None
    applies[0, 3] = False  # a function that gave None
    torch.testing.assert_close(total("min"), torch.tensor([1.0, 4.0]))


def test_one_model_cannot_be_combined():
    check_combine("sum", [])
    check_combine("min", [1.0, 0.5, 0.0])
    for weights in ([], [1.0], [1.0, 0.0]):
        with pytest.raises(SetupError, match="min is for several reward models, and"):
            check_combine("min", weights)
    with pytest.raises(SetupError, match="did you mean"):
        check_combine("means", [1.0, 1.0])


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_gpt2):
    """A folder with stages of one chain: two reward models, and a policy of dpo; and its recipe's stages."""
    folder = tmp_path_factory.mktemp("made")

    def write(name, rows):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder / name)

    pairs = [{**p, "chosen": f"it is red {w}", "rejected": f"it is blue {w}"} for p, w in zip(PROMPTS, WORDS * 9)]
    args = {"global_batch_size": 8, "num_train_epochs": 2, "max_length": 64, "learning_rate": 1e-3}
    model = {"model_name_or_path": str(tiny_gpt2), "chat_template": "plain"}
    one = {"kind": "reward", "model": model, "args": args}
    stages = {
        "first": {**one, "data": {"train": write("a.jsonl", pairs[:16])}},
        "second": {**one, "data": {"train": write("b.jsonl", pairs[8:])}},
        "sft": {
            **one,
            "kind": "sft",
            "data": {"train": write("s.jsonl", [{**p, "completion": "it is"} for p in PROMPTS])},
        },
        "preferred": {
            "kind": "dpo",
            "model": {"model_name_or_path": "stage:sft"},
            "data": {"train": write("c.jsonl", pairs)},
            "args": {**args, "beta": 0.5},
        },
        "policy": {
            "kind": "ppo",
            "model": model,
            "reward": {"min_accuracy": 0.0},
            "data": {"train": write("p.jsonl", PROMPTS), "validation": 0.3},
            "args": {**ARGS, "logging_steps": 1, "eval_steps": 1},
        },
    }
    recipe = folder / "recipe.yaml"

    def write_recipe(**reward):
        stages["policy"]["reward"] = {"min_accuracy": 0.0, **reward}
        recipe.write_text(json.dumps({"stages": stages, "output_dir": str(folder / "run"), "seed": 1}))
        return str(recipe)

    chain.run(load(write_recipe(models=["stage:first", "stage:second"], combine="uncertainty")))
    return folder / "run", write_recipe


def logged(run):
    return [json.loads(line) for line in open(run / "policy" / "history.jsonl")]


def test_disagreement_is_logged_and_the_score_is_the_combined_one(made):
    run, _ = made
    lines = logged(run)
    assert all(line["objective/disagreement"] > 0 for line in lines if "objective/scores" in line)
    (held_out,) = [line for line in lines if "eval_score" in line][-1:]
    mean = (held_out["eval_reward/first"] + held_out["eval_reward/second"]) / 2
    assert held_out["eval_score"] == pytest.approx(mean - held_out["eval_disagreement"], abs=1e-4)


@pytest.mark.parametrize(
    "reward, message",
    [
        (
            {"models": ["stage:first"], "combine": "min"},
            "(?s)reward.combine.*is for several reward models, and 1 counts",
        ),
        ({"models": ["stage:first", "stage:second"], "combine": "min", "weights": [1, 0]}, "and 1 counts"),
        ({"models": ["stage:first", "stage:second"], "weights": [0, 0]}, "(?s)reward.weights.*other than 0"),
        ({"models": ["stage:first", "stage:second"], "weights": [1, float("nan")]}, "reward.weights"),
        ({"models": ["stage:first", "stage:first"], "combine": "mean"}, "names a model twice"),
        ({"models": ["stage:first", "stage:second"], "combine": "median"}, "(?s)reward.combine.*sum, mean, min"),
        ({"models": ["stage:first", "stage:second"], "uncertainty_coef": 2.0}, "goes with combine: uncertainty"),
        (
            {"models": ["stage:first", "stage:second"], "combine": "uncertainty", "uncertainty_coef": -1.0},
            "(?s)uncertainty_coef.*must be at least 0",
        ),
        ({"models": ["stage:preferred"], "critic": "stage:preferred"}, "(?s)reward.critic.*this stage is of kind dpo"),
        ({"models": ["stage:preferred"], "tag_penalties": {"rude": 1.0}}, "does not learn this tag"),
    ],
)
def test_contradictions_are_found_by_check(made, reward, message):
    with pytest.raises(RecipeError, match=message):
        load(made[1](**reward))


def by_hand(run, prompt, answer, ended=True):
    """beta (log pi - log pi_ref), by the models' own logits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, total = AutoTokenizer.from_pretrained(run / "preferred"), 0.0
    before, ids = chat_template.encode_answer(tokenizer, prompt, answer)
    ids = ids if ended else ids[:-1]
    for folder, sign in ((run / "preferred", 1), (run / "sft", -1)):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            logits = model(torch.tensor([before + ids])).logits[0, len(before) - 1 : -1].log_softmax(-1)
        total += sign * logits.gather(1, torch.tensor(ids)[:, None]).sum().item()
    return 0.5 * total


def test_a_policy_of_dpo_is_a_reward_model_and_a_judge(made):
    """Its score is the implicit reward: in PPO and in evaluate."""
    run, recipe = made
    chain.run(load(recipe(models=["stage:preferred"])), redo=["policy"])
    assert any("eval_reward/preferred" in line for line in logged(run))

    model, tokenizer = load_reward(ModelSection(model_name_or_path=str(run / "preferred")))
    ends = [tokenizer.eos_token_id]
    scored = RewardScorer([model], [1.0], [tokenizer], tokenizer, ends, 2, Accelerator(cpu=True))
    texts, rows = ["it is red", "it is blue and not red", "no"], list(range(3))
    prompts = [PROMPTS[i]["prompt"] for i in rows]
    ids = [chat_template.encode_answer(tokenizer, *pair) for pair in zip(prompts, texts)]
    ids[1] = ids[1][0], ids[1][1][:-1]  # it broke off
    found = scored(Dataset.from_list(PROMPTS), rows, ids)
    expected = [by_hand(run, p, t, i != 1) for i, (p, t) in enumerate(zip(prompts, texts))]
    assert [score for (score,) in found] == pytest.approx(expected, abs=1e-3)

    answers = {"m": [[("it is red", True), ("it is blue", False)], [("the cat", True)]]}
    prompts = ["what colour is the dog 1", "what is it"]
    rows = [{"prompt": prompt} for prompt in prompts]
    scores = judge(str(run / "preferred"), rows, answers)["m"]["score"]
    ours = [by_hand(run, prompts[0], t, e) for t, e in answers["m"][0]]
    assert scores[0] == pytest.approx(sum(ours) / 2, abs=1e-4)
    assert scores[1] == pytest.approx(by_hand(run, prompts[1], "the cat"), abs=1e-4)


def test_a_reference_that_is_gone_or_lacks_tokens_is_named(made, tmp_path, tokenizer, tiny_gpt2):
    import shutil

    for name, start, message in (
        ("gone", "stage:before", "before is gone"),
        ("nowhere", files.HERE + "/x", "does not tell where that lies"),
        ("other", str(tiny_gpt2), "the stage gave its model tokens that .* does not have"),
    ):
        folder = tmp_path / name
        shutil.copytree(made[0] / "preferred", folder)
        record = json.loads((folder / "stage.json").read_text())
        record["record"]["sections"]["model"]["model_name_or_path"] = start
        del record["files"]  # checksums: the tokenizer is changed below
        (folder / "stage.json").write_text(json.dumps(record))
        if name == "other":
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(folder)
            tokenizer.add_tokens([f"new{i}" for i in range(500)])
            tokenizer.save_pretrained(folder)
        with pytest.raises(SetupError, match=message):
            load_reward(ModelSection(model_name_or_path=str(folder)))


def test_only_a_record_makes_a_language_model_a_reward(made, tiny_gpt2):
    run, recipe = made
    load(recipe(models=[str(run / "preferred")]))
    with pytest.raises(RecipeError, match=r"(?s)reward.models\[0\].*is no classifier or reward model"):
        load(recipe(models=[str(tiny_gpt2)]))


def test_plan_counts_the_reference_of_a_policy_of_dpo(made):
    models = describe(load(made[1](models=["stage:first", "stage:preferred"]))["policy"]).models
    assert {"critic", "reward 0", "reward 1", "reward 1, its reference"} <= models.keys() and len(models) == 5
