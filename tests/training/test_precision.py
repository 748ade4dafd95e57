"""What the hardware decides where a recipe is silent, what a CPU makes of settings for GPUs, and that both are said."""

import importlib.util
import itertools
import json
import logging
import signal
import types

import pytest
import torch
from tiny_words import WORDS

from pipelines import __main__, errors, files, launch
from pipelines.chain import chain
from pipelines.chain import record as chain_record
from pipelines.files import now
from pipelines.generation import answers
from pipelines.models import loading
from pipelines.recipe import model_checks
from pipelines.recipe.problems import RecipeError
from pipelines.recipe.recipe import load
from pipelines.training import arguments, loop

ARGS = {"global_batch_size": 8, "learning_rate": 1e-3, "max_steps": 2}
NEW = {
    "bert": {
        "model_type": "bert",
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 64,
    },
    "t5": {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2},
}


def reward(prompts, completions, **columns):
    """Long answers are worth more."""
    return [float(len(text)) for text in completions]


@pytest.fixture
def stage(write, tiny_gpt2):
    """`stage(kind, args, model)`: a stage of any kind that trains, two steps on little data, as a recipe says it."""
    pairs = [(a, b) for a in WORDS[:8] for b in WORDS[8:16]]
    text = write("text.jsonl", [{"text": f"the {a} is {b} and {b} is not {a}"} for a, b in pairs])
    asked = write("asked.jsonl", [{"prompt": f"what is {a}", "completion": f"{a} is {b}"} for a, b in pairs])
    ranked = write("r.jsonl", [{"prompt": f"what is {a}", "chosen": f"{a} is {b}", "rejected": b} for a, b in pairs])
    labelled = write("labelled.jsonl", [{"text": f"{a} is {b}", "label": int(b == WORDS[8])} for a, b in pairs])
    translated = write("translated.jsonl", [{"source": f"{a} is {b}", "target": f"{b} {a}"} for a, b in pairs])
    base, words = {"model_name_or_path": str(tiny_gpt2)}, {"train": "wordpiece", "vocab_size": 250}
    kinds = {
        "pretrain": {"model": base, "data": {"train": text}, "args": {"max_length": 32}},
        "mlm": {
            "model": {"config": NEW["bert"]},
            "tokenizer": words,
            "data": {"train": text},
            "args": {"max_length": 32},
        },
        "sft": {
            "model": base,
            "data": {"train": asked},
            "args": {"packing": True, "max_length": 32, "global_batch_size": 2},
        },
        "reward": {"model": base, "data": {"train": ranked}},
        "ppo": {
            "model": {**base, "chat_template": "plain"},
            "reward": {"functions": [f"{__name__}:reward"]},
            "data": {"train": asked},
            "args": {"response_length": 8, "num_ppo_epochs": 1, "allow_no_eos": True},
        },
        "classify": {"model": base, "data": {"train": labelled}},
        "seq2seq": {
            "model": {"config": NEW["t5"]},
            "tokenizer": {**words, "lowercase": True},
            "data": {"train": translated},
        },
    }

    def stage_(kind, args=None, model=None):
        found = kinds[kind]
        return {
            "kind": kind,
            **found,
            "args": {**ARGS, **found.get("args", {}), **(args or {})},
            "model": {**found["model"], **(model or {})},
        }

    return stage_


@pytest.fixture
def run(recipe, caplog, tmp_path):
    """`run(stage)` runs it alone, in a folder of its own; `(what was logged, stage.json)`."""
    folders = (str(tmp_path / f"run{i}") for i in itertools.count())

    def run_(stage):
        caplog.clear()
        loaded = load(recipe({"x": stage}, output_dir=next(folders)))
        with caplog.at_level(logging.INFO, logger="pipelines"):
            chain.run(loaded)
        return caplog.text, json.loads((loaded["x"].folder / "stage.json").read_text())

    return run_


@pytest.mark.parametrize(
    "kind, said",
    [
        ("pretrain", "attention sdpa, batches full windows, loss fused with the head"),
        ("mlm", "attention sdpa, batches full windows"),
        ("sft", "attention sdpa, batches packed, loss fused with the head"),
        ("reward", "attention sdpa, batches packed"),
        ("ppo", "attention sdpa, batches packed"),
        ("classify", "attention sdpa, batches padded"),
        ("seq2seq", "attention sdpa, batches padded"),
    ],
)
def test_what_was_chosen_is_said_as_it_is(run, stage, kind, said):
    text, final = run(stage(kind))
    assert "x: fp32 (" in text and "on 1 x cpu" in text and final["args"]["bf16"] is False
    assert f"x: float32 weights, {said}, optimizer adamw_torch_fused" in text
    assert "activation checkpointing off, torch.compile off" in text


def test_what_was_asked_for_is_said_too(run, stage):
    text, final = run(stage("sft", {"bf16": True, "activation_checkpointing": True, "optim": "sgd"}))
    assert "x: bf16 (as the recipe says)" in text and final["args"]["bf16"] is True
    assert "optimizer sgd, activation checkpointing on" in text
    text, _ = run(stage("classify", model={"attn_implementation": "eager", "dtype": "bfloat16"}))
    assert "x: bfloat16 weights, attention eager" in text
    text, _ = run(stage("reward", model={"attn_implementation": "eager"}))  # whose packs are SDPA's
    assert "by SDPA, not by eager" in text and "attention sdpa, batches packed" in text


def test_models_that_answer_are_described_too(caplog, tiny_gpt2):

    with caplog.at_level(logging.INFO, logger="pipelines"):
        answers.load(str(tiny_gpt2))
    assert f"{tiny_gpt2}: on cpu, float32 weights, attention sdpa" in caplog.text


@pytest.mark.parametrize(
    "device, has, launcher, expected, why",
    [
        ("cuda", True, "no", "bf16", "the GPUs compute in it"),
        ("cuda", False, "no", "fp32", "not every GPU here computes in bf16"),  # torch alone would emulate it
        ("cuda", False, "fp16", "fp16", "as the launcher says"),
        ("cpu", True, "no", "fp32", "the default on CPUs"),
        ("cpu", True, "bf16", "bf16", "as the launcher says"),
    ],
)
def test_silence_means_what_the_hardware_does_by_itself(monkeypatch, tmp_path, device, has, launcher, expected, why):
    state = types.SimpleNamespace(device=types.SimpleNamespace(type=device), is_main_process=True)
    monkeypatch.setattr(arguments, "PartialState", lambda: state)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: has or including_emulation)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    chosen, said = arguments.silent_precision(types.SimpleNamespace(checkpoints=tmp_path))
    assert chosen == expected and said.startswith(why)


def test_the_recipe_comes_before_the_launcher(run, stage, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    asked = []

    def enter(self, enter=torch.autocast.__enter__):
        asked.extend([self.fast_dtype] if self._enabled else [])
        return enter(self)

    monkeypatch.setattr(torch.autocast, "__enter__", enter)
    text, _ = run(stage("classify", {"bf16": False}))
    assert "x: fp32 (as the recipe says)" in text and torch.bfloat16 not in asked
    text, _ = run(stage("classify"))
    assert "x: bf16 (as the launcher says)" in text and torch.bfloat16 in asked


def test_a_run_that_goes_on_stays_in_the_precision_it_began_in(recipe, stage, caplog):
    """As if it had begun on a GPU: bf16 there, and here, where silence means fp32."""
    loaded = load(recipe({"x": stage("classify")}))
    log = loaded["x"].checkpoints / files.LOG
    log.parent.mkdir(parents=True)
    log.write_text(json.dumps({"max_steps": 2, "precision": "bf16", "step": 0, "time": 0.0}) + "\n")
    record = chain_record.record(loaded["x"], {})
    files.write_json(loaded["x"].folder / files.STARTED, {"record": record, "started": now()})
    with caplog.at_level(logging.INFO, logger="pipelines"):
        chain.run(loaded)
    assert "x: bf16 (as this run began; from the start it would be fp32 here" in caplog.text
    assert json.loads((loaded["x"].folder / "stage.json").read_text())["args"]["bf16"] is True


def test_the_precision_of_the_first_session_is_on_disk(tmp_path):
    assert files.begun_in(tmp_path) is None
    for text, expected in (('{"max_steps": 2', None), ('{"max_steps": 2, "precision": "fp32"}\n{"loss"', "fp32")):
        (tmp_path / files.LOG).write_text(text)
        assert files.begun_in(tmp_path) == expected


def test_settings_for_gpus_are_left_out_on_a_cpu_and_said(run, stage, monkeypatch):
    """All of them in one run, which then trains as without them."""
    plain = run(stage("sft"))[1]["metrics"]["train_loss"]
    monkeypatch.setattr(model_checks, "_installed", lambda *_: ())  # as where GPU packages are installed
    monkeypatch.setattr(arguments, "_has_compiler", lambda: False)
    args = {"fp16": True, "fp16_full_eval": True, "tf32": True, "use_liger_kernel": True}
    text, final = run(
        stage("sft", {**args, "torch_compile_mode": "default"}, {"attn_implementation": "flash_attention_2"})
    )
    for key in args:
        assert f"args.{key} needs a GPU; on this CPU: " in text
    assert "args.torch_compile needs a C++ compiler" in text and "torch.compile off" in text
    assert "training with flash_attention_2 needs a GPU; on this CPU: the model's default" in text
    assert "x: fp32 (fp16 needs a GPU)" in text and "attention sdpa" in text
    assert final["metrics"]["train_loss"] == plain


def test_on_a_gpu_they_stay(caplog):
    values = {"fp16": True, "tf32": True, "use_liger_kernel": True, "torch_compile": True}
    arguments._fit_to_cpu(kept := dict(values), "cuda")
    assert kept == values and not caplog.text


def test_attention_that_no_cpu_trains_with_is_the_models_own(run, stage):
    """PyTorch's flex attention has no backward there."""
    text, _ = run(stage("mlm", model={"attn_implementation": "flex_attention"}))
    assert "training with flex_attention needs a GPU" in text and "attention sdpa" in text


def test_bf16_that_a_cpu_emulates_is_warned_of(monkeypatch, caplog):
    monkeypatch.setattr(loading, "native_bf16", lambda device: False)
    values = {"bf16": True}
    arguments._fit_to_cpu(values, "cpu")
    assert values == {"bf16": True} and "emulates it, slowly" in caplog.text


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw_bnb_8bit"])
@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_optimizers_with_small_states_train_on_a_cpu(run, stage, optim, kind):
    pytest.importorskip("bitsandbytes")
    text, final = run(stage(kind, {"optim": optim}))
    assert f"optimizer {optim}" in text and final["metrics"]["steps"] == 2


def test_what_is_not_installed_is_said_before_anything_starts(recipe, stage, monkeypatch):
    absent, find = (
        ("torchao", "lomo_optim", "bitsandbytes", "flash_attn_interface", "kernels"),
        importlib.util.find_spec,
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    for setting, package in (
        ({"optim": "adamw_torch_8bit"}, "torchao"),
        ({"optim": "lomo"}, "lomo_optim"),
        ({"optim": "lion_32bit"}, "bitsandbytes"),
    ):
        with pytest.raises(RecipeError, match=f"needs {package}: "):
            load(recipe({"x": stage("sft", setting)}))
    for name, package in (("flash_attention_3", "flash_attn_interface"), ("someone/attention", "kernels")):
        with pytest.raises(RecipeError, match=f"needs the package {package}; drop the key"):
            load(recipe({"x": stage("sft", model={"attn_implementation": name})}))


def test_settings_that_exclude_each_other_name_the_stage(run, stage):
    """Also where this machine would leave one of them out."""
    with pytest.raises(RecipeError, match=r"stages\.x\.args\.\w+16 = True\n +fp16 and bf16 cannot both be true"):
        run(stage("classify", {"bf16": True, "fp16": True}))
    with pytest.raises(RecipeError, match="attn_implementation = 'nonsense'\n +must be one of eager"):
        run(stage("seq2seq", model={"attn_implementation": "nonsense"}))


@pytest.mark.parametrize(
    "verb, expected",
    [
        ("chat", True),
        ("evaluate", True),
        ("plan", True),
        ("recipe.yaml", True),
        ("rank", False),
        ("check", False),
        ("--help", False),
    ],
)
def test_what_computes_gets_the_fast_environment(monkeypatch, verb, expected):

    asked = []
    monkeypatch.setattr(launch, "fast_environment", lambda: asked.append(verb))
    monkeypatch.setattr(__main__, "main", lambda: 0)
    monkeypatch.setattr("sys.argv", ["pipelines", verb])
    with pytest.raises(SystemExit):
        __main__.entry()
    assert bool(asked) is expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "pretrain"])
def test_compiled_on_a_cpu_it_learns_the_same_and_resumes(recipe, stage, monkeypatch, tmp_path, kind):
    """Packs of varying length included; stopped at step 3, the same command ends with the same weights."""
    from safetensors.torch import load_file

    def train(name, args, stop=None):
        args = {"max_steps": 6, "save_steps": 2, **args}
        loaded = load(recipe({"x": stage(kind, args)}, output_dir=str(tmp_path / name)))

        def on_step_end(self, args, state, control, step=loop.Progress.on_step_end, **kwargs):
            step(self, args, state, control, **kwargs)
            if state.global_step == stop:
                signal.raise_signal(signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(loop.Progress, "on_step_end", on_step_end)
            chain.run(loaded)
        return load_file(loaded["x"].folder / "model.safetensors")

    plain, compiled = train("plain", {}), train("compiled", {"torch_compile": True})
    assert plain.keys() == compiled.keys()
    assert max((plain[k] - compiled[k]).abs().max().item() for k in plain) < 1e-4
    with pytest.raises(errors.Interrupted):
        train("stopped", {"torch_compile": True}, stop=3)
    again = train("stopped", {"torch_compile": True})
    assert max((again[k] - compiled[k]).abs().max().item() for k in again) < 1e-6
