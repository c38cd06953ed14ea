"""What a study leaves: its numbers, its figures, and what they show, in words that are made of the numbers."""

import jax

from jaxalign.evaluation import statistics
from jaxalign.train import chart, log, report


def leave(workdir, config, summary: dict, figures: dict, findings: list[str]):
    """Write config.json, summary.json, figures.json, findings.txt, report.html, and each figure alone: figure_1.svg, ...

    Args:
        summary: {name: number}. figures: {title: the arguments of jaxalign.train.chart.chart}.
        findings: sentences, by a function of the summary: what another seed could turn false is computed, not typed.
    """
    log.write_json(workdir / "config.json", log.plain(config))
    log.write_json(workdir / "figures.json", figures)
    log.write_text(workdir / "findings.txt", "\n".join(findings))
    log.write_json(workdir / "summary.json", summary)
    if jax.process_index() == 0:
        report.write(workdir)
        for number, (title, figure) in enumerate(figures.items(), 1):
            chart.picture(workdir / f"figure_{number}.svg", title, figure)
    for finding in findings:
        log.say(finding)
    log.say(f"report in {workdir / 'report.html'}")


def over_seeds(name: str, values) -> dict:
    """The mean over seeds and its standard error, values [N] -> {name, name_error}; of one seed without an error."""
    value, error = statistics.mean(values)
    return {name: value} | ({f"{name}_error": error} if len(values) > 1 else {})


def more(a, b) -> int:
    """1 where a is more than b, [N] each, paired, by two standard errors; -1 where it is less; else, and of one pair, 0."""
    value, error = statistics.mean([x - y for x, y in zip(a, b, strict=True)])
    return (value > 2 * error) - (value < -2 * error)


def compared(a, b) -> str:
    """How much more a is than b, [N] each, paired, with its standard error: "0.31 ± 0.05 more", "0.20 ± 0.04 less" or, within two
    errors, "no different (0.02 ± 0.05)". Where nothing says what chance does: "0.31 more, of one", "0.50 more, of 2 alike"."""
    value, error = statistics.mean([x - y for x, y in zip(a, b, strict=True)])
    said = f"{abs(value):.2g}"
    if value and not error > 1e-9 * abs(value):  # nan, of one
        return f"{said} {'more' if value > 0 else 'less'}, of {'one' if len(a) == 1 else f'{len(a)} alike'}"
    if not value or abs(value) <= 2 * error:
        return f"no different ({value:.2g} ± {error:.1g})" if len(a) > 1 else "no different"
    return f"{said} ± {error:.1g} {'more' if value > 0 else 'less'}"
