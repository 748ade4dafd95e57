"""`pipelines plan RECIPE`: will it fit, how long will it take, said for every stage before anything runs."""

from __future__ import annotations

import argparse
import time
from dataclasses import fields
from pathlib import Path

from pipelines import errors
from pipelines.commands import command_line
from pipelines.errors import PlanError
from pipelines.planning import devices
from pipelines.planning.job import Job, describe
from pipelines.planning.planner import Planner, Setup, micro_batch
from pipelines.planning.suggest import room_of, suggestions
from pipelines.recipe import recipe
from pipelines.training.arguments import accumulation

ABOUT = """\
Will it fit, how long will it take: said for every stage before anything runs.

No weights are read: models come from their config (a local folder, the hub or its cache, or what an earlier stage will
make), are counted and traced without numbers, and the rest are formulae (docs/plan.md). What does not fit is tried again
with one change after the other, and the changes that make it fit are named.
"""
EXAMPLES = """
pipelines plan recipes/demo.yaml policy --calibrate   this CPU, measured for a second
pipelines plan recipes/tldr_pythia1b.yaml --gpus 8 --gpu h100 --config_file accelerate_configs/zero2.yaml
pipelines plan recipes/qwen3_rlhf.yaml --gpus 1 --gpu a100 --price-per-hour 1.5
"""


def launcher(file: str) -> dict:
    """Strategy, offload, processes and bf16 that an Accelerate config file asks for."""
    import yaml

    path = Path(file)
    if not path.is_file():
        near = sorted(p.as_posix() for p in Path("accelerate_configs").glob("*.yaml"))
        raise PlanError(f"--config_file {file}: no such file{errors.meant(path.as_posix(), near)}")
    told = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
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
    return {"strategy": strategy, "offload": offload, "world": world, "cpu": bool(told.get("use_cpu")),
            "bf16": told.get("mixed_precision") == "bf16"}  # fmt: skip


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
        raise PlanError(f"stages.{job.stage.name}.model.load_in_4bit: quantized weights are not cut into shards "
                        f"(accelerate_configs/ddp.yaml holds all on each device), as under {setup.strategy}")  # fmt: skip
    if setup.sharded and job.stage.sections.get("reward", {}).get("share_base"):
        raise PlanError(f"stages.{job.stage.name}.reward.share_base: one base under several models is not cut into "
                        f"shards (accelerate_configs/ddp.yaml holds it on each device), as under {setup.strategy}")  # fmt: skip


def calibrate() -> tuple[float, float]:
    """`(FLOP/s of a float32 matrix product, bytes/s read and written)` of this machine, the best of a second's tries."""
    import torch

    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    products, big = [], torch.empty(2**26, dtype=torch.uint8)
    copies, until = [], time.perf_counter() + 1
    target = torch.empty_like(big)
    while time.perf_counter() < until or len(copies) < 3:
        begin = time.perf_counter()
        a @ b
        products.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        target.copy_(big)
        copies.append(time.perf_counter() - begin)
    return 2 * 1024**3 / min(products), 2 * big.numel() / min(copies)


def parser() -> argparse.ArgumentParser:
    """The verb's command line."""
    out = command_line("plan", ABOUT, EXAMPLES)
    out.add_argument("recipe", nargs="?", help="a YAML file; see recipes/")
    out.add_argument("words", nargs="*", metavar="STAGE | KEY=VALUE", help="stages to plan (default: all); overrides")
    out.add_argument("--gpus", type=int, help="number of GPUs, one process each (default: the config file's, or 1)")
    out.add_argument("--gpu", help=f"one of {', '.join(devices.DEVICES)} (default with --gpus: h100)")
    out.add_argument("--processes", type=int, help="without GPUs: processes on this machine's CPU")
    out.add_argument("--config_file", "--config-file", help="the file that `accelerate launch` will get")
    out.add_argument("--price-per-hour", type=float, help="of one GPU (or of the machine without GPUs)")
    out.add_argument(
        "--mfu", type=float, default=devices.MFU, help="share of the peak FLOP/s reached (default %(default)s)"
    )
    out.add_argument("--calibrate", action="store_true", help="measure this CPU for a second, to say how long")
    return out


def main(argv: list[str]) -> int:
    """Print the plan of a recipe; returns 1 where a stage does not fit."""
    args = parser().parse_intermixed_args(argv)
    if not args.recipe:
        raise PlanError("plan needs a recipe; see recipes/")
    names = [word for word in args.words if "=" not in word]
    loaded = recipe.load(args.recipe, [word for word in args.words if "=" in word], read_data=False)
    known = [stage.name for stage in loaded.stages]
    for name in names:
        if name not in known:
            raise PlanError(f"no stage {name!r} in {args.recipe}{errors.meant(name, known)}; it has {', '.join(known)}")
    if args.gpu:
        devices.device(args.gpu)  # what is wrong with the command is said before models are looked at
    if args.config_file:
        launcher(args.config_file)
    machine = calibrate() if args.calibrate else None
    total_seconds, unknown, too_big = 0.0, False, False
    for stage in loaded.stages:
        if names and stage.name not in names:
            continue
        if not stage.spec.leaves_model:
            print(f"{stage.name} ({stage.kind}) trains nothing: not planned")
            continue
        job = describe(loaded, stage)
        fits, seconds = report(Planner(job), setup_of(job, args), args, machine)
        too_big |= not fits
        unknown |= seconds is None
        total_seconds += seconds or 0.0
    if not unknown and (len(names) or len(known)) > 1:
        print(f"all: {_time(total_seconds)}")
    return 1 if too_big else 0


def report(planner: Planner, setup: Setup, args, machine: tuple[float, float] | None) -> tuple[bool, float | None]:
    """Print one stage; returns whether it fits and the seconds it takes (None: not known)."""
    job, memory, room = planner.job, planner.memory(setup), room_of(setup)
    a = planner.anatomy("model", setup.lora)
    where = f"{setup.world} x {setup.gpu or 'CPU process'}"
    how = {"fp32": "float32", "autocast": "bf16 autocast", "bf16": "bf16"}[setup.precision]
    how += (", LoRA" if setup.lora else "") + (", 4 bits" if setup.quantize else "")
    how += (", checkpointing" if setup.checkpointing else "") + (
        f", {setup.offload} offloaded" if setup.offload != "none" else ""
    )
    print(f"{job.stage.name} ({job.kind}) on {where}, {setup.strategy}, {how}")
    line("model", f"{a.architecture}: {a.parameters:,} parameters, {a.trainable:,} trained")
    for name in job.models:
        if name != "model":
            shares = planner.shares_base
            other = planner.anatomy(name, setup.lora and (shares or name == "critic"))
            trained = f", {other.trainable:,} trained" if name == "critic" else ", frozen"
            size = other.trainable if shares else other.parameters
            where = " on the policy's base" if shares else ""
            line("", f"{name}: {other.architecture}: {size:,} parameters{where}{trained}")
    rows, length = micro_batch(job, setup)
    steps, per_step, tokens = planner.steps(setup), planner.per_step(setup), planner.tokens_per_step(setup)
    unit = "updates" if job.kind == "ppo" else "steps"
    line("steps", f"{'unknown' if steps is None else f'{steps:,}'} {unit} of {per_step:,} rows "
         f"({setup.micro} a device at once: up to {rows} x {length} tokens)")  # fmt: skip
    train, decoding = planner.flops_per_step(setup)
    count = steps or 1
    line("work", f"{_si(tokens * count)} tokens, {_si((train + decoding) * count)}FLOPs" + ("" if steps else " a step"))
    parts = [(f.name, getattr(memory, f.name)) for f in fields(memory)]
    line("memory", f"{memory.total / 1e9:.2f} GB a device: "
         + ", ".join(f"{name.replace('_', ' ')} {size / 1e9:.2f}" for name, size in parts if size))  # fmt: skip
    fits = memory.total <= room
    line("", f"{'fits' if fits else 'DOES NOT FIT'} into {room / 1e9:.1f} GB")
    if not fits:
        found = suggestions(planner, setup, room)
        for words, _, changed in found:
            line("", f"  would fit with {words}: {changed.total / 1e9:.2f} GB")
        if not found:
            line("", "  nothing tried makes it fit: a smaller model, or GPUs with more memory")
    seconds = _report_time(planner, setup, args, machine, steps)
    for note in job.notes:
        line("note", note)
    return fits, seconds


def _report_time(planner: Planner, setup: Setup, args, machine, steps: int | None) -> float | None:
    if setup.gpu:
        hardware = devices.DEVICES[setup.gpu]
        peak = hardware.bf16 if setup.bf16 and hardware.bf16 else hardware.fp32
        flops, bandwidth = peak * args.mfu, hardware.bandwidth
        basis = f"assuming {args.mfu:.0%} of {peak / 1e12:.0f} TFLOP/s"
    elif machine:
        flops, bandwidth = machine[0] * devices.CPU_SHARE / setup.world, machine[1] / setup.world
        basis = f"assuming {devices.CPU_SHARE:.0%} of the {machine[0] / 1e9:.0f} GFLOP/s measured here"
    else:
        line("time", "not estimated: --calibrate measures this CPU, --gpu names another device")
        return None
    parts = planner.seconds_per_step(setup, flops, bandwidth)
    step = parts["compute"] + parts["decode"] + parts["traffic"]
    detail = ", ".join(f"{name} {_time(value)}" for name, value in parts.items() if value)
    detail += f"; {_si(planner.tokens_per_step(setup) / step)}tokens/s"
    if steps is None:
        line("time", f"{_time(step)} a step ({detail}), {basis}; how many steps is not known")
        return None
    cost = ""
    if args.price_per_hour is not None:
        count = setup.world if setup.gpu else 1
        cost = f"; costs {step * steps / 3600 * count * args.price_per_hour:,.2f} at {args.price_per_hour:g} an hour"
    line("time", f"{_time(step * steps)} ({_time(step)} a step: {detail}), {basis}{cost}")
    return step * steps


def line(head: str, text: str) -> None:
    """One line of the report."""
    print(f"  {head:<8}{text}")


def _si(value: float) -> str:
    for power, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= power:
            return f"{value / power:.3g} {letter}"
    return f"{value:.3g} "


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.3g} s"
