"""What to change so that a stage fits into memory: one change after the other, the smallest first."""

from __future__ import annotations

from dataclasses import replace

from pipelines.errors import SetupError
from pipelines.kinds import KINDS
from pipelines.planning import costs, devices
from pipelines.planning.costs import Memory
from pipelines.planning.job import Job
from pipelines.planning.planner import Planner, Setup
from pipelines.training.arguments import accumulation

MICRO = "args.per_device_train_batch_size={micro}"  # suggested with the largest number that fits
SHARDS = ("zero2", "fsdp2", "zero3")  # accelerate_configs/NAME.yaml, for suggestions


def suggestions(planner: Planner, setup: Setup, room: float) -> list[tuple[str, Setup, Memory]]:
    """Changes that make the stage fit into `room` bytes, the smallest first: `(what to set, setup, its memory)`.

    Each change is tried alone; where none suffices, on top of those before it.
    """
    tried = _changes(planner.job, setup)
    alone = _fitting(planner, [[change] for change in tried], setup, room)
    if any(words.startswith("args.") for words, *_ in alone):  # then no more GPUs are needed
        return [found for found in alone if "--gpus" not in found[0]]
    if alone:
        return alone
    shrunk = [change for change in tried if change[0].startswith("args.")]
    return _fitting(planner, [[*shrunk, change] for change in tried if change not in shrunk] + [shrunk], setup, room)


def _changes(job: Job, setup: Setup) -> list[tuple[str, dict]]:
    """`(what to set, the fields of the setup that it changes)`."""

    out: list[tuple[str, dict]] = []
    if setup.micro > 1:
        out.append((MICRO, {}))
    if not setup.checkpointing:
        out.append(("args.activation_checkpointing=true", {"checkpointing": True}))
    if job.kind == "ppo" and setup.rollout > 16:
        out.append(("args.local_rollout_forward_batch_size=16", {"rollout": 16}))
    adapts = KINDS[job.kind].adapters
    if adapts and not setup.lora:
        out.append(("model.use_peft=true", {"lora": True}))
    if adapts and not setup.quantize and not setup.sharded:
        words = "model.load_in_4bit=true" if setup.lora else "model.use_peft=true and model.load_in_4bit=true"
        out.append((words, {"lora": True, "quantize": True}))
    if not setup.gpu or setup.quantize:
        return out
    file = "--config_file accelerate_configs/{}.yaml".format
    if setup.world > 1:
        out += [(file(name), {"strategy": name}) for name in SHARDS if name != setup.strategy]
    if setup.offload != "all":
        out.append((file("zero3_offload"), {"strategy": "zero3", "offload": "all"}))
    strategy = setup.strategy if setup.strategy in costs.SHARDED else "fsdp2"
    for factor in (2, 4, 8, 16, 32, 64):
        more = setup.world * factor
        try:  # as many rows in all: a device has fewer at once
            micro = accumulation({**job.values, "per_device_train_batch_size": setup.micro}, more)
        except SetupError:  # the global batch cannot be split so far
            break
        fewer = {"micro": micro.get("per_device_train_batch_size", setup.micro)}
        name = strategy if more <= devices.PER_MACHINE else f"{strategy}_multi"
        out.append((f"--gpus {more} {file(name)}", {"strategy": strategy, "world": more, **fewer}))
    return out


def _fitting(planner: Planner, combinations: list, setup: Setup, room: float) -> list[tuple[str, Setup, Memory]]:
    found: list[tuple[str, Setup, Memory]] = []
    for combination in combinations:
        if any("--gpus" in c[0] for c in combination) and any("--gpus" in words for words, *_ in found):
            continue  # the fewest that suffice are enough
        fields_ = {k: v for _, change in combination for k, v in change.items()}
        changed = replace(setup, **fields_)
        if changed.sharded and (changed.quantize or planner.shares_base):
            continue  # as `_refuse`
        if any(words == MICRO for words, _ in combination):
            changed = replace(changed, micro=max(1, changed.micro // 2))
            while planner.memory(changed).total > room and changed.micro > 1:
                changed = replace(changed, micro=changed.micro // 2)
        memory = planner.memory(changed)
        if memory.total <= room:
            words = " and ".join(words.format(micro=changed.micro) for words, _ in combination)
            found.append((words, changed, memory))
    return found


def room_of(setup: Setup) -> float:
    """Bytes that one process may use."""
    if setup.gpu:
        return devices.DEVICES[setup.gpu].memory
    import psutil

    return psutil.virtual_memory().total / setup.world
