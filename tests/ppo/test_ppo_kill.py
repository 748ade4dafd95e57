"""kill -9 in every phase of PPO, through the real launch: the run that is started again ends with the same weights."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.__main__ import main
from pipelines.generation import decode
from pipelines.ppo import rollouts, update

ROOT = Path(__file__).parents[2]
PROMPTS = [{"prompt": f"what colour is the {w} {i}"} for i in range(8) for w in ("cat", "dog", "bird")]
TEXTS = [{"text": "the cat is red and the dog is blue"}] * 20
PHASES = ["rollout", "scoring", "update", "saving"]


def count_of_the(prompts, completions, **columns):
    """A reward function."""
    return [float(c.count("e")) + len(p) / 50 for p, c in zip(prompts, completions)]


def die_in(phase: str, method: str) -> None:
    """Replace one function by one that works a few times and then kills its own process in the midst of its work."""
    from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

    def patched(owner, name, times):
        real, left = getattr(owner, name), [times]

        def function(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(owner, name, function)

    if phase == "rollout":
        patched(decode, "inverse_cdf", 60)  # a token in the midst of an answer
    elif phase == "scoring":
        patched(rollouts.RewardScorer, "__call__", 5)
    elif phase == "update":
        patched(update.Learner, "backward", 11)  # two of four steps of the third update are done
    elif phase == "saving":
        # a checkpoint with a policy and no critic, or with a tokenizer at most
        patched(GPT2ForSequenceClassification if method == "gae" else GPT2LMHeadModel, "save_pretrained", 0)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gae", "grpo"])
def test_kill_in_each_phase_changes_nothing(tmp_path, write, recipe, tiny_gpt2, method):
    from safetensors.torch import load_file

    def chain(name):
        stage = {
            "kind": "ppo",
            "model": {"model_name_or_path": str(tiny_gpt2), "chat_template": "plain"},
            "reward": {"functions": ["tests.ppo.test_ppo_kill:count_of_the"]},
            "data": {"train": write("p.jsonl", PROMPTS), "validation": 0.2, "ptx": write("t.jsonl", TEXTS)},
            "args": {
                "global_batch_size": 8,
                "max_steps": 12,
                "response_length": 8,
                "learning_rate": 1e-3,
                "save_steps": 2,
                "eval_steps": 4,
                "advantage": method,
                "num_generations": 1 if method == "gae" else 4,
                "num_ppo_epochs": 2,
                "num_mini_batches": 2,
                "kl_target": 0.5,
                "kl_horizon": 100,
                "normalize_scores": True,
                "ptx_coef": 0.5,
                "ptx_length": 8,
                "allow_no_eos": True,
                "logging_steps": 3,
            },
        }
        return recipe({"policy": stage}, name=f"{name}.yaml", output_dir=str(tmp_path / name)), tmp_path / name

    def launch(path, phase):
        launcher = [str(Path(sys.executable).parent / "accelerate"), "launch"]
        config = ["--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml")]
        clean = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
        environment = clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PIPELINES_FAST_ENV": "0"}
        command = [*launcher, *config, str(Path(__file__)), phase, method, str(path)]
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)

    path, whole = chain("whole")
    done = launch(path, "nothing")
    assert done.returncode == 0, done.stderr[-3000:]
    path, killed = chain("killed")
    for phase in PHASES:
        done = launch(path, phase)
        assert done.returncode != 0 and "SIGKILL" in done.stderr + done.stdout, (phase, done.stderr[-3000:])
        assert not (killed / "policy" / "stage.json").exists()
    done = launch(path, "nothing")
    assert done.returncode == 0 and "is incomplete (stopped while saving)" in done.stderr, done.stderr[-3000:]
    assert "resuming from" in done.stderr
    for file in ("model.safetensors", "critic/model.safetensors")[: 2 if method == "gae" else 1]:
        one, two = (load_file(folder / "policy" / file) for folder in (whole, killed))
        assert one.keys() == two.keys()
        for name in one:
            assert one[name].equal(two[name]), name
    logs = [[json.loads(line) for line in open(folder / "policy" / "history.jsonl")] for folder in (whole, killed)]
    for one, two in zip(*logs, strict=True):
        timeless = {k for k in one if "second" not in k and "runtime" not in k}
        assert {k: one[k] for k in timeless} == {k: two[k] for k in timeless}


if __name__ == "__main__":
    die_in(*sys.argv[1:3])
    sys.exit(main([sys.argv[3]]))
