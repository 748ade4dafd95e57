"""Adapters: only they move, new tokens are learned too, what is saved is a plain model equal to the adapted one."""

import json

import pytest
import torch

from pipelines import chain, models
from pipelines import recipe as recipes
from pipelines.sections import ModelSection

ROWS = [
    {"prompt": f"what is the {a} {i}", "completion": f"the {a} is red"}
    for i in range(12)
    for a in ("cat", "dog", "bird")
]
PAIRS = [
    {"prompt": f"what is the {a} {i}", "chosen": f"the {a} is red", "rejected": f"the {a} is blue"}
    for i in range(12)
    for a in ("cat", "dog")
]
LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}  # dropout draws differ between worlds


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_gpt2):
    """sft -> reward -> ppo, all with adapters; `(recipe file, output folder)`."""
    import yaml

    folder = tmp_path_factory.mktemp("lora")

    def write(name, rows):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder / name)

    steps = {
        "global_batch_size": 4,
        "max_length": 64,
        "learning_rate": 5e-3,
        "max_steps": 6,
        "save_steps": 2,
        "save_total_limit": 9,
    }
    stages = {
        "sft": {
            "kind": "sft",
            "model": {"model_name_or_path": str(tiny_gpt2), "chat_template": "chatml", **LORA},
            "data": {"train": write("rows.jsonl", ROWS)},
            "args": steps,
        },
        "reward": {
            "kind": "reward",
            "model": {"model_name_or_path": "stage:sft", **LORA, "lora_target_modules": ["all-linear"]},
            "data": {"train": write("pairs.jsonl", PAIRS), "validation": 0.2},
            "args": steps,
        },
        "policy": {
            "kind": "ppo",
            "model": {"model_name_or_path": "stage:sft", **LORA},
            "reward": {"models": ["stage:reward"], "min_accuracy": 0},
            "data": {"train": write("prompts.jsonl", [{"prompt": row["prompt"]} for row in ROWS])},
            "args": {"global_batch_size": 8, "max_steps": 2, "response_length": 8, "learning_rate": 1e-2, "num_ppo_epochs": 1,
                     "num_mini_batches": 1, "missing_eos_penalty": 1.0},
        },
    }  # fmt: skip
    stages["policy"]["args"]["logging_steps"] = 1
    stages["one_base"] = json.loads(json.dumps(stages["policy"]))
    stages["one_base"]["reward"]["share_base"] = True
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(folder / "out"), "stages": stages}, sort_keys=False))
    chain.run(recipes.load(path))
    return path, folder / "out"


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def moved(before, after):
    return {name for name, value in after.items() if name in before and not torch.equal(before[name], value)}


def test_every_stage_leaves_a_plain_model_in_which_only_adapted_weights_moved(run, tiny_gpt2):
    _, out = run
    for place in ("sft", "reward", "policy", "policy/critic"):
        assert not any("lora" in name for name in weights(out / place)), place
        assert (out / place / "adapter" / "adapter_model.safetensors").is_file()
        assert not (out / place / "adapter_config.json").exists()
    base, sft = weights(tiny_gpt2), weights(out / "sft")
    changed = {n.split(".", 1)[-1] if n.startswith("transformer.") else n for n in moved(base, sft)}
    assert changed and all("c_attn" in n or "wte" in n for n in changed), changed  # peft's default targets of GPT-2
    assert all("c_attn" in n for n in moved(sft, weights(out / "policy")))
    assert moved(sft, weights(out / "policy")) and moved(weights(out / "reward"), weights(out / "policy/critic"))


def test_new_tokens_are_learned_and_old_embeddings_stay(run, tiny_gpt2):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, out = run
    before = AutoModelForCausalLM.from_pretrained(tiny_gpt2).get_input_embeddings().weight
    after = AutoModelForCausalLM.from_pretrained(out / "sft").get_input_embeddings().weight
    assert len(AutoTokenizer.from_pretrained(out / "sft")) == len(after) > len(before)
    assert torch.equal(after[: len(before)], before)
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    model = models.adapt(model, ModelSection(use_peft=True), "CAUSAL_LM", [3, 7])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    ids = torch.tensor([[3, 5, 7, 9]])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    trained = model.merge_and_unload().get_input_embeddings().weight
    assert {i for i in range(len(before)) if not torch.equal(trained[i], before[i])} == {3, 7}


def test_the_merged_model_says_what_the_adapted_one_says(run):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    _, out = run
    merged = AutoModelForCausalLM.from_pretrained(out / "policy").eval()
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(out / "sft"), out / "policy" / "adapter"
    ).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-5, rtol=1e-4)


def test_the_reward_model_keeps_its_trained_head(run):
    _, out = run
    record = json.loads((out / "reward" / "stage.json").read_text())
    before, after = weights(out / "sft"), weights(out / "reward")
    assert "score.weight" in after and 0 <= record["metrics"]["accuracy"] <= 1
    linear = {n for n in after if n.split(".")[-2] in ("c_attn", "c_proj", "c_fc") and n.endswith("weight")}
    assert moved(before, after) == linear  # lora_target_modules: [all-linear]


def test_an_interrupted_stage_resumes_to_the_same_weights(run, tmp_path):
    import transformers

    from pipelines import training

    path, out = run
    whole = weights(out / "sft")
    loaded = recipes.load(path, [f"output_dir={tmp_path / 'again'}", "stages.sft.args.max_steps=6"])
    stopped = tmp_path / "again" / "sft"

    class Kill(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 5:
                raise KeyboardInterrupt

    real = training.fit

    def killed(stage, trainer):
        trainer.add_callback(Kill())
        return real(stage, trainer)

    training.fit = killed
    try:
        with pytest.raises(BaseException):  # noqa: B017  however it dies
            chain.run(loaded, ["sft"])
    finally:
        training.fit = real
    assert list(stopped.glob("checkpoints/checkpoint-*")) and not (stopped / "stage.json").exists()
    chain.run(recipes.load(path, [f"output_dir={tmp_path / 'again'}"]), ["sft"])
    again = weights(stopped)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_reward_adapters_on_the_policys_base_score_like_the_merged_model(run):
    """One network in memory: the same scores, and the policy's own adapter is the active one before and after."""
    from pipelines.ppo.forward import sequence_scores
    from pipelines.ppo.rewards import AdapterScorer
    from pipelines.stages.ppo import scorer

    _, out = run
    section = ModelSection(model_name_or_path=str(out / "sft"), **LORA)
    policy = models.adapt(models.load_model(section, "AutoModelForCausalLM"), section, "CAUSAL_LM").eval()
    trained = {n for n, w in policy.named_parameters() if w.requires_grad}
    ids = [[5, 9, 11, 4], [7, 8, 3]]
    before = policy(torch.tensor(ids[:1])).logits
    shared = AdapterScorer(policy, out / "reward" / "adapter", "reward0")
    alone = scorer(str(out / "reward"), section).eval()
    expected, found = (sequence_scores(model, ids, False, "cpu") for model in (alone, shared))
    assert (expected[0] - expected[1]).abs() > 1e-4
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(policy(torch.tensor(ids[:1])).logits, before) and policy.active_adapter == "default"
    assert {n for n, w in policy.named_parameters() if w.requires_grad} == trained
    assert sum(w.numel() for w in shared.parameters()) == 32


def test_a_policy_trains_on_one_base_with_its_reward_and_critic(run):
    path, out = run
    assert (out / "one_base" / "critic" / "value_head.safetensors").is_file()
    assert all("c_attn" in n for n in moved(weights(out / "sft"), weights(out / "one_base")))
    assert not [p for p in (out / "one_base").rglob("*") if "reward" in p.name]
    record = json.loads((out / "one_base" / "stage.json").read_text())
    first = json.loads((out / "one_base" / "history.jsonl").read_text().splitlines()[0])
    other = json.loads((out / "policy" / "history.jsonl").read_text().splitlines()[0])
    assert record["metrics"]["steps"] == 2
    assert first["objective/scores"] == pytest.approx(other["objective/scores"], abs=1e-4)
    with pytest.raises(models.ModelError, match="was trained without adapters|was trained from"):
        from pipelines.stages.ppo import _on_base

        _on_base(str(out / "reward"), ModelSection(model_name_or_path="another"), None, 0)


@pytest.mark.slow
def test_two_processes_train_the_adapters_of_one(run):
    """The same three stages through the real `accelerate launch`, on one and on two processes."""
    import os
    import subprocess
    import sys
    from pathlib import Path

    path, out = run
    root = Path(__file__).parents[1]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    for config in ("cpu", "cpu_2"):
        line = [
            str(Path(sys.executable).parent / "accelerate"),
            "launch",
            "--config_file",
            f"{root}/accelerate_configs/{config}.yaml",
        ]
        line += ["-m", "pipelines", str(path), f"output_dir={out.parent / config}"]
        env = {**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for place in ("sft", "reward"):  # PPO's samples depend on rounding: it is enough that it ends
        one, two = (weights(out.parent / config / place) for config in ("cpu", "cpu_2"))
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=0, msg=f"{place} {name}")
    assert weights(out.parent / "cpu_2" / "policy" / "critic")
