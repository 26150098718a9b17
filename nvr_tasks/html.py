"""Pages and plots of reports: self-contained HTML, no network and no script, right in light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --bad: #cf222e; --soft: #8882;
  --c0: #0969da; --c1: #bc4c00; --c2: #8250df; --c3: #1a7f37; }
@media (prefers-color-scheme: dark) { :root { --good: #3fb950; --bad: #f85149;
  --c0: #58a6ff; --c1: #f0883e; --c2: #bc8cff; --c3: #3fb950; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; }
th, td { text-align: left; padding: .4rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.promote, .yes { color: var(--good); } .hold, .no { color: var(--bad); }
.bar { height: .7rem; background: currentColor; opacity: .55; border-radius: 2px; }
code { background: var(--soft); padding: .1rem .3rem; border-radius: 3px; overflow-wrap: anywhere; }
figure { margin: 1rem 0; } figcaption { font-size: .85rem; } svg { width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: currentColor; }
.key { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin: 0 .3rem 0 .9rem; }
td.text { max-width: 22rem; overflow-wrap: anywhere; font-size: .9rem; }
"""
COLOURS = ("var(--c0)", "var(--c1)", "var(--c2)", "var(--c3)")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 240, 46, 34, 10, 10

Points = Sequence[tuple[float, float]]


def page(title: str, body: str) -> str:
    """A whole document around a body."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body>{body}</body></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Cells of text; the columns in `numbers` are set to the right."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=n' if i in numbers else ''}>{escape(cell)}</{tag}>" for i, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f"<table><tr>{line(head, 'th')}</tr>{body}</table>"


def lines(series: Mapping[str, Points], x_label: str, y_label: str, mark: float | None = None) -> str:
    """A line per series over common axes; `mark` is an x that is in force. Points that are not finite are left out."""
    points = {name: [(x, y) for x, y in line if math.isfinite(x) and math.isfinite(y)] for name, line in series.items()}
    points = {name: line for name, line in points.items() if line}
    if not points:
        return ""
    xs = [x for line in points.values() for x, _ in line]
    ys = [y for line in points.values() for _, y in line]
    (x0, x1), (y0, y1) = _range(xs), _range([0.0, *ys])

    def at(x: float, y: float) -> str:
        px = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        py = HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - BOTTOM - TOP)
        return f"{px:.1f},{py:.1f}"

    parts = [_axes(x0, x1, y0, y1, x_label, y_label)]
    if mark is not None and x0 <= mark <= x1:
        (ax, ay), (_, by) = at(mark, y0).split(","), at(mark, y1).split(",")
        parts.append(
            f'<line x1="{ax}" y1="{ay}" x2="{ax}" y2="{by}" stroke="currentColor" stroke-dasharray="4 3" opacity=".7"/>'
        )
    for number, line in enumerate(points.values()):
        path = " ".join(at(x, y) for x, y in line)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="2"/>'
        )
    key = "".join(
        f'<span class="key" style="background:{COLOURS[i % len(COLOURS)]}"></span>{escape(n)}'
        for i, n in enumerate(points)
    )
    label = escape(f"{y_label} over {x_label}")
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
        f"<figcaption>{key}</figcaption></figure>"
    )


def _axes(x0: float, x1: float, y0: float, y1: float, x_label: str, y_label: str) -> str:
    parts = []
    for i in range(5):
        share = i / 4
        px, py = LEFT + share * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py:.1f}" y2="{py:.1f}" stroke="var(--line)"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{_number(y0 + share * (y1 - y0))}</text>'
        )
        parts.append(
            f'<text x="{px:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{_number(x0 + share * (x1 - x0))}</text>'
        )
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text x="{LEFT + 4}" y="{TOP + 8}">{escape(y_label)}</text>')
    return "".join(parts)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
