"""Data under `accelerate launch`: rows are encoded by one process and kept while nothing changes; a stream is dealt out
to one and to two processes in the same order, encoded once, and goes on in place when it is killed."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml

ROOT = Path(__file__).parents[2]
TEXT = [
    f"the {a} is {c} and the {a} likes {n} fish"
    for a in ("cat", "dog", "bird")
    for c in ("red", "blue")
    for n in range(20)
]
ARGS = {
    "global_batch_size": 8,
    "per_device_train_batch_size": 2,
    "max_steps": 10,
    "save_steps": 1,
    "save_total_limit": 1,
    "logging_steps": 1,
    "report_to": [],
    "learning_rate": 1e-3,
    "warmup_steps": 0,
}
pytestmark = pytest.mark.slow


def start(folder, stages, processes, name, config="cpu_2", script="watched"):
    """`accelerate launch` of these stages, watched; the output goes to `folder/name`."""
    recipe, watched = folder / f"{name}.yaml", folder / f"{name}.watched"
    recipe.write_text(yaml.safe_dump({"output_dir": str(folder / name), "stages": stages}, sort_keys=False))
    watched.mkdir(exist_ok=True)
    config = ROOT / "accelerate_configs" / f"{config if processes > 1 else 'cpu'}.yaml"
    command = [
        Path(sys.executable).parent / "accelerate",
        "launch",
        "--config_file",
        config,
        "--num_processes",
        processes,
    ]
    command = [str(word) for word in (*command, ROOT / "tests" / f"{script}.py", recipe)]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "WATCHED": str(watched)}
    return subprocess.Popen(
        command,
        env={**clean, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def launch(*args, **settings):
    process = start(*args, **settings)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output[-3000:]
    return output


def noted(folder, name, kind, empty=False):
    """What each process noted, by rank."""
    found = {}
    for path in sorted((folder / f"{name}.watched").glob(f"{kind}-*.jsonl")):
        found[int(path.stem[-1])] = [json.loads(line) for line in path.read_text().splitlines()]
        if empty:
            path.unlink()
    return found


def weights(folder):
    from safetensors.torch import load_file

    return {
        f"{p.parent.name}/{k}": v for p in sorted(folder.glob("*/model.safetensors")) for k, v in load_file(p).items()
    }


def losses(folder, stage):
    entries = [json.loads(line) for line in (folder / stage / "history.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_gpt2):
    """A folder with rows, and the stages that read them as a stream."""
    folder = tmp_path_factory.mktemp("data")
    rows = {
        "text": [{"text": text} for text in TEXT],
        "answers": [{"prompt": "what is it", "completion": text} for text in TEXT],
        "pairs": [{"prompt": "what", "chosen": text, "rejected": "not " + text} for text in TEXT],
    }
    for name, own in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    gpt2 = {"model_name_or_path": str(tiny_gpt2)}
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
    part = lambda name, size: {"train": str(folder / f"{name}.jsonl"), "streaming": True, "buffer_size": size}
    streams = {
        "base": {"kind": "pretrain", "model": gpt2, "data": part("text", 24), "args": {**ARGS, "max_length": 16}},
        "words": {
            "kind": "mlm",
            "model": {"config": bert},
            "data": part("text", 24),
            "args": {**ARGS, "max_length": 16},
            "tokenizer": {"train": "wordpiece", "vocab_size": 200, "max_documents": 40},
        },
        "answers": {
            "kind": "sft",
            "model": gpt2,
            "data": part("answers", 50),
            "args": {**ARGS, "packing": True, "max_length": 64},
        },
    }
    return folder, streams


def test_rows_are_encoded_by_one_process_and_once(files):
    folder, streams = files
    stages = {
        "answers": {**streams["answers"], "data": {"train": str(folder / "answers.jsonl")}},
        "reward": {
            "kind": "reward",
            "model": streams["answers"]["model"],
            "data": {"train": str(folder / "pairs.jsonl")},
            "args": {**ARGS, "max_steps": 2},
        },
    }
    both = sorted(TEXT + TEXT + ["not " + text for text in TEXT])
    launch(folder, stages, 2, "once")
    assert {rank: sorted(texts) for rank, texts in noted(folder, "once", "encoded", empty=True).items()} == {0: both}

    # made again with another learning rate, and with another row
    for name, stage in stages.items():
        stage["args"] = {**stage["args"], "learning_rate": 1e-4}
        (folder / "once" / name).rename(folder / f"{name}.first")
    assert "already encoded" in launch(folder, stages, 2, "once")
    assert noted(folder, "once", "encoded", empty=True) == {}
    path = folder / "answers.jsonl"
    whole = path.read_text()
    path.write_text(whole.replace(TEXT[7], "something else"))
    for name in stages:
        (folder / "once" / name).rename(folder / f"{name}.second")
    launch(folder, stages, 2, "once")
    assert {rank: sorted(texts) for rank, texts in noted(folder, "once", "encoded").items()} == {
        0: sorted([*TEXT[:7], "something else", *TEXT[8:]])
    }
    path.write_text(whole)


@pytest.fixture(scope="module")
def two(files):
    """The output folder of the streams on two processes, uninterrupted."""
    folder, streams = files
    launch(folder, streams, 2, "two")
    return folder / "two"


def test_one_and_two_processes_are_dealt_the_same_steps(files, two):
    folder, streams = files
    launch(folder, streams, 1, "one")
    assert [sum(map(len, noted(folder, name, "handed").values())) for name in ("one", "two")] == [240, 240]
    ones, twos = noted(folder, "one", "handed")[0], noted(folder, "two", "handed")
    for stage in range(3):
        one = dict(map(lambda item: (item[0], item[1]), ones[80 * stage : 80 * stage + 80]))
        parts = [
            dict(map(lambda item: (item[0], item[1]), twos[rank][40 * stage : 40 * stage + 40])) for rank in (0, 1)
        ]
        assert not parts[0].keys() & parts[1].keys() and parts[0] | parts[1] == one
        for step in range(10):  # each process has its half of every step
            assert all(sum(8 * step <= number < 8 * step + 8 for number in part) == 4 for part in parts)
    for name in streams:
        assert losses(folder / "one", name) == pytest.approx(losses(two, name), abs=2e-3), name
        assert len(losses(two, name)) == 10 and losses(two, name)[-1] < losses(two, name)[0]
    a, b = weights(folder / "one"), weights(two)
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-3) for k in a)


def test_each_row_of_a_stream_is_encoded_by_one_process(files, two):
    shares = noted(files[0], "two", "encoded")
    answers = [[text for text in shares[rank] if text in TEXT] for rank in (0, 1)]
    assert 0.8 < len(answers[0]) / len(answers[1]) < 1.25
    assert {*answers[0]} != {*answers[1]}


@pytest.mark.parametrize("config, script", [("fsdp2", "fsdp_on_cpu"), ("zero2", "watched")])
def test_a_stream_on_sharded_processes(files, two, config, script):
    if config == "zero2" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed (the extra `deepspeed`)")
    folder, streams = files
    launch(folder, {"base": streams["base"]}, 2, config, config=config, script=script)
    assert losses(folder / config, "base") == pytest.approx(losses(two, "base"), abs=2e-3)


@pytest.mark.parametrize("stage, after", [("base", 2), ("answers", 2), ("answers", 1)])
def test_a_killed_stream_goes_on_in_place(files, two, stage, after):
    folder, streams = files
    only, name = {stage: streams[stage]}, f"killed_{stage}_{after}"
    process = start(folder, only, 2, name)
    end = time.monotonic() + 300
    while not list(folder.glob(f"{name}/{stage}/checkpoints/checkpoint-[3-9]/complete")) and process.poll() is None:
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)
    parent = psutil.Process(process.pid)
    for one in [parent, *parent.children(recursive=True)]:  # torchrun's workers are in sessions of their own
        one.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / name / stage / "stage.json").exists()
    noted(folder, name, "handed", empty=True)
    noted(folder, name, "encoded", empty=True)
    assert f"{stage}: resuming from" in launch(folder, only, after, name)
    handed = {number: rows for part in noted(folder, name, "handed").values() for number, rows in part}
    assert min(handed) >= 8 * 3  # nothing is trained on again
    a = {k: v for k, v in weights(two).items() if k.startswith(stage)}
    b = weights(folder / name)
    same = torch.equal if after == 2 else lambda x, y: torch.allclose(x, y, atol=1e-3)
    assert a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
