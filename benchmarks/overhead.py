"""What the chain itself costs: over the bare trainer, for `check`, for `--help`, and from launch to the first step.

    python benchmarks/overhead.py [--repeat 3]

Prints CPU seconds (children included) as medians, each beside its bar. The chain's own cost is the time of a run less
the time spent inside the stages (loading, training and saving, which a bare script does too).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUN_TIMED = """
import sys, time
from pipelines import chain, launch, recipe
launch.start()
loaded = recipe.load(sys.argv[1])
inside = 0.0
import pipelines.stages.pretrain as stage
run = stage.run
def timed(s):
    global inside
    begin = time.monotonic(); out = run(s); inside += time.monotonic() - begin
    return out
stage.run = timed
begin = time.monotonic()
chain.run(loaded)
total = time.monotonic() - begin
print("TIMES", total, inside)
"""


def cpu_seconds(command: list[str]) -> float:
    """CPU seconds of a command and all its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=env)
    output = process.stdout.read()
    if process.wait() != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{output}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def median(repeat: int, command: list[str]) -> float:
    """Median CPU seconds over `repeat` runs after one to warm the disk cache."""
    cpu_seconds(command)
    return statistics.median(cpu_seconds(command) for _ in range(repeat))


def recipe(folder: Path, steps: int, name: str) -> Path:
    """A recipe that pretrains a tiny GPT-2 for `steps` steps."""
    text = folder / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"row {i} of a small corpus of rows " * 8}) + "\n" for i in range(2000))
    )
    path = folder / f"{name}.yaml"
    path.write_text(
        f"output_dir: {folder / name}\nstages:\n  base:\n    kind: pretrain\n"
        "    model: {config: {model_type: gpt2, n_layer: 4, n_embd: 256, n_head: 4, n_positions: 256}}\n"
        "    tokenizer: {train: bpe, vocab_size: 400}\n"
        f"    data: {{train: {text}}}\n"
        f"    args: {{max_length: 256, global_batch_size: 4, max_steps: {steps}, report_to: none}}\n"
    )
    return path


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150, help="length of the training whose overhead is measured")
    args = parser.parse_args()
    python, accelerate = sys.executable, str(Path(sys.executable).parent / "accelerate")
    import torch

    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        line = "{:<58}{:>10}   {}"
        print(line.format("", "measured", "bar"))
        for verb, bar in (["--help"], "0.5 s"), (["check", "recipes/demo.yaml"], "3 s"):
            print(
                line.format(
                    f"pipelines {' '.join(verb)} (CPU s)",
                    f"{median(args.repeat, [python, '-m', 'pipelines', *verb]):.2f}",
                    bar,
                )
            )
        script = folder / "run_timed.py"
        script.write_text(RUN_TIMED)
        shares = []
        for i in range(args.repeat):
            out = subprocess.run(
                [python, str(script), str(recipe(folder, args.steps, f"t{i}"))],
                cwd=ROOT,
                text=True,
                capture_output=True,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"},
            )
            total, inside = map(float, out.stdout.split("TIMES")[1].split())
            shares.append((total / inside - 1, total - inside, total))
        share, seconds, total = sorted(shares)[len(shares) // 2]
        print(
            line.format(
                f"chain over its stages ({total:.0f} s of training; wall)", f"{share:.2%}", f"2 %  ({seconds:.2f} s)"
            )
        )
        launch = [accelerate, "launch", "--cpu", "--num_processes", "1", "-m"]
        peer = median(args.repeat, [*launch, "timeit", "-n1", "-r1", "from trl import SFTTrainer"])
        ours = [cpu_seconds([*launch, "pipelines", str(recipe(folder, 1, f"f{i}"))]) for i in range(args.repeat)]
        print(line.format("accelerate launch + import trl.SFTTrainer (CPU s)", f"{peer:.2f}", ""))
        print(
            line.format(
                "launch to the end of a 1-step stage, saved (CPU s)",
                f"{statistics.median(ours):.2f}",
                "0.75 x the line above",
            )
        )


if __name__ == "__main__":
    main()
