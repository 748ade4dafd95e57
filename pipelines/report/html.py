"""The few pieces of HTML that the report is made of."""

from __future__ import annotations

import datetime
from html import escape
from pathlib import Path


def document(title: str, about: str, body: str, running: bool = False, every: float = 0) -> str:
    """A whole page: no script, nothing from elsewhere. With `every` it reloads itself every so many seconds while what
    it shows is running.
    """
    style = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    reload_ = f'<meta http-equiv="refresh" content="{every:g}">' if running and every else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"{reload_}<title>{escape(title)}: report</title><style>{style}</style></head><body>"
        f'<h1>{escape(title)}</h1><p class="soft">{escape(about)} · written {made}{" · running" if running else ""}</p>'
        f"{body}</body></html>\n"
    )


def titled(title: str, body: str) -> str:
    return f"<div><h3>{escape(title)}</h3>{body}</div>" if body else ""


def chart_grid(charts: list[str]) -> str:
    return f'<div class="charts">{"".join(charts)}</div>' if charts else ""


def tile_row(tiles: list[tuple[str, str]]) -> str:
    cells = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in tiles)
    return f'<div class="tiles">{cells}</div>'


def html_table(head: list[str], rows: list[list], numbers: int, style: str = "") -> str:
    """A table whose columns from `numbers` on are numbers; it scrolls sideways where the screen is narrow."""
    kind = lambda i: ' class="n"' if i >= numbers else ""
    top = "".join(f"<th{kind(i)}>{escape(str(h))}</th>" for i, h in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td{kind(i)}>{escape(str(v))}</td>" for i, v in enumerate(row)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table class="{style}"><tr>{top}</tr>{body}</table></div>'


def duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return (
        f"{hours} h {rest // 60:02d} min"
        if hours
        else f"{rest // 60} min {rest % 60:02d} s"
        if rest >= 60
        else f"{rest} s"
    )
