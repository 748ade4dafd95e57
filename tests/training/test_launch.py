"""Through the real `accelerate launch`: one and two processes train alike, and nothing is lost when a run is killed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
WORDS = "cat dog bird fish tree".split()
COLOURS = "red green blue".split()


def command(recipe, processes, *words):
    config = ROOT / "accelerate_configs" / ("cpu.yaml" if processes == 1 else "cpu_2.yaml")
    launcher = Path(sys.executable).parent / "accelerate"
    return [str(launcher), "launch", "--config_file", str(config), "-m", "pipelines", str(recipe), *words]


def environment():
    clean = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    return {**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def launch(recipe, processes=1, *words):
    done = subprocess.run(
        command(recipe, processes, *words), env=environment(), capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout + done.stderr


def start(recipe, processes, *words):
    return subprocess.Popen(
        command(recipe, processes, *words),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill(process):
    """SIGKILL to the launcher and all it started: torchrun's workers are in sessions of their own."""
    parent = psutil.Process(process.pid) if process.poll() is None else None
    for one in [*parent.children(recursive=True), parent] if parent else []:
        try:
            one.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            pass  # it ended by itself in the meantime
    process.wait()


def wait_for(path_glob, folder, process, seconds=600):
    """Until a file that matches appears below `folder` (or the process ends); after so many seconds it is killed."""
    end = time.monotonic() + seconds
    while not list(folder.glob(path_glob)) and process.poll() is None:
        if time.monotonic() > end:
            kill(process)
            raise AssertionError(f"no {path_glob} below {folder} in {seconds} s")
        time.sleep(0.02)


def weights(folder):
    from safetensors.torch import load_file

    return {
        f"{p.parent.name}/{k}": v
        for p in sorted(Path(folder).glob("*/model.safetensors"))
        for k, v in load_file(p).items()
    }


def equal(a, b):
    import torch

    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def chain(tmp_path_factory, tiny_gpt2):
    """`chain(name)` writes a recipe of pretrain, sft, reward and classify on tiny data, with its own output folder."""
    import json

    import yaml

    folder = tmp_path_factory.mktemp("chain")
    rng = random.Random(0)

    def write(name, rows):
        (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
        return str(folder / name)

    facts = [(rng.choice(WORDS), rng.choice(COLOURS)) for _ in range(240)]
    text = write("text.jsonl", [{"text": f"the {w} is {c} and the {c} {w} likes a {w}"} for w, c in facts])
    answers = write(
        "sft.jsonl", [{"prompt": f"what colour is the {w}", "completion": f"the {w} is {c}"} for w, c in facts]
    )
    pairs = write(
        "pairs.jsonl",
        [
            {"prompt": f"what is {w} {i}", "chosen": f"{w} is {c}", "rejected": f"{c} eats"}
            for i, (w, c) in enumerate(facts)
        ],
    )
    labelled = write("labelled.jsonl", [{"text": f"the {w} is {c}", "label": int(c == "red")} for w, c in facts])

    def chain_(name):
        args = {
            "global_batch_size": 8,
            "max_length": 32,
            "learning_rate": 1e-3,
            "num_train_epochs": 2,
            "save_steps": 4,
            "save_total_limit": 2,
        }
        start = {"model_name_or_path": str(tiny_gpt2)}
        stages = {
            "base": {
                "kind": "pretrain",
                "model": start,
                "data": {"train": text, "validation": 0.1},
                "args": {**args, "num_train_epochs": 4},
            },
            "sft": {
                "kind": "sft",
                "model": {"model_name_or_path": "stage:base"},
                "data": {"train": answers, "validation": 0.1},
                "args": {**args, "packing": True, "num_train_epochs": 8},
            },
            "reward": {
                "kind": "reward",
                "model": {"model_name_or_path": "stage:sft"},
                "data": {"train": pairs, "validation": 0.1},
                "args": args,
            },
            "classify": {
                "kind": "classify",
                "model": {"model_name_or_path": "stage:base"},
                "data": {"train": labelled, "validation": 0.1},
                "args": args,
            },
        }
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"output_dir": str(folder / name), "stages": stages}, sort_keys=False))
        return path, folder / name

    return chain_


@pytest.fixture(scope="module")
def whole(chain):
    """The folder of an uninterrupted one-process run."""
    recipe, folder = chain("whole")
    code, output = launch(recipe)
    assert code == 0, output
    return folder


def test_two_processes_train_as_one(chain, whole):
    import json

    recipe, folder = chain("two")
    code, output = launch(recipe, 2)
    assert code == 0, output
    one, two = weights(whole), weights(folder)
    assert one.keys() == two.keys()
    assert max((one[k] - two[k]).abs().max().item() for k in one) < 2e-3
    for stage in ("base", "sft", "reward", "classify"):
        a, b = ([json.loads(line) for line in open(f / stage / "history.jsonl")] for f in (whole, folder))
        first = [(x["loss"], y["loss"]) for x, y in zip(a, b) if "loss" in x][:2]
        assert first and all(x == pytest.approx(y, abs=2e-4) for x, y in first), (stage, first)
        assert json.loads((folder / stage / "stage.json").read_text())["world_size"] == 2


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_kill_at_random_moments_changes_nothing(chain, whole, processes):
    """kill -9 again and again, at random moments of any stage; the same command then ends with the same weights."""
    if processes == 2:
        recipe, whole = chain("whole2")
        assert launch(recipe, 2)[0] == 0
    recipe, folder = chain(f"killed{processes}")
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    for attempt in range(6):
        done = len(list(folder.glob("*/stage.json")))
        process = start(recipe, processes)
        wait_for("*/checkpoints/*/complete" if attempt % 2 else f"*[!{done}]/started.json", folder, process)
        time.sleep(rng.uniform(0, 2.5))
        kill(process)
        for record in folder.glob("*/stage.json"):  # what claims to be finished is whole
            assert (record.parent / "model.safetensors").exists()
        if len(list(folder.glob("*/stage.json"))) == 4:
            break
    code, output = launch(recipe, processes)
    assert code == 0, output
    assert equal(weights(folder), weights(whole)), f"kill seed {seed}"


def test_ctrl_c_saves_says_so_and_resumes(chain, whole):
    recipe, folder = chain("stopped")
    process = start(recipe, 1, "base")
    wait_for("base/checkpoints/*/complete", folder, process)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert "stopped at step" in output
    assert "Run the same command" in output.strip().splitlines()[-1]  # below the launcher's traceback
    assert not (folder / "base" / "stage.json").exists()
    code, output = launch(recipe, 1, "base")
    assert code == 0 and "resuming from" in output, output
    a, b = weights(folder), weights(whole)
    assert equal(a, {k: v for k, v in b.items() if k.startswith("base/")})


@pytest.mark.slow
def test_ctrl_c_of_run_on_prints_no_traceback(chain):
    recipe, folder = chain("on")
    line = [sys.executable, "-m", "pipelines", "run", str(recipe), "base", "--on", "cpu_2"]
    process = subprocess.Popen(
        line,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=ROOT,
    )
    wait_for("base/checkpoints/*/complete", folder, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: torchrun's workers are in sessions of their own
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in output, output
    assert "Run the same command" in output.strip().splitlines()[-1]


def test_a_checkpoint_that_is_not_whole_is_not_used(chain, whole):
    recipe, folder = chain("torn")
    process = start(recipe, 1, "base")
    wait_for("base/checkpoints/checkpoint-8/complete", folder, process)
    kill(process)
    newest = max(folder.glob("base/checkpoints/checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    (newest / "complete").unlink(missing_ok=True)  # as if killed while saving …
    (newest / "model.safetensors").write_bytes(b"half")  # … with half a file on disk
    code, output = launch(recipe, 1, "base")
    assert code == 0 and "incomplete (stopped while saving)" in output, output
    assert equal(weights(folder), {k: v for k, v in weights(whole).items() if k.startswith("base/")})


def test_a_world_of_the_wrong_size_is_refused(chain):
    recipe, folder = chain("world")
    launcher = str(Path(sys.executable).parent / "accelerate")
    line = [launcher, "launch", "--cpu", "--num_processes", "2", "-m", "pipelines", str(recipe)]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "2 processes were asked for (--num_processes 2), but this run sees 1" in done.stderr
    assert "error: " in done.stderr.split("Traceback")[-1]  # the reason is repeated below the launcher's traceback
    assert not list(folder.glob("*/started.json"))


def test_all_cores_are_used_unless_someone_chose(tmp_path):
    """The launcher says one thread per process when it is told nothing; then each process takes its share."""
    script = tmp_path / "show.py"
    script.write_text(
        "from pipelines import launch\n"
        "launch.fast_environment()\n"
        "launch.start()\n"
        "import torch\n"
        "print('threads', torch.get_num_threads())\n"
    )
    launcher = [str(Path(sys.executable).parent / "accelerate"), "launch", "--cpu"]
    plain = {k: v for k, v in environment().items() if k != "OMP_NUM_THREADS" and not k.startswith("PIPELINES_")}

    def threads(*options, **more):
        line = [*launcher, *options, str(script)]
        done = subprocess.run(line, env={**plain, **more}, capture_output=True, text=True, timeout=120, check=True)
        return int(done.stdout.split("threads ")[1])

    cores = min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or 1)
    assert threads() == cores
    assert threads("--num_cpu_threads_per_process", "1") == 1
    assert threads(OMP_NUM_THREADS="1") == 1
