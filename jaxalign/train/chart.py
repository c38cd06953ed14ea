"""Figures as SVG: one for the report of a run, where the page has the style, or a file that stands alone."""

import math
from html import escape
from pathlib import Path

from jaxalign.train.log import short

SMOOTH = 60  # points from which on a running mean is drawn over the curve
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 220, 46, 62, 12, 24  # of the plot, and the margins of its axes
LINE, LETTER = 16, 6.2  # of the legend: height of a line, and about the width of a letter

COLOURS = """
:root { color-scheme: light dark; --ink: #1c2024; --faint: #69707a; --line: #d9dde2; --card: #fff;
  --c0: #2563c9; --c1: #d2691e; --c2: #2e8b57; --c3: #a23b9c; --c4: #8a6d0b; --c5: #c2334d; --c6: #1a8a98; --c7: #6b7280; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e8ec; --faint: #949ca7; --line: #343a42; --card: #1b1f24;
  --c0: #6ea8fe; --c1: #f0a05a; --c2: #63c68d; --c3: #d98ad4; --c4: #d6b656; --c5: #f2788c; --c6: #5fc5d1; --c7: #a7adb6; } }
"""
MANY = 8  # colours
CSS = """
svg { display: block; width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: var(--faint); }
svg .grid-line { stroke: var(--line); } svg .curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .raw { fill: none; stroke-width: 1; opacity: .35; } svg .last { font-weight: 600; } svg .band { opacity: .18; }
svg .title { font-size: 14px; font-weight: 600; fill: var(--ink); }
"""


def chart(title: str, curves: dict[str, list], x: str = "step", points: list[str] = (), *, titled: bool = False) -> str:
    """An <svg> of curves {name: [(x, y) or (x, y, error), ...]}: axes with ticks, a band (dots: a bar) of y - error to y + error,
    the last value of each curve written beside it, and a legend below.

    Args: x: what is across; steps are whole. points: names of curves that are drawn as dots. titled: the title is in the picture.
    """
    xs = [point[0] for curve in curves.values() for point in curve]
    ends = [point[1] + side * error_of(point) for curve in curves.values() for point in curve for side in (-1, 1)]
    x0, x1, y0, y1 = min(xs), max(xs), min(ends), max(ends)
    x1, margin = max(x1, x0 + 1) if x == "step" or x0 == x1 else x1, (y1 - y0) * 0.06 or abs(y1) * 0.1 or 1.0
    y0, y1 = y0 - margin, y1 + margin

    def at(x, y):
        across, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    svg = []
    for tick in ticks(y0, y1, 6):
        _, row = at(x0, tick)
        svg.append(f'<line class="grid-line" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{row:.1f}" y2="{row:.1f}"/>')
        svg.append(f'<text x="{LEFT - 6}" y="{row + 4:.1f}" text-anchor="end">{short(round(tick, 12))}</text>')
    for tick in ticks(x0, x1, 6):
        if tick == int(tick) or x != "step":
            column, _ = at(tick, y0)
            label = short(int(tick) if tick == int(tick) else round(tick, 12))
            svg.append(f'<text x="{column:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{label}</text>')
    labels = []
    for k, (name, curve) in enumerate(curves.items()):
        colour = f"var(--c{k % MANY})"
        svg += _dots(curve, colour, at) if name in points else _line(name, curve, colour, at)
        if name not in points:
            last = running_mean(curve)[-1]
            labels.append((at(*last[:2])[1], colour, short(last[1])))
    below = -math.inf
    for row, colour, text in sorted(labels):  # no label over another
        below = max(row, below + 12)
        svg.append(f'<text class="last" x="{WIDTH - RIGHT + 8}" y="{below + 4:.1f}" style="fill: {colour}">{text}</text>')
    legend, height = _legend(curves, x)
    top = 26 if titled else 0
    heading = f'<text class="title" x="{LEFT - 30}" y="-8">{escape(title)}</text>' if titled else ""
    box = f"0 {-top} {WIDTH} {height + top}"
    return f'<svg viewBox="{box}" role="img" aria-label="{escape(title)}">{heading}{"".join(svg)}{legend}</svg>'


def picture(path, title: str, figure: dict) -> Path:
    """One entry of figures.json as a file that stands alone, light or dark as who looks has it."""
    svg = chart(title, **figure, titled=True)
    style = f'<style>{COLOURS}{CSS}</style><rect x="0" y="-30" width="100%" height="120%" style="fill: var(--card)"/>'
    head, rest = svg[:4] + ' xmlns="http://www.w3.org/2000/svg"' + svg[4 : svg.index(">") + 1], svg[svg.index(">") + 1 :]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(head + style + rest + "\n", encoding="utf-8")
    return Path(path)


def error_of(point) -> float:
    return (point[2] or 0.0) if len(point) > 2 else 0.0


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers within [low, high]."""
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= count)
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def running_mean(points: list) -> list:
    """Means over the last len/30 points; the points themselves where they are few."""
    if len(points) < SMOOTH:
        return points
    size, total, means = len(points) // 30, 0.0, []
    for k, (x, y, *_) in enumerate(points):
        total += y - (points[k - size][1] if k >= size else 0.0)
        means.append((x, total / min(k + 1, size)))
    return means


def _line(name, curve, colour, at) -> list[str]:
    mean, svg = running_mean(curve), []
    if mean is not curve:
        svg.append(f'<polyline class="raw" stroke="{colour}" points="{_path(curve, at)}"/>')
    elif any(map(error_of, curve)):
        edges = [(p[0], p[1] + error_of(p)) for p in curve] + [(p[0], p[1] - error_of(p)) for p in reversed(curve)]
        svg.append(f'<polygon class="band" fill="{colour}" points="{_path(edges, at)}"/>')
    svg.append(f'<polyline class="curve" stroke="{colour}" points="{_path(mean, at)}"><title>{escape(name)}</title></polyline>')
    column, row = at(*mean[-1][:2])
    return [*svg, f'<circle cx="{column:.1f}" cy="{row:.1f}" r="3" fill="{colour}"/>']


def _dots(curve, colour, at) -> list[str]:
    svg = []
    for point in curve:
        (column, row), error = at(*point[:2]), error_of(point)
        svg.append(f'<circle cx="{column:.1f}" cy="{row:.1f}" r="3" fill="{colour}"/>')
        if error:
            (_, low), (_, high) = at(point[0], point[1] - error), at(point[0], point[1] + error)
            svg.append(f'<line stroke="{colour}" x1="{column:.1f}" x2="{column:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
    return svg


def _path(points: list, at) -> str:
    every = max(1, len(points) // 800)
    return " ".join("{:.1f},{:.1f}".format(*at(*point[:2])) for point in [*points[:-1][::every], points[-1]])


def _legend(curves, x: str) -> tuple[str, float]:
    """What is across, and the name of each curve, below the plot. -> (svg, where it ends)"""
    row, column = HEIGHT + 10, float(LEFT)
    svg = [f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{row}" text-anchor="middle">{escape(x)}</text>']
    row += LINE + 2
    for k, name in enumerate(curves):
        wide = LETTER * len(name) + 30
        if column > LEFT and column + wide > WIDTH:
            row, column = row + LINE, float(LEFT)
        svg.append(f'<rect x="{column:.0f}" y="{row - 6}" width="10" height="3" fill="var(--c{k % MANY})"/>')
        svg.append(f'<text x="{column + 14:.0f}" y="{row}">{escape(name)}</text>')
        column += wide
    return "".join(svg), row + 6
