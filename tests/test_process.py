"""Rewards of steps: where a step ends, what is learned of it, which solution is picked, and how a policy earns it."""

import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import reward as reward_config
from experiments import agreement, reward
from experiments.settings import check
from jaxalign import rewards, rollout, shard
from jaxalign.data import arithmetic
from jaxalign.objectives.reward import Stepwise, process
from jaxalign.ops import advantages
from jaxalign.types import Batch

WORDS = arithmetic.tokenizer()
COLUMNS = {"prompt": "{prompt}", "steps": " {steps}", "labels": "{labels}"}
TEXTS = {"count": 0, "held_out": 1, "length": 13, "source_length": 0}
ROW = {"prompt": "1 up 2 :", "steps": ["1 up 2 up 3 ;", "3 up 4"], "labels": [1, 0.25]}


def test_the_labels_of_the_world_are_what_counting_gives():
    rows = arithmetic.solutions(400, seed=5)
    for row in rows:
        start, way, _ = row["prompt"].split()
        true = [(int(start) + (k if way == "up" else -k)) % arithmetic.MODULUS for k in range(1, arithmetic.STEPS + 1)]
        right = [int(int(step.split()[0]) == x) for step, x in zip(row["steps"], true, strict=True)]
        assert row["labels"] == right == sorted(right, reverse=True) and row["answer"] == true[-1]
        assert row["outcome"] == [None] * 4 + right[-1:] and row["text"] == " ".join([row["prompt"], *row["steps"]])
        assert WORDS.unk_token_id not in WORDS(row["text"]).input_ids
    assert len({row["prompt"] for row in rows[:16]}) == 2 and 0.25 < np.mean([row["labels"][-1] for row in rows]) < 0.4


def read(folder, rows):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return reward.solutions(WORDS, len(WORDS), source=str(folder / "rows.jsonl"), **COLUMNS, **TEXTS)


def test_a_label_stands_at_the_last_token_of_its_step(tmp_path):
    long = ROW | {"steps": ["1 ;", "1 up 2 up 1 up 1 up 1 up 1 up"]}  # of which the first step is cut away
    train, _ = read(tmp_path, [ROW, ROW | {"labels": [None, 1]}, long, ROW])
    data = reward.data_of(Stepwise, train, len(WORDS), length=13, source_length=0)
    want = np.full((3, 13), np.nan, np.float32)
    want[0, 9], want[:, 12] = 1, (0.25, 1, 0.25)  # behind the 4 tokens of the prompt and 6 of the first step
    np.testing.assert_array_equal(data.label, want)
    assert [np.flatnonzero(weights).tolist() for weights in data.solutions.weights] == [[9, 12], [9, 12], [12]]


@pytest.mark.parametrize(
    "row, says",
    [
        (ROW | {"labels": [1]}, "'labels' is a list of 1: a number from 0 to 1 for each of 2 steps, or null, but not all"),
        (ROW | {"labels": [1, 2]}, "'labels' is a list of 2: a number"),
        (ROW | {"labels": [None, None]}, "'labels' is"),
        (ROW | {"steps": "1 1"}, "'steps' is '1 1', not a list"),
        (ROW | {"steps": ["1 1", ""]}, "2 steps, of which 1 have a token"),
    ],
)
def test_bad_steps_are_refused_by_row(tmp_path, row, says):
    with pytest.raises(ValueError, match=f"rows.jsonl, row 1: {says}"):
        read(tmp_path, [ROW, row])


def test_the_loss_is_the_cross_entropy_of_each_labelled_step(tiny):
    draw = np.random.default_rng(0)
    tokens, ends = draw.integers(0, 14, (2, 6), np.int32), np.float32([[0, 0, 1, 0, 1, 1], [0, 1, 0, 1, 0, 0]])
    label = np.where(ends > 0, draw.uniform(size=(2, 6)), np.nan).astype(np.float32)
    label[0, 4] = np.nan
    batch = Batch(tokens, np.int32([[1] * 6, [1] * 4 + [0] * 2]), ends)
    logits = np.asarray(tiny.model.scalar(tiny.params, tiny.model.read(tiny.params, batch)[0]), np.float64)
    known = np.isfinite(label)
    p, q = label[known], 1 / (1 + np.exp(-logits[known]))
    loss, sums = process(tiny.params, Stepwise(batch, label), model=tiny.model)
    assert sums["weight"] == 4
    np.testing.assert_allclose(loss, -(p * np.log(q) + (1 - p) * np.log(1 - q)).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["reward/accuracy"], np.where(q > 0.5, p, 1 - p).sum(), rtol=1e-5)


def test_a_solution_is_as_good_as_all_its_steps_or_the_worst_or_the_last():
    logits, ends = jnp.array([[9.0, 2.0, -1.0, 9.0, 0.5], [9, 9, 3, 9, 9]]), jnp.array([[0, 1, 1, 0, 1], [0, 0, 1, 0, 0]])
    p = 1 / (1 + np.exp([-2.0, 1.0, -0.5]))
    np.testing.assert_allclose(np.exp(rewards.product_of_steps(logits, ends)), [p.prod(), 1 / (1 + np.exp(-3))], rtol=1e-6)
    assert rewards.worst_step(logits, ends).tolist() == [-1, 3] and rewards.last_step(logits, ends).tolist() == [0.5, 3]

    data = Stepwise(Batch(None, None, np.asarray(ends)[[0, 0, 0, 1]]), np.where(np.asarray(ends)[[0, 0, 0, 1]] > 0, 1.0, np.nan))
    data.label[0, 2] = 0  # the first of three solutions to one prompt is wrong
    found = agreement.of_steps(
        np.stack([np.asarray(logits)[0], [0, 1, 1, 0, 0.1], [0, 1, 0.9, 0, 0.2], logits[1]]), data, [*"aaab"]
    )
    assert found["reward_model/right"] == 0.75 and found["reward_model/best_of_n_any"] == found["reward_model/step_auc"] == 1
    assert (
        found["reward_model/best_of_n_product"] == found["reward_model/best_of_n_worst"] == found["reward_model/step_accuracy"] == 1
    )
    assert found["reward_model/best_of_n_last"] == 0.5  # 0.5 of the wrong one, the most


def test_whatever_steps_have_earned_a_response_is_worth_its_score():
    draw = np.random.default_rng(1)
    weights = jnp.array([[0.0, 1, 1, 0, 1, 1], [0, 1, 1, 1, 0, 0]])
    score, logp, earned = jnp.array([2.0, -1.0]), *(jnp.asarray(draw.normal(size=(2, 6)), jnp.float32) for _ in range(2))
    reward_of = partial(advantages.token_rewards, logp, logp, weights, score, 0.3)
    given = reward_of(earned)
    np.testing.assert_allclose(given.sum(1), score, atol=1e-6)
    np.testing.assert_allclose(given[0, 1:5], earned[0, 1:5] * weights[0, 1:5], atol=1e-6)  # when it was earned
    np.testing.assert_array_equal(reward_of(jnp.zeros((2, 6))), reward_of())
    zeros, batch = jnp.zeros((2, 6)), Batch(jnp.zeros((2, 6), jnp.int32), jnp.ones((2, 6), jnp.int32), weights)
    to_go = rollout.assemble(batch, zeros, zeros, zeros, score, 0.3, earned, lam=1.0, whiten_advantages=False).advantage
    np.testing.assert_allclose(to_go[0, jnp.array([1, 2, 4])], 2 - np.cumsum([0, *earned[0, jnp.array([1, 2])]]), atol=1e-6)


@pytest.mark.slow
def test_a_reward_model_of_steps_comes_out_of_its_config(tmp_path, monkeypatch):
    config = reward_config.get_config("process")
    config.stages.sft.update_from_flattened_dict({"data.count": 64, "data.held_out": 8, "run.steps": 2, "run.batch": 8})
    config.stages.sft.scratch.architecture.update(width=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=32)
    config.update_from_flattened_dict({"data.count": 64, "data.held_out": 16, "run.steps": 3, "run.batch": 8})
    check(config)
    monkeypatch.setattr(shard, "make_mesh", partial(shard.make_mesh, devices=jax.devices()[:1]))
    reward.run(config, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert all(math.isfinite(x) for x in summary.values()) and summary["comparisons/trained"] == 48
    assert 0 < summary["reward_model/step_accuracy"] < 1 and "reward_model/best_of_n_product" in summary
