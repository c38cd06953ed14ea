"""Rows of tasks, which of them are held out, how much of each is learnt, and in which words."""

import json
from collections import Counter

import numpy as np
import pytest

from jaxalign.data import compositions, instructions
from jaxalign.prompts import phrasings, template

TASK = {  # as Super-NaturalInstructions writes it
    "Categories": ["Text Modification -> Paraphrasing", "Other"],
    "Definition": ["Say it backwards. "],
    "Positive Examples": [{"input": f"a{n}", "output": f"{n}a", "explanation": "it is"} for n in range(3)],
    "Negative Examples": [{"input": "xy", "output": "xy", "explanation": "it is not"}],
    "Instances": [{"id": "one", "input": " ab ", "output": ["ba", "BA"]}, {"input": "cd", "output": "dc"}],
}


def row(task, n=0, category="all"):
    return {"task": task, "category": category, "definition": f"do {task}", "input": str(n), "targets": ["x"]}


def test_a_native_task_is_read_with_its_examples(tmp_path):
    (tmp_path / "task2_other.json").write_text(json.dumps(TASK | {"Definition": "As before."}))
    (tmp_path / "task1_backwards.json").write_text(json.dumps(TASK))
    rows = instructions.read(str(tmp_path))
    assert [row["task"] for row in rows] == ["task1_backwards"] * 2 + ["task2_other"] * 2
    first, second = rows[:2]
    assert (first["id"], second["id"]) == ("one", "task1_backwards-1")
    assert (first["input"], first["targets"], second["targets"]) == ("ab", ["ba", "BA"], ["dc"])
    assert (first["category"], first["definition"]) == ("Text Modification -> Paraphrasing", "Say it backwards.")
    assert [len(first[kind]) for kind in ("positive", "negative")] == [2, 1]
    assert instructions.read(str(tmp_path / "task1_backwards.json"), examples=0)[0]["positive"] == []
    (form,) = phrasings.drawn(rows[:1], phrasings.load("configs/instruct/examples.json"), seed=0)
    assert template.render(form, first).text == (
        "Definition: Say it backwards.\n\nPositive Example 1 -\nInput: a0\nOutput: 0a\n\n"
        "Positive Example 2 -\nInput: a1\nOutput: 1a\n\n"
        "Negative Example 1 -\nInput: xy\nOutput: xy\n\nNow complete the following example -\nInput: ab\nOutput:"
    )


def test_what_is_no_task_is_named(tmp_path):
    for broken, said in (
        ({"Instances": []}, "no 'Definition' and no 'Instances'"),
        (TASK | {"Instances": [{"input": 3}]}, "instance 0"),
    ):
        (tmp_path / "t.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=f"task t.*{said}"):
            instructions.read(str(tmp_path))


def test_seeds_of_self_instruct_and_rows_are_read(shared):
    folder = shared / "data" / "instruction"
    seeds = instructions.read(str(folder / "seed_tasks.jsonl"))
    assert len({row["task"] for row in seeds}) == 150 and seeds[0]["targets"] == ["Unsupport"]
    rows = instructions.read(str(folder / "natural_instructions_dev.jsonl"))
    train, unseen = instructions.hold_out(rows, ["reading comprehension", "qasc_answer_generation"])
    assert len({row["task"] for row in unseen}) == 4 and len(train) + len(unseen) == len(rows) == 318
    assert not {row["definition"] for row in train} & {row["definition"] for row in unseen}


def test_a_task_of_a_held_out_definition_is_held_out():
    twin = row("c") | {"definition": "do a"}
    train, unseen = instructions.hold_out([row("a"), row("b"), twin], ["a"])
    assert train == [row("b")] and unseen == [row("a"), twin]
    for names, said in ((["d"], "'d'"), (["all"], "each side"), ([], "each side")):
        with pytest.raises(ValueError, match=said):
            instructions.hold_out([row("a"), row("b")], names)


@pytest.mark.parametrize(
    "cap, temperature, expected",
    [
        (10**6, 1.0, [0.001, 0.099, 0.9]),  # in proportion
        (300, 1.0, [10 / 610, 300 / 610, 300 / 610]),
        (10**6, 2.0, np.sqrt([10, 990, 9000]) / np.sqrt([10, 990, 9000]).sum()),
        (10**6, np.inf, [1 / 3] * 3),
    ],
)
def test_rates_by_hand(cap, temperature, expected):
    np.testing.assert_allclose(instructions.rates([10, 990, 9000], cap=cap, temperature=temperature), expected, rtol=1e-12)


@pytest.mark.parametrize("wrong", [{"cap": 0}, {"temperature": 0.0}, {"sizes": [3, 0]}, {"sizes": []}])
def test_rates_of_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match="temperature"):
        instructions.rates(**{"sizes": [3], "cap": 9} | wrong)


def test_a_mixture_has_each_task_by_its_rate():
    rows = [row(task, n) for task, size in (("a", 2), ("b", 30), ("c", 10)) for n in range(size)]
    mixed = instructions.mixture(rows, 25, cap=10, seed=0)
    assert Counter(row["task"] for row in mixed) == {"a": 2, "b": 12, "c": 11}  # 25/22 of 2, 10, 10: 2.27, 11.36, 11.36
    often = Counter((row["task"], row["input"]) for row in mixed)
    assert max(n for (task, _), n in often.items() if task == "b") == 1 and set(often[("c", str(n))] for n in range(10)) == {1, 2}
    others = sorted(rows, key=lambda row: row["task"], reverse=True)
    assert instructions.mixture(others, 25, cap=10, seed=0) == mixed != instructions.mixture(rows, 25, cap=10, seed=1)


def test_each_row_gets_a_template_of_its_task_category_or_all(tmp_path):
    (tmp_path / "t.json").write_text(
        json.dumps({"*": [{"text": f"{n} {{input}}[Z]"} for n in range(4)], "a": [{"text": "A[Z]"}], "k": [{"text": "K[Z]"}]})
    )
    known, rows = phrasings.load(tmp_path / "t.json"), [row("a", category="k"), row("b", category="k"), *[row("c")] * 400]
    found = [form.text for form in phrasings.drawn(rows, known, seed=0)]
    assert found[:2] == ["A[Z]", "K[Z]"] and all(60 < n < 140 for n in Counter(found[2:]).values())
    assert [form.text for form in phrasings.drawn(rows[:50], known, seed=0)] == found[:50]
    with pytest.raises(ValueError, match="no template for task 'c'"):
        phrasings.drawn(rows, {"a": known["a"], "k": known["k"]}, seed=0)
    (tmp_path / "t.json").write_text('{"a": [{"text": "A[Z]"}, {"text": "no slot"}]}')
    with pytest.raises(ValueError, match="a, template 1"):
        phrasings.load(tmp_path / "t.json")


def test_compositions_do_as_they_are_told():
    rows = compositions.compositions(240, seed=0)
    assert len({row["task"] for row in rows}) == 120 and rows[0]["task"] == rows[120]["task"]
    of = {word: part for part, words in compositions.PARTS.items() for word in words}
    for one in rows:
        told = one["definition"].split()[1:]
        assert [of[word] for word in one["targets"][0].split()] == told and {*one["targets"][0].split()} <= {*one["input"].split()}
        assert [of[word] for word in one["negative"][0]["output"].split()] != told
    assert compositions.compositions(120, seed=0) == rows[:120] != compositions.compositions(120, seed=1)
    known = compositions.tokenizer()
    assert known.unk_token_id not in known(f"{rows[0]['definition']} of : ; = {rows[0]['input']}")["input_ids"]
