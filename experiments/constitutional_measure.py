"""What constitutional AI came to: answers by the first model's labels and by refusals, and such labels beside people's choices.

Values are {name: of every example, [N]}: "better/SL/red_team", "refused/RL/harmful", "FILE/accuracy/2 orders/16", ...
"""

from functools import partial
from pathlib import Path

import numpy as np

from experiments import common, evaluate, launch, study
from jaxalign.data import sources
from jaxalign.data.tables import order
from jaxalign.evaluation import statistics
from jaxalign.feedback import constitutional

SIZES = (1, 4, 16)  # principles of an ensemble
TITLES = {"accuracy": "share of pairs in which labels agree with people", "nats": "cross entropy of people's choices, nats"}


def human_pairs(tokenizer, *, files, count, tokens, seed) -> dict[str, list[dict]]:
    """{name of a file: pairs of at most `tokens` tokens that people judged}; "right": 1 where they chose `first`, else 0."""
    found = {}
    for path in files:
        rows = common.read_rows(path, 0, seed=0)
        sources.require(rows, ("prompt", "chosen", "rejected"), path)
        rows = [row for row in rows if len(tokenizer(row["prompt"] + row["chosen"] + row["rejected"])["input_ids"]) <= tokens]
        rows = [rows[n] for n in order(len(rows), min(count, len(rows)), seed=seed, step=0)]
        flips = np.random.default_rng(np.random.SeedSequence(seed)).integers(2, size=len(rows))
        found[Path(path).name.partition(".")[0]] = [
            {"prompt": row["prompt"], "first": both[flip], "second": both[1 - flip], "right": 1.0 - flip}
            for row, flip in zip(rows, flips.tolist(), strict=True)
            for both in [(row["chosen"], row["rejected"])]
        ]
    return found


def agreement(p, right, *, size: int, orders: int, clamp=(0.0, 1.0)) -> dict:
    """Of each pair, the mean over groups of `size` of its principles: whether the label agrees with people, and its cross entropy.

    -> {"accuracy", a tie 1/2, and "nats": f64 [N]}. Args: opinions p [N, principles, 2]; right [N], 1 where people chose the first.
    """
    groups = p[..., :orders].reshape(len(p), -1, size, orders)
    for_right = np.abs(1 - np.array(right)[:, None] - constitutional.preference(groups, clamp=clamp))
    return {"accuracy": (np.sign(for_right - 0.5) + 1).mean(1) / 2, "nats": -np.log(np.maximum(for_right, 1e-9)).mean(1)}


def with_people(config, ask, known) -> dict:
    """Labels of the config's `agreement` beside people's choices. -> values of all pairs. Args: ask, known: as of `of_models`."""
    values, count = {}, len(known.principles)
    drawn = {"files": config.agreement.files, "count": config.agreement.count, "tokens": config.agreement.tokens}
    for source, pairs in human_pairs(ask.loaded.tokenizer, **drawn, seed=config.seed).items():
        opinions = partial(constitutional.opinions, source, pairs, known.principles, known.form, orders=2, seed=config.seed)
        p = opinions(ask.choose, count=count)
        thought = opinions(partial(ask.choose, thought=True), count=config.agreement.thought)
        asked = [(f"{n} orders", p, size, n, (0.0, 1.0)) for n in (1, 2) for size in SIZES if count % size == 0]
        clamps = {"thought": (0.0, 1.0), "thought, clamped": config.agreement.clamp}
        asked += [(name, thought, config.agreement.thought, 2, clamp) for name, clamp in clamps.items()]
        for name, of, size, orders, clamp in asked:
            found = agreement(of, [pair["right"] for pair in pairs], size=size, orders=orders, clamp=clamp)
            values |= {f"{source}/{measure}/{name}/{size}": x for measure, x in found.items()}
        values[f"{source}/position"] = p.mean((1, 2))
    return values


def better(ask, known, name: str, rows, ours, theirs, *, count: int, seed: int) -> np.ndarray:
    """P(ours is better than theirs) of answers to these rows, by both orders and `count` principles each. -> f64 [N]"""
    pairs = [
        {"prompt": constitutional.asked([row["prompt"]]).text, "first": one, "second": other}
        for row, one, other in zip(rows, ours, theirs, strict=True)
    ]
    settings = {"count": count, "orders": 2, "seed": seed}
    return constitutional.preference(constitutional.opinions(name, pairs, known.principles, known.form, ask.choose, **settings))


def of_models(config, askers: dict, mesh, known, revised, workdir) -> tuple[dict, list]:
    """-> ({name: values of all prompts}, samples). What is better is said by the first of these models.

    Args: askers: {name of a model: its constitutional.Asker}; known: a Constitution; revised: rows of the critique stage.
    """
    values, (first, *others) = {}, askers
    said = partial(better, askers[first], known, count=config.measure.principles, seed=config.seed)
    red = [row for row in revised if row["kind"] == "red_team"]
    for k in range(1, len(red[0]["responses"])):
        texts, before = ([row["responses"][n] for row in red] for n in (k, 0))
        values[f"better/revision {k}"] = said(f"revision {k}", red, texts, before)
    prompts = [constitutional.asked([row["prompt"]]) for row in known.held_out]
    answers = {name: ask.texts("held out", prompts) for name, ask in askers.items()}
    kinds = np.array([row["kind"] for row in known.held_out])
    for name in others:
        p = said(f"{name} against {first}", known.held_out, answers[name], answers[first])
        values |= {f"better/{name}/{kind}": p[kinds == kind] for kind in ("red_team", "helpful")}
    settings = launch.config_of("evaluate", "safety")
    settings.update(chat=config.chat, batch=config.batch, length=config.length)
    settings.sample.length = config.sample.length
    measure = evaluate.prepare(settings, askers[first].loaded, mesh, config.measure.safety)
    for name, ask in askers.items():
        found, _ = measure(ask.loaded.params, ask.loaded.digest, workdir / "safety.jsonl")
        for one in found:
            values.setdefault(f"refused/{name}/{one['task'].removeprefix('safety/')}", []).append(one["refused"])
    texts = [(step, row["prompt"], text) for step, name in enumerate(answers) for row, text in zip(known.held_out, answers[name])]
    return values, [(*each, {}) for each in texts]


def findings(values: dict) -> list[str]:
    """What the numbers show, and whether the paper has it."""

    def mean(name):
        value, error = statistics.mean(values[name])
        return f"{value:.2f} ± {error:.2f}"

    def found(x, than):
        """Whether x is more than `than`, which the paper says."""
        other = np.broadcast_to(than, len(x))
        no = "which does not show what the paper has"
        verdict = {1: "as in the paper", 0: no, -1: "the other way round than in the paper"}[study.more(x, other)]
        return f"{study.compared(x, other)}, {verdict}."

    told = []
    for source in dict.fromkeys(name.partition("/accuracy/")[0] for name in values if "/accuracy/" in name):
        by = {name.partition("/accuracy/")[2]: x for name, x in values.items() if name.startswith(f"{source}/accuracy/")}
        most, (thought,) = max(int(name.rpartition("/")[2]) for name in by), [name for name in by if name.startswith("thought/")]
        best, size = f"2 orders/{most}", thought.rpartition("/")[2]
        agree = f"{source}/accuracy"
        told += [
            f"{source}, {len(by[best])} pairs: {most} principles in both orders agree with people for {mean(f'{agree}/{best}')}, "
            f"one principle in one order for {mean(f'{agree}/1 orders/1')}, one behind a thought for {mean(f'{agree}/{thought}')}.",
            f"{source}, {most} principles in both orders against chance: {found(by[best], 0.5)}",
            f"{source}, {most} principles against one: {found(by[best], by['2 orders/1'])}",
            f"{source}, a chain of thought against none: {found(by[thought], by.get(f'2 orders/{size}', by[best]))}",
            f"{source}, both orders against one: {study.compared(by[best], by[f'1 orders/{most}'])}; (A) gets a probability of "
            f"{mean(f'{source}/position')}, where 0.50 is no taste for a letter.",
            f"{source}, cross entropy of people's choices behind a thought: {mean(f'{source}/nats/{thought}')} nats, clamped "
            f"{mean(f'{source}/nats/thought, clamped/{size}')}; labels that are all 1/2 have 0.69.",
        ]
    for name, x in values.items():
        what, _, kind = name.removeprefix("better/").partition("/")
        if name.startswith("better/revision"):
            told.append(
                f"By its own labels {what} is better than the first answer for {mean(name)}; than 0.50 that is {found(x, 0.5)}"
            )
        elif name.startswith("better/"):
            asked = f"{len(x)} held-out {kind.replace('_', '-')} prompts"
            more = found(x, 0.5) if kind == "red_team" else f"{study.compared(x, np.full(len(x), 0.5))}."
            told.append(
                f"By the first model's labels {what} answers {asked} better than it for {mean(name)}; than 0.50 that is {more}"
            )
    for kind, rates in refusals(values).items():
        first, *others = rates
        changes = [f"{name} {np.mean(rates[name]):.2f}, {study.compared(rates[name], rates[first])}" for name in others]
        told.append(f"Refused of {len(rates[first])} {kind} prompts: {first} {np.mean(rates[first]):.2f}; {'; '.join(changes)}.")
    return told


def refusals(values: dict) -> dict:
    """{kind of a prompt: {model: values}}"""
    found = {}
    for name, x in values.items():
        if name.startswith("refused/"):
            _, model, kind = name.split("/")
            found.setdefault(kind, {})[model] = x
    return found


def figures(values: dict) -> dict:
    """Of all values, as chart.chart takes them."""
    drawn = {}
    for name, x in values.items():
        source, *measure = name.split("/", 1)
        if measure and measure[0].startswith(tuple(TITLES)):
            what, way, size = measure[0].split("/")
            figure = drawn.setdefault(f"{source}: {TITLES[what]}", {"x": "principles", "curves": {}, "points": []})
            figure["curves"].setdefault(way, []).append([int(size), *statistics.mean(x)])
            figure["points"] = [way for way in figure["curves"] if way.startswith("thought")]
    rounds = [statistics.mean(x) for name, x in values.items() if name.startswith("better/revision")]
    curve = [[0, 0.5, 0.0], *([k, *found] for k, found in enumerate(rounds, 1))]
    drawn["P(better than the first answer), by labels"] = {"x": "revisions", "curves": {"red-team prompts": curve}}
    refused = refusals(values).items()
    curves = {kind: [[k, *statistics.mean(x)] for k, x in enumerate(rates.values())] for kind, rates in refused}
    return drawn | {"Share that is refused, by phrases": {"x": "first, SL, RL", "curves": curves}}
