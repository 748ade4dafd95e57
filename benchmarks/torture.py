"""Nothing lost, nothing false: kills, corrupted checkpoints and full disks, and whether the end is that of a quiet run.

    python benchmarks/torture.py                                    100 kills, 40 corruptions, 10 full disks (hours)
    python benchmarks/torture.py --kills 3 --corruptions 12 --disks 2 --processes 1

A recipe of all kinds of stages on tiny models runs once in peace. Then, through real launches on 1 and 2 processes:

    kills        `kill -9` to all processes at random moments of the whole recipe, until so many were killed
    corruptions  a file of a checkpoint is truncated, emptied, deleted, or one bit of it flipped: all files, all four
    ways full disks   the run's folder lies on a file system (tmpfs, needs root) that is too small by so many degrees

and the same command is given again. One table: `survived` ended with exit code 0 and without a traceback; `identical`
left the same weights (byte by byte) and records (times and rates aside); `lost` did not end; `false` ended with others.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORDS, COLOURS = "cat dog bird fish tree".split(), "red green blue".split()
TIMES = (
    "second",
    "runtime",
    "started",
    "finished",
    "checksum",
    "files",
    "output_dir",
    "logging_dir",
    "run_name",
    "recipe",
    "git",
)
HOW = ("truncate", "empty", "delete", "flip")


def by_length(prompt, completions):
    """A labeller: shorter is better."""
    return [len(c) for c in completions], [[] for _ in completions]


def many_e(prompts, completions, **columns):
    """A reward function."""
    return [float(c.count("e")) for c in completions]


def recipe_of_all_kinds(folder: Path) -> dict:
    """The stages, with their data written to `folder`."""
    rng = random.Random(0)
    facts = [(rng.choice(WORDS), rng.choice(COLOURS)) for _ in range(160)]

    def write(name: str, rows: list[dict]) -> str:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder / name)

    text = write("text.jsonl", [{"text": f"the {w} is {c} and the {c} {w} likes a {w}"} for w, c in facts])
    answers = write("sft.jsonl", [{"prompt": f"what colour is the {w}", "completion": f"it is {c}"} for w, c in facts])
    pairs = write(
        "pairs.jsonl",
        [
            {"prompt": f"what is {w} {i}", "chosen": f"{w} is {c}", "rejected": f"{c} eats"}
            for i, (w, c) in enumerate(facts)
        ],
    )
    labelled = write("labelled.jsonl", [{"text": f"the {w} is {c}", "label": int(c == "red")} for w, c in facts])
    translated = write("seq2seq.jsonl", [{"source": f"{w} {c}", "target": f"{c} {w}"} for w, c in facts])
    prompts = write("prompts.jsonl", [{"prompt": f"what colour is the {w} {i}"} for i, (w, _) in enumerate(facts[:32])])
    args = {
        "global_batch_size": 8,
        "max_steps": 24,
        "save_steps": 4,
        "eval_steps": 8,
        "logging_steps": 3,
        "learning_rate": 1e-3,
        "report_to": [],
    }
    gpt2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64}
    bert = {
        "model_type": "bert",
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
    }
    t5 = {"model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    with_ = lambda path: {"train": path, "validation": 0.2}
    base, sft = {"model_name_or_path": "stage:base"}, {"model_name_or_path": "stage:sft"}
    plain = {**base, "chat_template": "plain"}
    ppo = {
        **args,
        "max_steps": 8,
        "save_steps": 2,
        "response_length": 6,
        "num_ppo_epochs": 1,
        "num_mini_batches": 2,
        "kl_target": 0.5,
        "normalize_scores": True,
        "allow_no_eos": True,
    }
    return {
        "base": {
            "kind": "pretrain",
            "model": {"config": gpt2},
            "tokenizer": {"train": "bpe", "vocab_size": 320},
            "data": with_(text),
            "args": {**args, "max_length": 16},
        },
        "stream": {
            "kind": "pretrain",
            "model": base,
            "data": {"train": text, "streaming": True, "buffer_size": 32},
            "args": {**args, "max_length": 16, "eval_strategy": "no"},
        },
        "mlm": {
            "kind": "mlm",
            "model": {"config": bert},
            "tokenizer": {"train": "wordpiece", "vocab_size": 200},
            "data": with_(text),
            "args": {**args, "max_length": 32},
        },
        "sft": {"kind": "sft", "model": plain, "data": with_(answers), "args": {**args, "max_length": 32}},
        "lora": {
            "kind": "sft",
            "model": {**plain, "use_peft": True, "lora_r": 4},
            "data": with_(answers),
            "args": {**args, "max_length": 32},
        },
        "best": {
            "kind": "sft",
            "model": plain,
            "data": with_(answers),
            "args": {**args, "max_length": 32, "eval_steps": 4, "load_best_model_at_end": True},
        },
        "reward": {"kind": "reward", "model": sft, "data": with_(pairs), "args": {**args, "max_length": 32}},
        "classify": {"kind": "classify", "model": base, "data": with_(labelled), "args": {**args, "max_length": 32}},
        "seq2seq": {
            "kind": "seq2seq",
            "model": {"config": t5},
            "tokenizer": {"train": "bpe", "vocab_size": 360},
            "data": with_(translated),
            "args": {**args, "max_source_length": 24, "max_target_length": 24},
        },
        "policy": {
            "kind": "ppo",
            "model": sft,
            "data": with_(prompts),
            "args": ppo,
            "reward": {"models": ["stage:reward"], "functions": ["benchmarks.torture:many_e"], "min_accuracy": 0.0},
        },
        "samples": {
            "kind": "sample",
            "sample": {"models": ["stage:sft", "stage:policy"], "completions": 4, "response_length": 6},
            "data": {"train": prompts},
        },
        "rankings": {
            "kind": "rank",
            "rank": {"labeller": "benchmarks.torture:by_length"},
            "data": {"train": "stage:samples/samples.jsonl"},
        },
        "scores": {"kind": "evaluate", "evaluate": {"models": ["stage:base", "stage:sft"], "text": text}},
    }


# --- launching, killing, comparing ------------------------------------------------------------------------------


class Runs:
    """Launches of one recipe into folders of its own, on a number of processes."""

    def __init__(self, home: Path, stages: dict, processes: int):
        self.home, self.stages, self.processes = home, stages, processes

    def start(self, out: Path, *names: str, stages: dict | None = None) -> subprocess.Popen:
        """A launch in the background, its output in `log(out)`."""
        path = self.log(out).with_suffix(".yaml")
        path.write_text(yaml.safe_dump({"output_dir": str(out), "stages": stages or self.stages}, sort_keys=False))
        config = ROOT / "accelerate_configs" / ("cpu.yaml" if self.processes == 1 else "cpu_2.yaml")
        launcher = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", str(config)]
        clean = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
        environment = clean | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with open(self.log(out), "a") as log:
            return subprocess.Popen(
                [*launcher, "-m", "pipelines", str(path), *names],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def log(self, out: Path) -> Path:
        """Where launches into `out` are written to: never on a disk that is to be full."""
        return self.home / f"{out.parent.name}_{out.name}.log"

    def finish(self, out: Path, *names: str, stages: dict | None = None) -> tuple[int, str]:
        """Give the command and wait; `(exit code, what it printed)`."""
        log = self.log(out)
        log.unlink(missing_ok=True)
        code = self.start(out, *names, stages=stages).wait(1800)
        return code, log.read_text(errors="replace")


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the launcher and all that it started."""
    if process.poll() is None:
        parent = psutil.Process(process.pid)
        for one in [*parent.children(recursive=True), parent]:
            try:
                one.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                pass  # it ended by itself in the meantime
    process.wait()


def timeless(value, at: str = ""):
    """A record without what depends on the clock or the folder."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not any(word in k for word in TIMES) and k != "parents"}
    return [timeless(v) for v in value] if isinstance(value, list) else repr(value)


def fingerprint(stage: Path) -> dict:
    """What a finished stage left: its weights and rows byte by byte, its record and history without times."""
    record = json.loads((stage / "stage.json").read_text())
    record.pop("stage")
    lines = (stage / "history.jsonl").read_text().splitlines()
    found = {"record": timeless(record), "history": [timeless(json.loads(line)) for line in lines]}
    for pattern in ("**/*.safetensors", "samples.jsonl", "rankings.jsonl", "values.json"):
        found |= {str(p.relative_to(stage)): p.read_bytes() for p in sorted(stage.glob(pattern))}
    return found


def different(one, two, at: str = "") -> list[str]:
    """Paths of the parts in which two fingerprints differ."""
    if isinstance(one, dict) and isinstance(two, dict):
        keys = sorted(one.keys() | two.keys())
        return [line for key in keys for line in different(one.get(key), two.get(key), f"{at}/{key}")]
    return [] if one == two else [at]


class Table:
    """Counts per row of the table, and what went wrong in words."""

    def __init__(self):
        self.rows, self.faults = {}, []

    def add(self, row: str, fault: str = "", lost: bool = False) -> None:
        counts = self.rows.setdefault(row, {"tried": 0, "survived": 0, "identical": 0, "lost": 0, "false": 0})
        counts["tried"] += 1
        counts["lost" if lost else "survived"] += 1
        if not lost:
            counts["false" if fault else "identical"] += 1
        if fault:
            self.faults.append(f"{row}: {fault}")
        print(f"  {row}: {fault or 'ok'}", flush=True)

    def __str__(self) -> str:
        head = ["", "tried", "survived", "identical", "lost", "false"]
        lines = [head, *([row, *map(str, counts.values())] for row, counts in self.rows.items())]
        return "\n".join("".join(f"{cell:<26}" if i == 0 else f"{cell:>10}" for i, cell in enumerate(x)) for x in lines)


# --- the three tortures -------------------------------------------------------------------------------------------


def kills(runs: Runs, whole: dict[str, dict], seconds: float, count: int, rng: random.Random, table: Table) -> None:
    """Kill `count` launches at random moments; each time a run ends by itself, compare it and begin another."""
    row, done, number = f"kills, {runs.processes} process(es)", 0, 0
    while done < count:
        number += 1
        out, mine = runs.home / f"killed{runs.processes}_{number}", 0
        while done < count:
            process = runs.start(out)
            try:
                process.wait(rng.uniform(0.2, 1.0) * max(15.0, seconds / 3))
                break  # it got through
            except subprocess.TimeoutExpired:
                kill(process)
                done, mine = done + 1, mine + 1
        code, output = runs.finish(out)
        fault = verdict(out, whole, code, output)
        for _ in range(mine):
            table.add(row, fault, lost=code != 0)
        shutil.rmtree(out, ignore_errors=True)


def verdict(out: Path, whole: dict[str, dict], code: int, output: str) -> str:
    """What is wrong with a run that ended; "" where nothing is."""
    if code or "Traceback" in output:
        return f"exit {code}: {output.strip().splitlines()[-1] if output.strip() else ''}"
    wrong = {name: parts for name in whole if (parts := different(whole[name], fingerprint(out / name)))}
    return f"other than in peace: {wrong}" if wrong else ""


def corruptions(runs: Runs, whole_run: Path, whole: dict[str, dict], kind: str, count: int, rng, table: Table) -> None:
    """Stop the stage `kind` after its second checkpoint, copy it `count` times, damage a file of each, let all
    go on.
    """
    row = f"corrupted {kind}, {runs.processes} proc."
    out = runs.home / f"corrupt_{kind}_{runs.processes}"
    shutil.copytree(whole_run, out)
    shutil.rmtree(out / kind)
    process = runs.start(out, kind)
    while process.poll() is None and len(list(out.glob(f"{kind}/checkpoints/*/complete"))) < 2:
        time.sleep(0.01)
    kill(process)
    newest = max(out.glob(f"{kind}/checkpoints/*/complete"), key=lambda p: int(p.parent.name.split("-")[1])).parent
    names = sorted(str(p.relative_to(newest)) for p in newest.rglob("*") if p.is_file())
    cases = [(name, how) for name in names for how in HOW]
    cases = rng.sample(cases, min(count, len(cases)))
    # Copies of one stage under other names are the same training: one launch lets all of them go on.
    names = list(runs.stages)
    stages = {name: runs.stages[name] for name in names[: names.index(kind)]}
    copies = {f"{kind}_{i}": case for i, case in enumerate(cases)}
    for copy, (name, how) in copies.items():
        stages[copy] = runs.stages[kind]
        shutil.copytree(out / kind, out / copy)
        damage(out / copy / newest.relative_to(out / kind) / name, how, rng)
    left = list(copies)
    while left:
        code, output = runs.finish(out, *left, stages=stages)
        for copy in [c for c in left if (out / c / "stage.json").exists()]:
            wrong = different(whole[kind], fingerprint(out / copy))
            table.add(row, f"{copies[copy]}: {wrong}" if wrong else "")
            left.remove(copy)
        if left:
            last = output.strip().splitlines()[-1]
            table.add(row, f"{copies[left[0]]}: exit {code}: {last}", lost=True)
            left.pop(0)
    shutil.rmtree(out)


def damage(path: Path, how: str, rng: random.Random) -> None:
    """Truncate, empty or delete a file, or flip one bit of it."""
    data = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
        return
    if how == "flip" and data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes({"truncate": data[: len(data) // 2], "empty": b"", "flip": data}[how])


def full_disks(runs: Runs, whole: dict[str, dict], needed: int, count: int, table: Table) -> None:
    """Run on a file system that holds a part of what is needed; then make room and give the command again."""
    row = f"full disks, {runs.processes} process(es)"
    for number in range(count):
        mount = runs.home / f"disk{runs.processes}_{number}"
        mount.mkdir()
        size = int(needed * (number + 0.5) / count)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", mount], check=True)
        try:
            code, output = runs.finish(mount / "run")
            said = [line for line in output.splitlines() if "error:" in line and "full" in line]
            subprocess.run(["mount", "-o", f"remount,size={needed * 40}", mount], check=True)
            fault = "" if code == 0 or (code == 1 and said) else f"exit {code}, {said}"
            if "Traceback" in output.partition("ChildFailedError")[0].replace(
                'Traceback (most recent call last):\n  File "' + sys.prefix + "/bin/accelerate", ""
            ):
                fault = "a traceback"
            code, output = runs.finish(mount / "run")
            table.add(row, fault or verdict(mount / "run", whole, code, output), lost=code != 0)
        finally:
            subprocess.run(["umount", mount], check=True)


def main() -> int:
    """Run what is asked for, print the table; the exit code is 0 where everything survived and is identical."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="in all, shared by the numbers of processes (100)")
    parser.add_argument(
        "--corruptions", type=int, default=40, help="of each of --kinds, on each number of processes (40)"
    )
    parser.add_argument("--disks", type=int, default=10, help="full disks, on one process; needs root (10)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes (1 2)")
    parser.add_argument(
        "--kinds",
        nargs="+",
        default=["stream", "sft", "lora", "best", "reward", "policy"],
        help="stages whose checkpoints are corrupted",
    )
    parser.add_argument("--only", nargs="+", default=[], help="stages of the recipe (with all that they build on)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    args = parser.parse_args()
    rng, table = random.Random(args.seed), Table()
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        home = Path(home)
        stages = recipe_of_all_kinds(home)
        stages = {name: stage for name, stage in stages.items() if name in args.only or not args.only}
        for processes in args.processes:
            runs, began = Runs(home, stages, processes), time.monotonic()
            quiet = home / f"quiet{processes}"
            code, output = runs.finish(quiet)
            if code:
                print(f"the quiet run ended with {code}:\n{output[-2000:]}", file=sys.stderr)
                return 1
            seconds = time.monotonic() - began
            print(f"a quiet run on {processes} process(es): {seconds:.0f} s", flush=True)
            whole = {name: fingerprint(quiet / name) for name in stages}
            for kind in [kind for kind in args.kinds if kind in stages and args.corruptions]:
                corruptions(runs, quiet, whole, kind, args.corruptions, rng, table)
            share = args.kills // len(args.processes)
            kills(runs, whole, seconds, share, rng, table)
            if args.disks and processes == 1:
                needed = sum(p.stat().st_size for p in quiet.rglob("*") if p.is_file())
                full_disks(runs, whole, needed, args.disks, table)
    print(f"\n{table}\n" + "\n".join(table.faults))
    return 1 if table.faults else 0


if __name__ == "__main__":
    sys.exit(main())
