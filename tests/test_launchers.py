"""Every way of launching: the files in accelerate_configs/ say what Accelerate understands, and what runs without a GPU
(plain data parallelism, FSDP2, ZeRO-2 and ZeRO-3 on two processes over gloo) trains as one process does, through every
stage in one run, to plain model folders."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
BIN = Path(sys.executable).parent
STAGES = ("base", "sft", "reward", "classify", "policy")
STEPS = 6


def launch(config, recipe, *words, processes=2, options=(), script=("-m", "pipelines"), expect=0):
    """Run `recipe` under accelerate_configs/`config`.yaml on this machine's CPU; returns what it printed."""
    line = [BIN / "accelerate", "launch", "--config_file", ROOT / "accelerate_configs" / f"{config}.yaml"]
    line += ["--num_processes", processes, *options, *script, recipe, *words]
    return run(line, expect)


def run(line, expect=0):
    """A command in a clean environment; returns what it printed, after checking how it ended."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    environment = {**clean, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([str(w) for w in line], env=environment, capture_output=True, text=True, timeout=400)
    output = done.stdout + done.stderr
    assert done.returncode == expect, output[-6000:]
    return output


@pytest.fixture(scope="module")
def chain(tmp_path_factory, tiny_gpt2):
    """`chain(name)` writes a recipe of all five stages on tiny data, with its own output folder; returns both."""
    folder = tmp_path_factory.mktemp("launchers")
    rng = random.Random(0)
    facts = [(rng.choice("cat dog bird fish tree".split()), rng.choice("red green blue".split())) for _ in range(96)]

    def write(name, rows):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"train": str(folder / name), "validation": 0.1}

    text = write("text.jsonl", [{"text": f"the {w} is {c} and the {c} {w} likes a {w}"} for w, c in facts])
    answers = write("a.jsonl", [{"prompt": f"what colour is the {w}", "completion": f"the {w} is {c}"} for w, c in facts])
    pairs = write("r.jsonl", [{"prompt": f"what is {w} {i}", "chosen": f"{w} is {c}", "rejected": f"{c} eats"} for i, (w, c) in enumerate(facts)])  # fmt: skip
    labelled = write("c.jsonl", [{"text": f"the {w} is {c}", "label": int(c == "red")} for w, c in facts])
    prompts = write("p.jsonl", [{"prompt": f"what colour is the {w} {i}"} for i, (w, _) in enumerate(facts[:20])])
    # Micro-batches of 2 rows: 4 are accumulated on one process, 2 on each of two.
    args = {"global_batch_size": 8, "per_device_train_batch_size": 2, "max_steps": STEPS, "save_steps": 2,
            "eval_steps": STEPS, "logging_steps": 1, "learning_rate": 1e-3, "report_to": []}  # fmt: skip
    short = {**args, "max_length": 32}
    sampled = {**args, "response_length": 6, "allow_no_eos": True, "learning_rate": 1e-4, "num_ppo_epochs": 2}
    stages = {
        "base": {"kind": "pretrain", "model": {"model_name_or_path": str(tiny_gpt2)}, "data": text, "args": short},
        "sft": {"kind": "sft", "model": {"model_name_or_path": "stage:base"}, "data": answers, "args": short},
        "reward": {"kind": "reward", "model": {"model_name_or_path": "stage:sft"}, "data": pairs, "args": short},
        "classify": {"kind": "classify", "model": {"model_name_or_path": "stage:base"}, "data": labelled, "args": short},
        "policy": {"kind": "ppo", "model": {"model_name_or_path": "stage:sft"}, "data": prompts, "args": sampled,
                   "reward": {"models": ["stage:reward"], "min_accuracy": 0.0}},
    }  # fmt: skip

    def chain_(name):
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"output_dir": str(folder / name), "stages": stages}, sort_keys=False))
        return path, folder / name

    return chain_


def weights(folder):
    """Every weight of every model folder of a run, by folder and name."""
    from safetensors.torch import load_file

    files = [*sorted(folder.glob("*/model.safetensors")), folder / "policy" / "critic" / "model.safetensors"]
    return {f"{path.parent.name}/{name}": w for path in files for name, w in load_file(path).items()}


def losses(folder, stage):
    entries = [json.loads(line) for line in open(folder / stage / "history.jsonl")]
    names = ("loss", "eval_perplexity", "eval_score", "objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg")
    return [e[name] for e in entries for name in names if name in e]


def assert_alike(one, two, world=2):
    """Two runs of the chain logged the same losses and ended with the same weights, up to rounding."""
    for stage in STAGES:
        a, b = losses(one, stage), losses(two, stage)
        assert len(a) >= STEPS and a == pytest.approx(b, rel=2e-3, abs=2e-3), stage
        assert json.loads((two / stage / "stage.json").read_text())["world_size"] == world
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    apart = {name: (a[name] - b[name].float()).abs().max().item() for name in a}
    assert max(apart.values()) < 1e-3, {k: v for k, v in apart.items() if v >= 1e-3}


@pytest.fixture(scope="module")
def one(chain):
    """The output folder of an uninterrupted run on one process."""
    recipe, folder = chain("one")
    launch("cpu", recipe, processes=1)
    return folder


FSDP = {"script": (ROOT / "tests" / "fsdp_on_cpu.py",)}


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_2", "fsdp2", "zero2", "zero3"])
def test_two_processes_train_as_one(chain, one, config):
    if config.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed (the extra `deepspeed`)")
    recipe, folder = chain(config)
    output = launch(config, recipe, **(FSDP if config.startswith("fsdp") else {}))
    assert_alike(one, folder)
