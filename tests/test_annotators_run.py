"""What labels are worth whose annotators err: who says what, what is found, and that the words follow the numbers."""

import json

import numpy as np
import pytest

from configs import annotators as annotators_config
from experiments import annotators, crowd
from experiments.settings import check
from jaxalign.ops import preference


def some(gold, *, who=((0, 1), (1, 0), (0, 1), (1, 0))) -> crowd.Drawn:
    """Four pairs before two annotators who feel what gold is."""
    gold, who = np.array(gold, float), np.array(who)
    nothing = np.zeros((4, 2))
    return crowd.Drawn(
        *(np.arange(4), np.array([[1, 2]] * 4), gold, nothing, who, np.zeros((4, 2, 2)), np.full((4, 2, 2), 0.5)),
        *(np.ones((4, 2)), np.array([1.0, -1.0]), nothing),
    )


def test_comparisons_are_shares_of_those_who_were_asked():
    drawn = some([[2, 0], [0, 1], [0.1, 0], [0, 9]])
    felt = crowd.opinions(drawn, temperature=1.0)
    np.testing.assert_array_equal(felt[:, 0], felt[:, 1])
    felt[0, 1] = felt[0, 1, ::-1]  # the second annotator sees the first pair the other way round
    np.testing.assert_array_equal(crowd.comparisons(drawn, felt, several=2).won, [0.5, 0, 1, 0])
    np.testing.assert_allclose(crowd.comparisons(drawn, felt, smoothing=0.1).won, [0.9, 0.1, 0.9, 0.1])
    np.testing.assert_array_equal(crowd.by_one(drawn, felt).won, [1, 0, 1, 0])
    told = crowd.comparisons(drawn, felt, within=0.5, cuts=(0.5, 1.5, 3.0))
    np.testing.assert_array_equal(told.tied, [0, 0, 1, 0])
    np.testing.assert_allclose(told.margin, [2 / 3, 1 / 3, 0, 1])


def test_the_robust_loss_is_that_of_labels_beyond_0_and_1():
    drawn, e = some([[2, 0], [0, 1], [3, 0], [0, 9]]), 0.2
    won = crowd.comparisons(drawn, crowd.opinions(drawn, temperature=1.0), smoothing=-e / (1 - 2 * e)).won
    for p, sides in zip(won[:2], ((1.3, 0.2), (0.2, 1.3))):
        chosen, rejected = sides if p > 0.5 else sides[::-1]
        robust = preference.robust_bradley_terry(chosen, rejected, noise=e)
        np.testing.assert_allclose(preference.soft_bradley_terry(*sides, p), robust, rtol=1e-5)


def test_ratings_are_by_the_scale_of_who_rates_and_centring_takes_it_away():
    drawn = some([[1, 0], [1, 0], [-1, 0], [-1, 0]])
    felt = crowd.opinions(drawn, temperature=1e-3)
    how = {"spread": 1.0, "levels": 7, "count": 4}
    np.testing.assert_array_equal(crowd.ratings(drawn, felt, centred=False, **how).rating, [2, 0, 0, -2])
    np.testing.assert_array_equal(crowd.ratings(drawn, felt, centred=True, **how).rating, [1, 1, -1, -1])


def test_the_next_round_keeps_what_is_known_and_asks_where_doubt_is_most():
    order = np.array([[0, 1, 2, 3, 4]])
    doubt = np.array([[9.0, 8.0, 0.1, 0.3, 0.2]])  # of the two that are answered it does not matter any more
    np.testing.assert_array_equal(annotators.next_first(order, doubt, 2), [[0, 1, 3, 4, 2]])
    np.testing.assert_array_equal(annotators.next_first(np.array([[1, 4, 0, 2, 3]]), doubt, 2), [[1, 4, 0, 3, 2]])


def told(**more):
    """Findings where all is alike but for `more`: {part/curve: what is added to each measure}."""
    noise = np.array([0.0, 0.01, -0.01, 0.02])

    def curve(part, name, xs):
        by = more.get(f"{part}/{name}", 0.0)
        return {x: {measure: 0.6 + by + noise * (1 + by) for measure in crowd.MEASURES} for x in xs}

    curves = {
        "scales": ("comparisons", "ratings"),
        "tastes": ("comparisons", "ratings"),
        "help": (annotators.ONE, "margins"),
        "counts": ("random", "active"),
        "length": ("judge", "pairs of equal length", "score less its slope by length", "gold"),
    }
    return annotators.findings({part: {name: curve(part, name, (1, 2)) for name in names} for part, names in curves.items()})


def test_the_words_follow_the_numbers():
    same = told()
    assert not any(line.endswith((" more.", " less.")) for line in same) and sum("none" in line for line in same) >= 3
    assert "no less than as many comparisons" in same[0] and all(line.endswith(": the same.") for line in same if "beside" in line)
    other = told(**{"scales/ratings": -0.2, "help/margins": 0.1, "counts/active": -0.1, "length/judge": 0.1})
    assert "less than as many comparisons where zero points spread by 1, 2." in other[0]
    assert other[1] == "Margins: better than one annotator a pair for 1, 2, worse for none."
    assert "beat random ones at none of 2" in other[2] and "worth 1, 2." in other[3]
    scales = next(line for line in other if "zero points of" in line)
    assert "1: 0.2 ± 0.001 less; 2: 0.2 ± 0.001 less." in scales


@pytest.mark.slow
def test_the_study_in_small(tmp_path):
    config = annotators_config.get_config("fast")
    check(config)
    annotators.run(config, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    # what was drawn alike is alike, and gold is the frontier that no judge is above
    assert summary["counts/random/16/gold/held_out"] == summary["counts/active/16/gold/held_out"]
    assert summary["scales/comparisons/0.0/judge/accuracy"] == summary["scales/comparisons/2.0/judge/accuracy"]
    gold = [value for name, value in summary.items() if name.endswith("/gold/held_out")]
    assert max(gold) == summary["length/gold/0.0/gold/held_out"] and summary["length/gold/0.0/judge/accuracy"] == pytest.approx(1)
    assert summary["length/judge/2.0/length/held_out"] > summary["length/judge/0.0/length/held_out"]
    assert "Help" in (tmp_path / "report.html").read_text() and (tmp_path / "findings.txt").read_text()
