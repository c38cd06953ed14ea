"""Figures are made of records, records survive an interruption, and what is said of a figure's error is true of simulated ones."""

import json

import numpy as np
import pytest

from experiments import figures
from jaxalign.evaluation import records, statistics
from jaxalign.ops import calibration

WANTED = [{"task": "t", "id": n, "prompt": "p", "model": "m"} for n in range(5)]
COUNTS = [2, 1, 3, 1, 1]


def collect(path, wanted=WANTED, *, most=99):
    """-> (the records, the requests made). The answer to request n is 10 n; the last ones come first; one too many breaks off."""
    made = []

    def ask(numbers, tell):
        for k in reversed(range(len(numbers))):
            if len(made) == most:
                raise KeyboardInterrupt
            made.append(numbers[k])
            tell(k, 10 * numbers[k])

    return records.collect(path, wanted, COUNTS, ask, lambda n, answers: {"sum": sum(answers), "count": len(answers)}), made


def test_an_interrupted_evaluation_goes_on_behind_its_records(tmp_path):
    whole, made = collect(tmp_path / "whole" / "records.jsonl")
    assert [(record["id"], record["sum"], record["count"]) for record in whole] == [
        (0, 10, 2),
        (1, 20, 1),
        (2, 120, 3),
        (3, 60, 1),
        (4, 70, 1),
    ]
    assert made == [7, 6, 5, 4, 3, 2, 1, 0]
    path = tmp_path / "records.jsonl"
    with pytest.raises(KeyboardInterrupt):
        collect(path, most=4)
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [4, 3]
    with open(path, "a") as file:
        file.write('{"task": "t", "id": 1, "pro')  # torn as the machine stopped
    again, made = collect(path)
    assert again == whole and made == [5, 4, 3, 2, 1, 0]
    assert collect(path) == (whole, [])
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 5


@pytest.mark.parametrize("name", records.KEY)
def test_a_record_of_another_task_example_prompt_or_model_does_not_count(tmp_path, name):
    collect(tmp_path / "records.jsonl")
    other = [*WANTED[:4], WANTED[4] | {name: "other"}]
    found, made = collect(tmp_path / "records.jsonl", other)
    assert made == [7] and found[4][name] == "other"


def test_fingerprints_tell_values_apart():
    assert records.fingerprint("a", {"b": 1, "c": [2]}) == records.fingerprint("a", {"c": [2], "b": 1})
    assert len({records.fingerprint(*what) for what in (("ab", "c"), ("a", "bc"), (["a", "bc"],), ("abc",))}) == 4


def test_a_summary_by_hand():
    rows = [("a", 1), ("a", 0), ("a", 1), ("a", 0), ("b", 1), ("b", 1)]
    found = records.summary([{"task": task, "right": right} for task, right in rows], ["right"])
    assert found["a"] == {"count": 4, "right": 0.5, "right_error": pytest.approx((0.25 / 3) ** 0.5)}
    assert found["b"] == {"count": 2, "right": 1.0, "right_error": 0.0}
    assert found["micro"]["right"] == pytest.approx(4 / 6)
    assert found["micro"]["right_error"] == pytest.approx((2 * (2 / 3) ** 2) ** 0.5 / 6)
    assert found["macro"]["right"] == 0.75 and found["macro"]["count"] == 2
    assert found["macro"]["right_error"] == pytest.approx(0.125, rel=0.1)  # sqrt(0.25 / 4) / 2
    alone = records.summary([{"task": task, "right": right} for task, right in [*rows, ("c", 1)]], ["right"])
    assert alone["macro"]["right"] == pytest.approx(2.5 / 3) and np.isnan(alone["macro"]["right_error"])


def test_a_difference_is_paired():
    """Hard and easy examples make both means vague, and their difference not."""
    hard = np.random.default_rng(0).normal(size=50)
    before, after = ([{"task": "t", "id": n, "x": x + gain} for n, x in enumerate(hard)] for gain in (0.0, 0.1))
    found = records.difference(before, after[10:] + [{"task": "t", "id": 99, "x": 9.0}], "x")
    assert found["count"] == 40 and found["difference"] == pytest.approx(0.1) and found["error"] < 1e-9
    assert found["after"] - found["before"] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="no example in common"):
        records.difference(before, [{"task": "u", "id": 0, "x": 1.0}], "x")


def simulated(draw, estimate, times=400):
    """-> (std of the value over fresh data, mean of the error that it claims)"""
    random = np.random.default_rng(0)
    found = np.array([estimate(*draw(random)) for _ in range(times)])
    return found[:, 0].std(), found[:, 1].mean()


def of_clusters(random, size=20):
    """Examples of ten clusters, which have much in common within one."""
    clusters = np.repeat(np.arange(30), size)
    return random.normal(size=30)[clusters] + random.normal(size=30 * size), clusters


def of_shares(random):
    longer = random.normal(size=300) * 40 + 30
    p = 1 / (1 + np.exp(-(0.4 + 1.5 * np.tanh(longer / longer.std()))))
    return random.random(300) < p, longer


@pytest.mark.parametrize(
    "draw, estimate",
    [
        (lambda random: (random.random(40) < 0.2,), statistics.mean),
        (of_clusters, statistics.clustered),
        (
            lambda random: (random.random(60) < np.repeat([0.2, 0.7], [20, 40]), np.repeat([0, 1], [20, 40])),
            lambda *x: statistics.macro(*x, seed=0, draws=100),
        ),
        (of_shares, statistics.length_controlled),
    ],
    ids=["mean", "clustered", "macro", "length_controlled"],
)
def test_an_error_is_how_far_a_figure_strays(draw, estimate):
    strays, claimed = simulated(draw, estimate)
    assert claimed == pytest.approx(strays, rel=0.12)


def test_wilson_by_the_definition():
    """Its ends are the rates from which the found one is z standard errors away."""
    for wins, count in ((0, 10), (3, 10), (10, 10), (70, 100)):
        for end in statistics.wilson(wins / count, count):
            assert abs(wins / count - end) == pytest.approx(1.96 * (end * (1 - end) / count) ** 0.5, abs=1e-7)


def test_a_win_rate_counts_both_orders():
    found = statistics.win_rate([[1, 1], [1, 0], [0.5, 0.5], [0, 0], [1, 0]])
    assert found["rate"] == 0.5 and found["count"] == 5 and found["consistent"] == 0.6
    assert found["first"] == pytest.approx(0.7)  # two of five answers shown first won whatever they were
    assert (found["low"], found["high"]) == statistics.wilson(0.5, 5)


def test_a_win_rate_without_the_length():
    """A judge who only counts words says nothing of answers of equal length; one who does not count them is left as he is."""
    random = np.random.default_rng(1)
    longer = random.normal(size=2000) * 50 + 40
    wordy = (random.random(2000) < 1 / (1 + np.exp(-3 * np.tanh(longer / longer.std())))).astype(float)
    assert wordy.mean() > 0.7
    assert statistics.length_controlled(wordy, longer).value == pytest.approx(0.5, abs=0.04)
    fair = (random.random(2000) < 0.65).astype(float)
    assert statistics.length_controlled(fair, longer).value == pytest.approx(fair.mean(), abs=0.02)
    assert statistics.length_controlled(fair, np.zeros(2000)).value == pytest.approx(fair.mean(), abs=1e-4)
    assert np.isfinite(statistics.length_controlled(longer > 0, longer)).all()  # length says all


def test_a_reliability_plot_shows_what_ece_sums(tmp_path):
    random = np.random.default_rng(2)
    confidence = random.random(500).astype(np.float32)
    confidence = np.where((confidence > 0.3) & (confidence < 0.4), 1.0, confidence).astype(np.float32)  # one bin is empty
    correct = (random.random(500) < confidence**2).astype(np.float32)
    bins = statistics.reliability(confidence, correct)
    off = np.nan_to_num(np.abs(bins["accuracy"] - bins["confidence"])) * bins["count"] / 500
    assert off.sum() == pytest.approx(float(calibration.ece(confidence, correct)), abs=1e-6) and bins["count"][3] == 0
    figure, axis = figures.pyplot().subplots()
    figures.reliability(axis, bins)
    figure.savefig(tmp_path / "reliability.png")
    assert (tmp_path / "reliability.png").stat().st_size > 5000
