"""Nothing lost, nothing false: kills, corrupted checkpoints and full disks, and whether the end is that of a quiet run.

    python benchmarks/torture.py    100 kills, 40 corruptions of each training stage, 10 full disks, in all four worlds
    python benchmarks/torture.py --kills 3 --corruptions 12 --disks 2 --worlds one --only base sft

A recipe of all kinds of stages on tiny models runs once in peace, through `accelerate launch`. Then, in every world
(one process, two, two with FSDP2 or ZeRO-2 over gloo):

    kills         `kill -9` at random moments of the whole recipe, half of them as soon as something is written next, to
                  all processes or to one of them (the launcher then ends the others); every second round is a `--redo`
    corruptions   a file of a checkpoint, or of the encoded rows, is truncated, emptied, deleted, or one bit of it
                  flipped: every file, all four ways
    full disks    the run's folder lies on a file system (tmpfs, needs root) that is too small by so many degrees

and the same command is given again. One table: `survived` ended with exit code 0 and without a traceback; `identical`
left the same files (byte by byte) and records (times and rates aside); `lost` did not end; `false` ended with others.

Libraries take seconds to import, so the launches that are killed are forked from a process that has imported them, each
with the environment that the launcher gives. The quiet run is not: it shows that both end the same.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import json
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
WORDS, COLOURS = "cat dog bird fish tree".split(), "red green blue".split()
# Fields of records that depend on the clock, on the folder, or (files, checksum) on the former two.
TIMES = ("second", "runtime", "started", "finished", "checksum", "output_dir", "logging_dir", "run_name", "recipe")
TIMES += ("files", "git_commit", "parents")
DATED = ("stage.json", "history.jsonl", "README.md", "started.json")  # compared without times, or not at all
COUNTED = ("corruptions", "kills", "disks")
HOW = ("truncate", "empty", "delete", "flip")
ENVIRONMENT = {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
ENVIRONMENT |= {"TOKENIZERS_PARALLELISM": "false"}
RANKED = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "MASTER_PORT", "TORCHELASTIC_", "PWD", "SHLVL", "_")


def by_length(prompt, completions):
    """A labeller: shorter is better."""
    return [len(c) for c in completions], [[] for _ in completions]


def many_e(prompts, completions, **columns):
    """A reward function."""
    return [float(c.count("e")) for c in completions]


@dataclass(frozen=True)
class World:
    """How a recipe is launched."""

    title: str
    config: str  # of accelerate_configs/
    processes: int
    share: int  # of the trials, in proportion to those of the other worlds
    script: tuple[str, ...] = ("-m", "pipelines")
    without: tuple[str, ...] = ()  # stages that it cannot run


WORLDS = {
    "one": World("1 process", "cpu", 1, 8),
    "two": World("2 processes", "cpu_2", 2, 6),
    "fsdp2": World("2 processes, FSDP2", "fsdp2", 2, 3, (str(ROOT / "tests" / "fsdp_on_cpu.py"),)),
    "zero2": World("2 processes, ZeRO-2", "zero2", 2, 3),
}


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
        "max_steps": 12,
        "save_steps": 3,
        "eval_steps": 6,
        "logging_steps": 2,
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
        "max_steps": 6,
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
            "args": {**args, "max_length": 32, "eval_steps": 3, "load_best_model_at_end": True},
        },
        "reward": {"kind": "reward", "model": sft, "data": with_(pairs), "args": {**args, "max_length": 32}},
        "dpo": {"kind": "dpo", "model": sft, "data": with_(pairs), "args": {**args, "max_length": 32}},
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


class Launch:
    """Processes forked from this one, each a rank of a run."""

    def __init__(self, pids: list[int]):
        self.codes: dict[int, int | None] = dict.fromkeys(pids)

    def code(self) -> int | None:
        """The exit code, of a process that failed where one did; None while any works. As a launcher does, it ends the
        others when one has failed.
        """
        for pid in [pid for pid, code in self.codes.items() if code is None]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        if any(self.codes.values()) and None in self.codes.values():
            self.kill(signal.SIGTERM)
        return None if None in self.codes.values() else next(filter(None, self.codes.values()), 0)

    def wait(self, seconds: float) -> int | None:
        """`code` as soon as there is one, None after so many seconds."""
        end = time.monotonic() + seconds
        while (code := self.code()) is None and time.monotonic() < end:
            time.sleep(0.02)
        return code

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send all processes a signal and wait for them, five seconds (a launcher waits 30) until it is SIGKILL."""
        end = time.monotonic() + 5
        living = [pid for pid, code in self.codes.items() if code is None]
        for pid in living:
            os.kill(pid, number)
        while living:
            for pid in list(living):
                if time.monotonic() > end:
                    os.kill(pid, signal.SIGKILL)
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
                    living.remove(pid)
            time.sleep(0.005)

    def kill_one(self, rng: random.Random) -> None:
        """SIGKILL to one process of several."""
        os.kill(rng.choice([pid for pid, code in self.codes.items() if code is None]), signal.SIGKILL)


class Runs:
    """Launches of one recipe in one world, into folders of its own."""

    def __init__(self, home: Path, stages: dict, world: World):
        self.home, self.world = home, world
        self.stages = {name: stage for name, stage in stages.items() if name not in world.without}
        for stage in self.stages.values():
            for section in (stage.get("sample", {}), stage.get("evaluate", {})):
                if "models" in section:
                    section["models"] = [m for m in section["models"] if m.removeprefix("stage:") in self.stages]
        script = home / "environment.py"
        script.write_text("import json, os\nprint('environment', json.dumps(dict(os.environ)), flush=True)\n")
        lines = self._launched(str(script)).communicate()[0].splitlines()
        found = next(json.loads(line.partition(" ")[2]) for line in lines if line.startswith("environment "))
        self.environment = {k: v for k, v in found.items() if not k.startswith(RANKED) and os.environ.get(k) != v}

    def _launched(self, *words: str) -> subprocess.Popen:
        config = ROOT / "accelerate_configs" / f"{self.world.config}.yaml"
        launcher = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", str(config)]
        clean = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
        return subprocess.Popen(
            [*launcher, "--num_processes", str(self.world.processes), *words],
            cwd=ROOT,
            env=clean | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def recipe(self, out: Path, stages: dict | None = None) -> Path:
        path = self.log(out).with_suffix(".yaml")
        path.write_text(yaml.safe_dump({"output_dir": str(out), "stages": stages or self.stages}, sort_keys=False))
        return path

    def log(self, out: Path) -> Path:
        """Where launches into `out` print to: never on a disk that is to be full."""
        return self.home / f"{out.parent.name}_{out.name}.log"

    def quiet(self, out: Path) -> tuple[int, str]:
        """A run by the real launcher, as people start it."""
        process = self._launched(*self.world.script, str(self.recipe(out)))
        output = process.communicate(timeout=3600)[0]
        return process.returncode, output

    def start(self, out: Path, *words: str, stages: dict | None = None) -> Launch:
        """A launch in the background, of processes that begin where a new one has imported its libraries."""
        line, log, port = [str(self.recipe(out, stages)), *words], self.log(out), free_port()
        sys.stdout.flush()
        sys.stderr.flush()
        pids = []
        for rank in range(self.world.processes):
            pid = os.fork()
            if not pid:
                self._work(line, log, rank, port)
            pids.append(pid)
        return Launch(pids)

    def _work(self, line: list[str], log: Path, rank: int, port: int) -> None:
        """What a forked process does, to its end."""
        import numpy as np  # with the others of `warm`
        import torch

        from pipelines import __main__ as main
        from tests import fsdp_on_cpu

        code = 1
        try:
            os.setsid()
            stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(stream, 1)
            os.dup2(stream, 2)
            os.environ |= self.environment
            if self.world.processes > 1:
                world = str(self.world.processes)
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
                os.environ |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": str(port)}
            random.seed()  # each is as random as a new process
            np.random.seed()
            torch.seed()
            os.chdir(ROOT)
            if self.world.config.startswith("fsdp"):
                fsdp_on_cpu.allow()
            code = main.main(["run", *line])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def finish(self, out: Path, *words: str, stages: dict | None = None) -> tuple[int | None, str]:
        """Give the command and wait; `(exit code, what it printed)`, None for one that hangs."""
        log = self.log(out)
        log.unlink(missing_ok=True)
        launch = self.start(out, *words, stages=stages)
        code = launch.wait(1800)
        launch.kill()
        return code, log.read_text(errors="replace")

    def peak(self, out: Path) -> int:
        """Run all; the most bytes that the folder held at any moment, checkpoints included."""
        launch, most = self.start(out), 0
        while launch.wait(0.05) is None:
            most = max(most, used(out))
        return most


def used(folder: Path) -> int:
    """Bytes on a file system that gives each file whole pages, as tmpfs does."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += -(-os.stat(os.path.join(place, name)).st_size // 4096) * 4096
    return total


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def timeless(value):
    """A record without what depends on the clock or the folder."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not any(word in k for word in TIMES)}
    return [timeless(v) for v in value] if isinstance(value, list) else repr(value)


def fingerprint(stage: Path) -> dict:
    """What a finished stage left: its files byte by byte, its record and history without times."""
    record = json.loads((stage / "stage.json").read_text())
    record.pop("stage")
    lines = (stage / "history.jsonl").read_text().splitlines()
    found = {"record": timeless(record), "history": [timeless(json.loads(line)) for line in lines]}
    for path in sorted(p for p in stage.rglob("*") if p.is_file() and p.name not in DATED):
        found[str(path.relative_to(stage))] = path.read_bytes()
    return found


def different(one, two, at: str = "") -> list[str]:
    """Paths of the parts in which two fingerprints differ."""
    if isinstance(one, dict) and isinstance(two, dict):
        keys = sorted(one.keys() | two.keys())
        return [line for key in keys for line in different(one.get(key), two.get(key), f"{at}/{key}")]
    if one == two:
        return []
    shown = lambda x: f"{len(x)} bytes" if isinstance(x, bytes) else str(x)[:60]  # noqa: E731
    return [f"{at} ({shown(one)} in peace, {shown(two)} now)"]


class Table:
    """Counts per row of the table, and what went wrong in words."""

    def __init__(self):
        self.rows, self.faults = {}, []

    def add(self, row: str, fault: str = "", lost: bool = False, times: int = 1, what: str = "") -> None:
        """Count `times` trials that ended alike."""
        counts = self.rows.setdefault(row, {"tried": 0, "survived": 0, "identical": 0, "lost": 0, "false": 0})
        counts["tried"] += times
        counts["lost" if lost else "survived"] += times
        if not lost:
            counts["false" if fault else "identical"] += times
        if fault:
            self.faults.append(f"{row}: {what}: {fault}")
        print(f"  {row}: {what}: {fault or 'ok'}", flush=True)

    def __str__(self) -> str:
        head = ["", "tried", "survived", "identical", "lost", "false"]
        lines = [head, *([row, *map(str, counts.values())] for row, counts in self.rows.items())]
        return "\n".join("".join(f"{cell:<34}" if i == 0 else f"{cell:>10}" for i, cell in enumerate(x)) for x in lines)


def verdict(out: Path, whole: dict[str, dict], code: int | None, output: str) -> str:
    """What is wrong with a run that ended; "" where nothing is."""
    if code != 0 or "Traceback" in output:
        return f"exit {code}: {output.strip()[-1500:]}"
    wrong = {name: parts for name in whole if (parts := different(whole[name], fingerprint(out / name)))}
    return f"other than in peace: {wrong}" if wrong else ""


# --- the three tortures -------------------------------------------------------------------------------------------


def kills(runs: Runs, whole: dict[str, dict], seconds: float, count: int, rng: random.Random, table: Table) -> None:
    """Kill `count` launches at random moments; each time a run ends by itself, compare it and begin another."""
    row, done, number, out = f"kills, {runs.world.title}", 0, 0, None
    while done < count:
        number += 1
        words: list[str] = []
        if number % 2 or out is None:
            out = runs.home / f"killed_{runs.world.config}_{number}"
        else:  # the finished run, from one of its stages on
            words = ["--redo", rng.choice(list(runs.stages))]
        mine, code, torn = 0, None, ""
        while done < count and code is None:
            runs.log(out).unlink(missing_ok=True)
            launch = runs.start(out, *words)
            code = launch.wait(rng.uniform(1.0, max(6.0, seconds / 3)))
            if code is None and rng.random() < 0.5:
                wait_for_a_write(out, launch)
                code = launch.code()
            if code is not None:
                break  # it got through
            if len(launch.codes) > 1 and rng.random() < 0.5:
                launch.kill_one(rng)
                launch.wait(60)
            launch.kill()
            done, mine = done + 1, mine + 1
            if "Traceback" in (output := runs.log(out).read_text(errors="replace")):
                torn = f"a traceback when killed: {output[-1500:]}"
        code, output = runs.finish(out, *words) if code is None else (code, runs.log(out).read_text(errors="replace"))
        fault = verdict(out, whole, code, output) or torn
        if mine:
            table.add(row, fault, code != 0, mine, f"{mine} kills{' ' if words else ''}{' '.join(words)}")
        if fault or not number % 2:
            shutil.rmtree(out)
            out = None


def wait_for_a_write(out: Path, launch: Launch) -> None:
    """Until a file or folder appears or changes in the folder of a run, at most five seconds."""

    def state():
        found = {}
        for folder, _, names in os.walk(out):
            for name in names:
                try:
                    found[folder, name] = os.stat(os.path.join(folder, name)).st_size
                except FileNotFoundError:
                    continue
        return found

    before, end = state(), time.monotonic() + 5
    while state() == before and time.monotonic() < end and launch.code() is None:
        pass


def corruptions(runs: Runs, quiet: Path, whole: dict[str, dict], name: str, count: int, rng, table: Table) -> None:
    """Stop the stage `name` after its second checkpoint, copy it `count` times, damage a file of each, go on."""
    row = f"corruptions, {runs.world.title}"
    out = runs.home / f"corrupt_{runs.world.config}_{name}"
    shutil.copytree(quiet, out)
    for left in (out / name, out / ".tokens" / name):
        shutil.rmtree(left, ignore_errors=True)
    launch = runs.start(out, name)
    while launch.code() is None and len(list(out.glob(f"{name}/checkpoints/*/complete"))) < 2:
        time.sleep(0.005)
    launch.kill()
    marks = sorted(out.glob(f"{name}/checkpoints/*/complete"), key=lambda p: int(p.parent.name.split("-")[1]))
    if len(marks) < 2:
        table.add(row, "it was not killed in time: " + runs.log(out).read_text()[-1500:], lost=True, what=name)
        return
    places = [marks[-1].parent, marks[-2].parent, out / ".tokens" / name]
    found = [p.relative_to(out) for place in places for p in sorted(place.rglob("*")) if p.is_file()]
    cases = [(path, how) for path in found for how in HOW]
    cases = rng.sample(cases, min(count, len(cases)))
    # Copies of one stage under other names are the same training: one launch lets all of them go on.
    names = list(runs.stages)
    stages = {other: runs.stages[other] for other in names[: names.index(name)]}
    copies = {f"{name}_{i}": case for i, case in enumerate(cases)}
    for copy, (path, how) in copies.items():
        stages[copy] = runs.stages[name]
        shutil.copytree(out / name, out / copy)
        if (out / ".tokens" / name).is_dir():
            shutil.copytree(out / ".tokens" / name, out / ".tokens" / copy)
        parts = [copy if part == name else part for part in path.parts]
        damage(out.joinpath(*parts), how, rng)
    left = list(copies)
    while left:
        code, output = runs.finish(out, *left, stages=stages)
        for copy in [c for c in left if (out / c / "stage.json").exists()]:
            wrong = different(whole[name], fingerprint(out / copy))
            path, how = copies[copy]
            table.add(row, f"other than in peace: {wrong}" if wrong else "", what=f"{how} {path}")
            left.remove(copy)
        if code or "Traceback" in output:
            path, how = copies[left[0]] if left else ("?", "?")
            table.add(row, f"exit {code}: {output[-1500:]}", lost=True, what=f"{how} {path}")
            left = left[1:]
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


def full_disks(runs: Runs, whole: dict[str, dict], peak: int, count: int, table: Table) -> None:
    """Run on a file system that holds a part of the `peak` bytes that a run needs; then make room, and once more."""
    row = f"full disks, {runs.world.title}"
    for number in range(count):
        mount = runs.home / f"disk_{runs.world.config}_{number}"
        mount.mkdir()
        size = int(peak * (number + 0.5) / count)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", mount], check=True)
        try:
            code, output = runs.finish(mount / "run")
            told = [line for line in output.splitlines() if line.startswith("error:") and "full" in line]
            fault = "" if code == 0 or (code == 1 and told) else f"exit {code}: {output[-1500:]}"
            if "Traceback" in output:
                fault = f"a traceback: {output[-3000:]}"
            subprocess.run(["mount", "-o", f"remount,size={2 * peak}", mount], check=True)
            again, output = runs.finish(mount / "run")
            fault = "; ".join(filter(None, (fault, verdict(mount / "run", whole, again, output))))
            what = f"{size / 1e6:.1f} of {peak / 1e6:.1f} MB: exit {code}: {told[0][:200] if told else 'no error'}"
            table.add(row, fault, lost=again != 0, what=what)
        finally:
            subprocess.run(["umount", "-l", mount], check=True)


def may_mount(home: Path) -> bool:
    """Whether this user may mount a small file system."""
    (home / "mount").mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", home / "mount"]
    try:
        if subprocess.run(command, capture_output=True).returncode:
            return False
    except FileNotFoundError:
        return False
    subprocess.run(["umount", home / "mount"], check=True)
    return True


def torture(worlds: list[str], count: dict[str, int], only: list[str], seed: int) -> Table:
    """All of it, shared by the worlds: `count` of each of `COUNTED`, corruptions for each training stage.

    Args:
        only: these stages of the recipe, with all that they build on.
    """
    rng, table, parts = random.Random(seed), Table(), sum(WORLDS[name].share for name in worlds)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        for name in worlds:
            folder = Path(home) / name
            folder.mkdir()
            stages = {k: v for k, v in recipe_of_all_kinds(folder).items() if k in only or not only}
            runs, quiet = Runs(folder, stages, WORLDS[name]), folder / "quiet"
            began = time.monotonic()
            code, output = runs.quiet(quiet)
            if code:
                table.add(f"quiet, {runs.world.title}", f"exit {code}: {output[-3000:]}", lost=True)
                continue
            print(f"a quiet run, {runs.world.title}: {time.monotonic() - began:.0f} s by the launcher", flush=True)
            whole = {stage: fingerprint(quiet / stage) for stage in runs.stages}
            began = time.monotonic()
            code, output = runs.finish(folder / "forked")
            seconds = time.monotonic() - began
            table.add(f"forked, {runs.world.title}", verdict(folder / "forked", whole, code, output), bool(code))
            print(f"the same, forked: {seconds:.0f} s", flush=True)
            each, killed, disks = (round(count[key] * runs.world.share / parts) for key in COUNTED)
            for stage in [s for s, of in runs.stages.items() if "args" in of and each]:
                corruptions(runs, quiet, whole, stage, each, rng, table)
            kills(runs, whole, seconds, killed, rng, table)
            if disks and not may_mount(folder):
                print("full disks: skipped, this user may not mount a small file system", flush=True)
            elif disks:
                peak, final = runs.peak(folder / "peak"), used(quiet)
                print(f"finished it holds {final / 1e6:.1f} MB, at most {peak / 1e6:.1f} MB on the way", flush=True)
                full_disks(runs, whole, peak, disks, table)
            print(f"\n{table}\n", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    return table


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="in all worlds together (100)")
    parser.add_argument("--corruptions", type=int, default=40, help="of each training stage, likewise (40)")
    parser.add_argument("--disks", type=int, default=10, help="full disks, likewise; needs root (10)")
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS), choices=WORLDS, help="(all)")
    parser.add_argument("--only", nargs="+", default=[], help="stages of the recipe (with all that they build on)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    return parser.parse_args(argv)


def run() -> int:
    """Run what is asked for, print the table; the exit code is 0 where everything survived and is identical."""
    args, began = parse(), time.monotonic()
    os.environ |= ENVIRONMENT
    warm()
    print(" ".join(sys.argv), flush=True)
    counts = {key: getattr(args, key) for key in COUNTED}
    table = torture(args.worlds, counts, args.only, args.seed)
    print(f"\n{table}\n" + "\n".join(table.faults))
    machine = (
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, torch {version('torch')}"
    )
    print(f"{datetime.date.today()}, {machine}, {(time.monotonic() - began) / 60:.0f} minutes, seed {args.seed}")
    return 1 if table.faults else 0


def warm() -> None:
    """Import what a run imports, in this process, from which the launches are forked."""
    for name in ("pipelines.commands.run_here", "transformers.models.gpt2.modeling_gpt2", "tests.fsdp_on_cpu"):
        importlib.import_module(name)
    for name in importlib.import_module("pipelines.kinds").KINDS:
        importlib.import_module(f"pipelines.stages.{name}")


if __name__ == "__main__":
    sys.exit(run())
