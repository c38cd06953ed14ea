"""The chain of constitutional AI on a small model, and what is said of its numbers."""

from functools import partial

import jax
import numpy as np
import pytest

from configs import constitutional as settings
from experiments import constitutional, constitutional_measure
from jaxalign import shard
from jaxalign.feedback.constitutional import preference
from jaxalign.train import log


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(shard, "make_mesh", partial(shard.make_mesh, devices=jax.devices()[:1]))


def fast(shared):
    config = settings.get_config("fast")
    config.model.source = str(shared / "data" / "models" / "stories260k")
    config.agreement.files = tuple(
        str(shared / "data" / "preferences" / f"{name}.jsonl") for name in ("hh_harmless_dev", "hhh_alignment")
    )
    return config


@pytest.mark.slow
def test_a_model_goes_through_all_stages_and_each_goes_on_behind_what_is_there(shared, tmp_path):
    constitutional.run(fast(shared), tmp_path)
    summary, values = log.read_json(tmp_path / "summary.json"), log.read_lines(tmp_path / "records.jsonl")
    for stage in ("critique", "sft", "label", "reward", "ppo"):
        assert (tmp_path / stage / "report.html").exists() and log.read_json(tmp_path / stage / "summary.json")["seconds"] > 0

    revisions = log.read_lines(tmp_path / "critique" / "revisions.jsonl")
    assert {row["kind"]: len(row["responses"]) for row in revisions} == {"red_team": 2, "helpful": 1}
    learned = {row["prompt"] for row in revisions} | {row["prompt"] for row in log.read_lines(tmp_path / "label/comparisons.jsonl")}
    held_out = {row["asked"] for row in values if row["task"] == "held out"}
    assert len(held_out) == 4 and not any(prompt in asked for prompt in learned for asked in held_out)

    records, compared = log.read_lines(tmp_path / "label/records.jsonl"), log.read_lines(tmp_path / "label/comparisons.jsonl")
    said = sorted((row for row in records if row["task"] == "label"), key=lambda row: row["id"])
    p = np.reshape([row["p"] for row in said], (len(compared), 2, 2))
    np.testing.assert_array_equal([row["won"] for row in compared], preference(p))
    writer, feedback, first = (
        {row["model"] for row in found if row["task"] == task}
        for found, task in (
            (records, "answer"),
            (records, "label"),
            (log.read_lines(tmp_path / "critique/records.jsonl"), "response"),
        )
    )
    assert feedback == first != writer and len({row["model"] for row in values if row["task"] == "held out"}) == 3

    page = (tmp_path / "report.html").read_text()
    assert "hh_harmless_dev: share of pairs" in page and "By the first model" in page and "Samples" in page
    assert 0 <= summary["better/SL/red_team"] <= 1 and summary["refused/RL/harmless"] in np.arange(4) / 3
    before = (tmp_path / "records.jsonl").read_bytes()
    constitutional.run(fast(shared), tmp_path)
    assert (tmp_path / "records.jsonl").read_bytes() == before and log.read_json(tmp_path / "summary.json") == summary

    lines = (tmp_path / "critique" / "records.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "records.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:20])  # killed in the third line
    constitutional.critique(fast(shared).stages.critique.copy_and_resolve_references(), tmp_path / "again")
    assert (tmp_path / "again" / "revisions.jsonl").read_bytes() == (tmp_path / "critique" / "revisions.jsonl").read_bytes()


def test_agreement_is_the_mean_over_groups_of_principles():
    p = np.array([[[0.9, 0.2], [0.3, 0.6]], [[0.6, 0.8], [0.7, 0.9]]])  # [pairs, principles, orders]
    found = constitutional_measure.agreement(p, [1.0, 0.0], size=1, orders=2)
    # P(first): 0.85, 0.35 of the first pair, whose first is right; 0.4, 0.4 of the second, whose second is
    np.testing.assert_allclose(found["accuracy"], [0.5, 1.0])
    np.testing.assert_allclose(found["nats"], [-np.log([0.85, 0.35]).mean(), -np.log(0.6)])
    of_both = constitutional_measure.agreement(p, [1.0, 0.0], size=2, orders=2)
    np.testing.assert_allclose(of_both["accuracy"], [1.0, 1.0])
    one = constitutional_measure.agreement(p, [1.0, 0.0], size=2, orders=1)
    np.testing.assert_allclose(one["accuracy"], [1.0, 0.0])
    tied = constitutional_measure.agreement(np.full((1, 2, 2), 0.95), [1.0], size=2, orders=2, clamp=(0.4, 0.6))
    np.testing.assert_allclose([tied["accuracy"][0], tied["nats"][0]], [0.5, np.log(2)])


def numbers(right: float, better: float) -> dict:
    """Values as of a run in which labels agree with people for `right` more than chance, and answers are better by `better`."""
    noise = np.tile([-0.1, 0.1], 20)
    found = {f"a/accuracy/{n} orders/{size}": 0.5 + right * size / 16 + noise for n in (1, 2) for size in (1, 16)}
    found |= {f"a/{what}/{way}/1": 0.5 + right + noise for what in ("accuracy", "nats") for way in ("thought", "thought, clamped")}
    found |= {"a/position": 0.8 + noise, "better/revision 1": 0.5 + better + noise}
    found |= {f"better/{name}/{kind}": 0.5 + better + noise for name in ("SL", "RL") for kind in ("red_team", "helpful")}
    found |= {
        f"refused/{name}/{kind}": 1.0 * (noise > k)
        for k, name in enumerate(("first", "SL", "RL"))
        for kind in ("harmful", "harmless")
    }
    return found


@pytest.mark.parametrize(
    "right, better, verdict",
    [
        (0.3, 0.2, "as in the paper"),
        (0.0, 0.0, "which does not show what the paper has"),
        (-0.3, -0.2, "the other way round than in the paper"),
    ],
)
def test_findings_say_what_the_numbers_say(right, better, verdict):
    told = constitutional_measure.findings(numbers(right, better))
    for about in ("a, 16 principles in both orders against chance", "a, 16 principles against one", "By its own labels revision 1"):
        assert [line for line in told if line.startswith(about)][0].endswith(f"{verdict}.")
    assert sum(verdict in line for line in told) == 6  # a chain of thought, SL and RL on red-team prompts, too
    assert any("(A) gets a probability of 0.80 ± 0.02" in line for line in told)
    assert any("Refused of 40 harmful prompts: first 0.50; SL 0.00, 0.5 ± 0.08 less" in line for line in told)


def test_what_people_judged_is_shown_in_an_order_that_tells_nothing(shared):
    files = (str(shared / "data" / "preferences" / "hhh_alignment.jsonl"),)
    drawn = partial(constitutional_measure.human_pairs, lambda text: {"input_ids": text.split()}, files=files, count=30, tokens=120)
    (pairs,) = drawn(seed=0).values()
    known = {(row["prompt"], row["chosen"], row["rejected"]) for row in log.read_lines(files[0])}
    assert len(pairs) == 30 and 5 < sum(pair["right"] for pair in pairs) < 25
    for pair in pairs:
        both = (pair["first"], pair["second"])[:: 1 if pair["right"] else -1]
        assert (pair["prompt"], *both) in known and len("".join([pair["prompt"], *both]).split()) <= 120
    assert drawn(seed=0) == {"hhh_alignment": pairs} != drawn(seed=1)
