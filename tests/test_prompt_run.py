"""Prompt it, search for the prompt, or fine-tune it: the same rows, and figures that the records give again."""

import re
from functools import partial

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import MODEL
from configs import prompt as prompt_config
from configs import prompt_search as search_config
from experiments import common, prompt, prompt_search
from jaxalign import score, shard
from jaxalign.data import tables
from jaxalign.prompts import answers
from jaxalign.train import log


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(shard, "make_mesh", partial(shard.make_mesh, devices=jax.devices()[:1]))


def here(config, shared):
    """The config, its files where they are."""
    data = str(shared / "data")
    config.model.source = config.model.source.replace("../shared/data", data)
    for name in ("pool", "rows"):
        config.task[name] = config.task[name].replace("../shared/data", data)
    return config


@pytest.fixture(scope="module")
def stories(shared):
    source = str(shared / "data" / "models" / "stories260k")
    mesh = shard.make_mesh(devices=jax.devices()[:1])
    return common.load(source, ConfigDict({"source": source, **MODEL}), mesh, seed=0)


def test_words_about_prompts_follow_the_numbers():
    summary = {"random/0": 0.5, "nearest, calibrated/4": 0.7, "sft": 0.9, "grpo": 0.75}
    best, _, tuned, close = prompt.findings(summary | {f"{name}_error": 0.05 for name in summary}, {"sft": 0, "grpo": 2})
    assert "nearest, calibrated with 4 demonstrations: 0.70 ± 0.05" in best
    assert "sft, asked behind 0 demonstrations, has 0.90 ± 0.05, more than" in tuned
    assert "grpo, asked behind 2 demonstrations, has 0.75 ± 0.05, as much as" in close


def test_a_curve_and_what_training_makes_of_the_model(shared, stories, tmp_path):
    config = here(prompt_config.get_config("tiny"), shared)
    prompt.run(config, tmp_path)
    summary, lines = log.read_json(tmp_path / "summary.json"), log.read_lines(tmp_path / "records.jsonl")
    lines = sorted(lines, key=lambda line: line["id"])
    ways = {line["task"]: [other for other in lines if other["task"] == line["task"]] for line in lines}
    shots = [f"{way}, 1 shots, seed {seed}" for way, seed in (("random", 0), ("random", 1), ("nearest", 0))]
    assert ways.keys() == {"no shots", *shots, "sft", "grpo", "sft_grpo"} and {len(each) for each in ways.values()} == {6}
    assert len({tuple(line["target"] for line in each) for each in ways.values()}) == 1  # the same rows
    of = {name: ways[name][0]["model"] for name in ("no shots", "sft", "grpo", "sft_grpo")}
    assert of["grpo"] == of["no shots"] != of["sft"] == of["sft_grpo"]  # so small a model draws nothing that is rewarded
    assert ways["sft"][0]["asked"] == ways["no shots"][0]["asked"] and {line["shots"] for line in ways["grpo"]} == {1}
    both = ways[shots[0]] + ways[shots[1]]
    assert summary["random/1"] == np.mean([line["right"] for line in both])
    assert summary["random, calibrated/1"] == np.mean([line["calibrated"] for line in both])
    assert {line["asked"].count("Opinion:") for line in both} == {2} and "nearest, calibrated/1" not in summary
    for name, shown in (("sft", 1), ("grpo", 2)):
        trained = log.read_lines(tmp_path / f"train_{name}.jsonl")
        assert len(trained) == 40 and {line["prompt"].count("Opinion:") for line in trained} == {shown}
        questions = {line["prompt"].rpartition("Sentence: ")[2] for line in trained}
        assert len(questions) == 40 and not any(line["asked"].rpartition("Sentence: ")[2] in questions for line in ways["no shots"])
        assert all(line["prompt"].count(line["prompt"].rpartition("Sentence: ")[2]) == 1 for line in trained)  # not its own shot
    page = (tmp_path / "report.html").read_text()
    assert "answered rightly" in page and all(name in page for name in ("random", "calibrated", "sft, behind 0", "grpo, behind 1"))

    task = prompt.task_of(**config.task, seed=0)
    ask = prompt.asker(stories, shard.make_mesh(), tmp_path / "other.jsonl", seed=0, batch=8, length=320, written=8)

    def logp(text):
        made = prompt.templates.Prompt(text, "", [])
        batch = tables.pad([ask.document(made, word) for word in task.words], 320)
        said, _ = score.evaluate(stories.model, stories.params, jax.tree.map(jax.numpy.asarray, batch))
        found = np.where(np.asarray(batch.targets) > 0, said.logp, 0).sum(1)
        return found - np.logaddexp.reduce(found)

    line = ways[shots[0]][3]
    np.testing.assert_allclose(list(line["p"].values()), np.exp(logp(line["asked"])), rtol=1e-4)
    asked = re.escape(task.rows[3]["text"])
    nothing = [logp(re.sub(asked, lambda _, x=x: x, line["asked"])) for x in answers.CONTENT_FREE]
    best = task.words[answers.calibrated(logp(line["asked"]), nothing).argmax()]
    assert line["calibrated"] == (best == line["target"])

    before = (tmp_path / "records.jsonl").read_bytes()
    prompt.run(here(prompt_config.get_config("tiny"), shared), tmp_path)  # goes on behind what is there
    assert (tmp_path / "records.jsonl").read_bytes() == before and log.read_json(tmp_path / "summary.json") == summary


def test_answers_that_are_written_with_and_without_a_chain_of_thought(shared, stories, tmp_path):
    path = str(shared / "data" / "reasoning" / "strategyqa.jsonl")
    made = {"template": "configs/prompts/yes_no.json", "pool": path, "rows": path, "count": 4, "pool_count": 8}
    task = prompt.task_of(**made, read="yes_no", seed=0)
    assert not {row["question"] for row in task.rows} & {row["question"] for row in task.pool}
    ask = prompt.asker(stories, shard.make_mesh(), tmp_path / "records.jsonl", seed=0, batch=4, length=320, written=6)
    found = prompt.curves(ask, task, shots=(0, 1), seeds=1, rankings=("random",))
    assert found.keys() == {"random", "random, thought"}
    plain, thought, first = found["random"][1], found["random, thought"][1], found["random, thought"][0]
    assert {line["target"] for line in plain} <= {"yes", "no"}
    assert all("So the answer is" in line["asked"] for line in thought) and not any("So the" in line["asked"] for line in plain)
    assert all(line["wrote"].count("\nTherefore, the answer (Yes or No) is") == 1 for line in first)
    behind = [line["wrote"].partition("(Yes or No) is")[2] for line in first]
    assert all(text.strip() for line in first for text in line["wrote"].split("\nTherefore, the answer (Yes or No) is"))
    assert [line["said"] for line in first] == [prompt.extract.yes_no(text) for text in behind]
    assert all(line["right"] == (line["said"] == line["target"]) for line in plain + thought)

    prompts = ask.prompts(task, task.template, task.pool, prompt.demonstrations.in_order, k=0)
    prompt.write_rows(tmp_path / "rows.jsonl", task, task.template, prompts)
    for row, line in zip(task.pool, log.read_lines(tmp_path / "rows.jsonl"), strict=True):
        assert line["completion"] == f" {row['rationale']}\nSo the answer is {row['answer']}."
        assert line["answer"] == f" {row['answer']}." and row["rationale"] not in line["prompt"]


def test_halving_keeps_the_better_half_within_its_budget():
    worth, asked = {"a": 0.5, "b": 0.9, "c": 0.1, "d": 0.5, "e": 0.95}, []

    def score(candidate, count):
        asked.append((candidate, count))
        return worth[candidate]

    best, scores = prompt_search.halved(["a", "b", "c", "d", "b"], score, lambda best: ["e", best], dev=100, budget=60, rounds=3)
    assert best == "e" and scores == worth and sum(count for _, count in asked) <= 60
    assert asked == [("a", 5), ("b", 5), ("c", 5), ("d", 5), ("b", 6), ("a", 6), ("e", 6), ("e", 10), ("b", 10)]
    with pytest.raises(ValueError, match="search.budget = 3: 1 rounds, the first of 4 candidates, leave no row for one"):
        prompt_search.halved(["a", "b", "c", "d"], score, lambda best: [], dev=9, budget=3, rounds=1)


def test_an_instruction_is_searched_for_and_judged_on_other_rows_beside_virtual_tokens(shared, tmp_path):
    config = here(search_config.get_config("tiny"), shared)
    prompt_search.run(config, tmp_path)
    summary, lines = log.read_json(tmp_path / "summary.json"), log.read_lines(tmp_path / "records.jsonl")
    tasks = {name: [line for line in lines if line["task"] == name] for name in ("induce", "rephrase", "dev", "held out")}
    first, best = summary["instruction/first"], summary["instruction/best"]
    assert {line["instruction"] for line in tasks["induce"]} <= {*summary["candidates"], ""} and tasks["rephrase"]
    assert len(tasks["dev"]) <= config.search.budget
    texts = {name: {line["asked"].rpartition("Sentence: ")[2] for line in tasks[name]} for name in ("dev", "held out")}
    assert not texts["dev"] & texts["held out"]
    by_way = [
        [line["right"] for line in tasks["held out"] if line["asked"].startswith(start)] for start in (first, best, "Sentence")
    ]
    for name, right in zip(("first", "best", "soft"), by_way, strict=True):
        assert len(right) == 6 and summary[f"held_out/{name}"] == pytest.approx(np.mean(right))
    assert summary["held_out/soft_more"] == pytest.approx(np.mean(by_way[2]) - np.mean(by_way[0]))
    adapter = log.read_json(tmp_path / "sft" / "config.json")["adapter"]
    tokenizer = common.load(str(tmp_path / "sft"), config.model, shard.make_mesh(), seed=0).tokenizer
    assert (adapter["kind"], adapter["length"]) == ("prompt", len(tokenizer(best, add_special_tokens=False).input_ids))
    assert all(instruction in (tmp_path / "report.html").read_text() for instruction in (first, "candidates."))
