"""What labels are worth whose annotators err: python -m experiments.annotators --config=configs/annotators.py

Judges learn, in the tiny world, from a crowd with the faults of jaxalign.feedback.annotators: noise, carelessness, tastes of their
own, scales that drift, a liking for length. Asked is what comparisons have over ratings, what margins, ties, smoothing and more
annotators buy, how few comparisons do, and what a bias becomes. A judge is measured by gold, on held-out prompts: how often it is
right, and the gold of the policy that is best by it. The same draws answer every question, so that differences are paired by seed.
"""

from functools import partial

import jax
import numpy as np

from experiments import launch, study, tiny_world
from experiments.crowd import (
    HELD_OUT,
    MEASURES,
    Lab,
    ask,
    by_one,
    comparisons,
    held_out_scores,
    judge,
    lab_of,
    lengths,
    measured,
    ratings,
)
from jaxalign.train import log

ONE = "one a pair"
ACCURACY, GOLD, WORDS = MEASURES
TITLES = {ACCURACY: "accuracy of the judge", GOLD: "gold of its best policy", WORDS: "words a response of its best policy"}
DRAWN = {  # part of the study: what is across, and what is drawn
    "scales": ("zero points of scales differ and drift by, std of gold", (ACCURACY, GOLD)),
    "tastes": ("annotators disagree by, std of gold", (ACCURACY,)),
    "counts": ("comparisons", (ACCURACY, GOLD)),
    "length": ("a word more is worth, std of gold", (WORDS, ACCURACY, GOLD)),
}


# --------------------------------------------------------- the questions: -> {curve: {x: {measure: f64 [N]}}}


def of_scales(lab: Lab) -> dict:
    """Comparisons beside ratings, as the annotators' scales differ and drift; both sides of a comparison are read by one scale."""
    many, usual = lab.config.run.labels, {"temperature": lab.config.world.temperature}
    once = judge(lab, ask(lab, comparisons, usual), many)
    found = {"comparisons": {}, "ratings": {}, "ratings, two for one": {}, "ratings, less each annotator's mean": {}}
    for spread in lab.config.scales.spread:
        found["comparisons"][spread] = once
        for name, count, centred in zip([*found][1:], (many, 2 * many, many), (False, False, True), strict=True):
            how = {"spread": spread, "levels": lab.config.crowd.levels, "count": count, "centred": centred}
            found[name][spread] = judge(lab, ask(lab, ratings, usual, **how), count, "rating")
    return found


def of_tastes(lab: Lab) -> dict:
    """The same as annotators disagree; and one annotator who does all of the work."""
    many, found = lab.config.run.labels, {"comparisons": {}, "ratings": {}, "comparisons, all by one": {}}
    how = {"spread": 0.0, "levels": lab.config.crowd.levels, "count": many, "centred": False}
    for disagreement in lab.config.tastes.disagreement:
        about = {"temperature": lab.config.world.temperature, "disagreement": disagreement}
        found["comparisons"][disagreement] = judge(lab, ask(lab, comparisons, about), many)
        found["ratings"][disagreement] = judge(lab, ask(lab, ratings, about, **how), many, "rating")
        found["comparisons, all by one"][disagreement] = judge(lab, ask(lab, by_one, about), many)
    return found


def of_help(lab: Lab) -> dict:
    """What is said to help, under each noise, beside one annotator a pair.

    The robust loss (Chowdhury et al. 2024) is that of soft labels beyond 0 and 1, (1 - noise)/(1 - 2 noise) and what is left.
    """
    many, helps, found = lab.config.run.labels, lab.config.help, {}
    for noise, about in lab.config.noises.items():
        told, heat = partial(ask, lab, comparisons, about), about.temperature
        tried = {
            ONE: judge(lab, told(), many),
            "margins": judge(lab, told(cuts=tuple(heat * cut for cut in helps.cuts)), many, "pairwise"),
            "ties": judge(lab, told(within=heat * np.log(helps.theta)), many, "pairwise_with_ties"),
            "smoothing": judge(lab, told(smoothing=helps.smoothing), many),
            "robust loss": judge(lab, told(smoothing=-helps.noise / (1 - 2 * helps.noise)), many),
        }
        for several in helps.several:
            tried[f"{several} a pair, as many pairs"] = judge(lab, told(several=several), many)
            tried[f"{several} a pair, as many labels"] = judge(lab, told(several=several), many // several)
        for name, said in tried.items():
            found.setdefault(name, {})[noise] = said
    return found


def of_counts(lab: Lab) -> dict:
    """How few comparisons suffice: chosen at random, or in rounds those about which judges disagree most (Christiano et al. 2017).

    The judges of an ensemble learn from resamples of the comparisons, and their mean score is what is measured.
    """
    active, found = lab.config.active, {"random": {}, "active": {}}
    told = ask(lab, comparisons, {"temperature": lab.config.world.temperature})
    seeds = np.arange(len(told.won))[:, None]

    def ensemble(order, count):
        resamples = np.random.default_rng([lab.config.seed, count]).integers(0, count, (active.members, order.shape[1]))
        learnt = [jax.tree.map(lambda x, which=order[:, which]: x[seeds, which], told) for which in resamples]
        return [lab.learn["soft_pairwise"](lab.worlds, one, count) for one in learnt]

    def doubt(params):
        said = np.stack([np.asarray(lab.scores(one, tiny_world.ROWS)) for one in params])  # [M,N,P,S]
        said = said[:, seeds[..., None], told.prompts[..., None], told.responses]
        return (said[..., 0] - said[..., 1]).std(0)

    anyhow = np.broadcast_to(np.arange(lab.config.run.examples), told.won.shape)
    start = ensemble(anyhow, active.counts[0])
    for way in found:
        order, params, last = anyhow, start, active.counts[0]
        for count in active.counts:
            if count != last:
                order = next_first(order, doubt(params), last) if way == "active" else order
                params, last = ensemble(order, count), count
            found[way][count] = measured(lab, sum(lab.scores(one, HELD_OUT) for one in params) / active.members)
    return found


def next_first(order, doubt, count: int):
    """Keep the first `count`, and put those behind them that are most in doubt. Args: order [N,E]; doubt [N,E], of example e."""
    left = order[:, count:]
    by_doubt = np.argsort(-np.take_along_axis(doubt, left, axis=1), axis=1, kind="stable")
    return np.concatenate([order[:, :count], np.take_along_axis(left, by_doubt, axis=1)], axis=1)


def of_length(lab: Lab) -> dict:
    """What judge and policy learn from annotators who like length, and two ways out of it.

    Raises ValueError where too few pairs are of equal length.
    """
    many, seeds = lab.config.run.labels, np.arange(len(lab.drawn))[:, None]
    found = {"judge": {}, "pairs of equal length": {}, "score less its slope by length": {}, "gold": {}}
    differ = np.stack([drawn.length[:, 0] != drawn.length[:, 1] for drawn in lab.drawn])
    equal = np.argsort(differ, axis=1, kind="stable")  # those first
    if (least := (~differ).sum(1).min()) < many:
        raise ValueError(f"run.examples = {lab.config.run.examples}: {least} pairs are of equal length, of run.labels = {many}")
    ref, gold = np.exp(lab.worlds.ref_logp[:, -tiny_world.HELD_OUT :]), lab.worlds.gold[:, -tiny_world.HELD_OUT :]
    words = np.asarray(lengths())[None, -tiny_world.HELD_OUT :]
    off = words - (ref * words).sum(-1, keepdims=True)
    for bias in lab.config.length.bias:
        told = ask(lab, comparisons, {"temperature": lab.config.world.temperature, "bias": bias})
        scores = held_out_scores(lab, told, many)
        slope = (ref * off * scores).sum((1, 2)) / (ref * off**2).sum((1, 2))
        found["judge"][bias] = measured(lab, scores)
        alike = jax.tree.map(lambda x: x[seeds, equal], told)
        found["pairs of equal length"][bias] = judge(lab, alike, many)
        found["score less its slope by length"][bias] = measured(lab, scores - slope[:, None, None] * words)
        found["gold"][bias] = measured(lab, gold)
    return found


# --------------------------------------------------------- what they come to


def curves(part: dict, measure: str) -> dict:
    """{curve: [[x, mean over seeds, its error]]}"""
    return {name: [[x, *study.over_seeds("y", said[measure]).values()] for x, said in xs.items()] for name, xs in part.items()}


def gains(part: dict, measure: str, base: str) -> dict:
    """The same of differences to `base`, paired by seed; x is the number of the noise, and a little more for each curve."""
    found = {}
    for k, (name, noises) in enumerate((name, xs) for name, xs in part.items() if name != base):
        more = [said[measure] - part[base][noise][measure] for noise, said in noises.items()]
        found[name] = [[n + 0.08 * k, *study.over_seeds("y", x).values()] for n, x in enumerate(more, 1)]
    return found


def figures_of(found: dict) -> dict:
    figures = {
        f"{part.capitalize()}: {TITLES[measure]}": {"x": across, "curves": curves(found[part], measure)}
        for part, (across, measures) in DRAWN.items()
        for measure in measures
    }
    noises = ", ".join(f"{n} {noise}" for n, noise in enumerate(found["help"][ONE], 1))
    for measure in (ACCURACY, GOLD):
        drawn = gains(found["help"], measure, ONE)
        figures[f"Help: {TITLES[measure]}, more than by one a pair"] = {"x": noises, "curves": drawn, "points": list(drawn)}
    return figures


def headlines(found: dict) -> list[str]:
    """The answers in short; what is more, or less, is so by two errors."""
    scales, one = found["scales"], found["help"][ONE]
    behind = more(scales["comparisons"], scales["ratings"], ACCURACY)
    drift = f"are worth less than as many comparisons where zero points spread by {_names(behind)}"
    said = [f"Ratings {drift if behind else 'are worth no less than as many comparisons here'}."]
    for name, xs in found["help"].items():
        if name != ONE:
            gain, loss = more(xs, one, ACCURACY), more(one, xs, ACCURACY)
            said.append(
                f"{name[0].upper()}{name[1:]}: better than one annotator a pair for {_names(gain)}, worse for {_names(loss)}."
            )
    chosen = more(found["counts"]["active"], found["counts"]["random"], ACCURACY)
    said.append(
        f"Comparisons chosen by disagreement beat random ones at {_names(chosen)} of {len(found['counts']['active'])} counts."
    )
    longer = more(found["length"]["judge"], found["length"]["gold"], WORDS)
    said.append(f"The best policy by the judge is longer than by gold where a word more is worth {_names(longer)}.")
    return said


def _names(found: list) -> str:
    return ", ".join(map(str, found)) or "none"


def findings(found: dict) -> list[str]:
    said = headlines(found) + [
        versus(f"Accuracy of {name} beside as many comparisons, where {DRAWN[part][0]}", xs, found[part]["comparisons"], ACCURACY)
        for part in ("scales", "tastes")
        for name, xs in found[part].items()
        if name != "comparisons"
    ]
    one, tried = found["help"][ONE], {name: xs for name, xs in found["help"].items() if name != ONE}
    said += [versus(f"Accuracy by {name}, beside one annotator a pair", xs, one, ACCURACY) for name, xs in tried.items()]
    count = len(tried) * len(one)
    said.append(f"Of these {count} differences chance alone would put about {0.05 * count:.1f} beyond two errors.")

    random, active = found["counts"]["random"], found["counts"]["active"]
    fewer = dict(zip([*random][1:], random.values()))  # the count before
    said.append(versus("Accuracy of random comparisons, beside the count before", {x: random[x] for x in fewer}, fewer, ACCURACY))
    said += [
        versus(f"{name} of comparisons chosen by disagreement, beside as many random ones", active, random, measure)
        for name, measure in (("Accuracy", ACCURACY), ("Gold", GOLD))
    ]

    length = found["length"]
    said.append(
        versus(
            "Words of the policy that is best by the judge, beside gold's own, by the worth of a word",
            length["judge"],
            length["gold"],
            WORDS,
        )
    )
    least = dict.fromkeys(length["judge"], length["judge"][min(length["judge"])])
    said.append(
        versus(
            f"Gold of that policy, beside a bias of {min(length['judge'])}, by the worth of a word", length["judge"], least, GOLD
        )
    )
    for fix in ("pairs of equal length", "score less its slope by length"):
        for name, measure in (("Accuracy", ACCURACY), ("Gold", GOLD)):
            said.append(versus(f"{name} by {fix}, beside no remedy, by the worth of a word", length[fix], length["judge"], measure))
    return said


def versus(title: str, one: dict, other: dict, measure: str) -> str:
    """One beside the other at each x where they are not the same numbers."""
    differ = {x: said[measure] for x, said in one.items() if list(said[measure]) != list(other[x][measure])}
    return f"{title}: {'; '.join(f'{x}: {study.compared(said, other[x][measure])}' for x, said in differ.items()) or 'the same'}."


def more(one: dict, other: dict, measure: str) -> list:
    """Where one has more than the other, by two errors."""
    return [x for x, said in one.items() if x in other and study.more(said[measure], other[x][measure]) > 0]


def run(config, workdir):
    lab, found = lab_of(config), {}
    for name, question in QUESTIONS.items():
        log.say(f"{name}: {question.__doc__.partition(chr(10))[0]}")
        found[name] = question(lab)
    summary = {}
    for part, asked in found.items():
        for name, xs in asked.items():
            for x, said in xs.items():
                for measure, values in said.items():
                    summary |= study.over_seeds(f"{part}/{name}/{x}/{measure}", values)
    study.leave(workdir, config, summary, figures_of(found), findings(found))


QUESTIONS = {"scales": of_scales, "tastes": of_tastes, "help": of_help, "counts": of_counts, "length": of_length}


if __name__ == "__main__":
    launch.main(run, "annotators")
