"""Charts: SVG that shows every point, its error, and the names of the curves."""

import xml.etree.ElementTree as ET

import pytest

from jaxalign.train import chart


@pytest.mark.parametrize("ys", [[1.0], [0.0, 0.0], [-1e-9, 1e-9], [1e6, 3e6], [5.0, -5.0] * 700])
def test_a_chart_is_svg_with_every_point_inside_and_the_last_value_written(ys):
    svg = ET.fromstring(chart.chart("a < b", {"x": list(enumerate(ys))}))
    for line in svg.iter("polyline"):
        for point in line.get("points").split():
            x, y = map(float, point.split(","))
            assert chart.LEFT <= x <= chart.WIDTH - chart.RIGHT and chart.TOP <= y <= chart.HEIGHT - chart.BOTTOM
    written = [text.text for text in svg.iter("text") if text.get("class") == "last"]
    assert written == [chart.short(chart.running_mean(list(enumerate(ys)))[-1][1])]
    assert len(list(svg.iter("line"))) >= 2


@pytest.mark.parametrize("low, high", [(0, 1), (-0.37, 12.4), (1e-7, 3e-7), (99_000, 101_000)])
def test_ticks_are_few_round_and_inside(low, high):
    marks = chart.ticks(low, high, 5)
    assert 2 <= len(marks) <= 6 and low <= marks[0] and marks[-1] <= high * (1 + 1e-9)
    step = marks[1] - marks[0]
    assert any(abs(step / 10**e - m) < 1e-6 for e in range(-12, 9) for m in (1, 2, 5))


def test_a_running_mean_is_a_mean():
    points = [(i, float(i % 2)) for i in range(600)]
    assert chart.running_mean(points[:59]) == points[:59]
    assert [y for _, y in chart.running_mean(points)[20:]] == pytest.approx([0.5] * 580)


def test_an_error_is_drawn_as_far_as_it_reaches_and_of_dots_as_a_bar():
    curves = {"a & b": [(0, 1.0, 2.0), (1, 1.0, 0.0)], "dots": [(0, 0.0, 1.0)]}
    svg = ET.fromstring(chart.chart("", curves, "KL", ["dots"]))
    (band,) = svg.iter("polygon")
    ys = [float(point.split(",")[1]) for point in band.get("points").split()]
    bar = next(line for line in svg.iter("line") if line.get("stroke"))
    assert max(ys) - min(ys) == pytest.approx(2 * (float(bar.get("y1")) - float(bar.get("y2"))), abs=0.3)
    assert min(ys) >= chart.TOP and max(ys) <= chart.HEIGHT - chart.BOTTOM
    assert len(list(svg.iter("polyline"))) == 1 and {"a & b", "dots", "KL"} <= {text.text for text in svg.iter("text")}


def test_a_picture_stands_alone(tmp_path):
    path = chart.picture(tmp_path / "new" / "a.svg", "a < b", {"x": "k", "curves": {"c": [[0, 1], [1, 2]]}})
    svg = ET.fromstring(path.read_text())
    assert svg.tag == "{http://www.w3.org/2000/svg}svg" and "a < b" in [text.text for text in svg.iter() if text.text]
