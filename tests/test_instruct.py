"""More tasks, better on unseen ones: what is learnt, what is asked, and what the study says of it."""

import json
from functools import partial

import jax
import numpy as np
import pytest

from experiments import instruct
from experiments.launch import config_of
from jaxalign import shard

COURSE = config_of("instruct", "fast").course.to_dict() | {"count": 360, "examples": 96, "questions": 40}


def test_larger_sets_of_tasks_have_the_smaller_ones_and_nobody_learns_what_is_asked():
    found = {n: (learnt, asked) for n, learnt, asked in instruct.courses(**COURSE, numbers=(1, 3, 96), seed=0)}
    tasks = {n: {row["task"] for row in learnt} for n, (learnt, _) in found.items()}
    assert [len(tasks[n]) for n in (1, 3, 96)] == [1, 3, 96] and tasks[1] < tasks[3] < tasks[96]
    assert {len(learnt) for learnt, _ in found.values()} == {96}
    unseen = {n: asked["unseen"] for n, (_, asked) in found.items()}
    assert unseen[1] == unseen[3] == unseen[96] and len(unseen[1]) == 40
    assert not {row["task"] for row in unseen[1]} & tasks[96]
    assert {row["task"] for row in found[3][1]["seen"]} == tasks[3]
    told = {(row["definition"], row["input"]) for learnt, _ in found.values() for row in learnt}
    assert not told & {(row["definition"], row["input"]) for _, asked in found.values() for rows in asked.values() for row in rows}
    ((_, other, _),) = instruct.courses(**COURSE, numbers=(1,), seed=1)
    assert {row["task"] for row in other} != tasks[1]


def test_none_is_a_number_of_tasks_and_too_many_are_not():
    ((_, learnt, asked),) = instruct.courses(**COURSE, numbers=(0,), seed=0)
    assert not learnt and asked.keys() == {"unseen"}
    with pytest.raises(ValueError, match="there are 96 tasks"):
        list(instruct.courses(**COURSE, numbers=(97,), seed=0))


def test_findings_say_what_the_numbers_say():
    seen = {n: [1.0, 1.0, 1.0] for n in (1, 96)}
    rises = {"unseen": {1: [0.0, 0.1, 0.0], 96: [0.8, 0.7, 0.9]}, "seen": seen}
    flat = {"unseen": {1: [0.2, 0.1, 0.0], 96: [0.0, 0.1, 0.2]}, "seen": seen}
    told = instruct.findings({"decoder": rises, "encoder_decoder": flat})
    assert told[0] == "decoder, unseen tasks, 96 tasks against 1: 0.77 ± 0.09 more, as the papers have it."
    assert told[3].endswith("96 tasks against 1: no different (0 ± 0.1), which does not show what the papers have.")
    assert told[-1] == "Unseen tasks, decoder against encoder_decoder, at the most tasks: 0.7 ± 0.06 more."


@pytest.mark.slow
def test_the_study_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "make_mesh", partial(shard.make_mesh, devices=jax.devices()[:1]))
    config = config_of("instruct", "fast")
    instruct.run(config, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["decoder/unseen/4"] < 0.1 and summary["decoder/unseen/16"] > 0.3
    assert min(summary[f"{name}/seen/4"] for name in config.stages) > 0.8
    said = (tmp_path / "findings.txt").read_text()
    assert "decoder, unseen tasks, 16 tasks against 4" in said and "as the papers have it" in said.partition("\n")[0]
    assert "Tasks of categories" in (tmp_path / "report.html").read_text()
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    named = [one["exact_match"] for one in records if one["task"] == "decoder, 16 tasks, seed 0, unseen"]
    assert np.mean(named) == pytest.approx(summary["decoder/unseen/16"])
