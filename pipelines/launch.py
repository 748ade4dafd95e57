"""Before and around training: the fast environment, and processes that are really the ones that were asked for."""

from __future__ import annotations

import logging
import os
import sys

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


class WorldError(ValueError):
    """The launcher started another number of processes than it was asked for; says how to launch instead."""


def fast_environment() -> None:
    """Start this process again with the allocator settings of `FAST`, once; `PIPELINES_FAST_ENV=0` switches it off."""
    if os.environ.get(SWITCH, "1") != "1" or not sys.platform.startswith("linux"):
        return
    os.environ[SWITCH] = "set"
    missing = {k: v for k, v in FAST.items() if k not in os.environ}
    if missing:
        os.environ |= missing
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def start():
    """Accelerate's state for this process, created once. Raises `WorldError` when the world is not the asked one.

    Whether it is for CPU is decided when the state is first created: a config file with `use_cpu: true` alone gives
    two independent runs of one process each. So it is said here, and in the variable that the Accelerator reads later.
    """
    import torch

    cpu = not torch.accelerator.is_available() and os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") != "true"
    if cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    from accelerate import PartialState
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading and saving weights: two lines each for what takes milliseconds
    state = PartialState(cpu=cpu)
    asked, how = asked_world()
    if state.num_processes != asked:
        raise WorldError(
            f"{asked} processes were asked for ({how}), but this run sees {state.num_processes}. On CPU use "
            "`accelerate launch --config_file accelerate_configs/cpu_2.yaml`; on GPUs check that there are as many "
            "devices as processes (`nvidia-smi`, CUDA_VISIBLE_DEVICES)."
        )
    if os.environ.get(SWITCH) == "set" and state.is_main_process:
        os.environ[SWITCH] = "said"
        logger.info("fast environment: %s (switch off with %s=0)", " ".join(FAST), SWITCH)
    return state


def asked_world() -> tuple[int, str]:
    """`(processes asked for, where it was said)`: WORLD_SIZE, or what the parent `accelerate launch` was told."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        return world, "WORLD_SIZE"
    return _launcher_world() or (1, "no launcher")


def _launcher_world() -> tuple[int, str] | None:
    """What the `accelerate launch` above this process was told; it starts one process silently in some cases."""
    import psutil

    try:
        line = psutil.Process(os.getppid()).cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None
    if "launch" not in line or not any("accelerate" in part for part in line[: line.index("launch")]):
        return None
    count = config = None
    for i, part in enumerate(line):
        name, _, value = part.partition("=")
        value = value or (line[i + 1] if i + 1 < len(line) else "")
        if name in ("--num_processes", "--num-processes"):
            count = int(value)
        elif name in ("--config_file", "--config-file"):
            config = value
        elif part == "-m":
            break
    if count is not None:
        return count, f"--num_processes {count}"
    if config:
        import yaml

        with open(config, encoding="utf-8") as stream:
            told = yaml.safe_load(stream) or {}
        if told.get("num_processes"):
            return int(told["num_processes"]), f"num_processes in {config}"
    return None


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
