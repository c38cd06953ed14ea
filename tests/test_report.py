"""The report: one file that loads nothing, shows what the run left, and runs nothing that a model wrote."""

import json
from html.parser import HTMLParser

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


def test_a_study_says_what_it_found_and_by_which_command(tmp_path):
    figures = {"Gold & proxy": {"x": "KL", "curves": {"gold": [[0, 1, 0.1], [1, 2, None]], "dots": [[0, 2]]}, "points": ["dots"]}}
    (tmp_path / "figures.json").write_text(json.dumps(figures))
    (tmp_path / "findings.txt").write_text(f"{EVIL}\nMore is more.\n")
    (tmp_path / "command.txt").write_text("python -m experiments.x\n")
    page = Page(report.write(tmp_path).read_text())
    assert not page.tags & {"script", "b"} and "No step was logged." not in page.text
    words = page.text
    assert words.index(EVIL) < words.index("More is more.") < words.index("Gold & proxy") < words.index("python -m experiments.x")
