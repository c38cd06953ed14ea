"""Constitutional AI as text: who is asked what, by which principle, and what letters come to."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxalign.data.text import Document
from jaxalign.evaluation import judges
from jaxalign.feedback import constitutional
from jaxalign.prompts import template

FILES = Path(__file__).parents[1] / "configs" / "constitutional"
PRINCIPLES = [
    {"id": f"p{n}", "critique": f"fault {n}?", "revision": f"better {n}?", "preference": f"which, {n}?"} for n in range(5)
]
EXAMPLE = dict(zip(constitutional.TURNS, ("q", "a", "what is wrong?", "all", "again?", "b"), strict=True))


def lines(name):
    return [json.loads(line) for line in (FILES / name).read_text().splitlines()]


def test_what_is_asked_stands_behind_examples_plain_and_as_a_conversation():
    prompt = constitutional.asked(["hi", "go", "fault?"], [EXAMPLE])
    assert prompt.text == (
        "\n\nHuman: q\n\nAssistant: a\n\nCritiqueRequest: what is wrong?\n\nCritique: all\n\nRevisionRequest: again?\n\nRevision: b"
        "\n\nHuman: hi\n\nAssistant: go\n\nCritiqueRequest: fault?\n\nCritique:"
    )
    told = [(message["role"], message["content"]) for message in prompt.messages]
    assert told[4:] == [("user", "again?"), ("assistant", "b"), ("user", "hi"), ("assistant", "go"), ("user", "fault?")]


def revised(rows, rounds, **changed):
    heard = []

    def write(name, prompts):
        heard.extend((name, prompt.text) for prompt in prompts)
        return [f"<{name} to {prompt.messages[0]['content']}>" for prompt in prompts]

    settings = {"rounds": rounds, "seed": 3, **changed}
    return constitutional.revise(rows, PRINCIPLES, [], write, **settings), heard


def test_each_round_criticises_what_the_one_before_has_made():
    rows = [{"prompt": "x", "kind": "red_team"}, {"prompt": "y", "kind": "red_team"}]
    found, heard = revised(rows, 2)
    assert found[1] == {
        **rows[1],
        "principles": found[1]["principles"],
        "critiques": ["<critique 1 to y>", "<critique 2 to y>"],
        "responses": ["<response to y>", "<revision 1 to y>", "<revision 2 to y>"],
        "response": "<revision 2 to y>",
    }
    first, second = (int(name[1:]) for name in found[1]["principles"])
    assert first != second
    after = "\n\nHuman: y\n\nAssistant: <revision 1 to y>\n\nCritiqueRequest: "
    assert ("critique 2", f"{after}fault {second}?\n\nCritique:") in heard
    last = f"{after}fault {second}?\n\nCritique: <critique 2 to y>\n\nRevisionRequest: better {second}?\n\nRevision:"
    assert heard[-1] == ("revision 2", last)
    assert revised(rows, 2)[0] == found and revised(rows[:1], 2)[0] == found[:1]
    assert revised(rows[:1], 0)[0][0]["response"] == "<response to x>"
    assert len({tuple(row["principles"]) for seed in range(9) for row in revised(rows, 2, seed=seed)[0]}) > 5
    with pytest.raises(ValueError, match="6 principles for one example, where there are 5"):
        revised(rows, 6)


def test_opinions_ask_of_each_pair_by_its_principles_in_both_orders():
    form = template.Template("{prompt}|{preference}|{first}|{second}[Z]", answer="")
    pairs = [{"prompt": f"p{n}", "first": "good", "second": "bad"} for n in range(3)]
    heard = []

    def choose(name, prompts):
        heard.extend(prompt.text for prompt in prompts)
        return [0.9 if "|good|" in prompt.text.partition("bad")[0] else 0.3 for prompt in prompts]

    settings = {"count": 2, "orders": 2, "seed": 0}
    p = constitutional.opinions("label", pairs, PRINCIPLES, form, choose, **settings)
    assert p.shape == (3, 2, 2) and (p == [0.9, 0.3]).all() and len(set(heard)) == 12
    np.testing.assert_allclose(constitutional.preference(p), 0.8)  # (0.9 + 1 - 0.3) / 2
    np.testing.assert_allclose(constitutional.preference(p, clamp=(0.4, 0.6)), 0.6)
    np.testing.assert_allclose(constitutional.preference(p[..., :1]), 0.9)
    swapped = [pair | {"first": "bad", "second": "good"} for pair in pairs]
    other = constitutional.opinions("label", swapped, PRINCIPLES, form, choose, **settings)
    np.testing.assert_allclose(constitutional.preference(p) + constitutional.preference(other), 1.0, rtol=1e-15)


@pytest.mark.parametrize("clamp", [(0.0, 1.0), (0.4, 0.6)])
def test_a_label_of_both_orders_has_no_taste_for_a_letter_and_none_for_the_order_of_principles(clamp):
    p = np.random.default_rng(0).random((7, 4, 2))
    label = constitutional.preference(p, clamp=clamp)
    np.testing.assert_allclose(constitutional.preference(p[..., ::-1], clamp=clamp), 1 - label, atol=1e-15)
    np.testing.assert_allclose(constitutional.preference(p[:, ::-1], clamp=clamp), label, atol=1e-15)
    np.testing.assert_allclose(constitutional.preference(np.full((2, 3, 2), 0.95), clamp=clamp), 0.5)


def test_letters_are_compared_where_they_differ():
    one, other = (Document(np.array([5, 6, letter, 9]), np.float32([0, 0, 1, 1])) for letter in (1, 2))
    kept = judges.apart(one, other)
    assert [document.tokens.tolist() for document in kept] == [[5, 6, 1], [5, 6, 2]]
    assert all(document.weights.tolist() == [0, 0, 1] for document in kept)
    with pytest.raises(ValueError, match="nothing to choose by"):
        judges.apart(one, one)
    logp = np.log([[0.3, 0.1], [0.02, 0.06]])
    np.testing.assert_allclose(judges.first_better(logp), [0.75, 0.25])
    np.testing.assert_allclose(judges.first_better(logp[:, ::-1]), [0.25, 0.75])


def test_the_files_of_the_project_are_whole():
    principles, examples = lines("principles.jsonl"), lines("critiques.jsonl")
    assert len({row["id"] for row in principles}) == len(principles) == 16
    assert all(row[name].strip() for row in principles for name in ("critique", "revision", "preference"))
    assert all(tuple(row) == constitutional.TURNS for row in examples)
    asked = {name: {row["prompt"] for row in lines(f"{name}.jsonl")} for name in ("red_team", "helpful")}
    assert all(len(prompts) == 40 for prompts in asked.values()) and not asked["red_team"] & asked["helpful"]
    held_out = {json.loads(line)["prompt"] for line in (FILES.parent / "evaluate" / "safety.jsonl").read_text().splitlines()}
    assert not held_out & (asked["red_team"] | asked["helpful"])
    form = template.load(FILES / "preference.json")
    row = principles[0] | {"prompt": constitutional.asked(["hi"]).text, "first": "one", "second": "two"}
    one, other = (prompt.text for prompt in judges.in_both_orders(form, row, "one", "two"))
    assert "(A) one\n(B) two" in one and "(A) two\n(B) one" in other and principles[0]["preference"] in one
