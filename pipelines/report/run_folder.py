"""What a run's folder tells: its stages, their state, records, logs and samples."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

from pipelines import files
from pipelines.errors import RecordError, SetupError


@dataclass
class Seen:
    """What the run's folder tells about one stage. `state` is finished, running, stopped, due or damaged."""

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
    problems: list[str] = field(default_factory=list)  # files of it that cannot be read, with the way out

    @property
    def step(self) -> int:
        return max((e.get("step", 0) for e in self.history), default=0)

    @property
    def metrics(self) -> dict:
        return self.final.get("metrics", {})


def read(run: Path, running: bool | None = None) -> list[Seen]:
    """The stages of a run's folder in the recipe's order. `running`: whether a run works there (None: look at its
    lock).

    Raises `SetupError` for a folder in which no chain was started.
    """
    listed, problems = listed_stages(run)
    found = [p.parent.name for p in run.glob("*/*.json") if p.name in (files.STARTED, files.FINISHED)]
    if not listed and not found:
        raise SetupError(
            problems[0]
            if problems
            else f"{run}: no stage was started here. A report is made of a run's folder: the recipe's output_dir"
        )
    out = []
    for name in [*listed, *sorted(set(found) - set(listed), key=lambda n: _begun(run / n))]:
        stage = Seen(name, listed.get(name, {}).get("kind", "?"), listed.get(name, {}).get("parents", []), "due")
        try:
            _look(run / name, stage)
        except RecordError as error:
            stage.problems.append(str(error))
            stage.state = stage.state if stage.record else "damaged"
        out.append(stage)
    open_ = [s for s in out if s.state == "stopped"]
    if open_ and (files.busy(run) if running is None else running):
        # A run works on one stage at a time: on the one that was written to last.
        max(open_, key=lambda s: _touched(run / s.name)).state = "running"
    return out


def listed_stages(run: Path) -> tuple[dict[str, dict], list[str]]:
    """`(the stages of chain.json by name, what is wrong with the file)`."""
    try:
        stages = (files.read_record(run / files.CHAIN) or {"stages": []})["stages"]
    except RecordError as error:
        return {}, [str(error)]
    return {s["name"]: {"kind": s.get("kind", "?"), "parents": s.get("parents", [])} for s in stages if "name" in s}, []


def _look(folder: Path, stage: Seen) -> None:
    """Fill `stage` from its folder, as far as that can be read. Raises `RecordError` where it cannot."""
    final, started = (files.read_record(folder / n) or {} for n in (files.FINISHED, files.STARTED))
    record = (final or started).get("record", {})
    stage.kind = str(record.get("kind") or stage.kind)
    stage.parents = list(record.get("parents", {})) or stage.parents
    stage.record, stage.final = record, final
    if final:
        stage.state, stage.seconds = "finished", final["seconds"]
        stage.history = files.read_rows(folder / files.HISTORY)
        stage.samples = files.read_rows(folder / "samples.jsonl") or files.read_rows(folder / "rankings.jsonl")
        stage.values = files.read_json(folder / "values.json") or {}
    elif started:
        stage.state = "stopped"
        stage.history, stage.total, stage.seconds = files.read_log(folder / "checkpoints")
        stage.samples = files.read_rows(folder / "checkpoints" / "samples.jsonl")


def _begun(folder: Path) -> str:
    for name in (files.FINISHED, files.STARTED):
        with contextlib.suppress(RecordError):
            if seen := files.read_record(folder / name):
                return seen["started"]
    return ""


def _touched(folder: Path) -> float:
    return max(p.stat().st_mtime for p in (folder / files.STARTED, folder / "checkpoints" / files.LOG) if p.exists())
