"""RLOO, GRPO and REINFORCE in the PPO trainer: no critic anywhere, groups of answers, and all that PPO has."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_ppo_trainer import EOS, StopAt, assert_same_weights, count_goal, gpt2, make, prompts, text, weights_of
from transformers import GPT2LMHeadModel

from pipelines.errors import SetupError
from pipelines.generation.decode import generate
from pipelines.ppo import algorithm, diagnosis
from pipelines.ppo import trainer as trainer_module
from pipelines.ppo.config import METHODS, PPOConfig

WITHOUT = ("rloo", "grpo", "reinforce")
GROUPS = {"rloo": 4, "grpo": 4, "reinforce": 1}


def without(folder, method, seed=0, **settings):
    """The trainer of test_ppo_trainer without a critic."""
    settings = {"advantage": method, "num_generations": GROUPS[method], **settings}
    return make(folder, models=(settings.pop("policy", None) or gpt2(seed=seed), None), **settings)


@pytest.mark.parametrize("method", WITHOUT)
def test_a_bandit_like_task_is_solved_without_a_critic(tmp_path, method):
    trainer = without(
        tmp_path,
        method,
        max_steps=16,
        per_device_train_batch_size=64,
        learning_rate=8e-3,
        num_ppo_epochs=4,
        kl_coef=0.01,
        response_length=4,
        allow_no_eos=True,
    )
    trainer.train()
    history = [row for row in trainer.state.log_history if "objective/scores" in row]
    assert history[0]["objective/scores"] < 0.1 and history[-1]["objective/scores"] > 0.8
    assert trainer.critic is None and not any(name.startswith("critic") for name in weights_of(trainer))
    assert ("objective/scores_alike" in history[0]) == (GROUPS[method] > 1)
    assert all(math.isfinite(value) for row in history for value in row.values() if isinstance(value, float))
    assert history[0]["val/first_ratio_rms"] < 1e-4


@pytest.mark.parametrize("method", WITHOUT)
def test_resume_is_bit_identical_and_no_critic_is_saved(tmp_path, method):
    settings = dict(
        max_steps=6,
        save_strategy="steps",
        save_steps=3,
        kl_target=0.01,
        kl_horizon=100,
        normalize_scores=True,
        missing_eos_penalty=0.1,
        ptx=text(),
        ptx_coef=0.1,
        per_device_train_batch_size=24,  # epochs of 64 prompts end inside a batch
        num_ppo_epochs=2,
    )
    whole = without(tmp_path / "whole", method, **settings)
    whole.train()
    without(tmp_path / "parts", method, callbacks=[StopAt(2)], **settings).train()
    resumed = without(tmp_path / "parts", method, seed=8, **settings)
    resumed.ref_model.load_state_dict(whole.ref_model.state_dict())  # the caller gives the SFT model again
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert_same_weights(weights_of(resumed), weights_of(whole))
    for one, other in zip(resumed.state.log_history, whole.state.log_history, strict=True):
        timeless = {k for k in one if "second" not in k and "runtime" not in k}
        assert {k: one[k] for k in timeless} == {k: other[k] for k in timeless}
    resumed.save_model(str(tmp_path / "model"))
    assert_same_weights(
        dict(GPT2LMHeadModel.from_pretrained(tmp_path / "model").named_parameters()),
        dict(whole.policy.named_parameters()),
    )
    assert not list(tmp_path.rglob("critic"))


def test_a_run_does_not_go_on_with_another_method(tmp_path):
    without(tmp_path, "rloo", max_steps=1, save_strategy="steps", save_steps=1).train()
    for other in ({"method": "grpo"}, {"method": "rloo", "num_generations": 8}):
        with pytest.raises(SetupError, match="was made with advantage: rloo, num_generations: 4"):
            without(tmp_path, **other, max_steps=2).train(resume_from_checkpoint=True)


def test_the_answers_to_a_prompt_stand_together_and_differ(tmp_path):
    """Each epoch takes every prompt once; the groups of an update are taken whole by its minibatches."""
    trainer = without(tmp_path, "grpo", num_train_epochs=1, max_steps=-1)
    assert trainer.max_steps == 64 * 4 / 16
    batches = [trainer._train_rollout(range(16 * i, 16 * (i + 1))) for i in range(2)]
    rows = [row for batch in batches for row in batch.rows]
    assert rows[::4] == rows[1::4] == rows[3::4] and len(set(rows)) == 8
    for start in range(0, 16, 4):
        assert len({tuple(answer) for answer in batches[0].responses[start : start + 4]}) > 1
    order = trainer.learner.order(0, 0)
    assert sorted(order) == list(range(16)) and all(order[i] // 4 == order[i - i % 4] // 4 for i in range(16))
    trainer.train()
    assert trainer.state.epoch == 1.0


def test_advantages_by_hand():
    rewards = torch.tensor([1.0, 3.0, 5.0, 2.0, 2.0, 2.0])
    torch.testing.assert_close(
        algorithm.leave_one_out(rewards, 3), torch.tensor([1 - 4.0, 3 - 3.0, 5 - 2.0, 0.0, 0.0, 0.0])
    )
    torch.testing.assert_close(
        algorithm.group_relative(rewards, 3, "group"), torch.tensor([-2.0, 0.0, 2.0, 0.0, 0.0, 0.0]) / 2.0001
    )
    assert algorithm.group_relative(rewards, 3, "none").tolist() == [-2.0, 0.0, 2.0, 0.0, 0.0, 0.0]
    assert algorithm.alike(rewards, 3) == 0.5


def test_answers_that_score_alike_are_refused_counted_and_diagnosed(tmp_path, caplog):
    """The scores differ from prompt to prompt, but not among the answers to one: nothing to compare."""

    def of_prompt(prompts, completions, number, **_):
        return [float(n) for n in number]

    with pytest.raises(SetupError, match=r"answers to each of 16 prompts got the same score: advantage: rloo"):
        without(tmp_path, "rloo", reward_funcs=of_prompt).train()
    settings = dict(reward_funcs=of_prompt, kl_coef=0.0, allow_constant_scores=True)
    trainer = without(tmp_path, "rloo", **settings)
    before = weights_of(trainer)
    with caplog.at_level("WARNING", logger="pipelines"):
        trainer.train()
    assert_same_weights(weights_of(trainer), before)  # Adam takes no step where there is no gradient
    assert [row["objective/scores_alike"] for row in trainer.state.log_history if "objective/kl" in row] == [1.0] * 4
    assert [finding["name"] for finding in trainer.monitor.watch.said] == ["answers_score_alike"]
    assert "to 100% of the prompts all answers score alike" in caplog.text
    healthy = without(tmp_path, "rloo")
    healthy.train()
    assert healthy.monitor.watch.said == []
    constant = [{"objective/scores_alike": 1.0, "objective/scores_std": 0.0, "objective/raw_scores": 1.0}] * 3
    assert diagnosis.answers_score_alike(constant, []) is None and diagnosis.constant_scores(constant, [])


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_lora_and_checkpointing_without_a_critic(tmp_path, method):
    from peft import LoraConfig, get_peft_model

    def adapted():
        torch.manual_seed(5)
        settings = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
        return get_peft_model(gpt2(), settings)

    settings = dict(max_steps=4, save_strategy="steps", save_steps=2, activation_checkpointing=True)
    whole = without(tmp_path / "whole", method, policy=adapted(), **settings)
    before = weights_of(whole)
    whole.train()
    assert all(("lora_" in n) or torch.equal(w, before[n]) for n, w in weights_of(whole).items())
    without(tmp_path / "parts", method, policy=adapted(), callbacks=[StopAt(2)], **settings).train()
    resumed = without(tmp_path / "parts", method, policy=adapted(), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(weights_of(resumed), weights_of(whole))


def test_vllm_answers_each_prompt_several_times(tmp_path, monkeypatch):
    class Engine:
        def __init__(self, policy, *_):
            self.policy, self.calls = policy, []

        def sync_weights(self):
            pass

        def generate(self, prompts, images, num_generations):
            self.calls.append(prompts)
            seeds = [(len(self.calls), i) for i in range(len(prompts))]
            ids, _ = generate(self.policy, prompts, max_new_tokens=8, eos_token_ids=[EOS], seeds=seeds)
            return prompts, ids, None, None

    monkeypatch.setattr(trainer_module, "vllm_engine", Engine)
    trainer = without(tmp_path, "grpo", use_vllm=True)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "objective/kl" in row]
    assert all(row["val/first_ratio_rms"] < 1e-4 for row in rows)
    assert all(calls[i] == calls[i - i % 4] for calls in trainer.rollout_maker.vllm.calls for i in range(len(calls)))


# --- settings -----------------------------------------------------------------------------------------------


def test_what_a_method_leaves_out_is_filled_in(tmp_path):
    def of(**settings):
        args = PPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
        return args.num_generations, args.num_ppo_epochs, args.kl_estimator, args.kl_placement, args.loss_type

    assert of() == (1, 4, "k1", "reward", None)
    assert of(advantage="reinforce") == (1, 1, "k1", "reward", None)
    assert of(advantage="rloo") == (2, 1, "k1", "reward", None)
    assert of(advantage="grpo") == (8, 1, "k3", "loss", "dapo")
    given = dict(num_generations=3, num_ppo_epochs=2, kl_estimator="k2", kl_placement="reward", loss_type="bnpo")
    assert of(advantage="grpo", **given) == (3, 2, "k2", "reward", "bnpo")


OTHER = {"vf_coef": 0.5, "cliprange_value": 1.0, "lam": 0.5, "critic_warmup_steps": 3, "gamma": 0.9}
OTHER |= {"whiten_rewards": True, "scale_rewards": "batch", "loss_type": "grpo", "normalize_advantages": True}


@pytest.mark.parametrize("method", METHODS)
def test_settings_of_other_methods_are_refused(tmp_path, method):
    foreign = {name for name, value in METHODS[method].items() if value is None}
    assert foreign <= OTHER.keys()
    with pytest.raises(SetupError) as error:
        PPOConfig(output_dir=str(tmp_path), use_cpu=True, advantage=method, **OTHER)
    said = {name for name in OTHER if f"- {name} is for advantage: " in str(error.value)}
    assert said == foreign


def test_wrong_groups_and_critics_are_refused(tmp_path):
    for method in ("rloo", "grpo"):
        with pytest.raises(SetupError, match=f"num_generations must be at least 2 with advantage: {method}"):
            without(tmp_path, method, num_generations=1)
        with pytest.raises(SetupError, match="num_generations=5 answers to each prompt do not divide a batch of 16"):
            without(tmp_path, method, num_generations=5)
    with pytest.raises(SetupError, match="advantage must be one of gae, reinforce, rloo, grpo, is 'ppo'"):
        PPOConfig(output_dir=str(tmp_path), advantage="ppo")
    with pytest.raises(SetupError, match="advantage: rloo has no critic: value_model must be None"):
        make(tmp_path, advantage="rloo")
    with pytest.raises(SetupError, match="advantage: gae trains a critic"):
        make(tmp_path, models=(gpt2(), None))


def test_several_answers_to_a_prompt_with_a_critic(tmp_path):
    """PPO takes them as it takes any answers."""
    trainer = make(tmp_path, num_generations=4, eval_data=prompts(7), eval_strategy="steps", eval_steps=4)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "objective/kl" in row]
    assert all("objective/scores_alike" in row and "val/explained_variance" in row for row in rows)


# --- several processes --------------------------------------------------------------------------------------


def worker(folder, method):
    """What each process of the launch below runs: six answers each, so that a group of four is cut in two."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    trainer = without(
        folder,
        method,
        reward_funcs=count_goal,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=4 // world,
        num_mini_batches=1,
        kl_coef=0.2,
        save_strategy="steps",
        save_steps=4,
    )
    assert trainer.accelerator.num_processes == world and trainer.batch_size == 12
    trainer.train()
    trainer.save_model(str(folder / "model"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_two_processes_update_like_one(tmp_path, method):
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(map(str, (root, root / "tests")))
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    for world in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if world == 2 else []
        command = [sys.executable, *launch, __file__, str(tmp_path / str(world)), method]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (dict(GPT2LMHeadModel.from_pretrained(tmp_path / w / "model").named_parameters()) for w in "12")
    assert_same_weights(one, two, atol=2e-6, rtol=1e-4)
    states = [json.loads((tmp_path / w / "checkpoint-4/trainer_state.json").read_text()) for w in "12"]
    for one, two in zip(*(state["log_history"] for state in states), strict=True):
        for name in one:
            if "second" not in name and "runtime" not in name:
                assert one[name] == pytest.approx(two[name], rel=1e-3, abs=1e-5), name


if __name__ == "__main__":
    worker(Path(sys.argv[1]), sys.argv[2])
