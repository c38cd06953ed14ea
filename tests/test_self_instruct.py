"""Self-Instruct: what is asked, what is read in what was written, what is kept, and a run of it all."""

import re
from functools import partial

import jax
import pytest

from configs import self_instruct as config_of
from experiments import self_instruct as study
from jaxalign import shard
from jaxalign.data import sources
from jaxalign.feedback import self_instruct
from jaxalign.train import log

SEEDS = sources.read("configs/self_instruct/seed_tasks.jsonl")
GROW = {"rounds": 2, "requests": 2, "human": 6, "model": 2, "count": 4, "most": 0.7, "seed": 0}


def test_the_seed_tasks_are_many_of_both_kinds_and_no_two_are_alike():
    names = [task["instruction"] for task in SEEDS]
    assert len(SEEDS) >= 40 and 10 <= sum(task["is_classification"] for task in SEEDS) <= len(SEEDS) - 10
    assert all(kept for _, _, kept in self_instruct.novel(names, []))
    for task in SEEDS:
        found = [(each["input"], each["output"]) for each in task["instances"]]
        assert found and self_instruct.sound(found)[0] == found, task["id"]


def writer(*texts):
    """Writes these, one a prompt, in turn, and keeps what it was asked."""
    asked, left = [], list(texts)

    def write(name, prompts, until):
        asked.append((name, prompts))
        return [left.pop(0) for _ in prompts]

    return write, asked


def shown(prompt):
    return re.findall(r"^\d\. (.*)$", prompt.text, re.MULTILINE)


def test_instructions_that_are_fit_and_new_join_the_pool_of_the_next_round():
    first = "1. Describe the taste of a lemon.\n2. draw a cat for me.\n3. Too short one\n4. Describe the taste of a ripe lemon."
    texts = [(first, True), ("1. Invent a holiday for bakers.\n2. Explain how a bicycle", False)]
    texts += [(" 1. Invent a holiday for bakers.", True), ("Name the capital of the country.", True)]
    write, asked = writer(*texts)
    made, funnel = self_instruct.grow(write, SEEDS, **GROW)
    assert [(each["instruction"], each["round"]) for each in made] == [
        ("Describe the taste of a lemon.", 0),
        ("Invent a holiday for bakers.", 1),
    ]
    assert funnel == {
        "written": 8,
        "in a list that was cut": 2,
        "about what is no text": 1,
        "up to 3 words": 1,
        "too like another": 1,  # 12/13
        "there already": 1,  # a seed task
        "kept": 2,
    }
    humans = {task["instruction"] for task in SEEDS}
    for _, prompts in asked:
        assert len(prompts) == 2 and shown(prompts[0]) != shown(prompts[1])
        assert all(len({*shown(prompt)}) == 8 for prompt in prompts)
    assert all({*shown(prompt)} - humans == set() for prompt in asked[0][1])  # none of its own yet
    assert all({*shown(prompt)} - humans == {"Describe the taste of a lemon."} for prompt in asked[1][1])
    chat = asked[0][1][0].messages
    assert [message["role"] for message in chat] == ["user", "assistant"] * 2 + ["user"] and chat[1]["content"].startswith("1. ")

    again, others = writer(*texts), writer(*texts)
    assert self_instruct.grow(again[0], SEEDS, **GROW) == (made, funnel) and again[1] == asked
    self_instruct.grow(others[0], SEEDS, **GROW | {"seed": 1})
    assert others[1] != asked


def test_whether_a_task_asks_for_a_label_is_asked_behind_tasks_of_either_kind_and_calibrated_by_others():
    asked, words_of = [], []
    kind = {task["instruction"]: task["is_classification"] for task in SEEDS} | {"Is it red?": True, "Tell a tale.": False}

    def score(name, prompts, words):
        asked.extend(prompts)
        words_of.extend(words)
        last = [prompt.text.rpartition("Task: ")[2].partition("\n")[0] for prompt in prompts]
        return [[-3.0, -0.1] if kind[name] else [-5.0, -0.1] for name in last]  # a model that says no of all

    labels = self_instruct.kinds(score, ["Is it red?", "Tell a tale."], SEEDS, shots=3, seed=0)
    assert labels == [True, False] and words_of == [" yes", " no"]
    assert len({prompt.text.rpartition("Task: ")[0] for prompt in asked}) == 1
    assert (asked[0].text.count("labels? yes"), asked[0].text.count("labels? no")) == (3, 3)
    assert len(asked) == 2 + 2 * (sum(task["is_classification"] for task in SEEDS) - 3)


@pytest.mark.parametrize(
    "label, text, found",
    [
        (False, "Example 1\nInput: a b\nOutput: c\n\nd\nExample 2\nInput: e\nOutput: f", [("a b", "c\n\nd"), ("e", "f")]),
        (False, "Output: c\nOutput: Example of it", [("", "c"), ("", "Example of it")]),
        (False, "\nExample 1\nInput: \nOutput: c", [("", "c")]),
        (False, "No mark at all", []),
        (True, "Class label: good\nInput: a\nb\nClass label: bad\nc", [("a\nb", "good"), ("c", "bad")]),
        (True, "Class label: good", [("", "good")]),
        (True, "Input: a", []),
    ],
    ids=range(7),
)
def test_examples_are_found_in_what_was_written(label, text, found):
    assert self_instruct.pairs(text, label) == found


@pytest.mark.parametrize(
    "found, kept, why",
    [
        ([("a", "b"), ("c", "d"), ("a", "b")], [("a", "b"), ("c", "d")], {"twice": 1}),
        (
            [("a", "a"), ("", ""), ("a", ""), ("a:", "b"), ("a", "b:")],
            [],
            {"output is input": 1, "no output": 2, "ends in a colon": 2},
        ),
        ([("a", "b"), ("c", "d"), ("a", "d")], [], {"one input, two outputs": 3}),
        ([("", "b"), ("", "d")], [("", "b"), ("", "d")], {}),  # without input any number of outputs
        (
            [("a\nInput: b", "c"), ("a", "b\nExample 2"), ("my Input: a", "b")],
            [("my Input: a", "b")],
            {"another example inside": 2},
        ),
    ],
    ids=range(5),
)
def test_examples_that_cannot_be_learnt_are_left_out(found, kept, why):
    assert self_instruct.sound(found)[0] == kept
    assert {name: count for name, count in self_instruct.sound(found)[1].items() if count} == why


def test_rows_and_the_card_say_what_became_of_all_that_was_written():
    numbered = "\n".join(f"Example {n}\nInput: i{n}\nOutput: o{n}" for n in range(4))
    labelled = "Class label: yes\nInput: one\nClass label: no\nInput: tw"
    write, asked = writer((numbered, True), (labelled, False), ("nothing", True))
    made = [
        {"instruction": name, "likeness": 0.1, "round": 0} for name in ("Say it again.", "Is it so?", "Name the capital of it.")
    ]
    names = [each["instruction"] for each in made]
    rows, funnel = self_instruct.examples(write, names, [False, True, False], SEEDS, shots=2, most=3, seed=0)
    assert [(row["instruction"], row["input"], row["output"]) for row in rows] == [
        *((names[0], f"i{n}", f"o{n}") for n in range(3)),
        (names[1], "one", "yes"),
    ]
    assert funnel == {"written": 6, "beyond 3 of a task": 1, "cut": 1, "kept": 4}
    (_, prompts) = asked[0]
    assert ["Class label:" in prompt.text for prompt in prompts] == [False, True, False]
    said = self_instruct.card(made, rows, SEEDS, {"examples, what became": funnel}, rounds=2)
    assert (said["instructions"], said["instructions without an example"], said["examples"]) == (2, 1, 4)
    assert said["share of classification"] == 0.5 and said["first words"] == {"say": 1, "is": 1}
    assert said["new in a round"] == {1: 3, 2: 0} and said["nearest seed"]["0.7"] == 1  # 8/11
    text = self_instruct.card_text(said, "Title")
    assert "# Title" in text and "- examples: 4" in text and "| cut | 1 |" in text


def test_lessons_ask_and_answer_as_the_model_will_be_asked():
    rows = self_instruct.lessons(SEEDS, human=8, count=4, shots=2, seed=0, size=40)
    lists = [row for row in rows if row["prompt"].startswith("Write")]
    assert 0 < len(lists) < 40 and rows == self_instruct.lessons(SEEDS, human=8, count=4, shots=2, seed=0, size=40)
    names = {task["instruction"] for task in SEEDS}
    for row in rows:
        if row in lists:
            assert {*self_instruct.listed(row["answer"])} <= {name.capitalize() for name in names}
            assert not any(name in row["prompt"] for name in names if name in row["answer"])
        else:
            assert self_instruct.pairs(row["answer"], "Class label:" in row["answer"])


def card(kept):
    funnel = {"written": 40, "too like another": 40 - kept, "kept": kept}
    numbers = {"instructions": kept, "share of classification": 0.25, "ROUGE-L with the nearest seed": 0.3}
    return numbers | {"new in a round": {1: kept, 2: 0}, study.INSTRUCTIONS: funnel, study.EXAMPLES: funnel}


def test_findings_say_what_the_scores_show():
    base = [10.0, 20.0, 30.0, 40.0]
    better, same = [x + 5 + n / 10 for n, x in enumerate(base)], [x + (-1) ** n for n, x in enumerate(base)]
    told = "\n".join(study.findings(card(10), {study.FIRST: base, study.PEOPLES: same, study.OWN: better}))
    assert "10 were fit and new (25%): 10 in the first round, 0 in the last of 2" in told
    assert f"The model {study.OWN} against the one {study.FIRST}: 5.2 ± 0.06 more." in told
    assert f"The model {study.PEOPLES} against the one {study.FIRST}: no different" in told and "agrees in sign" in told
    told = "\n".join(study.findings(card(10), {study.FIRST: better, study.OWN: base}))
    assert "0.06 less." in told and "not found here" in told and study.PEOPLES not in told


@pytest.mark.slow
def test_a_run_learns_from_what_its_model_wrote_and_goes_on_where_it_was(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "make_mesh", partial(shard.make_mesh, devices=jax.devices()[:1]))

    def config():
        made = config_of.get_config("fast")
        made.stages.writer.model.source = str(shared / "data" / "models" / "stories260k")
        made.evaluate.source = str(shared / "data" / "instruction" / "natural_instructions_dev.jsonl")
        return made

    study.run(config(), tmp_path)
    summary, rows = log.read_json(tmp_path / "summary.json"), log.read_lines(tmp_path / "instructions.jsonl")
    said, kept = log.read_json(tmp_path / "datacard.json"), log.read_lines(tmp_path / "records.jsonl")
    assert len(rows) == said["examples"] == summary["examples"] == len(log.read_lines(tmp_path / "seeds.jsonl")) > 0
    for name in (study.INSTRUCTIONS, study.EXAMPLES):
        assert sum(said[name].values()) == 2 * said[name]["written"] > 0  # nothing is lost without a name
    assert {row["instruction"] for row in rows} <= {
        part for each in kept for part in self_instruct.listed("\n" + each.get("wrote", "").strip())
    }
    scored = log.read_lines(tmp_path / "answers.jsonl")
    assert len({record["model"] for record in scored}) == 3 and len(scored) == 3 * config().evaluate.count
    findings = (tmp_path / "findings.txt").read_text().splitlines()
    assert all(finding.split(":")[0] in (tmp_path / "report.html").read_text() for finding in findings)

    before = [(tmp_path / name).read_bytes() for name in ("records.jsonl", "answers.jsonl", "summary.json", "datacard.json")]
    study.run(config(), tmp_path)
    assert before == [
        (tmp_path / name).read_bytes() for name in ("records.jsonl", "answers.jsonl", "summary.json", "datacard.json")
    ]
