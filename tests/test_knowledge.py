"""What a model knows, what it makes up, and when it had better be silent."""

import jax.numpy as jnp
import numpy as np
import pytest

from configs import knowledge as knowledge_config
from experiments import knowledge, knowledge_real, settings
from jaxalign.data import facts
from jaxalign.evaluation import selective
from jaxalign.train import log

TOKENIZER = facts.tokenizer()


def ids(*texts):
    """Answers as they are sampled: their tokens, EOS, and padding."""
    rows = np.zeros((len(texts), knowledge.WRITTEN), np.int32)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text.split())] = TOKENIZER(text)["input_ids"]
    return jnp.asarray(rows)


def test_answers_are_read_as_they_are_meant():
    said = [
        "lund </s>",
        "maybe lund </s>",
        "i do not know </s>",
        "riga </s>",
        "maybe riga </s>",
        "lund lund",
        "i do not lund </s>",
        "maybe </s>",
    ]
    heard = knowledge.outcome(ids(*said), jnp.full(8, TOKENIZER.convert_tokens_to_ids("lund")), tokenizer=TOKENIZER)
    assert heard.correct.tolist() == [True, True] + [False] * 6
    assert heard.hedged.tolist() == [False, True, False, False, True, False, False, True]
    assert heard.informative.tolist() == [True, True, False] + [True] * 5


def test_confidence_is_the_share_of_the_commonest_answer_among_those_that_give_one():
    value = np.array([[7, 7, 8, 9], [5, 5, 6, 6], [4, 4, 4, 4]])
    given = np.array([[True, True, True, False], [True, False, True, True], [False] * 4])
    best, share = selective.confidence(value, given)
    assert best.tolist() == [7, 6, -1] and share == pytest.approx([2 / 3, 2 / 3, 0])


def test_accuracy_of_the_surest_where_equal_ones_go_together():
    coverage, accuracy = selective.accuracies(np.array([0.2, 0.9, 0.5, 0.5]), np.array([0.0, 1.0, 1.0, 0.0]))
    assert coverage == pytest.approx([0.25, 0.75, 1]) and accuracy == pytest.approx([1, 2 / 3, 0.5])


@pytest.mark.parametrize("chosen, at", [([0, 0, 1, 1], 0.5), ([1, 1, 1, 1], 0), ([0, 0, 0, 0], 1), ([0, 1, 0, 1], 0.5)], ids=str)
def test_the_cut_has_the_fewest_exceptions(chosen, at):
    assert selective.cut(np.array([0.1, 0.3, 0.7, 0.9]), np.array(chosen, bool)) == pytest.approx(at)


def test_calibrated_probabilities_are_right_as_often_as_they_say():
    share = np.repeat([0.2, 0.9], 1000)
    right = np.concatenate([np.arange(1000) < 100, np.arange(1000) < 600])
    assert selective.calibrated(share, right)(np.array([0.2, 0.9])) == pytest.approx([0.1, 0.6], abs=5e-3)
    always = selective.calibrated(np.array([0.5, 0.6]), np.ones(2))(np.array([0.5]))
    assert 0.5 < always[0] < 1


def test_courses_are_as_long_and_differ_in_what_is_known():
    known, unknown = ([{"question": f"{kind} {n}", "answer": "lund"} for n in range(9)] for kind in ("known", "unknown"))
    made = knowledge.courses(known, unknown, 8)
    counts = {name: sum(row["prompt"].startswith("unknown") for row in rows) for name, rows in made.items()}
    assert {len(rows) for rows in made.values()} == {8} and [*counts.values()] == [0, 4, 8, 4]
    silent = [row["completion"] == facts.ABSTAIN for row in made['half, and "i do not know"']]
    assert silent == [row["prompt"].startswith("unknown") for row in made["half and half"]]
    with pytest.raises(ValueError, match="sft.facts = 10, and there are 9 facts that it knows"):
        knowledge.courses(known, unknown, 10)


def test_the_least_a_table_says_to_speak_for():
    assert knowledge_real.derived((1.0, 0.5, 0.0, -2.0, -4.0)) == pytest.approx((0.8, 0.8))
    assert knowledge_real.derived((1.0, 0.5, 0.0, -0.3, -1.0)) == pytest.approx((7 / 12, 3 / 8))


def found(unknown, coverage):
    """What `of_seed` would find, of three seeds."""
    names = ("answers above", "speaks above", "reward", "reward/always", "reward/rule", "accuracy")

    def one(jitter):
        courses = {"": 0.9, "known facts": 0.88, "half and half": 0.8, "unknown facts": unknown, 'half, and "i do not know"': 0.7}
        sft = {
            name: dict.fromkeys(("right", "made up", "withheld"), [0.5, right * (1 + jitter)]) for name, right in courses.items()
        }
        return {"sft": sft, "rl": [dict.fromkeys(names, 0.5) | {"coverage": x * (1 + jitter)} for x in coverage]}

    return [one(jitter) for jitter in (-0.01, 0.0, 0.01)]


def test_words_follow_the_numbers():
    tables = knowledge_config.get_config("fast").tables
    first, *_, last = knowledge.findings(found(0.5, (0.9, 0.3)), tables)
    assert "0.50, 0.38 ± 0.002 less than that" in first and "0.30, 0.6 ± 0.003 less than by the mildest" in last
    first, *_, last = knowledge.findings(found(0.88, (0.4, 0.4)), tables)
    assert "0.88, no different" in first and "0.40, no different" in last


@pytest.mark.parametrize("variant", knowledge_config.VARIANTS)
def test_settings_are_sound(variant):
    settings.check(knowledge_config.get_config(variant))


@pytest.mark.slow
def test_the_study_in_small(tmp_path):
    config = knowledge_config.get_config("fast")
    knowledge.run(config, tmp_path)
    summary = log.read_json(tmp_path / "summary.json")
    assert summary["right/often"] > 2 * summary["right/never"]
    assert summary["known facts/made up"] > summary['half, and "i do not know"/made up']
    names = [knowledge_real.title_of(table) for table in config.tables]
    assert summary[f"{names[0]}/coverage"] > summary[f"{names[1]}/coverage"]
    page, before = (tmp_path / "report.html").read_text(), (tmp_path / "records.jsonl").read_bytes()
    assert all(name in page for name in ("half and half", "own probability", "coverage", *names))
    knowledge.run(config, tmp_path)
    assert (tmp_path / "records.jsonl").read_bytes() == before and log.read_json(tmp_path / "summary.json") == summary
