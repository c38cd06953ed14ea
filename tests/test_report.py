"""The report: one file that loads nothing, shows what the run left, and runs nothing that a model wrote."""

import json
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from jaxalign.train import report

EVIL = "<script>alert('x')</script> & <b>\"bold\"</b>"


def a_run(folder, steps=5, prompts=(EVIL, EVIL), **more):
    with open(folder / "metrics.jsonl", "w") as file:
        for i in range(steps):
            loss = None if i == 1 else 2.0 / (i + 1)
            line = {"step": i + 1, "loss/total": loss, "own/<metric>": i, "time/elapsed_s": 21.0 * i}
            file.write(json.dumps(line | more) + "\n")
    with open(folder / "samples.jsonl", "w") as file:
        for step, prompt in zip((0, steps - 1), prompts):
            file.write(json.dumps({"step": step, "prompt": prompt, "response": f"{EVIL} at {step}", "score": step / 2}) + "\n")
    (folder / "config.json").write_text(json.dumps({"optim": {"rate": 0.001}, "note": EVIL}))
    (folder / "summary.json").write_text(json.dumps({"gold": {"after": 12.3456}, "note": EVIL}))
    return report.write(folder).read_text()


class Page(HTMLParser):
    """The tags and the text of a page; asserts that what is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text, self.attributes = set(), [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text.append(text)


def test_what_a_model_wrote_is_text_and_nothing_is_loaded(tmp_path):
    html = a_run(tmp_path)
    page = Page(html)
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    assert not {name for name, _ in page.attributes} & {"src", "href", "onload", "onclick"}
    assert "url(" not in html and "http" not in html and "<script" not in html
    assert f"{EVIL} at 0" in page.text and f"{EVIL} at 4" in page.text and EVIL in page.text
    assert "own/<metric>" in page.text


def test_result_curves_samples_and_config_are_there(tmp_path):
    page = Page(a_run(tmp_path))
    words = " ".join(page.text)
    assert "5 steps in 1:24" in words and "gold.after" in words and "12.35" in words and '"rate": 0.001' in words
    assert page.text.index("Loss") < page.text.index("2 more curves") < page.text.index("own/<metric>")
    assert "score 0" in page.text and "score 2 " in page.text and "▲" in words
    assert page.text.count(EVIL) == 2  # in the summary, and once as the prompt that both responses share


def test_an_empty_and_an_unfinished_run_have_a_report_too(tmp_path):
    assert "No step was logged." in Page(report.write(tmp_path).read_text()).text
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss/total": 1.5}\n{"step": 2, "lo')
    assert "1 steps" in Page(report.write(tmp_path).read_text()).text


def test_samples_of_different_prompts_stand_side_by_side(tmp_path):
    words = Page(a_run(tmp_path, prompts=("one?", "two?"))).text
    assert words.index("one?") < words.index(f"{EVIL} at 0") < words.index("two?") < words.index(f"{EVIL} at 4")
    assert "▲" not in words  # scores of different prompts are not compared


@pytest.mark.parametrize("ys", [[1.0], [0.0, 0.0], [-1e-9, 1e-9], [1e6, 3e6], [5.0, -5.0] * 700])
def test_a_chart_is_svg_with_every_point_inside_and_the_last_value_written(ys):
    figure = report.chart("a < b", {"x": list(enumerate(ys))})
    svg = ET.fromstring(figure[figure.index("<svg") : figure.index("</svg>") + 6])
    for line in svg.iter("polyline"):
        for point in line.get("points").split():
            x, y = map(float, point.split(","))
            assert report.LEFT <= x <= report.WIDTH - report.RIGHT and report.TOP <= y <= report.HEIGHT - report.BOTTOM
    written = [text.text for text in svg.iter("text") if text.get("class") == "last"]
    assert written == [report.short(report.running_mean(list(enumerate(ys)))[-1][1])]
    assert len(list(svg.iter("line"))) >= 2


@pytest.mark.parametrize("low, high", [(0, 1), (-0.37, 12.4), (1e-7, 3e-7), (99_000, 101_000)])
def test_ticks_are_few_round_and_inside(low, high):
    marks = report.ticks(low, high, 5)
    assert 2 <= len(marks) <= 6 and low <= marks[0] and marks[-1] <= high * (1 + 1e-9)
    step = marks[1] - marks[0]
    assert any(abs(step / 10**e - m) < 1e-6 for e in range(-12, 9) for m in (1, 2, 5))


def test_a_running_mean_is_a_mean():
    points = [(i, float(i % 2)) for i in range(600)]
    assert report.running_mean(points[:59]) == points[:59]
    assert [y for _, y in report.running_mean(points)[20:]] == pytest.approx([0.5] * 580)
