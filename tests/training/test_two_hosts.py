"""Two machines, as two network namespaces joined by a cable: a recipe runs across them as on one, a cut cable ends both
sides with a clear error in bounded time, and the same command goes on to the same weights."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from test_launch import kill

ROOT = Path(__file__).parents[2]
TIMEOUT = 15  # seconds after which a process gives the others up: the recipe's args.ddp_timeout
pytestmark = pytest.mark.slow


def ip(*words):
    return subprocess.run(["ip", *map(str, words)], capture_output=True, text=True, check=True)


@pytest.fixture(scope="module")
def hosts():
    """`[(namespace, its interface), …]` of two hosts, 10.99.0.1 and 10.99.0.2."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    tag = f"pl{os.getpid() % 10000}"
    made = [(f"{tag}a", f"{tag}v0"), (f"{tag}b", f"{tag}v1")]
    try:
        for namespace, _ in made:
            ip("netns", "add", namespace)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")
    try:
        ip("link", "add", made[0][1], "netns", made[0][0], "type", "veth", "peer", made[1][1], "netns", made[1][0])
        for number, (namespace, interface) in enumerate(made, 1):
            ip("-n", namespace, "addr", "add", f"10.99.0.{number}/24", "dev", interface)
            ip("-n", namespace, "link", "set", interface, "up")
            ip("-n", namespace, "link", "set", "lo", "up")
        yield made
    finally:
        for namespace, _ in made:
            ip("netns", "del", namespace)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_gpt2):
    """`recipe(name)` writes a recipe of one pretraining stage with its own output folder; returns both."""
    folder = tmp_path_factory.mktemp("hosts")
    rng = random.Random(0)
    words = "cat dog bird fish tree red green blue".split()
    text = folder / "text.jsonl"
    rows = [{"text": " ".join(rng.choices(words, k=30))} for _ in range(300)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = {
        "global_batch_size": 8,
        "max_length": 32,
        "max_steps": 120,
        "save_steps": 5,
        "learning_rate": 1e-3,
        "report_to": [],
        "ddp_timeout": TIMEOUT,
    }
    stage = {
        "kind": "pretrain",
        "model": {"model_name_or_path": str(tiny_gpt2)},
        "data": {"train": str(text)},
        "args": args,
    }

    def recipe_(name):
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"output_dir": str(folder / name), "stages": {"base": stage}}))
        return path, folder / name / "base"

    return recipe_


def start(config, recipe, *options, host=None):
    """`accelerate launch` of the recipe, inside `host` (a namespace and its interface) where one is given."""
    config = ROOT / "accelerate_configs" / f"{config}.yaml"
    line = [Path(sys.executable).parent / "accelerate", "launch", "--config_file", config, *options]
    line = [*(("ip", "netns", "exec", host[0]) if host else ()), *line, "-m", "pipelines", recipe]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    clean |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    clean |= {"GLOO_SOCKET_IFNAME": host[1]} if host else {}
    return subprocess.Popen(
        [str(w) for w in line], env=clean, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def start_both(hosts, recipe):
    """The command of each of the two machines, one process each."""
    options = ["--num_processes", 2, "--main_process_ip", "10.99.0.1"]
    return [start("ddp_multi", recipe, *options, "--machine_rank", n, host=host) for n, host in enumerate(hosts)]


def end(processes, timeout=300):
    """`[(exit code, output), …]`; whatever still runs after `timeout` seconds is killed, and fails the test."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            kill(process)
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def same_weights(a, b):
    import torch
    from safetensors.torch import load_file

    one, two = (load_file(folder / "model.safetensors") for folder in (a, b))
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_two_hosts_train_as_one_and_survive_a_cut_cable(hosts, recipe):
    path, one_host = recipe("one_host")
    [(code, output)] = end([start("cpu_2", path)])
    assert code == 0, output[-3000:]

    path, across = recipe("across")
    for code, output in end(start_both(hosts, path)):
        assert code == 0, output[-3000:]
    assert same_weights(one_host, across)
    assert json.loads((across / "stage.json").read_text())["world_size"] == 2

    path, cut = recipe("cut")
    processes = start_both(hosts, path)
    limit = time.monotonic() + 200
    while not list(cut.glob("checkpoints/checkpoint-*/complete")):
        assert time.monotonic() < limit and all(p.poll() is None for p in processes), end(processes, 5)
        time.sleep(0.02)
    ip("-n", hosts[0][0], "link", "set", hosts[0][1], "down")
    began = time.monotonic()
    ended = end(processes, timeout=200)
    took = time.monotonic() - began
    for code, output in ended:
        assert code != 0 and "lost the others, or the network to them" in output, output[-4000:]
        assert "The same command (on every machine) goes on from the last checkpoint" in output
    assert not (cut / "stage.json").exists() and took < 150, took

    ip("-n", hosts[0][0], "link", "set", hosts[0][1], "up")
    ended = end(start_both(hosts, path))
    assert all(code == 0 for code, _ in ended) and "resuming from" in ended[0][1], ended
    assert same_weights(one_host, cut)
