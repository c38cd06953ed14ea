"""report.html: a run at a glance. One file, no script, nothing loaded from anywhere: it can be mailed."""

import json
import math
from html import escape
from pathlib import Path

from jaxalign.train.log import duration, flat, read_json, read_lines, short

CHARTS = (  # title, metrics; those that a run has not are left out, those not named here are drawn further down, one a chart
    ("Loss", ("loss/total",)),
    ("Negative log-likelihood, nats a token", ("loss/nll", "nll/held_out")),
    ("Reward, a response", ("reward/score", "reward/total", "proxy/held_out")),
    ("Gold reward, a held-out response", ("gold/held_out",)),
    ("KL from the reference, nats a response", ("policy/kl", "policy/kl_k2", "policy/kl_k3", "kl/held_out")),
    ("Accuracy", ("reward/accuracy", "accuracy/held_out", "class/accuracy")),
    ("KL from the teacher, nats a token", ("loss/divergence", "forward_kl/held_out", "reverse_kl/held_out")),
    (
        "Log-probability, nats a response",
        ("policy/logp_chosen", "policy/logp_rejected", "logp_chosen/held_out", "logp_rejected/held_out"),
    ),
    ("Entropy, nats a token", ("policy/entropy",)),
    ("Response length, tokens", ("policy/length",)),
    ("Share of responses that end with EOS", ("policy/eos_rate",)),
    ("Price of KL, reward a nat", ("policy/beta",)),
    ("Share of the value's variance explained", ("value/explained",)),
    ("Gradient norm, before clipping", ("train/grad_norm",)),
)
FIRST = 9  # charts that are not folded away
SAMPLES = 12
SCORES = ("score", "proxy", "gold")  # of a sample: more is better
SMOOTH = 60  # points from which on a running mean is drawn over the curve
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 220, 46, 62, 12, 24  # of a chart, and the margins of its axes

CSS = """
:root { color-scheme: light dark; --ink: #1c2024; --faint: #69707a; --line: #d9dde2; --card: #fff; --page: #f5f6f8; --chip: #eef0f3;
  --c0: #2563c9; --c1: #d2691e; --c2: #2e8b57; --c3: #a23b9c; --up: #1f7a46; --down: #b3362b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e8ec; --faint: #949ca7; --line: #343a42; --card: #1b1f24; --page: #121518;
  --chip: #2a3037; --c0: #6ea8fe; --c1: #f0a05a; --c2: #63c68d; --c3: #d98ad4; --up: #63c68d; --down: #f08a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 20px 16px 60px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 24px; margin: 8px 0 0; overflow-wrap: anywhere; } h2 { font-size: 18px; margin: 34px 0 12px; }
p.about { margin: 2px 0 0; color: var(--faint); }
.grid { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; min-width: 0; }
figure { margin: 0; } figcaption { font-weight: 600; font-size: 14px; }
svg { display: block; width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: var(--faint); }
svg .grid-line { stroke: var(--line); } svg .curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .raw { fill: none; stroke-width: 1; opacity: .35; } svg .last { font-weight: 600; }
.legend { font-size: 12px; color: var(--faint); }
.legend b { display: inline-block; width: 10px; height: 3px; margin: 0 5px 3px 0; }
.legend span { margin-right: 12px; white-space: nowrap; }
.result { max-width: 620px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; } td { padding: 5px 0; border-top: 1px solid var(--line); }
tr:first-child td { border-top: 0; } td:first-child { color: var(--faint); padding-right: 14px; overflow-wrap: anywhere; }
td:last-child { text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
details { margin-top: 14px; } summary { cursor: pointer; font-weight: 600; padding: 4px 0; } details > .grid { margin-top: 10px; }
pre { overflow-x: auto; font: 12.5px/1.5 ui-monospace, Menlo, Consolas, monospace; margin: 8px 0 0; }
.sample { margin-bottom: 14px; } .prompt { color: var(--faint); white-space: pre-wrap; overflow-wrap: anywhere; }
.pair { display: grid; gap: 10px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 280px), 1fr)); margin-top: 8px; }
.side { border-left: 3px solid var(--line); padding-left: 10px; min-width: 0; } .side.after { border-color: var(--c0); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; } .chips { font-size: 12px; color: var(--faint); margin-top: 4px; }
.chips span { background: var(--chip); border-radius: 6px; padding: 1px 7px; margin-right: 5px; display: inline-block; }
.up { color: var(--up); } .down { color: var(--down); }
"""


def write(workdir) -> Path:
    """Make workdir/report.html from the files of a run, finished or not: metrics, summary, config, samples. -> its path

    figures.json, where it is there, is {title: {"x": what is across, "curves": {name: [[x, y], ...]}}}.
    """
    workdir = Path(workdir)
    lines, samples = read_lines(workdir / "metrics.jsonl"), read_lines(workdir / "samples.jsonl")
    summary, config, figures = (read_json(workdir / f"{name}.json") for name in ("summary", "config", "figures"))
    shown, folded = _charts(lines)
    parts = [f"<h1>{escape(workdir.resolve().name)}</h1>", f'<p class="about">{_about(lines)}</p>']
    if summary:
        rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(_text(v))}</td></tr>" for k, v in flat(summary).items())
        parts.append(f'<h2>Result</h2><div class="card result"><table>{rows}</table></div>')
    if figures:
        drawn = "".join(chart(title, figure["curves"], figure["x"]) for title, figure in figures.items())
        parts.append(f'<h2>Figures</h2><div class="grid">{drawn}</div>')
    if shown:
        parts.append(f'<h2>Curves</h2><div class="grid">{"".join(shown)}</div>')
    if folded:
        parts.append(f'<details><summary>{len(folded)} more curves</summary><div class="grid">{"".join(folded)}</div></details>')
    if samples:
        parts.append(_before_and_after(samples))
    if config:
        text = escape(json.dumps(config, indent=2, ensure_ascii=False))
        parts.append(f'<h2>Configuration</h2><details class="card"><summary>config.json</summary><pre>{text}</pre></details>')
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(workdir.resolve().name)}</title><style>{CSS}</style>"
    body = "\n".join(parts)
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'
    (workdir / "report.html").write_text(page, encoding="utf-8")
    return workdir / "report.html"


def _about(lines: list[dict]) -> str:
    if not lines:
        return "No step was logged."
    last = lines[-1]
    said = f"{last['step']:,} steps" + (f" in {duration(last['time/elapsed_s'])}" if "time/elapsed_s" in last else "")
    return said + (f". Bold curves are running means of {len(lines) // 30} points." if len(lines) >= SMOOTH else "")


def _text(value) -> str:
    return short(value) if isinstance(value, float | int) and not isinstance(value, bool) else str(value)


def _charts(lines: list[dict]) -> tuple[list[str], list[str]]:
    """-> (charts, further charts)"""
    curves: dict[str, list] = {}
    for line in lines:
        for name, y in line.items():
            if name != "step" and isinstance(y, float | int):
                curves.setdefault(name, []).append((line["step"], y))
    known = [(title, {n: curves.pop(n) for n in names if n in curves}) for title, names in CHARTS]
    known = [(title, found) for title, found in known if found]
    rest = [(name, {name: points}) for name, points in sorted(curves.items(), key=lambda item: item[0].startswith("time/"))]
    drawn = [chart(title, found) for title, found in known + rest]
    first = min(FIRST, len(known)) or FIRST
    return drawn[:first], drawn[first:]


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers within [low, high]."""
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= count)
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def chart(title: str, curves: dict[str, list], across: str = "step") -> str:
    """A figure of curves {name: [(x, y), ...]}: axes with ticks, the last value of each written beside it; steps are whole."""
    xs, ys = ([point[k] for points in curves.values() for point in points] for k in (0, 1))
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    x1, margin = max(x1, x0 + 1) if across == "step" or x0 == x1 else x1, (y1 - y0) * 0.06 or abs(y1) * 0.1 or 1.0
    y0, y1 = y0 - margin, y1 + margin

    def at(x, y):
        across, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    svg = []
    for y in ticks(y0, y1, 6):
        _, row = at(x0, y)
        svg.append(f'<line class="grid-line" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{row:.1f}" y2="{row:.1f}"/>')
        svg.append(f'<text x="{LEFT - 6}" y="{row + 4:.1f}" text-anchor="end">{short(round(y, 12))}</text>')
    for x in ticks(x0, x1, 6):
        if x == int(x) or across != "step":
            column, _ = at(x, y0)
            label = short(int(x) if x == int(x) else round(x, 12))
            svg.append(f'<text x="{column:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{label}</text>')
    svg.append(f'<text x="{WIDTH - RIGHT + 8}" y="{HEIGHT - 6}">{escape(across)}</text>')
    labels = []
    for k, (name, points) in enumerate(curves.items()):
        colour, mean = f"var(--c{k % 4})", running_mean(points)
        if mean is not points:
            svg.append(f'<polyline class="raw" stroke="{colour}" points="{_path(points, at)}"/>')
        svg.append(f'<polyline class="curve" stroke="{colour}" points="{_path(mean, at)}"><title>{escape(name)}</title></polyline>')
        column, row = at(*mean[-1])
        svg.append(f'<circle cx="{column:.1f}" cy="{row:.1f}" r="3" fill="{colour}"/>')
        labels.append((row, colour, short(mean[-1][1])))
    below = -math.inf
    for row, colour, text in sorted(labels):  # no label over another
        below = max(row, below + 12)
        svg.append(f'<text class="last" x="{WIDTH - RIGHT + 8}" y="{below + 4:.1f}" style="fill: {colour}">{text}</text>')
    names = "".join(f'<span><b style="background: var(--c{k % 4})"></b>{escape(name)}</span>' for k, name in enumerate(curves))
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(svg)}</svg>'
    return f'<figure class="card"><figcaption>{escape(title)}</figcaption>{picture}<div class="legend">{names}</div></figure>'


def running_mean(points: list) -> list:
    """Means over the last len/30 points; the points themselves where they are few."""
    if len(points) < SMOOTH:
        return points
    size, total, means = len(points) // 30, 0.0, []
    for k, (x, y) in enumerate(points):
        total += y - (points[k - size][1] if k >= size else 0.0)
        means.append((x, total / min(k + 1, size)))
    return means


def _path(points: list, at) -> str:
    every = max(1, len(points) // 800)
    return " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in [*points[:-1][::every], points[-1]])


def _before_and_after(samples: list[dict]) -> str:
    """The first response to each prompt beside its last; where no prompt came twice, the first step's samples beside the last's."""
    first, last = {}, {}
    for sample in samples:
        first.setdefault(sample.get("prompt", ""), sample)
        last[sample.get("prompt", "")] = sample
    pairs = [(first[p], last[p]) for p in first if first[p]["step"] < last[p]["step"]]
    if not pairs:
        begin, end = ([s for s in samples if s["step"] == samples[k]["step"]] for k in (0, -1))
        pairs = list(zip(begin, end)) if samples[0]["step"] < samples[-1]["step"] else [(s, s) for s in begin]
    cards = "".join(_pair(*pair) for pair in pairs[:SAMPLES])
    return f"<h2>Samples, before and after</h2>{cards}"


def _pair(before: dict, after: dict) -> str:
    def side(kind, sample, prompt=""):
        chips = [f"<span>step {sample['step']}</span>"]
        for name, value in sample.items():
            if name not in ("step", "prompt", "response"):
                mark = _change(name, before, after) if kind == "after" else ""
                chips.append(f"<span>{escape(name)} {escape(_text(value))}{mark}</span>")
        text = f'{prompt}<div class="text">{escape(str(sample.get("response", "")))}</div>'
        return f'<div class="side {kind}">{text}<div class="chips">{"".join(chips)}</div></div>'

    prompts = [f'<div class="prompt">{escape(str(sample.get("prompt", "")))}</div>' for sample in (before, after)]
    if before is after:
        return f'<div class="card sample">{prompts[0]}<div class="pair">{side("before", before)}</div></div>'
    if prompts[0] == prompts[1]:
        return f'<div class="card sample">{prompts[0]}<div class="pair">{side("before", before)}{side("after", after)}</div></div>'
    sides = side("before", before, prompts[0]) + side("after", after, prompts[1])
    return f'<div class="card sample"><div class="pair">{sides}</div></div>'


def _change(name: str, before: dict, after: dict) -> str:
    """An arrow where a score rose or fell."""
    old, new = before.get(name), after.get(name)
    if before["prompt"] != after["prompt"] or name not in SCORES or not all(isinstance(x, float | int) for x in (old, new)):
        return ""
    return "" if new == old else ' <b class="up">▲</b>' if new > old else ' <b class="down">▼</b>'
