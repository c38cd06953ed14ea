"""Words that are made of numbers."""

import json

import pytest

from experiments import study


@pytest.mark.parametrize(
    "a, b, said",
    [
        ([1.0, 1.1, 0.9], [0.0, 0.0, 0.1], "0.97 ± 0.09 more"),
        ([0.0, 0.0, 0.1], [1.0, 1.1, 0.9], "0.97 ± 0.09 less"),
        ([1.0, -1.0, 0.3], [0.0, 0.0, 0.0], "no different (0.1 ± 0.6)"),
        ([0.5, 0.5], [0.5, 0.5], "no different (0 ± 0)"),
        ([0.5], [0.25], "0.25 more, of one"),
        ([0.5], [0.5], "no different"),
        ([1.0, 2.0], [1.5, 2.5], "0.5 less, of 2 alike"),
    ],
)
def test_a_difference_within_two_errors_is_none(a, b, said):
    assert study.compared(a, b) == said


@pytest.mark.parametrize(
    "a, more", [([1.0, 1.1, 0.9], 1), ([-1.0, -1.1, -0.9], -1), ([1.0, -1.0, 0.3], 0), ([0.0, 0.0], 0), ([5.0], 0)]
)
def test_what_is_more_is_so_by_two_errors(a, more):
    assert study.more(a, [0.0] * len(a)) == more


def test_a_study_leaves_what_its_report_is_made_of(tmp_path):
    summary = study.over_seeds("gold", [1.0, 2.0, 3.0]) | study.over_seeds("one", [1.0])
    assert summary == {"gold": 2.0, "gold_error": pytest.approx(3**-0.5), "one": 1.0}
    study.leave(tmp_path, {"seed": 0}, summary, {"Gold": {"x": "KL", "curves": {"a": [[0, 1], [1, 2]]}}}, ["It rose."])
    assert json.loads((tmp_path / "summary.json").read_text())["gold"] == 2.0
    page = (tmp_path / "report.html").read_text()
    assert "It rose." in page and "<svg" in page and "Gold" in (tmp_path / "figure_1.svg").read_text()
