"""Before and around training: the fast environment, the launcher, and processes that are really the ones asked for."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipelines import shipped
from pipelines.errors import SetupError, WorldError, meant

logger = logging.getLogger(__name__)

# glibc gives every tensor of 32 MB and more fresh pages, and faulting them in costs more than the arithmetic. Keeping
# freed memory, in huge pages, is read by the C library when a process starts, hence the re-exec. Threads that spin
# while they wait cost up to ten times the work as soon as anything else runs on the cores.
FAST = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "67108864",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
# Batches of packs are of a different size each: CUDA's allocator then keeps freed pieces that fit none of the next,
# unless its segments can grow. The first name is PyTorch's since 2.9, the second the one before.
ALLOCATORS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
SEGMENTS = "expandable_segments:True"
SWITCH = "PIPELINES_FAST_ENV"
# What is chosen on a GPU where the recipe is silent (docs/gpus.md), each left out where this variable names it.
OFF_ON_GPU = "PIPELINES_GPU_OFF"
ON_GPU = ("expandable_segments", "tf32", "varlen", "graphs", "bf16_decoding", "bf16_frozen")
ASKED = "PIPELINES_PROCESSES"  # how many processes `pipelines run --on` asked the launcher for
CONFIGS = "accelerate_configs"


def fast_environment() -> None:
    """Start this process again with the allocator settings of `FAST`, once; `PIPELINES_FAST_ENV=0` switches it off.

    Where an NVIDIA GPU is here, its allocator too is set, before PyTorch reads the variable.
    """
    if os.environ.get(SWITCH, "1") != "1" or not sys.platform.startswith("linux"):
        return
    os.environ[SWITCH] = "set"
    if any(Path("/dev").glob("nvidia[0-9]*")) and os.environ.keys().isdisjoint(ALLOCATORS):
        with contextlib.suppress(SetupError):  # of a misspelt choice: `start` raises it
            if chosen_on_gpu("expandable_segments"):
                os.environ |= dict.fromkeys(ALLOCATORS, SEGMENTS)
    missing = {k: v for k, v in FAST.items() if k not in os.environ}
    if missing:
        os.environ |= missing
        with contextlib.suppress(OSError):  # where this user may not start Python: slower, and nothing else
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def chosen_on_gpu(choice: str) -> bool:
    """Whether `choice`, one of `ON_GPU`, is not switched off by the variable `OFF_ON_GPU` ("all", or some of them)."""
    off = set(os.environ.get(OFF_ON_GPU, "").replace(",", " ").split())
    if unknown := sorted(off - {*ON_GPU, "all"}):
        raise SetupError(
            f"{OFF_ON_GPU}: no {unknown[0]!r}{meant(unknown[0], ON_GPU)}; there are {', '.join(ON_GPU)}, all"
        )
    return off.isdisjoint((choice, "all"))


def start(timeout: float = 1800):
    """Accelerate's state for this process, created once. Raises `WorldError` when the world is not the asked one.

    Whether it is for CPU is decided when the state is first created: a config file with `use_cpu: true` alone gives
    two independent runs of one process each. So it is said here, and in the variable that the Accelerator reads later.
    A process that waits for another one longer than `timeout` seconds gives up: see `lost`.
    """
    from datetime import timedelta

    import torch

    on_cpu = not torch.accelerator.is_available()
    cpu = on_cpu and not _asked("DEEPSPEED")
    if cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    from accelerate import PartialState
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading and saving weights: two lines each for what takes milliseconds
    # Accelerate knows DeepSpeed only on accelerators: there the CPU's backend must be named.
    backend = {"backend": "gloo"} if on_cpu and not cpu else {}
    state = PartialState(cpu=cpu, timeout=timedelta(seconds=timeout), **backend)
    if cpu and _asked("FSDP"):
        raise WorldError(
            "FSDP was asked for, but there is no GPU, and on a CPU Accelerate would let every process hold the whole "
            "model without a word. Use `accelerate launch --config_file accelerate_configs/cpu_2.yaml`."
        )
    asked, how = asked_world()
    chosen_on_gpu("all")  # raises for a choice that does not exist
    if state.num_processes != asked:
        raise WorldError(
            f"{asked} processes were asked for ({how}), but this run sees {state.num_processes}. On CPU use "
            "`accelerate launch --config_file accelerate_configs/cpu_2.yaml`; on GPUs check that there are as many "
            "devices as processes (`nvidia-smi`, CUDA_VISIBLE_DEVICES)."
        )
    if os.environ.get(SWITCH) == "set":
        os.environ[SWITCH] = "said"
        threads = _share_of_cores() if cpu else None
        if threads:
            torch.set_num_threads(threads)
        if state.is_main_process:
            said = " ".join(FAST) + (f", {threads} threads per process" if threads else "")
            logger.info("fast environment: %s (switch off with %s=0)", said, SWITCH)
            if not on_cpu:
                memory = next((os.environ[name] for name in ALLOCATORS if name in os.environ), "PyTorch's defaults")
                logger.info("memory of the GPU: %s (switch off with %s=expandable_segments)", memory, OFF_ON_GPU)
    return state


_alone = itertools.count()


@contextlib.contextmanager
def first_alone() -> Iterator[bool]:
    """For what the first process does alone and may take hours, such as asking a server: `with first_alone() as first`.

    The others (to which it gives False) wait at its end until the first one is there, or is gone, however long that
    takes: behind a barrier they would give up after the `timeout` of `start`. Every process must come here.
    """
    from accelerate import PartialState

    state = PartialState()
    if state.num_processes == 1:
        yield True
        return
    from torch.distributed.distributed_c10d import _get_default_store  # the public ways to wait all have an end

    store, done = _get_default_store(), f"pipelines/first_alone/{next(_alone)}"
    try:
        yield state.is_main_process
    finally:
        if state.is_main_process:
            store.set(done, "")
    while not store.check([done]):
        time.sleep(0.2)


def _asked(what: str) -> bool:
    """Whether the launcher set `ACCELERATE_USE_<what>`: FSDP or DEEPSPEED."""
    return os.environ.get(f"ACCELERATE_USE_{what}", "false").lower() == "true"


def sharded() -> bool:
    """Whether the launcher asked for FSDP or DeepSpeed: processes then hold parts of a model or of its optimizer."""
    return _asked("FSDP") or _asked("DEEPSPEED")


def lost(error: Exception) -> bool:
    """Whether `error` says that another process, or the network to it, is gone."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo/transport" in str(error)  # gloo raises plain RuntimeErrors


def launched() -> bool:
    """Whether a launcher (`accelerate launch`, torchrun, `pipelines run --on`) started this process."""
    known = {"LOCAL_RANK", "TORCHELASTIC_RUN_ID", ASKED}  # not WORLD_SIZE, which clusters set around launchers, too
    return bool(known & os.environ.keys() or _launcher()[0])


def config_file(name: str) -> Path:
    """The Accelerate configuration called `name`: a path, or a file of `accelerate_configs/` here or in the package.

    Raises `SetupError` with the names there are.
    """
    places = [Path(CONFIGS), shipped(CONFIGS)]
    for path in (Path(name), *(place / f"{name}.yaml" for place in places)):
        if path.is_file():
            return path
    known = sorted({p.stem for place in places for p in place.glob("*.yaml")})
    paths = [f"{CONFIGS}/{stem}.yaml" for stem in known] if "/" in name or name.endswith(".yaml") else known
    raise SetupError(
        f"no launch configuration {name!r}{meant(name, paths)}; there are {', '.join(known)}, or give a path"
    )


def available() -> int:
    """Accelerators that a run may use: none where Accelerate is set to use the CPU."""
    import torch

    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        return 0
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def processes(name: str | None, gpus: int | None) -> tuple[Path, int]:
    """`(configuration file, number of processes)` of `--on NAME --gpus N`.

    Args:
        name: as `config_file` takes it; None: `ddp`, or one process where `gpus` is 1.
        gpus: processes, one on each GPU; None: all GPUs that are here (for a path: what the file says).

    Raises:
        SetupError: there are not so many GPUs here, or the configuration is for several machines or for CPUs.
    """
    import yaml

    if gpus is not None and gpus < 1:
        raise SetupError(f"--gpus {gpus}: must be 1 or more")
    here, name = available(), name or ("single_gpu" if gpus == 1 else "ddp")
    path = config_file(name)
    asked = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if int(asked.get("num_machines", 1)) > 1:
        raise SetupError(
            f"--on {name} is for several machines, each of which needs its rank and the address of the first: use "
            f"`accelerate launch --config_file {path} --machine_rank N --main_process_ip ADDRESS -m pipelines RECIPE`"
        )
    if asked.get("use_cpu"):
        if gpus is not None:
            raise SetupError(f"--gpus {gpus}: --on {name} runs on CPUs; its processes are num_processes in {path}")
        count = int(asked.get("num_processes", 1))
    else:
        if here < (gpus or 1):
            raise SetupError(
                f"--on {name}{f' --gpus {gpus}' if gpus else ''}: {here or 'no'} GPUs are here (--on cpu_2: "
                "two processes on the CPU)"
            )
        alone = str(asked.get("distributed_type", "NO")).upper() == "NO"
        count = gpus or (1 if alone else here if not Path(name).is_file() else int(asked.get("num_processes", here)))
    return path, count


def launch(name: str | None, gpus: int | None, words: list[str]) -> int:
    """Run `python -m pipelines WORDS` on the processes of the configuration `name`, by Accelerate's own launcher.

    Args:
        name, gpus: see `processes`, which also says what is refused.
        words: the command line of each process, from the recipe on.

    Returns:
        The exit code: 0, 130 after Ctrl-C, else that of the process that failed first.
    """
    path, count = processes(name, gpus)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    line = ["--config_file", str(path), "--num_processes", str(count), "-m", "pipelines", *words]
    # Ctrl-C is for the processes, which save and stop; the launcher waits for them and has no traceback to print.
    os.environ |= {ASKED: str(count), "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGHUP,SIGQUIT"}
    signal.signal(signal.SIGINT, _pass_on)
    for name in ("torch.distributed.elastic", "accelerate.commands.launch"):  # our own lines say what there is to say
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args(line))
    except subprocess.CalledProcessError as error:
        return error.returncode
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    return 0


def _pass_on(number: int, frame) -> None:
    """Send a signal to the processes of the launcher that the terminal does not reach: torchrun's are sessions of their
    own.
    """
    import psutil

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(child.pid) != os.getpgrp():
                child.send_signal(number)


def run_apart(command: Sequence[str]) -> tuple[int, str, bool]:
    """Run a command, what it writes shown; `(exit code, its error in one line, whether it was stopped)`.

    In a process of its own: what one run leaves in memory, or the kernel that kills it for want of some, does not
    reach the next one. Ctrl-C and SIGTERM are passed on to it once, so that it saves before it ends.
    """
    asked: list[int] = []
    children: list[subprocess.Popen] = []

    def pass_on(number, frame=None):
        asked.append(number)
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # `nohup` ignores SIGHUP
    before = {number: signal.signal(number, pass_on) for number in heard}
    tail = b""
    try:
        # a session of its own: the terminal's Ctrl-C would reach it beside ours, and twice means at once
        with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True) as child:
            children.append(child)
            if asked:  # just before it was there
                pass_on(asked[0])
            while block := os.read(child.stderr.fileno(), 65536):
                sys.stderr.buffer.write(block)
                sys.stderr.buffer.flush()
                tail = (tail + block)[-20_000:]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    code = child.returncode
    return code, _reason(tail.decode("utf-8", "replace"), code), bool(asked) or code == 130


def _reason(text: str, code: int) -> str:
    """Why a run ended with `code`, in one line: its `error: …`, or the last line of a traceback."""
    if code == 0:
        return ""
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    marked = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    said = " ".join(lines[marked[-1] : marked[-1] + 4]).removeprefix("error: ") if marked else "".join(lines[-1:])
    return (said if len(said) <= 400 else said[:399] + "…") or f"exit code {code}"


# Waits until the process argv[1] is gone, then prints argv[2].
AFTERWARDS = """
import sys, time, psutil
try:
    for _ in range(600):
        if psutil.Process(int(sys.argv[1])).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.1)
except psutil.NoSuchProcess:
    pass
print(sys.argv[2], file=sys.stderr)
"""


def last_words(text: str) -> None:
    """Print why this process ends to stderr, and once more below the traceback of an `accelerate launch` above it.

    Whenever a process does not end with 0, and on Ctrl-C, that launcher prints a traceback of its own, up to 60 lines,
    in which the reason is lost. Nothing keeps it from that (`pipelines run --on` starts the same without it), so the
    reason is repeated when the launcher has ended.
    """
    print(text, file=sys.stderr, flush=True)
    if _launcher()[0] and int(os.environ.get("RANK", "0")) == 0:
        command = [sys.executable, "-c", AFTERWARDS, str(os.getppid()), f"\n{text}"]
        subprocess.Popen(command, start_new_session=True)  # the launcher ends the session of its processes


def asked_world() -> tuple[int, str]:
    """`(processes asked for, by what)`: WORLD_SIZE, or the command line of the `accelerate launch` above this process.

    `accelerate launch` sets WORLD_SIZE only where it starts several processes, and there are cases in which it starts
    one although more were asked for: `--cpu --num_processes 2`, and configurations with `MULTI_CPU`
    (https://github.com/huggingface/accelerate/issues/2741, closed without a change), each with exit code 0. A run would
    then train on half the batch without a word. What was asked for stands nowhere but in the launcher's command line.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        return world, "WORLD_SIZE"
    if ASKED in os.environ:
        return int(os.environ[ASKED]), "pipelines run --on"
    return _launcher_world() or (1, "no launcher")


def _launcher() -> tuple[list[str], str | None, dict]:
    """`(command line, config file, what it holds)` of the `accelerate launch` above this process; empty without one."""
    import psutil

    try:
        line = psutil.Process(os.getppid()).cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return [], None, {}
    if "launch" not in line or not any("accelerate" in part for part in line[: line.index("launch")]):
        return [], None, {}
    line = line[line.index("launch") :]
    if "-m" in line:
        line = line[: line.index("-m")]
    config = _option(line, "config_file")
    if config is None:
        return line, None, {}
    import yaml

    with open(config, encoding="utf-8") as stream:
        return line, config, yaml.safe_load(stream) or {}


def _option(line: list[str], name: str) -> str | None:
    """The value of `--name value` or `--name=value`, with underscores or dashes."""
    for i, part in enumerate(line):
        option, _, value = part.partition("=")
        if option.replace("-", "_") == f"__{name}":
            return value or (line[i + 1] if i + 1 < len(line) else None)
    return None


def _launcher_world() -> tuple[int, str] | None:
    """What the `accelerate launch` above this process was asked for; see `asked_world`."""
    line, config, told = _launcher()
    if (count := _option(line, "num_processes")) is not None:
        return int(count), f"--num_processes {count}"
    return (int(told["num_processes"]), f"num_processes in {config}") if told.get("num_processes") else None


def _share_of_cores() -> int | None:
    """Threads for this process where nobody chose a number: the launchers then say one, and most of a CPU idles.

    None where OMP_NUM_THREADS or `--num_cpu_threads_per_process` was given, or where neither `accelerate launch` nor
    torchrun is above this process: alone, PyTorch takes all cores by itself.
    """
    import psutil

    line, _, told = _launcher()
    chosen = _option(line, "num_cpu_threads_per_process") or told.get("num_cpu_threads_per_process")
    launched = line or "TORCHELASTIC_RUN_ID" in os.environ
    if not launched or chosen or "OMP_NUM_THREADS" in psutil.Process(os.getppid()).environ():
        return None
    cores = min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or 1)
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def reset() -> None:
    """Reset what a stage set in Accelerate and free its memory; the process group stays."""
    import gc

    import torch
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
