"""Masked words, weighted classes and translation through `accelerate launch`: one and two processes train alike, and a
run of two processes that is killed ends with the weights of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from pipelines.data import train_tokenizer

ROOT = Path(__file__).parents[2]
THINGS, COLOURS = ["otter", "kettle", "wagon", "lantern"], ["red", "green", "blue", "yellow"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """`chain(name)` writes the recipe of the three stages with an output folder of its own; returns both."""

    folder = tmp_path_factory.mktemp("stages")
    chance = random.Random(0)
    facts = [(chance.choice(THINGS), chance.choices(COLOURS, weights=[6, 1, 1, 1])[0]) for _ in range(200)]

    def write(name, rows):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder / name)

    text = write("text.jsonl", [{"text": f"the {thing} is {colour} ."} for thing, colour in facts])
    labelled = write(
        "labelled.jsonl", [{"text": f"the {t} is {c} ." * (1 + i % 3), "label": c} for i, (t, c) in enumerate(facts)]
    )
    pairs = write(
        "pairs.jsonl",
        [{"source": f"the {t} is {c}" + " ." * (i % 4), "target": f"{c} {t}"} for i, (t, c) in enumerate(facts)],
    )
    train_tokenizer.train_wordpiece([f"the {t} is {c} ." for t, c in facts], vocab_size=120).save_pretrained(
        folder / "tokenizer"
    )
    bert = {
        "model_type": "bert",
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    t5 = {
        "model_type": "t5",
        "d_model": 32,
        "d_kv": 16,
        "d_ff": 64,
        "num_layers": 1,
        "num_heads": 2,
        "dropout_rate": 0.0,
    }
    # Micro-batches of 2 rows: 4 are accumulated on one process, 2 on each of two.
    args = {
        "global_batch_size": 8,
        "per_device_train_batch_size": 2,
        "max_steps": 16,
        "save_steps": 1,
        "eval_steps": 8,
        "logging_steps": 1,
        "report_to": [],
        "learning_rate": 1e-3,
    }
    stages = {
        "words": {
            "kind": "mlm",
            "model": {"config": bert, "tokenizer_name_or_path": str(folder / "tokenizer")},
            "data": {"train": text, "validation": [{"path": text, "rows": 61}]},
            "args": {**args, "max_length": 16},
        },
        "colours": {
            "kind": "classify",
            "model": {"model_name_or_path": "stage:words"},
            "task": {"class_weights": "balanced"},
            "data": {"train": labelled, "validation": [{"path": labelled, "rows": 37}]},
            "args": args,
        },
        "translate": {
            "kind": "seq2seq",
            "model": {"config": t5},
            "tokenizer": {"train": "bpe", "vocab_size": 300},
            "data": {"train": pairs, "validation": [{"path": pairs, "rows": 37}]},
            "args": {**args, "max_source_length": 16, "max_target_length": 16},
        },
    }

    def chain_(name):
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"output_dir": str(folder / name), "stages": stages}, sort_keys=False))
        return path, folder / name

    return chain_


def start(recipe, processes):
    config = ROOT / "accelerate_configs" / ("cpu.yaml" if processes == 1 else "cpu_2.yaml")
    command = [
        str(Path(sys.executable).parent / "accelerate"),
        "launch",
        "--config_file",
        str(config),
        "-m",
        "pipelines",
        str(recipe),
    ]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    environment = {**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def launch(recipe, processes):
    process = start(recipe, processes)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output[-3000:]
    return output


def weights(folder):
    from safetensors.torch import load_file

    found = {
        f"{p.parent.name}/{k}": v for p in sorted(folder.glob("*/model.safetensors")) for k, v in load_file(p).items()
    }
    assert len({name.split("/")[0] for name in found}) == 3
    return found


def log(folder, stage):
    entries = [json.loads(line) for line in (folder / stage / "history.jsonl").read_text().splitlines()]
    return [e["loss"] for e in entries if "loss" in e], [e["eval_loss"] for e in entries if "eval_loss" in e]


@pytest.fixture(scope="module")
def two(chain):
    """The output folder of an uninterrupted run on two processes."""
    recipe, folder = chain("two")
    launch(recipe, 2)
    return folder


def test_one_and_two_processes_train_alike(chain, two):
    recipe, one = chain("one")
    launch(recipe, 1)
    for stage in ("words", "colours", "translate"):
        (train_one, eval_one), (train_two, eval_two) = log(one, stage), log(two, stage)
        assert len(train_one) == 16 and train_one == pytest.approx(train_two, abs=2e-3), stage
        assert eval_one == pytest.approx(eval_two, abs=1e-3), stage
    a, b = weights(one), weights(two)
    for name in a:
        assert torch.allclose(a[name], b[name], atol=1e-3), name


@pytest.mark.parametrize("stage", ["words", "translate"])
def test_killed_in_the_middle_of_a_stage(chain, two, stage):
    recipe, folder = chain(f"killed_{stage}")
    process = start(recipe, 2)
    end = time.monotonic() + 300
    while not list(folder.glob(f"{stage}/checkpoints/checkpoint-*/complete")) and process.poll() is None:
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)
    parent = psutil.Process(process.pid)
    for one in [parent, *parent.children(recursive=True)]:  # torchrun's workers are in sessions of their own
        one.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / stage / "stage.json").exists()
    assert f"{stage}: resuming from" in launch(recipe, 2)
    a, b = weights(two), weights(folder)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
