"""The plan as tables: a line for each stage, what its memory is made of, and notes below."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from pipelines.planning import devices, setups
from pipelines.planning.costs import Memory
from pipelines.planning.planner import Planner, Setup, micro_batch
from pipelines.planning.suggest import room_of, suggestions


@dataclass
class Outlook:
    """What is expected of one stage; `seconds` is None where its steps or the device are not known."""

    planner: Planner
    setup: Setup
    memory: Memory
    room: float
    steps: int | None
    step: dict[str, float] | None  # seconds of a step, part by part
    basis: str = ""

    @property
    def fits(self) -> bool:
        """Whether one device holds it."""
        return self.memory.total <= self.room

    @property
    def seconds(self) -> float | None:
        """Of the whole stage."""
        return None if self.steps is None or self.step is None else self.steps * sum(self.step.values())


def outlook(planner: Planner, setup: Setup, mfu: float, calibrated: bool) -> Outlook:
    """What is expected of a stage; its time on a GPU of the table, or with `calibrated` on this CPU as measured."""
    found = Outlook(planner, setup, planner.memory(setup), room_of(setup), planner.steps(setup), None)
    precision = "bf16" if setup.bf16 else "float32"
    if setup.gpu:
        hardware = devices.DEVICES[setup.gpu]
        peak = hardware.bf16 if setup.bf16 and hardware.bf16 else hardware.fp32
        found.step = planner.seconds_per_step(setup, peak * mfu, hardware.bandwidth)
        found.basis = f"{mfu:.0%} of {peak / 1e12:.0f} TFLOP/s in {precision}"
    elif calibrated:
        flops, bandwidth = setups.calibrate(setup.bf16)
        share = devices.CPU_SHARE / setup.world
        found.step = planner.seconds_per_step(setup, flops * share, bandwidth / setup.world)
        found.basis = f"{devices.CPU_SHARE:.0%} of the {flops / 1e9:.0f} GFLOP/s measured here in {precision}"
    return found


def report(found: list[Outlook], price: float | None) -> str:
    """The plan for people."""
    first = found[0].setup
    where = f"on {first.world} x {first.gpu or 'CPU process'}, {first.strategy}"
    where += f", {first.offload} offloaded" if first.offload != "none" else ""
    parts = [where, "", table(*_stages(found, price)), "", "memory of a device in GB", table(*_memory(found))]
    notes = [
        f"{one.planner.job.stage.name}: {note}" for one in found for note in (*_models(one), *one.planner.job.notes)
    ]
    parts += ["", *notes] if notes else []
    parts += [line for one in found if not one.fits for line in ("", *_too_big(one))]
    bases = list(dict.fromkeys(one.basis for one in found if one.basis))
    parts.append(
        "\n"
        + (
            f"times assume {'; '.join(bases)}"
            if bases
            else "no times: --calibrate measures this CPU, --gpu names another device"
        )
    )
    return "\n".join(parts)


def _stages(found: list[Outlook], price: float | None) -> tuple[list[str], list[list[str]]]:
    head = [
        "stage",
        "model",
        "parameters",
        "trained",
        "how",
        "steps",
        "of rows",
        "at once",
        "tokens",
        "FLOPs",
        "GB",
        "fits",
        "a step",
        "tokens/s",
        "time",
    ]
    rows, total, cost = [], 0.0, 0.0
    for one in found:
        planner, setup, job = one.planner, one.setup, one.planner.job
        a = planner.anatomy("model", setup.lora)
        count, tokens = one.steps or 1, planner.tokens_per_step(setup)
        at_once, length = micro_batch(job, setup)
        step = sum(one.step.values()) if one.step else None
        unit = "updates" if job.kind == "ppo" else "steps"
        row = [f"{job.stage.name} ({job.kind})", a.architecture, f"{a.parameters:,}", f"{a.trainable:,}", _how(setup)]
        row += ["?" if one.steps is None else f"{one.steps:,} {unit}", f"{planner.per_step(setup):,}"]
        row += [f"{at_once} x {length}", _si(tokens * count), _si(sum(planner.flops_per_step(setup)) * count)]
        row += [f"{one.memory.total / 1e9:.2f} of {one.room / 1e9:.0f}", "yes" if one.fits else "NO"]
        row += [_time(step), _si(tokens / step) if step else "", _time(one.seconds)]
        if price is not None:
            spent = (one.seconds or 0.0) / 3600 * price * (setup.world if setup.gpu else 1)
            row.append("" if one.seconds is None else f"{spent:,.2f}")
            cost += spent
        total += one.seconds or 0.0
        rows.append(row)
    if price is not None:
        head.append("cost")
    if len(found) > 1 and all(one.seconds is not None for one in found):
        last = ["all", *[""] * (len(head) - (2 if price is None else 3)), _time(total)]
        rows.append([*last, f"{cost:,.2f}"] if price is not None else last)
    empty = [i for i in range(len(head)) if i and not any(row[i] for row in rows)]
    keep = [i for i in range(len(head)) if i not in empty]
    return [head[i] for i in keep], [[row[i] for i in keep] for row in rows]


def _memory(found: list[Outlook]) -> tuple[list[str], list[list[str]]]:
    names = [f.name for f in fields(Memory) if any(getattr(one.memory, f.name) for one in found)]
    rows = []
    for one in found:
        parts = [getattr(one.memory, name) for name in names]
        rows.append(
            [
                one.planner.job.stage.name,
                *(f"{size / 1e9:.2f}" if size else "" for size in parts),
                f"{one.memory.total / 1e9:.2f}",
            ]
        )
    return ["stage", *(name.replace("_", " ") for name in names), "total"], rows


def _models(one: Outlook) -> list[str]:
    """A line for every model beside the trained one: PPO's critic and reward models."""
    planner, setup, out = one.planner, one.setup, []
    for name in planner.job.models:
        if name != "model":
            shares = planner.shares_base
            other = planner.anatomy(name, setup.lora and (shares or name == "critic"))
            trained = f", {other.trainable:,} trained" if name == "critic" else ", frozen"
            size = other.trainable if shares else other.parameters
            base = " on the policy's base" if shares else ""
            out.append(f"{name}: {other.architecture}: {size:,} parameters{base}{trained}")
    if planner.job.spared is not None:
        full = Planner(replace(planner.job, models={**planner.job.models, "critic": planner.job.spared}))
        saved = full.memory(setup).total - one.memory.total
        out.append(f"no critic (advantage: {planner.job.values['advantage']}): {saved / 1e9:.2f} GB less than with gae")
    return out


def _too_big(one: Outlook) -> list[str]:
    found = suggestions(one.planner, one.setup, one.room)
    name = one.planner.job.stage.name
    lines = [f"{name} does not fit into {one.room / 1e9:.1f} GB; it would with"]
    lines += [f"  {words}: {changed.total / 1e9:.2f} GB" for words, _, changed in found]
    return (
        lines
        if found
        else [f"{name} does not fit, and nothing tried makes it: a smaller model, or GPUs with more memory"]
    )


def _how(setup: Setup) -> str:
    how = {"fp32": "float32", "autocast": "bf16 autocast", "bf16": "bf16"}[setup.precision]
    how += (", LoRA" if setup.lora else "") + (", 4 bits" if setup.quantize else "")
    return how + (", checkpointing" if setup.checkpointing else "")


def table(head: list[str], rows: list[list[str]]) -> str:
    """Columns under their names: words to the left, numbers to the right."""
    columns = list(zip(head, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [any(cell[:1].isdigit() for cell in column[1:]) for column in columns]
    lines = [
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in (head, ["-" * w for w in widths], *rows)
    ]
    return "\n".join(lines)


def _si(value: float) -> str:
    for power, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= power:
            return f"{value / power:.3g} {letter}"
    return f"{value:.3g}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.3g} s"
