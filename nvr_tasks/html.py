"""Pages and plots of reports: self-contained HTML, no network and no script, right in light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --bad: #cf222e; --soft: #8882;
  --c0: #0969da; --c1: #bc4c00; --c2: #8250df; --c3: #1a7f37;
  --c4: #bf3989; --c5: #0e7490; --c6: #9a6700; --c7: #57606a; }
@media (prefers-color-scheme: dark) { :root { --good: #3fb950; --bad: #f85149;
  --c0: #58a6ff; --c1: #f0883e; --c2: #bc8cff; --c3: #3fb950;
  --c4: #f778ba; --c5: #39c5cf; --c6: #d29922; --c7: #9198a1; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; }
th, td { text-align: left; padding: .4rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.promote, .yes { color: var(--good); } .hold, .no { color: var(--bad); } .needs-approval { color: var(--c1); }
.bar { height: .7rem; background: currentColor; opacity: .55; border-radius: 2px; }
code { background: var(--soft); padding: .1rem .3rem; border-radius: 3px; overflow-wrap: anywhere; }
figure { margin: 1rem 0; } figcaption { font-size: .85rem; } svg { width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: currentColor; }
.entry { white-space: nowrap; margin-right: .9rem; }
.key { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .3rem; }
.key.dashed { mask: linear-gradient(90deg, #000 40%, #0000 40% 60%, #000 60%); }
@media (max-width: 45rem) { table { display: block; } table, figure { overflow-x: auto; } svg { min-width: 34rem; } }
details { margin: .5rem 0; } summary { cursor: pointer; }
td.text { max-width: 22rem; overflow-wrap: anywhere; font-size: .9rem; }
"""
COLOURS = tuple(f"var(--c{i})" for i in range(8))
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 250, 46, 34, 22, 24

Points = Sequence[tuple[float, float]]


def page(title: str, body: str) -> str:
    """A whole document around a body."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body>{body}</body></html>\n"
    )


def mark(criterion: Mapping[str, object]) -> str:
    """A criterion of the gate in one sign: met, not met, or not looked at."""
    return "✓" if criterion["passed"] else "✗" if criterion.get("looked_at", True) else "–"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Cells of text; the columns in `numbers` are set to the right."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=n' if i in numbers else ''}>{escape(cell)}</{tag}>" for i, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f"<table><tr>{line(head, 'th')}</tr>{body}</table>"


Band = Sequence[tuple[float, float, float]]  # x, low, high


def lines(
    series: Mapping[str, Points],
    x_label: str,
    y_label: str,
    mark: float | None = None,
    *,
    bands: Mapping[str, Band] | None = None,
    level: float | None = None,
    from_zero: bool = True,
) -> str:
    """A line per series over common axes. Points that are not finite are left out; from the ninth on lines are dashed.

    Args:
        mark: an x that is in force.
        bands: a shaded range around the line of the same name.
        level: a y that is in force.
        from_zero: the y axis begins at 0.
    """
    bands = bands or {}
    points = {name: [(x, y) for x, y in line if math.isfinite(x) and math.isfinite(y)] for name, line in series.items()}
    points = {name: line for name, line in points.items() if line}
    if not points:
        return ""
    xs = [x for line in points.values() for x, _ in line]
    ys = [y for line in points.values() for _, y in line]
    ys += [y for band in bands.values() for _, low, high in band for y in (low, high)]
    ys += [level] if level is not None else []
    (x0, x1), (y0, y1) = _range(xs), _round(*_range([0.0, *ys])) if from_zero else _range(ys)

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
    if level is not None:
        (ax, ay), (bx, by) = at(x0, level).split(","), at(x1, level).split(",")
        parts.append(
            f'<line x1="{ax}" y1="{ay}" x2="{bx}" y2="{by}" stroke="currentColor" stroke-dasharray="4 3" opacity=".7"/>'
        )
    for number, (name, line) in enumerate(points.items()):
        colour = COLOURS[number % len(COLOURS)]
        dash = ' stroke-dasharray="6 3"' if number >= len(COLOURS) else ""
        path = " ".join(at(x, y) for x, y in line)
        if band := bands.get(name):
            around = " ".join([*(at(x, high) for x, _, high in band), *(at(x, low) for x, low, _ in reversed(band))])
            parts.append(f'<polygon points="{around}" fill="{colour}" opacity=".12"/>')
        parts.append(
            f'<g><title>{escape(name)}</title><polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/></g>'
        )
    label = escape(f"{y_label} over {x_label}")
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
        f"<figcaption>{_key(list(points))}</figcaption></figure>"
    )


Bar = tuple[str, float, float, float]  # series, low, value, high


def intervals(rows: Sequence[tuple[str, Sequence[Bar]]], x_label: str) -> str:
    """Values with their intervals: a line of dots per row, a colour per series. Shares are drawn as per cent."""
    names = list(dict.fromkeys(name for _, bars in rows for name, *_ in bars))
    if not names:
        return ""
    top = max(high for _, bars in rows for *_, high in bars) or 1.0
    step, label_width = 14, 190
    tall = sum(step * len(bars) + 12 for _, bars in rows)
    scale = (WIDTH - label_width - 30) / top
    parts = []
    for i in range(5):
        x = label_width + scale * top * i / 4
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{tall}" stroke="var(--line)"/>')
        parts.append(f'<text x="{x:.1f}" y="{tall + 14}" text-anchor="middle">{100 * top * i / 4:.3g} %</text>')
    y = 4.0
    for label, bars in rows:
        middle = y + step * len(bars) / 2
        parts.append(f'<text x="{label_width - 10}" y="{middle + 4:.1f}" text-anchor="end">{escape(label)}</text>')
        for name, low, value, high in bars:
            colour = COLOURS[names.index(name) % len(COLOURS)]
            at = y + step / 2
            ends = f'x1="{label_width + scale * low:.1f}" x2="{label_width + scale * high:.1f}"'
            said = escape(f"{label}, {name}: {value:.2%} ({low:.2%} to {high:.2%})")
            parts.append(
                f'<g stroke="{colour}" fill="{colour}"><title>{said}</title>'
                f'<line {ends} y1="{at}" y2="{at}" stroke-width="2" opacity=".6"/>'
                f'<circle cx="{label_width + scale * value:.1f}" cy="{at}" r="4"/></g>'
            )
            y += step
        y += 12
    middle = label_width + (WIDTH - label_width - 30) / 2
    parts.append(f'<text x="{middle}" y="{tall + 30}" text-anchor="middle">{escape(x_label)}</text>')
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {tall + 36}" role="img" aria-label="{escape(x_label)}">{"".join(parts)}</svg>'
        f"<figcaption>{_key(names)}</figcaption></figure>"
    )


def _key(names: Sequence[str]) -> str:
    """Which colour is whose; with more series than colours, the rest are dashed."""
    return "".join(
        f'<span class="entry"><span class="key{" dashed" if i >= len(COLOURS) else ""}" style="background:{COLOURS[i % len(COLOURS)]}">'
        f"</span>{escape(n)}</span> "
        for i, n in enumerate(names)
    )


@dataclass(frozen=True)
class Measured:
    """One value with its interval, drawn as a bar."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    colour: int = 0


def bars(groups: Mapping[str, Sequence[Measured]], label: str, marks: Sequence[float] = ()) -> str:
    """Horizontal bars from zero with whiskers, a block per group; `marks` are dashed vertical lines."""
    values = [x for rows in groups.values() for b in rows for x in (b.value, b.low, b.high) if x is not None]
    low, high = min([0.0, *values, *marks]), max([0.0, *values, *marks])
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    left, right, row, gap = 130, 60, 18, 26
    height = sum(gap + row * len(rows) for rows in groups.values()) + 24

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (WIDTH - left - right)

    parts, y = [], 0
    for mark in (0.0, *marks):
        dash = "" if mark == 0 else ' stroke-dasharray="4 3"'
        parts.append(
            f'<line x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="8" y2="{height - 20}" stroke="currentColor" opacity=".6"{dash}/>'
            f'<text x="{x(mark):.1f}" y="{height - 6}" text-anchor="middle">{_number(mark)}</text>'
        )
    for name, rows in groups.items():
        parts.append(f'<text x="0" y="{y + 20}" font-weight="600">{escape(name)}</text>')
        y += gap
        for bar in rows:
            colour = COLOURS[bar.colour % len(COLOURS)]
            start, end = sorted((x(0.0), x(bar.value)))
            parts.append(
                f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{escape(bar.label)}</text>'
                f'<rect x="{start:.1f}" y="{y + 3}" width="{max(1.0, end - start):.1f}" height="{row - 7}" fill="{colour}" opacity=".75"/>'
            )
            far = end
            if bar.low is not None and bar.high is not None:
                a, b, middle = x(bar.low), x(bar.high), y + 3 + (row - 7) / 2
                far = max(end, b)
                parts.append(
                    f'<path d="M{a:.1f} {middle}H{b:.1f}M{a:.1f} {middle - 4}v8M{b:.1f} {middle - 4}v8" '
                    'stroke="currentColor" stroke-width="1.5" fill="none"/>'
                )
            parts.append(f'<text x="{far + 6:.1f}" y="{y + 12}">{bar.value:.4f}</text>')
            y += row
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
        f"<figcaption>{escape(label)}</figcaption></figure>"
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
    parts.append(f'<text x="{LEFT}" y="{TOP - 9}">{escape(y_label)}</text>')
    return "".join(parts)


def _round(low: float, high: float) -> tuple[float, float]:
    """An axis from zero ends at four round steps; one that starts below zero stays as it is."""
    if low < 0:
        return low, high
    power = 10.0 ** math.floor(math.log10(high / 4))
    return low, 4 * power * next(step for step in (1, 2, 2.5, 5, 10) if step * power * 4 >= high * (1 - 1e-9))


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
