"""A stage's `args:` as the trainer's dataclass, with what the hardware at hand suggests filled in."""

from __future__ import annotations

import logging
import os
import sysconfig
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch._inductor import cpp_builder, exc

from pipelines import files
from pipelines.errors import SetupError
from pipelines.models import loading

logger = logging.getLogger(__name__)


def build_args(stage, **defaults):
    """The stage's `args:` as its dataclass, with what the chain sets and what the hardware suggests filled in.

    Order of precedence: the recipe, the stage module's `defaults`, the hardware (`silent_precision`), the class.
    """
    state = PartialState()
    values = {"report_to": ["tensorboard"], "save_total_limit": 2, "save_steps": 0.1, "logging_steps": 10}
    values |= {"eval_strategy": "steps", "eval_steps": 0.1} if stage.sections.get("data", {}).get("validation") else {}
    values |= {"ddp_find_unused_parameters": False, "gradient_checkpointing": False}
    zero = state.distributed_type.value == "DEEPSPEED"
    if state.device.type == "cpu":
        values |= {"dataloader_pin_memory": False} | ({"ddp_backend": "gloo"} if zero else {"use_cpu": True})
    values |= defaults
    said = stage.sections.get("args", {})
    values |= {"bf16": False} | said  # TRL's default would be bf16 anywhere
    why = "as the recipe says"
    if said.keys().isdisjoint(("bf16", "fp16")):
        chosen, why = silent_precision(stage)
        values |= {"bf16": chosen == "bf16", "fp16": chosen == "fp16"}
    values |= {"output_dir": str(stage.checkpoints), "seed": stage.seed, "remove_unused_columns": False}
    values |= accumulation(values, state.num_processes)
    asked = values.get("fp16")
    _fit_to_cpu(values, state.device.type)
    why = "fp16 needs a GPU" if asked and not values["fp16"] else why
    if zero:  # DeepSpeed divides by the steps of its own config, which `accelerate launch` sets to 1
        os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(values.get("gradient_accumulation_steps", 1))
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(stage.folder / "logs")
    try:
        args = stage.section_class("args")(**values)
    except SetupError:
        raise
    except (ValueError, ImportError) as error:  # settings that exclude each other, a package that is missing
        raise SetupError(f"stages.{stage.name}.args: {error}") from error
    args.mixed_precision = {"fp32": "no"}.get(precision(args), precision(args))  # else the launcher's would win unseen
    stage.resolved = {k: v for k, v in args.to_dict().items() if v is not None}
    if PartialState().is_main_process:
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * state.num_processes
        logger.info(
            "%s: %s (%s) on %d x %s, %d %s per step (%d per device x %d accumulated x %d processes)",
            stage.name, precision(args), why, state.num_processes, state.device.type, per_step,
            "packs" if getattr(args, "packing", False) else "rows",
            args.per_device_train_batch_size, args.gradient_accumulation_steps, state.num_processes,
        )  # fmt: skip
    return args


def precision(args) -> str:
    """What the matrix products of a training are computed in: bf16, fp16 (both by autocast) or fp32."""
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"


def silent_precision(stage) -> tuple[str, str]:
    """`(bf16, fp16 or fp32, why)` where the recipe says nothing; every process calls it and gets the same.

    A run that goes on stays with what it began in. Else the launcher's word counts (`--mixed_precision`), else bf16 is
    taken where the GPUs of all processes compute in it themselves. fp16 is never taken without a word: it overflows where
    the others do not, and its loss scaling skips steps.
    """
    state, asked = PartialState(), os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked in ("bf16", "fp16"):
        chosen, why = asked, "as the launcher says"
    elif state.device.type == "cpu":
        chosen, why = (
            "fp32",
            "the default on CPUs" + ("; bf16 may be faster here" if loading.native_bf16("cpu") else ""),
        )
    elif all(gather_object([loading.native_bf16(state.device.type)])):
        chosen, why = "bf16", "the GPUs compute in it"
    else:
        chosen, why = "fp32", "not every GPU here computes in bf16"
    begun = [files.begun_in(stage.checkpoints) if state.is_main_process else None]
    broadcast_object_list(begun)
    if begun[0] not in (None, chosen):
        return begun[0], f"as this run began; from the start it would be {chosen} here: {why}"
    return chosen, why


def _fit_to_cpu(values: dict, device: str) -> None:
    """What only a GPU can do is left out on a CPU, and said, so that one recipe runs on both."""
    if device != "cpu":
        return
    instead = {
        "fp16": "fp32",
        "fp16_full_eval": "evaluation as training",
        "tf32": "fp32",
        "use_liger_kernel": "our own fused loss, on any device",
    }
    for key, other in instead.items():
        if values.get(key):
            logger.warning("args.%s needs a GPU; on this CPU: %s", key, other)
            values[key] = None if key == "tf32" else False
    compiled = any(values.get(f"torch_compile{key}") for key in ("", "_backend", "_mode"))
    if compiled and values.get("torch_compile_backend") in (None, "inductor") and not _has_compiler():
        logger.warning("args.torch_compile needs a C++ compiler and Python's headers; without them here: off")
        values |= {"torch_compile": False, "torch_compile_backend": None, "torch_compile_mode": None}
    if (values.get("bf16") or values.get("bf16_full_eval")) and not loading.native_bf16("cpu"):
        logger.warning("args.bf16: this CPU has no bf16 arithmetic and emulates it, slowly; bf16: false is faster")


def _has_compiler() -> bool:
    """Whether inductor, which writes C++ for a CPU, finds what turns it into code."""

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return False
    return (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()


def accumulation(values: dict, world: int) -> dict:
    """Micro-batch and accumulation that give `global_batch_size` rows per step on `world` processes."""
    total, micro = values.get("global_batch_size"), values.get("per_device_train_batch_size", 8)
    if total is None:
        return {}
    if total % world:
        raise SetupError(
            f"args.global_batch_size {total} cannot be split over {world} processes: use a multiple of {world}"
        )
    share = total // world
    steps = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= micro)
    return {"per_device_train_batch_size": share // steps, "gradient_accumulation_steps": steps}
