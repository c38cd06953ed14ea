"""What a model's samples become, for each method; and sums that can be verified."""

import itertools

import pytest

from jaxalign.data import arithmetic
from jaxalign.feedback import self_improvement as si
from jaxalign.feedback.self_improvement import METHODS, Drawn

RIGHT = Drawn("a", ["x 3", "y 4", "z 3", "x 3"], [3, 4, 3, 3], [0.0, 1.0, 0.0, 0.0])  # most are wrong
WRONG = Drawn("b", ["u 5", "v", "w 6", "v"], [5, None, 6, None], [0.0, 0.0, 0.0, 0.0])


def said(rows):
    return [(row["prompt"], row["completion"]) for row in rows]


@pytest.mark.parametrize(
    "name, kept",
    [
        ("rejection", [("a", "y 4")]),
        ("best of n", [("a", "y 4"), ("b", "u 5")]),
        ("LMSI", [("a", "x 3"), ("a", "z 3"), ("a", "x 3"), ("b", "u 5")]),
    ],
)
def test_what_a_method_keeps(name, kept):
    assert said(si.kept([RIGHT, WRONG], METHODS[name].select)) == kept


def test_a_majority_reads_no_score_and_can_be_held_to_its_share():
    assert si.majority(RIGHT._replace(scores=[])) == si.majority(RIGHT) == [0, 2, 3]
    assert si.majority(RIGHT, least=0.75) == [0, 2, 3] and si.majority(RIGHT, least=0.8) == []
    assert si.majority(Drawn("c", ["?"], [None], [0.0])) == []


def test_a_score_of_any_kind_is_compared_with_what_is_wanted():
    judged = RIGHT._replace(scores=[0.2, -1.0, 0.7, 0.7])
    assert si.above(judged, least=0.2) == [0, 2, 3] and si.best(judged) == [2]


def test_what_failed_is_learnt_from_a_hint_but_without_it():
    select = METHODS["STaR"].select
    assert si.failed([RIGHT, WRONG], select) == [1]
    told = Drawn("b", ["so 7"], [7], [1.0])
    assert said(si.rationalised([RIGHT, WRONG], {1: told._replace(prompt="b, it is 7")}, select)) == [("a", "y 4"), ("b", "so 7")]
    assert said(si.rationalised([RIGHT, WRONG], {1: told._replace(scores=[0.0])}, select)) == [("a", "y 4")]


def test_every_row_is_learnt_in_every_format():
    rows = si.kept([RIGHT], METHODS["rejection"].select)
    formats = [("{prompt}", "{completion}"), ("{prompt} Say the number alone.", "{answer}")]
    assert said(si.in_formats(rows, formats)) == [("a", "y 4"), ("a Say the number alone.", "4")]


def test_sums_are_right_and_no_held_out_one_is_anywhere_else():
    rows, held_out = arithmetic.sums(300, seed=3), arithmetic.held_out_sums(300, seed=3)
    for row in rows + held_out:
        terms = [int(x) for x in row["prompt"].split()[1:-1]]
        assert row["solution"] == " ".join(str(x % arithmetic.MODULUS) for x in [*itertools.accumulate(terms)][1:])
        assert row["answer"] == sum(terms) % arithmetic.MODULUS == int(row["solution"].split()[-1])
        assert row["kind"] == ("carry" if sum(terms) >= arithmetic.MODULUS else "plain")
        assert row["hint"].split() == [str(row["answer"]), *row["prompt"].split()[1:]]
    seen = {row["prompt"] for row in rows + arithmetic.sums(300, seed=4)}
    assert not seen & {row["prompt"] for row in held_out}
    assert rows[:20] == arithmetic.sums(20, seed=3) != arithmetic.sums(20, seed=4)


def test_people_are_mostly_right_about_plain_sums_mostly_wrong_about_others_and_right_where_they_were_told():
    rows, told = arithmetic.sums(3000, seed=0), arithmetic.told_sums(3000, seed=0)
    right = {}
    for row, said in zip(rows, told, strict=True):
        assert said["prompt"] in (row["prompt"], row["hint"])
        kind = "told" if said["prompt"] == row["hint"] else row["kind"]
        right.setdefault(kind, []).append(said["completion"] == row["solution"])
    share = {kind: sum(found) / len(found) for kind, found in right.items()}
    keeps = 1 - arithmetic.SLIP * (1 - 1 / arithmetic.MODULUS)  # a slip may be the right number
    assert share["told"] == 1 and len(right["told"]) == 1000
    assert share["plain"] == pytest.approx(keeps**arithmetic.TERMS, abs=0.05)
    assert share["carry"] == pytest.approx(keeps**arithmetic.TERMS * (1 - arithmetic.HABIT), abs=0.05)
    words = arithmetic.tokenizer()
    assert not any(words.unk_token_id in words(said["prompt"] + " " + said["completion"])["input_ids"] for said in told[:50])
