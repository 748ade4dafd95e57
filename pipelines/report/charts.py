"""Charts and the picture of a chain as inline SVG: no script, no network, light and dark by the page's CSS classes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from html import escape

WIDTH, HEIGHT = 360, 230  # of a chart; a phone shows it at about this size, so its text stays legible
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 26, 40
MOST = 300  # points drawn per line; longer ones are averaged

BOX, TALL, GAP = 196, 66, 56  # a stage's width, height and the space between two
DATA = 34  # height of a data source
WIDEST = 1240  # what a screen shows of the chain side by side
WORDS = 28  # characters that fit into a box


@dataclass
class Series:
    """One line of a chart: `points` are (x, y), `look` is line, dots, both, dashed or steps (a filled outline)."""

    name: str
    points: list[tuple[float, float]]
    look: str = "line"
    color: int = 0  # one of the four of the page's style


def chart(series: list[Series], x: str, y: str, *, low: float | None = None, high: float | None = None) -> str:
    """The series over axes named `x` and `y` (with units); the y axis reaches at least to `low` and `high`.

    Points that are not finite are left out and counted below the chart. Returns "" when there is nothing to draw.
    """
    whole = [replace(s, points=[p for p in s.points if all(map(math.isfinite, p))]) for s in series]
    lost = sum(len(s.points) for s in series) - sum(len(s.points) for s in whole)
    drawn = [replace(s, points=_thin(s.points)) for s in whole if s.points]
    if not drawn:
        return ""
    xs, ys = ([p[i] for s in drawn for p in s.points] for i in (0, 1))
    xticks = _ticks(min(xs), max(xs))
    yticks = _ticks(min([*ys, *([low] if low is not None else [])]), max([*ys, *([high] if high is not None else [])]))
    x0, x1 = min(xs[0], *xs, *xticks[:1]), max(xs)
    y0, y1 = yticks[0], max(yticks[-1], max(ys))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    at_x = lambda v: LEFT + (v - x0) / ((x1 - x0) or 1) * (right - LEFT)
    at_y = lambda v: bottom - (v - y0) / ((y1 - y0) or 1) * (bottom - TOP)
    out = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y)} over {escape(x)}">']
    for v in yticks:
        out.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at_y(v):.1f}" y2="{at_y(v):.1f}"/>')
        out.append(f'<text x="{LEFT - 6}" y="{at_y(v) + 4:.1f}" text-anchor="end">{number(v)}</text>')
    for v in xticks:
        if x0 <= v <= x1:
            out.append(f'<text x="{at_x(v):.1f}" y="{bottom + 16}" text-anchor="middle">{number(v)}</text>')
    out.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    out.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>')
    out.append(f'<text x="2" y="12">{escape(y)}</text>')
    out += [f'<g class="c{s.color}">{_marks(s, at_x, at_y, bottom)}</g>' for s in drawn]
    out.append("</svg>")
    keys = "".join(f'<span class="key c{s.color} {s.look}"><i></i>{escape(s.name)}</span>' for s in drawn)
    out.append(f'<p class="legend">{keys}</p>')
    averaged = max(math.ceil(len(s.points) / MOST) for s in whole)
    if averaged > 1:
        out.append(f'<p class="note">each point is the mean of up to {averaged} logged values</p>')
    if lost:
        out.append(f'<p class="note">{lost} values are not finite and are left out</p>')
    return "".join(out)


def _marks(series: Series, at_x, at_y, bottom: float) -> str:
    """One series: its line or outline, its dots, and a tooltip per dot."""
    places = [(at_x(a), at_y(b)) for a, b in series.points]
    out = ""
    if series.look == "steps":
        path = "".join(f"H{px:.1f}V{py:.1f}" for px, py in places[1:])
        out += f'<path class="area" d="M{places[0][0]:.1f},{bottom}V{places[0][1]:.1f}{path}V{bottom}Z"/>'
    elif series.look != "dots":
        path = "L".join(f"{px:.1f},{py:.1f}" for px, py in places)
        out += f'<path class="{series.look}" d="M{path}"/>'
    if series.look in ("dots", "both") or len(places) == 1:
        for (px, py), (a, b) in zip(places, series.points, strict=True):
            out += f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5"><title>{number(a)}: {number(b)}</title></circle>'
    return out


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MOST` points: the means of equally long pieces."""
    step = math.ceil(len(points) / MOST)
    pieces = [points[i : i + step] for i in range(0, len(points), step)]
    return points if step == 1 else [(sum(a for a, _ in p) / len(p), sum(b for _, b in p) / len(p)) for p in pieces]


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers from at most `low` to at most one step below `high`, and then one more."""
    if low == high:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    raw = (high - low) / count
    step = 10 ** math.floor(math.log10(raw))
    step *= next(m for m in (1, 2, 5, 10) if m * step >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value) -> str:
    """A number for people: 1.89, 12.3k, 2e-4; whole numbers stay whole."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if value == int(value):
        return f"{int(value)}"
    if size < 1e-3:
        digits, power = f"{value:.2e}".split("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value:.4g}" if size >= 1000 else f"{value:.3g}"


@dataclass
class Node:
    """A stage in the picture: its `lines` of text, `state` (a CSS class), `parents` by name, and its data in words."""

    name: str
    lines: list[str]
    state: str
    parents: list[str]
    data: str = ""
    rows: str = ""


def picture(nodes: list[Node]) -> str:
    """The chain from left to right for a screen, and one under the other for a phone; CSS shows one of them.

    A chain that is too long for a screen stands one under the other on both.
    """
    wide, width = _across(nodes)
    return _down(nodes) if width > WIDEST else f'<div class="wide">{wide}</div><div class="narrow">{_down(nodes)}</div>'


def _across(nodes: list[Node]) -> tuple[str, int]:
    """The drawing and its width: columns by depth. A stage stands in its first parent's lane where that is free; its
    data stands above it.
    """
    depth: dict[str, int] = {}
    lane: dict[str, int] = {}
    taken: set[tuple[int, int]] = set()
    for node in nodes:
        near = [p for p in node.parents if p in depth]
        depth[node.name] = column = 1 + max((depth[p] for p in near), default=-1)
        # A new lane for what begins anew, so that two chains do not share a row.
        wanted = lane[near[0]] if near else 1 + max(lane.values(), default=-1)
        while (column, wanted) in taken:
            wanted += 1
        taken.add((column, wanted))
        lane[node.name] = wanted
    row = DATA + 22 + TALL + 34
    left = {n.name: 2 + depth[n.name] * (BOX + GAP) for n in nodes}
    top = {n.name: 2 + lane[n.name] * row + DATA + 22 for n in nodes}
    out = []
    for node in nodes:
        x, y = left[node.name], top[node.name]
        # Arrows that come from below other boxes end lowest, so that none cross.
        near = sorted((p for p in node.parents if p in left), key=lambda p: depth[node.name] - depth[p])
        for i, parent in enumerate(near):
            x1, y1 = left[parent] + BOX, top[parent] + TALL / 2
            y2 = y + TALL / 2 + (i - (len(near) - 1) / 2) * 18
            if depth[node.name] - depth[parent] == 1:
                middle = (x1 + x) / 2
                out.append(_arrow(f"M{x1},{y1} C{middle},{y1} {middle},{y2} {x - 2},{y2}"))
            else:  # below the boxes between them
                y1, under = y1 + 18, top[parent] + TALL + 18
                out.append(
                    _arrow(
                        f"M{x1},{y1} C{x1 + 20},{y1} {x1 + 8},{under} {x1 + 30},{under} H{x - 34} "
                        f"C{x - 10},{under} {x - 26},{y2} {x - 2},{y2}"
                    )
                )
        out += _source(node, x, y - 22 - DATA, y, BOX)
        out.append(_box(node, x, y, BOX))
    width = max(left.values(), default=0) + BOX + 2
    return _svg(width, (1 + max(lane.values(), default=0)) * row - 10, out), width


def _down(nodes: list[Node]) -> str:
    """One stage per row, in the recipe's order; what a stage builds on comes in from the left."""
    width, gutter, top, out, y = 350, 46, {}, [], 2
    for node in nodes:
        y += (DATA + 20) if node.data else 0
        top[node.name] = y
        for parent in (p for p in node.parents if p in top):
            y1, y2 = top[parent] + TALL / 2 + 10, y + TALL / 2 - 10
            bulge = gutter - min(56, 14 + (y2 - y1) / 14)  # the curve reaches three quarters as far
            out.append(_arrow(f"M{gutter},{y1} C{bulge},{y1 + 14} {bulge},{y2 - 14} {gutter - 2},{y2}"))
        out += _source(node, gutter, y - 20 - DATA, y, width - gutter - 2)
        out.append(_box(node, gutter, y, width - gutter - 2))
        y += TALL + 22
    return _svg(width, y - 16, out)


def _svg(width: float, height: float, parts: list[str]) -> str:
    return (
        f'<svg class="picture" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="the stages of the chain and what each is made from">{"".join(parts)}</svg>'
    )


def _arrow(path: str) -> str:
    """A path and, at its end, a head that points the way it ends: right, or down for a straight vertical line."""
    *_, end = path.replace("C", " ").replace("V", " ").split()
    if "V" in path:
        x, y = float(path[1:].split(",")[0]), float(end)
        head = f"M{x - 4},{y - 6} L{x},{y} L{x + 4},{y - 6}"
    else:
        x, y = map(float, end.split(","))
        head = f"M{x - 6},{y - 4} L{x},{y} L{x - 6},{y + 4}"
    return f'<path class="arrow" d="{path}"/><path class="arrow" d="{head}"/>'


def _source(node: Node, x: float, y: float, below: float, width: float) -> list[str]:
    """The data of a stage above it: file names, row counts, and an arrow into the stage."""
    if not node.data:
        return []
    fits = WORDS if width == BOX else 44
    return [
        f'<g class="source"><title>{escape(node.data)}: {escape(node.rows)}</title>',
        f'<rect x="{x}" y="{y}" width="{width}" height="{DATA}" rx="{DATA / 2}"/>',
        f'<text class="small" x="{x + width / 2}" y="{y + (14 if node.rows else 21)}" text-anchor="middle">'
        f"{_cut(node.data, fits)}</text>",
        f'<text class="small" x="{x + width / 2}" y="{y + 27}" text-anchor="middle">{_cut(node.rows, fits)}</text></g>',
        _arrow(f"M{x + width / 2},{y + DATA} V{below - 2}"),
    ]


def _box(node: Node, x: float, y: float, width: float) -> str:
    fits = WORDS if width == BOX else 42
    text = "".join(
        f'<text x="{x + 12}" y="{y + 39 + 17 * i}">{_cut(line, fits)}</text>' for i, line in enumerate(node.lines)
    )
    return (
        f'<a href="#{escape(node.name)}"><g class="stage {node.state}"><title>{escape(node.name)}</title>'
        f'<rect x="{x}" y="{y}" width="{width}" height="{TALL}" rx="8"/>'
        f'<text class="name" x="{x + 12}" y="{y + 20}">{_cut(node.name, fits - 5)}</text>{text}</g></a>'
    )


def _cut(text: str, most: int) -> str:
    return escape(text if len(text) <= most else text[: most - 1] + "…")
