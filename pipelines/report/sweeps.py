"""What a sweep found: `sweep.json`, its table, its figures, and the page that shows them."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import pydantic

from pipelines import files
from pipelines.errors import RecordError
from pipelines.report import charts
from pipelines.report.charts import Series, number
from pipelines.report.html import chart_grid, document, duration, html_table, titled
from pipelines.report.run_folder import Seen

FOLDER = "sweep"  # in a run's folder: FOLDER/KEYS/POINT
RESULTS, PAGE = "sweep.json", "sweep.html"
MARKS = {"finished": "✓", "failed": "✗ failed", "due": "○ due"}


@dataclass
class Row:
    """One point: the values of its keys, what came out, and what it cost."""

    name: str  # of its folder
    settings: dict[str, str | int | float | bool | list | dict | None]
    state: str = "due"  # finished, failed or due
    metric: float | None = None
    kl: float | None = None  # nats per answer, of the metric's stage, or of the last one it builds on that measures it
    seconds: float = 0.0  # of the stages that a swept key decides, wherever they were trained
    error: str = ""  # why it failed

    @property
    def measured(self) -> bool:
        return self.metric is not None and math.isfinite(self.metric)


@dataclass
class Sweep:
    """The content of `sweep.json`."""

    recipe: str
    keys: list[str]
    metric: str = ""  # STAGE/METRIC; empty until a point has one
    lower_is_better: bool = False
    shared: list[str] = field(default_factory=list)  # stages that no key decides, trained once
    shared_seconds: float = 0.0
    spent: float = 0.0  # seconds of everything that was trained, what two points share counted once
    points: list[Row] = field(default_factory=list)

    def best_first(self) -> list[Row]:
        """The points in order: those with a metric, best first, then those without, those that failed, those due."""
        sign = 1 if self.lower_is_better else -1
        states = list(MARKS)
        return sorted(
            self.points, key=lambda p: (not p.measured, sign * p.metric if p.measured else 0, states.index(p.state))
        )

    @property
    def best(self) -> Row | None:
        return next((p for p in self.best_first() if p.measured), None)


def write(folder: Path, sweep: Sweep) -> None:
    """Write `sweep.json` and `sweep.html` into the sweep's folder."""
    files.write_json(folder / RESULTS, dataclasses.asdict(sweep))
    about = f"{sum(p.state == 'finished' for p in sweep.points)} of {len(sweep.points)} points finished"
    files.write_text(folder / PAGE, document(sweep.recipe, about, section(sweep)))


def read(path: Path) -> Sweep:
    """A `sweep.json`. Raises `RecordError` where it is damaged."""
    try:
        return pydantic.TypeAdapter(Sweep).validate_python(files.read_json(path))
    except pydantic.ValidationError as error:
        at = ".".join(map(str, error.errors()[0]["loc"]))
        raise RecordError(
            f"{path} is damaged (its field {at!r} is wrong): give the sweep's command again, which writes it again and "
            "trains nothing that is finished."
        ) from None


def sections(run: Path) -> tuple[list[str], list[str]]:
    """`(HTML of the sweeps below a run's folder, what of them cannot be read)`."""
    found, wrong = [], []
    for path in sorted(run.glob(f"{FOLDER}/*/{RESULTS}")):
        try:
            found.append(section(read(path)))
        except RecordError as error:
            wrong.append(str(error))
    return found, wrong


def section(sweep: Sweep) -> str:
    """Figures and table of a sweep, as a part of a page."""
    name = sweep.metric or "metric"
    drawn = [chart for key in sweep.keys if (chart := _against(sweep, key, name))]
    points = [p for p in sweep.points if p.measured and p.kl is not None]
    if points:
        lines = [Series("points", [(p.kl, p.metric) for p in points], "dots")]
        if sweep.best in points:
            lines.append(Series(f"best: {sweep.best.name}", [(sweep.best.kl, sweep.best.metric)], "dots", 1))
        drawn.append(titled(f"{name} against KL", charts.chart(lines, "KL to the reference, nats per answer", name)))
    failed = "".join(
        f'<p class="stopped">{escape(p.name)}: {escape(p.error)}</p>' for p in sweep.points if p.state == "failed"
    )
    seeds = over_seeds(sweep)
    means = f"<h3>over seeds</h3>{html_table(*seeds, len(sweep.keys) - 1)}" if seeds[1] else ""
    head, rows = table(sweep)
    return (
        f"<section><h2>Sweep of {escape(', '.join(sweep.keys))}</h2>{chart_grid(drawn)}"
        f"{html_table(head, rows, len(sweep.keys))}{means}{failed}"
        f'<p class="note">{escape(costs(sweep))}</p></section>'
    )


def _against(sweep: Sweep, key: str, name: str) -> str:
    """The metric against the values of one key; "" where these are no numbers."""
    points = [(p.settings.get(key), p.metric) for p in sweep.points if p.measured]
    if key == "seed" or len({value for value, _ in points if _is_number(value)}) < 2:
        return ""
    points = sorted((float(value), metric) for value, metric in points if _is_number(value))
    axis, values = key, [value for value, _ in points]
    if min(values) > 0 and max(values) / min(values) >= 10:  # 1e-6 to 1e-4: on a plain axis all but one lie on zero
        points = [(math.log10(value), metric) for value, metric in points]
        axis = f"log10 of {key}"
    look = "both" if len(sweep.keys) == 1 else "dots"
    return titled(f"{name} against {key}", charts.chart([Series("points", points, look)], axis, name))


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def table(sweep: Sweep) -> tuple[list[str], list[list[str]]]:
    """`(head, rows)` for people, best first: settings, metric, KL where there is one, seconds, state."""
    with_kl = any(p.kl is not None for p in sweep.points)
    head = [*sweep.keys, sweep.metric or "metric", *(["KL"] if with_kl else []), "seconds", ""]
    rows = []
    for p in sweep.best_first():
        state = "★ best" if p is sweep.best else MARKS[p.state]
        kl = [_figure(p.kl)] if with_kl else []
        rows.append(
            [*(_value(p.settings.get(k)) for k in sweep.keys), _figure(p.metric), *kl, f"{p.seconds:.0f}", state]
        )
    return head, rows


def over_seeds(sweep: Sweep) -> tuple[list[str], list[list[str]]]:
    """`(head, rows)` of the means over `seed`, best first; no rows where it was not swept."""
    others = [key for key in sweep.keys if key != "seed"]
    groups: dict[tuple, list[float]] = {}
    for p in sweep.points:
        if "seed" in sweep.keys and p.measured:
            groups.setdefault(tuple(_value(p.settings.get(key)) for key in others), []).append(p.metric)
    means = sorted(groups.items(), key=lambda item: statistics.fmean(item[1]), reverse=not sweep.lower_is_better)
    rows = [
        [
            *values,
            _figure(statistics.fmean(found)),
            _figure(statistics.stdev(found)) if len(found) > 1 else "–",
            str(len(found)),
        ]
        for values, found in means
    ]
    return [*others, f"mean {sweep.metric}", "standard deviation", "seeds"], rows


def costs(sweep: Sweep) -> str:
    """In words what a point's seconds are, and what all of it took."""
    text = "Seconds of a point: of the stages that the keys decide, also where another run had made them. "
    if sweep.shared:
        text += f"Trained once for all points: {', '.join(sweep.shared)} ({duration(sweep.shared_seconds)}). "
    return text + f"In all, each training counted once: {duration(sweep.spent)}."


def text_table(head: list[str], rows: list[list[str]]) -> str:
    """A table for the terminal."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]]
    return "\n".join(f"  {line}" for line in lines)


def _figure(value: float | None) -> str:
    return "–" if value is None else number(value)


def _value(value) -> str:
    """A setting as YAML has it: exact, not rounded."""
    return value if isinstance(value, str) else json.dumps(value)


def measured(stage: Seen) -> dict[str, float]:
    """Everything that a stage measured, by name: final figures, those of an evaluation, and the last ones logged."""
    logged = {k: v for entry in stage.history for k, v in entry.items()}
    figures = stage.metrics.get("figures")
    figures = {k: v.get("value") for k, v in figures.items()} if isinstance(figures, dict) else {}
    values = {**logged, **figures, **stage.metrics}
    held_out = {k.removeprefix("eval_"): v for k, v in values.items() if k.startswith("eval_")}
    values |= {k: v for k, v in held_out.items() if k not in stage.metrics}  # `loss` is that of held-out rows
    return {k: float(v) for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def kl_of(stage: Seen) -> float | None:
    """Nats per answer that a stage's policy is away from its reference; None where it measures none."""
    values = measured(stage)
    return next((values[key] for key in ("eval_kl", "objective/kl") if key in values), None)
