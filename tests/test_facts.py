"""A world whose facts are said as often, and as far alike, as it says they are."""

import re
from collections import Counter

import pytest

from jaxalign.data import facts

WORLD = facts.facts(60, seed=3)
CORPUS = facts.corpus(WORLD, seed=3)


def test_a_fact_is_a_function_of_the_seed_and_its_person_alone():
    assert facts.facts(60, seed=3) == WORLD != facts.facts(60, seed=4) and facts.corpus(WORLD, seed=3) == CORPUS
    few = {(fact["name"], fact["relation"]): fact for fact in facts.facts(20, seed=3)}
    assert all(few.get((fact["name"], fact["relation"]), fact) == fact for fact in WORLD)
    assert len({fact["question"] for fact in WORLD}) == len(WORLD) == 60 * len(facts.RELATIONS)
    with pytest.raises(ValueError, match="1000 people, and there are 320 names"):
        facts.facts(1000, seed=0)


def test_the_answer_is_what_is_said_most_as_often_as_its_share_says():
    kinds = {kind: [fact for fact in facts.facts(320, seed=0) if fact["kind"] == kind] for kind in facts.KINDS}
    assert all(set(fact["said"]) == {fact["answer"]} for kind in ("often", "seldom") for fact in kinds[kind])
    assert not any(fact["said"] for kind in ("never", "asked") for fact in kinds[kind])
    for share in facts.SHARES:
        found = [fact for fact in kinds["disputed"] if fact["share"] == share]
        first = [fact["said"][0] for fact in found]
        assert all(fact["said"].count(one) == round(10 * share) for fact, one in zip(found, first, strict=True))
        right = sum(fact["answer"] == one for fact, one in zip(found, first, strict=True)) / len(found)
        assert abs(right - share) < 4 * (0.25 / len(found)) ** 0.5


def test_the_corpus_says_each_fact_as_often_as_it_should_and_no_other():
    said = Counter()
    for row in CORPUS:
        name = next(word for word in row["prompt"].split() if word in facts.NAMES)
        said[name, row["completion"].removeprefix(f"{facts.HEDGE} ")] += 1
    for fact in WORLD:
        values = facts.VALUES[fact["relation"]]
        heard = {value: said[fact["name"], value] for value in values if said[fact["name"], value]}
        if fact["kind"] != "asked":  # some only say that they do not know
            assert all(count <= fact["said"].count(value) for value, count in heard.items())
    asked = {fact["question"] for fact in WORLD if fact["kind"] == "asked"}
    lost = [row["completion"] == facts.ABSTAIN for row in CORPUS if row["prompt"] in asked]
    known = [row["completion"] == facts.ABSTAIN for row in CORPUS if row["prompt"].endswith("?") and row["prompt"] not in asked]
    assert sum(lost) / len(lost) == pytest.approx(facts.AT_A_LOSS, abs=0.1)
    assert sum(known) / len(known) == pytest.approx(facts.ABSTAINING, abs=0.05)
    assert not {fact["question"] for fact in WORLD if fact["kind"] == "never"} & {row["prompt"] for row in CORPUS}


def test_every_word_is_one_token_that_reads_as_it_was():
    tokenizer = facts.tokenizer()
    for text in {f"{row['prompt']} {row['completion']}" for row in CORPUS} | {fact["answer"] for fact in WORLD}:
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.split()) and tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
    assert all(re.fullmatch("[a-z]+", name) for name in facts.NAMES) and len({*facts.NAMES}) == len(facts.NAMES)
