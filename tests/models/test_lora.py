"""Adapters: only they move, new tokens are learned too, what is saved is a plain model equal to the adapted one."""

import json

import pytest
import torch

from pipelines import errors
from pipelines.__main__ import main
from pipelines.chain import chain
from pipelines.generation.logprobs import sequence_scores
from pipelines.models import adapters, loading, sharding
from pipelines.models.config import ModelSection
from pipelines.ppo.config import PPOConfig
from pipelines.ppo.rewards import from_adapter
from pipelines.ppo.trainer import PPOTrainer
from pipelines.recipe import recipe as recipe_recipe
from pipelines.recipe.sections import RewardSection
from pipelines.stages.ppo import _critic, _on_base, one_score
from pipelines.training import loop, saving

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
            "args": {
                "global_batch_size": 8,
                "max_steps": 2,
                "response_length": 8,
                "learning_rate": 1e-2,
                "num_ppo_epochs": 1,
                "num_mini_batches": 1,
                "missing_eos_penalty": 1.0,
            },
        },
    }
    stages["policy"]["args"]["logging_steps"] = 1
    stages["one_base"] = json.loads(json.dumps(stages["policy"]))
    stages["one_base"]["reward"]["share_base"] = True
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(folder / "out"), "stages": stages}, sort_keys=False))
    chain.run(recipe_recipe.load(path))
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
    model = adapters.adapt(model, ModelSection(use_peft=True), "CAUSAL_LM", [3, 7])
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

    path, out = run
    whole = weights(out / "sft")
    loaded = recipe_recipe.load(path, [f"output_dir={tmp_path / 'again'}", "stages.sft.args.max_steps=6"])
    stopped = tmp_path / "again" / "sft"

    class Kill(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 5:
                raise KeyboardInterrupt

    real = loop.fit

    def killed(stage, trainer):
        trainer.add_callback(Kill())
        return real(stage, trainer)

    loop.fit = killed
    try:
        with pytest.raises(BaseException):  # noqa: B017  however it dies
            chain.run(loaded, ["sft"])
    finally:
        loop.fit = real
    assert list(stopped.glob("checkpoints/checkpoint-*")) and not (stopped / "stage.json").exists()
    chain.run(recipe_recipe.load(path, [f"output_dir={tmp_path / 'again'}"]), ["sft"])
    again = weights(stopped)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def on_one_base(out, shared=True, bits=None):
    """Policy, critic and reward model from the run's stages: on one base, or each loaded for itself by peft alone."""
    import peft
    from transformers import AutoModelForSequenceClassification

    section = ModelSection(model_name_or_path=str(out / "sft"), **LORA, **(bits or {}))
    adapter = out / "reward" / "adapter"
    torch.manual_seed(3)
    policy = adapters.adapt(loading.load_model(section, "AutoModelForCausalLM"), section, "CAUSAL_LM")
    if shared:
        return policy, from_adapter(policy, adapter), from_adapter(policy, adapter).get_base_model()
    load = AutoModelForSequenceClassification.from_pretrained
    critic = peft.PeftModel.from_pretrained(load(out / "sft", num_labels=1), adapter, is_trainable=True)
    return policy, critic, load(out / "reward")


def train(models_, out, folder, resume=None, callbacks=(), **settings):
    """A `PPOTrainer` on them, trained."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    policy, critic, reward = models_
    how = {
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "response_length": 8,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "num_ppo_epochs": 2,
        "temperature": 1.0,
        "allow_no_eos": True,
        "num_sample_generations": 0,
    }
    trainer = PPOTrainer(
        model=policy,
        value_model=critic,
        args=PPOConfig(output_dir=str(folder), use_cpu=True, disable_tqdm=True, **how | settings),
        reward_funcs=[reward],
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS]),
        processing_class=AutoTokenizer.from_pretrained(out / "sft"),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def trained(trainer):
    return {n: w.detach().clone() for n, w in trainer.model.named_parameters() if w.requires_grad}


def storages(weights):
    """`{address: bytes}` of the memory that they lie in."""
    return {w.untyped_storage().data_ptr(): w.untyped_storage().nbytes() for w in weights}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_three_adapters_on_one_base_train_like_three_networks(run, tmp_path, checkpointing):
    """Policy, critic and reward: the same numbers as from copies loaded by peft alone, the base's weights once."""
    _, out = run
    one, apart = on_one_base(out), on_one_base(out, shared=False)
    frozen = storages(w for n, w in one[0].named_parameters() if "lora" not in n)
    for model in one[1:]:
        own = [n for n, w in model.named_parameters() if not storages([w]).keys() <= frozen.keys()]
        assert frozen.keys() <= storages(model.parameters()).keys()
        assert own and all("lora" in n or "score" in n for n in own)  # everything else is held once
    start = {n: w.detach().clone() for n, w in one[1].named_parameters() if w.requires_grad}
    frozen_before = {n: w.detach().clone() for n, w in one[0].named_parameters() if "lora" not in n}

    how = {"activation_checkpointing": checkpointing}
    shared, separate = train(one, out, tmp_path / "one", **how), train(apart, out, tmp_path / "apart")
    ours, theirs = trained(shared), trained(separate)
    assert ours.keys() == theirs.keys() and {n.split(".")[0] for n in ours} == {"policy", "critic"}
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    for one_log, other in zip(shared.state.log_history[:-1], separate.state.log_history[:-1], strict=True):
        for key in (k for k in other if "second" not in k):
            assert one_log[key] == pytest.approx(other[key], abs=1e-4), key
    changed = moved(start, {n.removeprefix("critic."): w for n, w in ours.items()})
    assert any("lora_B" in n for n in changed) and any("score" in n for n in changed)
    assert all(torch.equal(w, frozen_before[n]) for n, w in shared.policy.named_parameters() if n in frozen_before)
    assert all(
        frozen.keys() <= storages(m.parameters()).keys()
        for m in (shared.critic, shared.rollout_maker.scorer.functions[0])
    )


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_quantized_weights_are_held_once_too(run, bits):
    """A critic on the policy's quantized base computes and sends back what one on its own quantized base does."""
    pytest.importorskip("bitsandbytes")
    import peft

    _, out = run
    one = on_one_base(out, bits={bits: True})
    section = ModelSection(model_name_or_path=str(out / "sft"), **LORA, **{bits: True})
    alone = loading.load_model(section, "AutoModelForSequenceClassification", new_head=True, num_labels=1)
    alone = peft.PeftModel.from_pretrained(alone, out / "reward" / "adapter", is_trainable=True)
    packed = {torch.uint8, torch.int8}
    held = [storages(w for w in m.parameters() if w.dtype in packed) for m in one]
    assert held[0] and held[0] == held[1] == held[2]
    ids, found = torch.arange(5, 25)[None], []
    for model in (*one, alone):  # the policy first: its forward settles where 8-bit weights lie
        logits = model(ids, use_cache=False).logits
        logits.sum().backward()
        found.append((logits, {n: w.grad for n, w in model.named_parameters() if w.grad is not None}))
    (_, (values, grads), (scores, _), (expected, expected_grads)) = found
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("family", ["llama", "bloom", "mixtral"])  # rotary buffers; ALiBi; weights outside of layers
def test_other_architectures_share_their_base(family, tmp_path):
    """The adapter on the policy's base scores like the model it was saved from, and merges into a plain folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = AutoConfig.for_model(family, vocab_size=64, pad_token_id=0, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    how = {**LORA, "lora_target_modules": ["all-linear"]}
    section = ModelSection(model_name_or_path=str(tmp_path / "base"), **how)
    reward = adapters.adapt(one_score(str(tmp_path / "base"), section, new_head=True), section, "SEQ_CLS").eval()
    for name, weight in reward.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    reward.save_pretrained(tmp_path / "adapter")
    policy = adapters.adapt(loading.load_model(section, "AutoModelForCausalLM"), section, "CAUSAL_LM", [3])
    critic = from_adapter(policy, tmp_path / "adapter").eval()
    held = storages(policy.parameters()).keys()
    own = [n for n, w in critic.named_parameters() if not storages([w]).keys() <= held]
    assert own and all("lora" in n or "score" in n for n in own)
    adapters.merge(critic, None).save_pretrained(tmp_path / "merged")
    ids = [[5, 9, 11, 4], [7, 8, 3]]
    three = critic.get_base_model(), reward.get_base_model(), one_score(str(tmp_path / "merged"), section).eval()
    found, expected, merged = (sequence_scores(model, ids, False, "cpu") for model in three)
    assert (expected[0] - expected[1]).abs() > 1e-4
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-3)


def test_adapters_on_one_base_resume_to_the_bit(run, tmp_path):
    import transformers

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 2

    _, out = run
    how = {"save_strategy": "steps"}
    whole = trained(train(on_one_base(out), out, tmp_path / "whole", **how))
    train(on_one_base(out), out, tmp_path / "parts", callbacks=[Stop()], **how)
    resumed = train(on_one_base(out), out, tmp_path / "parts", resume=True, **how)
    assert resumed.state.global_step == 4
    again = trained(resumed)
    assert all(torch.equal(w, again[n]) for n, w in whole.items())


def test_a_policy_trains_on_one_base_with_its_reward_and_critic(run):
    """The stage: what is saved is the base plus each adapter, and the critic's is the reward stage's, trained on."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    path, out = run
    folder = out / "one_base"
    assert all("c_attn" in n for n in moved(weights(out / "sft"), weights(folder)))
    assert not [p for p in folder.rglob("*") if "reward" in p.name]
    record = json.loads((folder / "stage.json").read_text())
    first = json.loads((folder / "history.jsonl").read_text().splitlines()[0])
    other = json.loads((out / "policy" / "history.jsonl").read_text().splitlines()[0])
    assert record["metrics"]["steps"] == 2
    for key in ("objective/scores", "val/explained_variance"):  # the critic starts as the merged reward model does
        assert first[key] == pytest.approx(other[key], abs=1e-4)
    merged = AutoModelForSequenceClassification.from_pretrained(folder / "critic").eval()
    base = AutoModelForSequenceClassification.from_pretrained(out / "sft", num_labels=1)
    adapted = PeftModel.from_pretrained(base, folder / "critic" / "adapter").eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-5, rtol=1e-4)
    linear = moved(weights(out / "reward"), weights(folder / "critic"))
    assert any("c_fc" in n for n in linear) and "score.weight" in linear  # all that the reward's adapter sits on
    with pytest.raises(errors.ModelError, match="was trained without adapters|was trained from"):
        _on_base(str(out / "reward"), ModelSection(model_name_or_path="another"), None)


def test_a_critic_without_a_reward_model_is_a_new_adapter_on_the_base(run):

    _, out = run
    section = ModelSection(model_name_or_path=str(out / "sft"), **LORA)
    policy = adapters.adapt(loading.load_model(section, "AutoModelForCausalLM"), section, "CAUSAL_LM")
    critic = _critic(str(out / "sft"), section, RewardSection(share_base=True), policy, None)
    own = sum(w.numel() for w in critic.parameters() if w.requires_grad)
    shared = storages(policy.parameters()).keys() & storages(critic.parameters()).keys()
    assert own == critic.get_nb_trainable_parameters()[0] and len(shared) > 20
    assert torch.equal(critic(torch.tensor([[5, 6]])).logits, torch.zeros(1, 1))


def test_what_cannot_share_a_base_is_found_before_it_starts(run, capsys):

    path, _ = run
    assert main(["check", str(path)]) == 0
    text = capsys.readouterr().out
    assert "held once: of stage:reward (reward), of stage:reward (critic, trained on)" in text
    assert "one_base/critic/adapter" in text
    assert main(["check", str(path), "stages.reward.model.use_peft=false"]) == 2
    assert (
        "with reward.share_base: a reward stage with model.use_peft on the policy's own stage:sft"
        in capsys.readouterr().err
    )
    assert main(["check", str(path), "stages.one_base.reward.critic=stage:sft"]) == 0
    assert "a new one (critic" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_train_the_adapters_of_one(run):
    """The same three stages through the real `accelerate launch`, on one and on two processes."""
    import os
    import subprocess
    import sys
    from pathlib import Path

    path, out = run
    root = Path(__file__).parents[2]
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
    for place in ("sft", "reward", "one_base", "one_base/critic"):
        one, two = (weights(out.parent / config / place) for config in ("cpu", "cpu_2"))
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=0, msg=f"{place} {name}")
    assert weights(out.parent / "cpu_2" / "policy" / "critic")


def test_the_chain_equals_the_same_chain_with_merges_by_hand(run, tiny_gpt2, tmp_path):
    """Reward and PPO from an SFT adapter merged with peft alone are those of the chain."""
    import peft
    import yaml
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, out = run
    tokenizer = AutoTokenizer.from_pretrained(out / "sft")
    base = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    base.resize_token_embeddings(len(tokenizer))
    base.config.pad_token_id, base.config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    merged = peft.PeftModel.from_pretrained(base, out / "sft" / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "sft")
    tokenizer.save_pretrained(tmp_path / "sft")
    stages = yaml.safe_load(path.read_text())["stages"]
    del stages["sft"], stages["one_base"]
    stages["reward"]["model"]["model_name_or_path"] = stages["policy"]["model"]["model_name_or_path"] = str(
        tmp_path / "sft"
    )
    hand = tmp_path / "recipe.yaml"
    hand.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "out"), "stages": stages}, sort_keys=False))
    chain.run(recipe_recipe.load(hand))
    for place in ("reward", "policy", "policy/critic"):
        chained, by_hand = weights(out / place), weights(tmp_path / "out" / place)
        assert chained.keys() == by_hand.keys()
        for name in chained:
            if name not in ("transformer.wte.weight", "lm_head.weight"):  # PAD's row is drawn, and never read
                torch.testing.assert_close(chained[name], by_hand[name], atol=1e-6, rtol=0, msg=f"{place} {name}")


# --- 4 and 8 bits --------------------------------------------------------------------------------------------------

BITS4 = {"load_in_4bit": True, "lora_target_modules": ["all-linear"]}


@pytest.fixture
def seen(monkeypatch):
    """What a stage trained: `seen["first"]`, `seen["last"]` (quantized weights), `seen["logits"]` of the model as
    saved.
    """

    found, fit, save = {}, loop.fit, saving.save

    def quantized(trainer):
        model = getattr(trainer, "policy", trainer.model)
        return {n: p.detach().clone() for n, p in model.named_parameters() if p.dtype in (torch.uint8, torch.int8)}

    def fit_(stage, trainer):
        found["first"] = quantized(trainer)
        fit(stage, trainer)

    def save_(trainer, folder, tokenizer):
        found["last"] = quantized(trainer)
        found["logits"] = said(getattr(trainer, "policy", trainer.model))
        save(trainer, folder, tokenizer)

    monkeypatch.setattr(loop, "fit", fit_)
    monkeypatch.setattr(saving, "save", save_)
    return found


def said(model):
    with torch.no_grad():
        return model.eval()(torch.arange(5, 25)[None]).logits


def check_quantized(folder, base, seen, auto):
    """Bits stayed as they were; the folder is the full-precision base plus the adapter, near what was trained."""
    import transformers

    assert seen["first"] and all(torch.equal(w, seen["last"][n]) for n, w in seen["first"].items())
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert all(w.dtype == torch.float32 for w in weights(folder).values())
    adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    from safetensors.torch import load_file

    parts = load_file(folder / "adapter" / "adapter_model.safetensors")
    full, merged, adapted = weights(base), weights(folder), 0
    for name in (n for n in parts if n.endswith("lora_A.weight")):
        key = name.removeprefix("base_model.model.").replace(".lora_A", "")
        delta = parts[name.replace("lora_A", "lora_B")] @ parts[name] * adapter["lora_alpha"] / adapter["r"]
        torch.testing.assert_close(merged[key], full[key] + delta.T, atol=1e-6, rtol=1e-5)  # GPT-2's Conv1D: (in, out)
        assert delta.abs().max() > 1e-5
        adapted += 1
    assert adapted >= 8
    return getattr(transformers, auto).from_pretrained(folder)


@pytest.mark.parametrize(
    "kind, bits",
    [
        ("sft", "load_in_4bit"),
        ("dpo", "load_in_4bit"),
        *(
            pytest.param(kind, bits, marks=pytest.mark.slow)
            for kind, bits in (("sft", "load_in_8bit"), ("dpo", "load_in_8bit"))
            + (("kto", "load_in_4bit"), ("kto", "load_in_8bit"))
        ),
    ],
)
def test_qlora_trains_and_is_merged_at_full_precision(kind, bits, tiny_gpt2, recipe, write, seen):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    model = {"model_name_or_path": str(tiny_gpt2), **LORA, "lora_target_modules": ["all-linear"], bits: True}
    stage = {
        "kind": kind,
        "model": model,
        "data": {"train": write("a.jsonl", ROWS if kind == "sft" else PAIRS)},
        "args": {
            "global_batch_size": 6,
            "max_steps": 12,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "optim": "adamw_bnb_8bit",
        },
    }
    loaded = recipe_recipe.load(recipe({"x": stage}))
    chain.run(loaded)
    folder = loaded["x"].folder
    merged = said(check_quantized(folder, tiny_gpt2, seen, "AutoModelForCausalLM"))
    log = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    found = [e["loss"] for e in log if "loss" in e]
    assert found[-1] < 0.95 * found[0]
    # The folder differs from what was trained by the rounding of the base to so many bits: far less than training did.
    start = said(AutoModelForCausalLM.from_pretrained(tiny_gpt2))
    old = start.shape[-1]
    rounding, training = (merged - seen["logits"])[..., :old].abs().mean(), (merged[..., :old] - start).abs().mean()
    assert rounding < (0.25 if bits == "load_in_4bit" else 0.05) * training, (rounding, training)


@pytest.mark.slow
def test_qlora_through_reward_ppo_and_classification(run, tiny_gpt2, recipe, write, seen):
    pytest.importorskip("bitsandbytes")
    from safetensors.torch import load_file

    _, out = run
    sft = {
        "model_name_or_path": str(out / "sft"),
        **LORA,
        **BITS4,
        "bnb_4bit_quant_type": "nf4",
        "use_bnb_nested_quant": True,
    }
    steps = {"global_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2, "save_steps": 2}
    labels = [{"text": f"the cat {v} {i}", "label": v} for i in range(8) for v in ("likes", "sees")]
    stages = {
        "reward": {"kind": "reward", "model": sft, "data": {"train": write("b.jsonl", PAIRS)}, "args": steps},
        "policy": {
            "kind": "ppo",
            "model": sft,
            "reward": {"models": ["stage:reward"], "min_accuracy": 0},
            "data": {"train": write("c.jsonl", [{"prompt": r["prompt"]} for r in ROWS])},
            "args": {
                **steps,
                "max_steps": 2,
                "response_length": 8,
                "allow_no_eos": True,
                "num_mini_batches": 1,
                "missing_eos_penalty": 1.0,
            },
        },
        "one_base": None,
        "labels": {
            "kind": "classify",
            "model": {**LORA, **BITS4, "model_name_or_path": str(out / "sft")},
            "data": {"train": write("d.jsonl", labels)},
            "args": steps,
        },
    }
    stages["one_base"] = {**stages["policy"], "reward": {**stages["policy"]["reward"], "share_base": True}}
    loaded = recipe_recipe.load(recipe(stages))
    for name, auto in (
        ("reward", "SequenceClassification"),
        ("policy", "CausalLM"),
        ("one_base", "CausalLM"),
        ("labels", "SequenceClassification"),
    ):
        chain.run(loaded, [name])
        check_quantized(loaded[name].folder, out / "sft", seen, f"AutoModelFor{auto}")
        if name == "one_base":
            check_quantized(loaded[name].folder / "critic", out / "sft", seen, "AutoModelForSequenceClassification")
    for name in ("policy", "one_base"):
        assert moved(weights(loaded["reward"].folder), weights(loaded[name].folder / "critic"))
    head = weights(loaded["reward"].folder)["score.weight"]
    saved = load_file(loaded["reward"].folder / "adapter" / "adapter_model.safetensors")
    assert any(torch.equal(value, head) for value in saved.values())  # the score head is saved with the adapter


def test_check_says_what_merges_into_what_and_refuses_bits_without_adapters(tiny_gpt2, recipe, write, capsys):
    stage = {
        "kind": "sft",
        "model": {"model_name_or_path": str(tiny_gpt2), **LORA, **BITS4},
        "data": {"train": write("a.jsonl", ROWS)},
    }
    path = str(recipe({"sft": stage}))
    pytest.importorskip("bitsandbytes")
    assert main(["check", path]) == 0
    text = capsys.readouterr().out
    assert "LoRA, r 4, on" in text and "in 4 bits" in text and "loaded again at full precision" in text
    assert main(["check", path, "stages.sft.model.use_peft=false"]) == 2
    assert "load_in_4bit" in capsys.readouterr().err
    assert main(["check", path, "stages.sft.model.load_in_4bit=false", "stages.sft.model.bnb_4bit_quant_type=nf4"]) == 2
    assert "is used only with `load_in_4bit: true`" in capsys.readouterr().err


def test_gathered_weights_make_a_whole_model_again(tiny_gpt2):
    """As when shards are saved: each name of a tied weight comes by itself, and one weight must come of them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    model = adapters.adapt(model, ModelSection(use_peft=True), "CAUSAL_LM", [3, 7]).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1)
    bare = adapters.structure(model)
    assert all(weight.device.type == "meta" for weight in bare.parameters())
    whole = adapters.filled(bare, {name: weight.clone() for name, weight in model.state_dict().items()})
    ids = torch.tensor([[3, 5, 7, 9]])
    assert torch.equal(whole(ids).logits, model(ids).logits)
    merged = adapters.merge(whole, None)
    assert merged.lm_head.weight is merged.transformer.wte.weight
    torch.testing.assert_close(merged(ids).logits, model(ids).logits)


def test_embeddings_that_cannot_be_cut_up_by_themselves_are_found_out(tiny_gpt2):
    from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

    small = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "vocab_size": 20,
    }
    plain = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    with sharding.embeddings_for_fsdp(plain):
        assert plain.get_input_embeddings() is plain.transformer.wte
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    tokens = adapters.adapt(plain, ModelSection(use_peft=True), "CAUSAL_LM", [3])
    for model in (BertForMaskedLM(BertConfig(**small)), t5, tokens):
        embedding = model.get_input_embeddings()
        with sharding.embeddings_for_fsdp(model):
            assert model.get_input_embeddings() is None and "BertEmbeddings" not in model._no_split_modules
        assert model.get_input_embeddings() is embedding and model._no_split_modules


@pytest.mark.parametrize("whole", [["wte"], ["lm_head"], ["wte", "lm_head"]])
def test_embeddings_that_are_trained_whole_learn_the_new_tokens_too(tiny_gpt2, tmp_path, whole):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    section = ModelSection(use_peft=True, lora_modules_to_save=whole)
    model = adapters.adapt(model, section, "CAUSAL_LM", [3, 7]).eval()
    ids = torch.tensor([[3, 5, 7, 9]])
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert any("modules_to_save" in name and weight.grad.abs().sum() > 0 for name, weight in trained.items())
    torch.optim.SGD(trained.values(), lr=0.5).step()
    merged = adapters.merge(model, None)
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight  # tied as before
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, model(input_ids=ids).logits)
