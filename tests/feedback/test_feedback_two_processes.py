"""The loop of feedback through `accelerate launch`: one and two processes write the same samples, rankings and
figures.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.feedback.stand_in_judge import serving

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
SCRIPTS = {"fsdp2": "fsdp_on_cpu.py", "zero3": "zero3_on_cpu.py"}  # what lets them cut up tiny models on a CPU
PROMPTS = [{"prompt": f"what colour is the {w} {i}"} for i in range(7) for w in ("cat", "dog", "tree")]


def start(words, processes, config=None):
    config = ROOT / "accelerate_configs" / f"{config or ('cpu' if processes == 1 else 'cpu_2')}.yaml"
    line = ["launch", "--config_file", config, "--num_processes", str(processes)]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    return subprocess.Popen(
        [Path(sys.executable).parent / "accelerate", *line, *words],
        env={**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(run):
    out, _ = run.communicate(timeout=600)
    assert run.returncode == 0, out[-3000:]
    return out


def launch(recipe, processes):
    return finish(start(["-m", "pipelines", recipe], processes))


@pytest.fixture(scope="module")
def loop(tmp_path_factory, tiny_gpt2):
    """`loop(config)` runs it with that launcher, on one process (`cpu`) or two; the output folder."""
    tmp_path = tmp_path_factory.mktemp("loop")

    def write(name, rows):
        (tmp_path / name).write_text(rows if isinstance(rows, str) else "".join(json.dumps(r) + "\n" for r in rows))
        return str(tmp_path / name)

    args = {"max_steps": 2, "global_batch_size": 4, "max_length": 64, "learning_rate": 1e-2, "report_to": []}
    prompts = write("p.jsonl", PROMPTS)
    sft_rows = write("s.jsonl", [{**p, "completion": "it is red"} for p in PROMPTS])
    stages = {
        "sft": {
            "kind": "sft",
            "model": {"model_name_or_path": str(tiny_gpt2), "chat_template": "plain"},
            "data": {"train": sft_rows},
            "args": args,
        },
        "samples": {
            "kind": "sample",
            "sample": {
                "models": [str(tiny_gpt2), "stage:sft"],
                "completions": 4,
                "response_length": 6,
                "batch_size": 8,
            },
            "data": {"train": prompts},
        },
        "rankings": {
            "kind": "rank",
            "rank": {"labeller": "tests.stages.test_stage_sample:by_length"},
            "data": {"train": "stage:samples/samples.jsonl"},
        },
        "reward": {
            "kind": "reward",
            "model": {"model_name_or_path": "stage:sft"},
            "data": {
                "train": "stage:rankings/rankings.jsonl",
                "validation": [{"path": "stage:rankings/rankings.jsonl", "rows": 5}],
            },
            "args": {**args, "tags": ["long"]},
        },
        "scores": {
            "kind": "evaluate",
            "evaluate": {
                "models": [str(tiny_gpt2), "stage:sft"],
                "text": write("t.txt", "\n".join(p["prompt"] for p in PROMPTS)),
                "pairs": sft_rows,
                "prompts": prompts,
                "judge": "stage:reward",
                "response_length": 6,
                "samples": 4,
                "best_of": 4,
                "max_length": 32,
                "rankings": "stage:rankings/rankings.jsonl",
            },
        },
    }

    def loop_(config):
        recipe, folder = tmp_path / f"{config}.yaml", tmp_path / config
        recipe.write_text(yaml.safe_dump({"output_dir": str(folder), "stages": stages}, sort_keys=False))
        words = [ROOT / "tests" / SCRIPTS[config]] if config in SCRIPTS else ["-m", "pipelines"]
        assert "sft over" in finish(start([*words, recipe], 1 if config == "cpu" else 2, config))
        return folder

    return loop_


@pytest.fixture(scope="module")
def alone(loop):
    """The output folder of one process."""
    return loop("cpu")


@pytest.mark.parametrize("config", ["cpu_2", "fsdp2", "zero2", "zero3"])
def test_the_loop_is_the_same_on_one_and_two_processes(loop, alone, config):
    """On shards too: what samples, ranks and evaluates holds whole models on each process."""
    if config.startswith("zero"):
        pytest.importorskip("deepspeed")
    runs = {1: alone, 2: loop(config)}
    one, two = (
        [(runs[n] / f).read_text() for f in ("samples/samples.jsonl", "rankings/rankings.jsonl")] for n in (1, 2)
    )
    assert one == two and len(one[0].splitlines()) == len(PROMPTS)
    one, two = (
        {stage: json.loads((runs[n] / stage / "stage.json").read_text())["metrics"] for stage in ("reward", "scores")}
        for n in (1, 2)
    )
    for name in ("accuracy", "margin", "tag_long_auc"):
        assert one["reward"][name] == pytest.approx(two["reward"][name], abs=1e-4)
    assert (
        one["scores"]["figures"].keys() == two["scores"]["figures"].keys() >= {"sft/perplexity", "sft/best_of_4/score"}
    )
    for name, figure in one["scores"]["figures"].items():
        assert figure == pytest.approx(two["scores"]["figures"][name], rel=1e-4, abs=1e-4)
    assert (runs[2] / "reward" / "tags.safetensors").exists()


def test_what_the_first_process_does_alone_may_take_longer_than_others_wait_for_each_other(tmp_path):
    script = tmp_path / "alone.py"
    script.write_text(
        "import time\nfrom pipelines import launch\nstate = launch.start(timeout=3)\n"
        "for _ in range(2):\n"
        "    with launch.first_alone() as first:\n"
        "        time.sleep(7 if first else 0)\n"
        "state.wait_for_everyone()\nprint('together', first, flush=True)\n"
    )
    out = finish(start([script], 2))
    assert "together True" in out and "together False" in out


def ranking(tmp_path, write, name, judges):
    """The path of a recipe that ranks, and the folder of its stage."""
    samples = [{"prompt": f"q{i}", "completions": ["a fish" * (1 + i % 3), "b c d", f"it is {i}"]} for i in range(8)]
    stage = {"kind": "rank", "rank": {"judge": judges}, "data": {"train": write("samples.jsonl", samples)}}
    recipe = tmp_path / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump({"output_dir": str(tmp_path / name), "stages": {"rankings": stage}}))
    return recipe, tmp_path / name / "rankings"


def check_replies(folder, server, asked):
    """Each prompt was asked about in two orders, and every reply is kept once."""
    texts = [body["messages"][0]["content"] for body in server.asked]
    assert len(set(texts)) == 16 and len(texts) == asked
    lines = [json.loads(line)["key"] for line in (folder / "judge.jsonl").read_text().splitlines()]
    assert len(lines) == len(set(lines))
    return len(lines)


def test_judges_rank_the_same_on_two_processes_and_ask_no_more(tmp_path, write, tiny_gpt2):
    """A reward model, a language model that runs here (its replies are of no use), and an endpoint."""
    torch.manual_seed(1)
    reward, writer = tmp_path / "reward", tmp_path / "writer"
    AutoModelForSequenceClassification.from_pretrained(tiny_gpt2, num_labels=1).save_pretrained(reward)
    room = AutoConfig.from_pretrained(tiny_gpt2, n_positions=2048)  # for a judge's prompt
    AutoModelForCausalLM.from_config(room).save_pretrained(writer)
    for folder in (reward, writer):
        AutoTokenizer.from_pretrained(tiny_gpt2).save_pretrained(folder)
    found = []
    for processes in (1, 2):
        with serving() as server:
            here = {"model": str(writer), "rubric": "short", "response_length": 4}
            judges = [str(reward), here, {"endpoint": server.url, "model": "judge"}]
            recipe, folder = ranking(tmp_path, write, f"on_{processes}", judges)
            launch(recipe, processes)
            assert check_replies(folder, server, 16) == 32
        counts = json.loads((folder / "stage.json").read_text())["metrics"]["judges"]
        found.append(([(folder / file).read_text() for file in ("rankings.jsonl", "best.jsonl")], counts))
    assert found[0] == found[1]
    assert len(found[0][0][0].splitlines()) == 16  # of the reward model and of the endpoint


def test_two_processes_that_are_killed_ask_only_what_is_left(tmp_path, write):
    killed = threading.Event()

    def hang(handler, number, text):
        """Half of the questions, then silence: until the run is killed."""
        return number >= 8 and not killed.wait(300)

    with serving(hang) as server:
        judge = {"endpoint": server.url, "model": "judge", "concurrency": 2}
        recipe, folder = ranking(tmp_path, write, "killed", [judge])
        run = start(["-m", "pipelines", recipe], 2)
        while len(server.asked) < 10 and run.poll() is None:
            time.sleep(0.2)
        for process in [*psutil.Process(run.pid).children(recursive=True), run]:  # they have sessions of their own
            process.kill()
        run.communicate()
        killed.set()
        launch(recipe, 2)
        assert check_replies(folder, server, 18) == 16  # two were under way
    assert len((folder / "rankings.jsonl").read_text().splitlines()) == 8
