"""Before and around training: the fast environment, and processes that are really the ones that were asked for."""

from __future__ import annotations

import logging
import os
import sys

from pipelines.errors import WorldError

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
SWITCH = "PIPELINES_FAST_ENV"


def fast_environment() -> None:
    """Start this process again with the allocator settings of `FAST`, once; `PIPELINES_FAST_ENV=0` switches it off."""
    if os.environ.get(SWITCH, "1") != "1" or not sys.platform.startswith("linux"):
        return
    os.environ[SWITCH] = "set"
    missing = {k: v for k, v in FAST.items() if k not in os.environ}
    if missing:
        os.environ |= missing
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


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
    return state


def _asked(what: str) -> bool:
    """Whether the launcher said `ACCELERATE_USE_<what>`: FSDP or DEEPSPEED."""
    return os.environ.get(f"ACCELERATE_USE_{what}", "false").lower() == "true"


def sharded() -> bool:
    """Whether the launcher asked for FSDP or DeepSpeed: processes then hold parts of a model or of its optimizer."""
    return _asked("FSDP") or _asked("DEEPSPEED")


def lost(error: Exception) -> bool:
    """Whether `error` says that another process, or the network to it, is gone."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo/transport" in str(error)  # gloo raises plain RuntimeErrors


def asked_world() -> tuple[int, str]:
    """`(processes asked for, where it was said)`: WORLD_SIZE, or what the parent `accelerate launch` was told."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        return world, "WORLD_SIZE"
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
    """What the `accelerate launch` above this process was told; it starts one process silently in some cases."""
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
    """Forget what a stage told Accelerate and free its memory; the process group stays."""
    import gc

    import torch
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
