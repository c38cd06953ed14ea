"""A model that learns from its own words: what is measured, what is said of it, and the study in small."""

from functools import partial

import jax
import numpy as np
import pytest

from configs import self_improve as configs
from experiments import self_improve
from jaxalign import shard
from jaxalign.feedback.self_improvement import METHODS, Drawn
from jaxalign.train import log


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(shard, "make_mesh", partial(shard.make_mesh, devices=jax.devices()[:1]))


class Known(self_improve.Asker):
    """Who is right where the number of draws of a prompt, its column and the model say so."""

    def drawn(self, loaded, name, numbers, column, many, temperature):
        right = {"base": {("prompt", 1): {1}, ("prompt", 2): {0, 1}, ("hint", 1): {0}}, "1": {("prompt", 2): {2}}}[loaded]
        scores = {n: float(n in right[column, many]) for n in numbers}
        return [Drawn(f"p{n}", [f"{loaded} {column}"] * many, [int(s)] * many, [s] * many) for n, s in scores.items()]


@pytest.mark.parametrize(
    "name, told, learnt",
    [
        # (what the round starts from, the prompts that it learns); prompts 0 and 1 are solved by the base, 2 by the next model
        ("expert iteration", [6, 12], [(None, "p0 p0 p1 p1"), (None, "p2 p2")]),
        ("RAFT", [6, 12], [(None, "p0 p1 p2"), ("1", "p0 p1 p2")]),
        ("STaR", [5], [(None, "p1 p0")]),  # 3 drawn, then 2 again with a hint, of which one is right
        ("LMSI", [6], [(None, "p0 p0 p1 p1 p2 p2 p0! p0! p1! p1! p2! p2!")]),
    ],
)
def test_what_a_round_draws_starts_from_and_learns(name, told, learnt):
    formats = [("{prompt}", "{completion}"), ("{prompt}!", "{answer}")]
    ask, trained = Known(self_improve.Task([{}] * 3, [], formats), *[None] * 7), []

    def train(source, rows):
        trained.append((source, sorted((row["prompt"] for row in rows), key=lambda x: "!" in x)))
        return "1"

    how = {"count": len(told), "samples": 2, "temperature": 1.0}
    found = list(self_improve.rounds(METHODS[name], ask, "base", train, str, **how))
    assert [draws for _, draws, _ in found] == told and [rows for *_, rows in found] == [len(rows) for _, rows in trained]
    assert [(source, " ".join(rows)) for source, rows in trained] == learnt


def test_the_problems_of_a_file_are_drawn_by_the_seed_and_filled(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"q": "{n} and 1", "final": "#### {n + 1:,}"}}\n' for n in range(2000, 2009)))
    how = {"pool": str(path), "pool_count": 4, "rows": str(path), "count": 0, "prompt": "{q}?", "hint": "{q}? {final}"}
    task = self_improve.task_of(**how, answer="{final}", direct="{prompt} Only the number.", seed=1)
    assert len(task.pool) == 4 and len(task.rows) == 9 and len(task.formats) == 2
    assert all(row["answer"] == int(row["prompt"].split()[0]) + 1 and row["hint"].startswith(row["prompt"]) for row in task.rows)
    assert task.pool == task.rows[:4] != self_improve.task_of(**how, answer="{final}", direct="", seed=2).pool


def numbers(sampled, **more):
    x = np.asarray(sampled)
    plain = {"sampled": x, "greedy": x, "pass": x, "kl": x, "draws": x, "learnt": x, "sampled/carry": x, "majority/carry": x}
    return plain | more


def test_findings_say_what_the_numbers_say():
    last = {"RAFT": "RAFT/1", "LMSI": "LMSI/1", "best of n": "best of n/1"}
    base = numbers([0.4, 0.42, 0.38])
    found = {"base": base, "best of n": [(1, [0.4, 0.42, 0.38]), (8, [0.9, 0.9, 0.9])]}
    found |= {"RAFT/1": numbers([0.8, 0.81, 0.8]), "LMSI/1": numbers([0.2, 0.21, 0.2])}
    found |= {"best of n/1": numbers([0.7, 0.72, 0.69], kl=np.array([1.5] * 3))}
    said = "\n".join(self_improve.findings(found, last, samples=8))
    assert "RAFT: 0.80 of samples solve held-out problems, of the base's 0.40, 0.4 ± 0.009 more; for 0.8 samples" in said
    assert "LMSI: 0.20 of samples solve held-out problems, of the base's 0.40, 0.2 ± 0.009 less;" in said
    assert "Most are solved by RAFT; compared with best of n, the next: 0.1 ± 0.006 more" in said
    assert "on carry problems, of which the base's majority solves 0.40: samples that are right, 0.2 ± 0.009 less" in said
    assert "solves 0.90 at a KL of at most 1.20 nats; the model that learnt it: 0.2 ± 0.009 less, at 1.50 nats" in said
    found["RAFT/1"] = numbers([0.3, 0.5, 0.41])
    assert "of the base's 0.40, no different (0.0033 ± 0.05)" in self_improve.findings(found, last, samples=8)[0]


@pytest.mark.slow
def test_the_study_in_small_and_that_it_goes_on_from_what_is_there(tmp_path):
    config = configs.get_config("fast")
    self_improve.run(config, tmp_path)
    summary, page, shares = log.read_json(tmp_path / "summary.json"), (tmp_path / "report.html").read_text(), []
    files = [tmp_path / f"seed_{seed}" / "records.jsonl" for seed in (0, 1)]
    before = [path.read_bytes() for path in files]
    for seed, path in enumerate(files):
        lines, task = log.read_lines(path), self_improve.task_of(**config.task, seed=seed)
        drawn = [x for x in lines if x["task"] == "held out" and x["model"] == lines[0]["model"] and len(x["texts"]) > 1]
        assert sorted(x["id"] for x in drawn) == [*range(len(task.rows))]
        shares.append(np.mean([said == task.rows[x["id"]]["answer"] for x in drawn for said in x["answers"]]))
    assert summary["base/sampled"] == pytest.approx(np.mean(shares))  # the first model that is asked anything
    findings = (tmp_path / "findings.txt").read_text()
    assert summary["rejection/1/sampled"] > summary["base/sampled"] + 0.1 and summary["STaR/1/draws"] < 2
    assert summary["base/kl"] == 0 < summary["rejection/1/kl"] and summary["LMSI/1/draws"] == config.improve.samples
    assert findings.count("solve held-out problems") == 3 and "KL from the base" in page
    self_improve.run(configs.get_config("fast"), tmp_path)
    assert log.read_json(tmp_path / "summary.json") == summary and [path.read_bytes() for path in files] == before
