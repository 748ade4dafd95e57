"""Where and how a stage runs: what the command line, Accelerate's configuration and the recipe say; how fast this CPU
is.
"""

from __future__ import annotations

import argparse
import time
from functools import lru_cache

import torch
import yaml

from pipelines import launch
from pipelines.errors import PlanError
from pipelines.planning import devices
from pipelines.planning.job import Job
from pipelines.planning.planner import Setup
from pipelines.training.arguments import accumulation


def launcher(file: str) -> dict:
    """Strategy, offload, processes and bf16 that an Accelerate configuration (a name or a path) asks for."""
    told = yaml.safe_load(launch.config_file(file).read_text(encoding="utf-8")) or {}
    kind, world = str(told.get("distributed_type", "NO")).upper(), int(told.get("num_processes", 1))
    strategy, offload = "ddp" if world > 1 else "single", "none"
    if kind == "DEEPSPEED":
        deepspeed = told.get("deepspeed_config", {})
        stage = int(deepspeed.get("zero_stage", 2))
        if stage == 0:
            strategy = "ddp"
        else:
            strategy = f"zero{stage}"
        if deepspeed.get("offload_param_device", "none") != "none":
            offload = "all"
        elif deepspeed.get("offload_optimizer_device", "none") != "none":
            offload = "optimizer"
    elif kind == "FSDP":
        strategy = "fsdp2"
        offload = "all" if (told.get("fsdp_config") or {}).get("fsdp_offload_params") else "none"
    return {
        "strategy": strategy,
        "offload": offload,
        "world": world,
        "cpu": bool(told.get("use_cpu")),
        "bf16": told.get("mixed_precision") == "bf16",
    }


def setup_of(job: Job, args: argparse.Namespace) -> Setup:
    """The setup that the command line and the recipe ask for."""

    told = launcher(args.config_file) if args.config_file else {}
    on_gpus = args.gpu or args.gpus or (told and not told["cpu"] and not args.processes)
    gpu = devices.device(args.gpu or "h100").name if on_gpus else None
    world = args.gpus or args.processes or told.get("world") or 1
    strategy = told.get("strategy", "ddp")
    if strategy in ("single", "ddp"):
        strategy = "ddp" if world > 1 else "single"
    values, section = job.values, job.stage.sections.get("model", {})
    batch = accumulation(values, world)
    if job.kind == "ppo" and values.get("global_batch_size"):
        batch = {"per_device_train_batch_size": batch["per_device_train_batch_size"]}
    checkpointing = values.get("activation_checkpointing")
    if checkpointing is None:
        checkpointing = values.get("gradient_checkpointing")
    lora = bool(section.get("use_peft"))
    stored = section.get("dtype")
    if stored == "auto":
        stored = str(job.models["model"].config.dtype).removeprefix("torch.")
    setup = Setup(
        gpu=gpu,
        strategy=strategy,
        world=world,
        offload=told.get("offload", "none"),
        micro=batch.get("per_device_train_batch_size", values["per_device_train_batch_size"]),
        rollout=values.get("local_rollout_forward_batch_size", 64),
        checkpointing=bool(checkpointing),
        lora=lora,
        quantize=bool(section.get("load_in_4bit")),
        size=2 if stored in ("bfloat16", "float16") else 4,
        bf16=bool(gpu and values.get("fp16"))
        or values.get("bf16", bool(gpu and devices.DEVICES[gpu].bf16) or told.get("bf16", False)),
        optim=str(values.get("optim", "adamw_torch_fused")),
    )
    _refuse(job, setup)
    return setup


def _refuse(job: Job, setup: Setup) -> None:
    """Raise `PlanError` for what stages refuse on shards."""
    if setup.sharded and setup.quantize:
        raise PlanError(
            f"stages.{job.stage.name}.model.load_in_4bit: quantized weights are not cut into shards "
            f"(accelerate_configs/ddp.yaml holds all on each device), as under {setup.strategy}"
        )
    if setup.sharded and job.stage.sections.get("reward", {}).get("share_base"):
        raise PlanError(
            f"stages.{job.stage.name}.reward.share_base: one base under several models is not cut into "
            f"shards (accelerate_configs/ddp.yaml holds it on each device), as under {setup.strategy}"
        )


@lru_cache(None)
def calibrate(bf16: bool) -> tuple[float, float]:
    """`(FLOP/s of a matrix product, bytes/s read and written)` of this machine, the best of a second's tries.

    The product is in the precision that is trained in: a CPU with bf16 units is several times as fast in it.
    """
    a, b = (torch.randn(1024, 1024, dtype=torch.bfloat16 if bf16 else torch.float32) for _ in range(2))
    products, copies, big = [], [], torch.empty(2**26, dtype=torch.uint8)
    target, until = torch.empty_like(big), time.perf_counter() + 1
    while time.perf_counter() < until or len(copies) < 3:
        begin = time.perf_counter()
        a @ b
        products.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        target.copy_(big)
        copies.append(time.perf_counter() - begin)
    return 2 * 1024**3 / min(products), 2 * big.numel() / min(copies)
