"""What a run's folder tells: its stages, their state, records, logs and samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pipelines import files
from pipelines.errors import SetupError


@dataclass
class Seen:
    """What the run's folder tells about one stage. `state` is finished, running, stopped or due."""

    name: str
    kind: str
    parents: list[str]
    state: str
    record: dict = field(default_factory=dict)
    final: dict = field(default_factory=dict)  # stage.json
    history: list[dict] = field(default_factory=list)
    samples: list[dict] = field(default_factory=list)
    values: dict = field(default_factory=dict)  # values.json of an evaluation: model to measure to one value per item
    total: int | None = None  # steps to come in all, of a stage that is not finished
    seconds: float = 0.0

    @property
    def step(self) -> int:
        return max((e.get("step", 0) for e in self.history), default=0)

    @property
    def metrics(self) -> dict:
        return self.final.get("metrics", {})


def read(run: Path, running: bool | None = None) -> list[Seen]:
    """The stages of a run's folder in the recipe's order. `running`: whether a run works there (None: look at its lock).

    Raises `SetupError` for a folder in which no chain was started.
    """
    listed = {s["name"]: s for s in (files.read_json(run / files.CHAIN) or {}).get("stages", [])}
    found = [p.parent.name for p in run.glob("*/*.json") if p.name in (files.STARTED, files.FINISHED)]
    if not listed and not found:
        raise SetupError(
            f"{run}: no stage was started here. A report is made of a run's folder: the recipe's output_dir"
        )
    out = []
    for name in [*listed, *sorted(set(found) - set(listed), key=lambda n: _begun(run / n))]:
        folder = run / name
        final, started = (files.read_json(folder / n) or {} for n in (files.FINISHED, files.STARTED))
        record = (final or started).get("record", {})
        stage = Seen(
            name,
            record.get("kind") or listed[name]["kind"],
            list(record.get("parents", {})) or listed.get(name, {}).get("parents", []),
            "finished" if final else "stopped" if started else "due",
            record,
            final,
        )
        if final:
            stage.history, stage.seconds = files.read_rows(folder / files.HISTORY), final["seconds"]
            stage.samples = files.read_rows(folder / "samples.jsonl") or files.read_rows(folder / "rankings.jsonl")
            stage.values = files.read_json(folder / "values.json") or {}
        elif started:
            stage.history, stage.total, stage.seconds = files.read_log(folder / "checkpoints")
            stage.samples = files.read_rows(folder / "checkpoints" / "samples.jsonl")
        out.append(stage)
    open_ = [s for s in out if s.state == "stopped"]
    if open_ and (files.busy(run) if running is None else running):
        # A run works on one stage at a time: on the one that was written to last.
        max(open_, key=lambda s: _touched(run / s.name)).state = "running"
    return out


def _begun(folder: Path) -> str:
    seen = files.read_json(folder / files.FINISHED) or files.read_json(folder / files.STARTED)
    return seen["started"]


def _touched(folder: Path) -> float:
    return max(p.stat().st_mtime for p in (folder / files.STARTED, folder / "checkpoints" / files.LOG) if p.exists())
