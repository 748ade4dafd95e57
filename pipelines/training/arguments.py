"""A stage's `args:` as the trainer's dataclass, with what the hardware at hand suggests filled in.

`check` and the stage build them by the same functions: `problems` only takes the hardware from the launcher's
environment, and leaves Accelerate's global state alone.
"""

from __future__ import annotations

import copy
import logging
import os
import re
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import Trainer
from transformers.optimization import get_scheduler
from transformers.utils import is_torch_tf32_available

from pipelines import files, launch
from pipelines.errors import SetupError
from pipelines.models import loading
from pipelines.training import best_checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hardware:
    """What settings depend on beside the recipe: "cpu", "cuda" …, the number of processes, DeepSpeed or not."""

    device: str
    processes: int = 1
    deepspeed: bool = False


def build_args(stage):
    """The stage's `args:` as its dataclass, for this run; raises `SetupError` for settings that cannot be."""
    state = PartialState()
    hardware = Hardware(state.device.type, state.num_processes, state.distributed_type.value == "DEEPSPEED")
    values, why = settings(stage, hardware, silent_precision)
    if hardware.deepspeed:  # it divides by the steps of its own config, which `accelerate launch` sets to 1
        os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(values.get("gradient_accumulation_steps", 1))
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(stage.folder / "logs")
    try:
        args = construct(stage.section_class("args"), values)
    except SetupError as error:
        raise SetupError(f"stages.{stage.name}.args: {error}") from error
    if args.n_gpu > 1:  # the Trainer would make an `nn.DataParallel` of it, with as many times the batch
        logger.warning(
            "%s: one process uses one GPU, the other %d are idle. All of them: accelerate launch --config_file "
            "accelerate_configs/ddp.yaml --num_processes %d -m pipelines RECIPE",
            stage.name,
            args.n_gpu - 1,
            args.n_gpu,
        )
        args._n_gpu = 1
    args.mixed_precision = {"fp32": "no"}.get(precision(args), precision(args))  # else the launcher's would win unseen
    stage.resolved = {k: v for k, v in args.to_dict().items() if v is not None}
    if state.is_main_process:
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * state.num_processes
        logger.info(
            "%s: %s (%s)%s on %d x %s, %d %s per step (%d per device x %d accumulated x %d processes)",
            stage.name,
            precision(args),
            why,
            ", its float32 products in TF32" if args.tf32 else "",
            state.num_processes,
            state.device.type,
            per_step,
            "packs" if getattr(args, "packing", False) else "rows",
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            state.num_processes,
        )
    return args


def problems(stage, hardware: Hardware) -> tuple[Any, list[tuple[str, str, object]]]:
    """`(args, [])`, or `(None, what is wrong with the stage's args)` as `(key path, message, value)`, found by building
    them for `hardware`. The args have the device of `hardware` but no process group."""
    ours = stage.sections.get("args", {})
    quiet, logger.disabled = logger.disabled, True  # the stage itself will tell what it leaves out on this machine
    try:
        values, _ = settings(stage, hardware, lambda stage: _default_precision(hardware.device))
        cls = stage.section_class("args")
        here = {"_setup_devices": torch.device(hardware.device), "distributed_state": None, "_n_gpu": 1}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the stage itself will warn
            args = construct(type(cls.__name__, (cls,), here), values)
            _schedule(args)
            if not {"optim", "optim_args"}.isdisjoint(ours):
                _optimizer(args)
    except SetupError as error:
        head, *bullets = re.split(r"\n\s*- ", str(error))
        return None, [_located(text.strip(), ours) for text in bullets or [head]]
    finally:
        logger.disabled = quiet
    return args, []


def _located(message: str, ours: dict) -> tuple[str, str, object]:
    """A message of a config class under the key of the recipe that it names, or under `args`."""
    named = [key for key in ours if re.search(rf"(?<![\w]){re.escape(key)}(?![\w])", message)]
    place = min(named, key=message.index, default=None)
    return (f"args.{place}", message, ours[place]) if place else ("args", message, None)


def expected_hardware() -> Hardware:
    """What a run started like this process will find: nothing is initialised for it."""
    asked = {name: os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("CPU", "DEEPSPEED")}
    gpu = torch.accelerator.is_available() and not asked["CPU"]
    device = torch.accelerator.current_accelerator().type if gpu else "cpu"
    return Hardware(device, int(os.environ.get("WORLD_SIZE", "1")), asked["DEEPSPEED"])


def settings(stage, hardware: Hardware, silent) -> tuple[dict, str]:
    """`(keywords of the dataclass, why the precision is what it is)`.

    Order of precedence: the recipe, the stage module's `DEFAULTS`, the hardware (`silent(stage)`, where the recipe does
    not name a precision), the class.
    """
    values = _defaults(stage, hardware) | stage.sections.get("args", {})
    why = _precision(stage, values, silent)
    for precise in ("", "_full_eval"):
        if values.get(f"bf16{precise}") and values.get(f"fp16{precise}"):
            raise SetupError(f"fp16{precise} and bf16{precise} cannot both be true: keep one")
    values |= {"output_dir": str(stage.checkpoints), "seed": stage.seed, "remove_unused_columns": False}
    values |= accumulation(values, hardware.processes)
    asked = values.get("fp16")
    _fit_to_cpu(values, hardware.device)
    return values, "fp16 needs a GPU" if asked and not values["fp16"] else why


def construct(cls: type, values: dict):
    """An instance of a config class; whatever it raises becomes a `SetupError`."""
    try:
        return cls(**values)
    except SetupError:
        raise
    except Exception as error:  # settings that exclude each other, a missing package, a bad value: any type of error
        raise SetupError(str(error) or type(error).__name__) from error


def _defaults(stage, hardware: Hardware) -> dict:
    """What the chain and the stage set where the recipe is silent."""
    values = {"report_to": ["tensorboard"], "save_total_limit": 2, "save_steps": 0.1, "logging_steps": 10}
    if stage.sections.get("data", {}).get("validation"):
        values |= {"eval_strategy": "steps", "eval_steps": 0.1}
    values |= {"ddp_find_unused_parameters": False}
    values |= {"logging_nan_inf_filter": False}  # `ChainTrainer` stops on them, and asks the device less often
    if "gradient_checkpointing" not in stage.sections.get("args", {}):  # its older name; TRL's default is true
        values["activation_checkpointing"] = False
    values |= {"bf16": False}  # TRL's default would be bf16 anywhere
    if hardware.device == "cpu":
        values["dataloader_pin_memory"] = False
        values |= {"ddp_backend": "gloo"} if hardware.deepspeed else {"use_cpu": True}
    elif is_torch_tf32_available() and launch.chosen_on_gpu("tf32"):
        values["tf32"] = True  # what stays float32 beside bf16, and fp32 runs: args.tf32: false switches it off
    return (
        values
        | stage.module.DEFAULTS
        | best_checkpoint.defaults(stage.sections.get("args", {}), best_checkpoint.reported(stage))
    )


def _precision(stage, values: dict, silent) -> str:
    """Fill in bf16 and fp16 where the recipe names neither; returns why they are what they are."""
    if not stage.sections.get("args", {}).keys().isdisjoint(("bf16", "fp16")):
        return "as the recipe says"
    chosen, why = silent(stage)
    values |= {"bf16": chosen == "bf16", "fp16": chosen == "fp16"}
    return why


def precision(args) -> str:
    """What the matrix products of a training are computed in: bf16, fp16 (both by autocast) or fp32."""
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"


def _default_precision(device: str, everywhere=bool) -> tuple[str, str]:
    """`(bf16, fp16 or fp32, why)` of a run that begins; `everywhere(ok)` tells whether all processes are ok.

    The launcher's word counts (`--mixed_precision`), else bf16 is taken where the GPUs of all processes compute in it
    themselves. fp16 is never taken without a word: it overflows where the others do not, and its loss scaling skips
    steps.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked in ("bf16", "fp16"):
        return asked, "as the launcher says"
    if device == "cpu":
        return "fp32", "the default on CPUs" + ("; bf16 may be faster here" if loading.native_bf16("cpu") else "")
    if everywhere(loading.native_bf16(device)):
        return "bf16", "the GPUs compute in it"
    return "fp32", "not every GPU here computes in bf16"


def silent_precision(stage) -> tuple[str, str]:
    """`(bf16, fp16 or fp32, why)` where the recipe says nothing; every process calls it and gets the same.

    A run that goes on stays with what it began in; one that begins takes `_default_precision`.
    """
    state = PartialState()
    chosen, why = _default_precision(state.device.type, lambda ok: all(gather_object([ok])))
    begun = [files.begun_in(stage.checkpoints) if state.is_main_process else None]
    broadcast_object_list(begun)
    if begun[0] not in (None, chosen):
        return begun[0], f"as this run began; from the start it would be {chosen} here: {why}"
    return chosen, why


def _fit_to_cpu(values: dict, device: str) -> None:
    """What only a GPU can do is left out on a CPU, and logged, so that one recipe runs on both."""
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
    from torch._inductor import cpp_builder, exc  # late: a second, for what few recipes ask for

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


def _schedule(args) -> None:
    """Make the learning rate schedule once for a single weight; raises `SetupError` where it cannot be made."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 10, args.lr_scheduler_kwargs)
    except Exception as error:  # a missing or unknown keyword, a value out of range: any type of error
        raise SetupError(f"lr_scheduler_type {args.lr_scheduler_type.value}, lr_scheduler_kwargs: {error}") from error


def _optimizer(args) -> None:
    """Make the optimizer once for a single weight; raises `SetupError` where it cannot be made."""
    if re.search("galore|apollo|lomo", args.optim.value):  # these look for layers of the real model
        return
    weight, plain = torch.nn.Linear(1, 1), copy.copy(args)
    plain.optim_args = None
    try:
        cls, keywords = Trainer.get_optimizer_cls_and_kwargs(args, weight)
        cls(weight.parameters(), **keywords)
        without = Trainer.get_optimizer_cls_and_kwargs(plain, weight)[1]
    except Exception as error:  # a missing package, an unknown keyword, a value out of range: any type of error
        raise SetupError(f"optim {args.optim.value}, optim_args: {error}") from error
    if args.optim_args and keywords == without:
        raise SetupError(f"optim_args {args.optim_args!r} changes nothing: {args.optim.value} takes none of it")
