"""report.html: a run at a glance. One file, no script, nothing loaded from anywhere: it can be mailed."""

import json
from html import escape
from pathlib import Path

from jaxalign.train.chart import COLOURS, SMOOTH, chart
from jaxalign.train.chart import CSS as CHART
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

CSS = f"""{COLOURS}{CHART}
:root {{ --page: #f5f6f8; --chip: #eef0f3; --up: #1f7a46; --down: #b3362b; }}
@media (prefers-color-scheme: dark) {{ :root {{ --page: #121518; --chip: #2a3037; --up: #63c68d; --down: #f08a80; }} }}
"""
CSS += """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 20px 16px 60px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 24px; margin: 8px 0 0; overflow-wrap: anywhere; } h2 { font-size: 18px; margin: 34px 0 12px; }
p.about { margin: 2px 0 0; color: var(--faint); }
.grid { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
.grid.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; min-width: 0; }
figure { margin: 0; } figcaption { font-weight: 600; font-size: 14px; } .findings p { margin: 6px 0; max-width: 75ch; }
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
    """Make workdir/report.html from the files of a run, finished or not. -> its path

    metrics.jsonl, summary.json, config.json and samples.jsonl; of a study findings.txt, a paragraph a line, and figures.json,
    {title: the arguments of `chart.chart`}; command.txt, what was typed.
    """
    workdir = Path(workdir)
    lines, samples = read_lines(workdir / "metrics.jsonl"), read_lines(workdir / "samples.jsonl")
    summary, config, figures = (read_json(workdir / f"{name}.json") for name in ("summary", "config", "figures"))
    shown, folded = _charts(lines)
    findings, command = (_lines(workdir / f"{name}.txt") for name in ("findings", "command"))
    parts = [f"<h1>{escape(workdir.resolve().name)}</h1>"]
    if lines or not findings:
        parts.append(f'<p class="about">{_about(lines)}</p>')
    if findings:
        parts.append('<h2>Findings</h2><div class="findings">' + "".join(f"<p>{escape(x)}</p>" for x in findings) + "</div>")
    if figures:
        drawn = "".join(_figure(title, **figure) for title, figure in figures.items())
        parts.append(f'<h2>Figures</h2><div class="grid wide">{drawn}</div>')
    parts += [f"<pre>{escape(line)}</pre>" for line in command]
    if summary:
        rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(_text(v))}</td></tr>" for k, v in flat(summary).items())
        parts.append(f'<h2>Result</h2><div class="card result"><table>{rows}</table></div>')
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


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _figure(title: str, curves, **settings) -> str:
    return f'<figure class="card"><figcaption>{escape(title)}</figcaption>{chart(title, curves, **settings)}</figure>'


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
    drawn = [_figure(title, found) for title, found in known + rest]
    first = min(FIRST, len(known)) or FIRST
    return drawn[:first], drawn[first:]


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
