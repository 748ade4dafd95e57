"""The loop of feedback through `accelerate launch`: one and two processes write the same samples, rankings and
figures.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
PROMPTS = [{"prompt": f"what colour is the {w} {i}"} for i in range(7) for w in ("cat", "dog", "tree")]


def launch(recipe, processes):
    config = ROOT / "accelerate_configs" / ("cpu.yaml" if processes == 1 else "cpu_2.yaml")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    done = subprocess.run(
        [Path(sys.executable).parent / "accelerate", "launch", "--config_file", config, "-m", "pipelines", recipe],
        env={**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def test_the_loop_is_the_same_on_one_and_two_processes(tmp_path, write, tiny_gpt2):
    args = {"max_steps": 2, "global_batch_size": 4, "max_length": 64, "learning_rate": 1e-2, "report_to": []}
    prompts = write("p.jsonl", PROMPTS)
    stages = {
        "sft": {
            "kind": "sft",
            "model": {"model_name_or_path": str(tiny_gpt2), "chat_template": "plain"},
            "data": {"train": write("s.jsonl", [{**p, "completion": "it is red"} for p in PROMPTS])},
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
                "prompts": prompts,
                "judge": "stage:reward",
                "response_length": 6,
                "samples": 2,
                "max_length": 32,
                "rankings": "stage:rankings/rankings.jsonl",
            },
        },
    }
    runs = {}
    for processes in (1, 2):
        folder = tmp_path / f"on_{processes}"
        recipe = tmp_path / f"{processes}.yaml"
        recipe.write_text(yaml.safe_dump({"output_dir": str(folder), "stages": stages}, sort_keys=False))
        assert "sft over" in launch(recipe, processes)
        runs[processes] = folder
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
    assert one["scores"]["figures"].keys() == two["scores"]["figures"].keys() >= {"sft/perplexity", "sft/score"}
    for name, figure in one["scores"]["figures"].items():
        assert figure == pytest.approx(two["scores"]["figures"][name], rel=1e-4, abs=1e-4)
    assert (runs[2] / "reward" / "tags.safetensors").exists()
