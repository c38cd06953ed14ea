"""Every algorithm on samples of its own, from its config to what it leaves: small runs on the same stages."""

import importlib
import json
import math
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import compare, grpo, launch, online_dpo, ppo, ppo_ptx, reinforce, reward, sft
from jaxalign import shard
from jaxalign.models import checkpoints
from jaxalign.objectives import online
from jaxalign.train import log

pytestmark = pytest.mark.slow

STAGES = ("sft", "compare", "reward")
RUNS = {  # the config's file, the algorithm, what is changed
    "grpo": ("grpo", grpo.of_groups(online.grpo), {}),
    "dr_grpo": (
        *("grpo", grpo.of_groups(online.grpo)),
        {"advantage.estimator": "dr_grpo", "objective.aggregation": "seq_sum_const", "objective.kl": "k2"},
    ),
    "dapo": (
        *("grpo", grpo.of_groups(online.grpo)),
        {"advantage.overlong": 4, "objective.aggregation": "token_mean", "run.dynamic_sampling": True},
    ),
    "exact_kl": ("grpo", grpo.of_groups(online.grpo), {"objective.kl": "exact"}),
    "gspo": ("gspo", grpo.of_groups(online.gspo), {}),
    "cispo": ("cispo", grpo.of_groups(online.cispo), {}),
    "rloo": ("rloo", grpo.of_groups(online.rloo), {}),
    **{
        f"reinforce_{baseline}": ("reinforce", reinforce.REINFORCE, {"run.baseline": baseline})
        for baseline in ("none", "mean", "leave_one_out", "greedy", "learned")
    },
    "online_dpo": ("online_dpo", online_dpo.ONLINE_DPO, {}),
    "ppo_ptx": ("ppo_ptx", ppo_ptx.PPO_PTX, {}),
    "own_critic": ("ppo", ppo.PPO, {"run.critic": "own"}),
    "reuse": ("ppo", ppo.PPO, {"run.reuse": 2}),
}


def settings(name):
    config = importlib.import_module(f"configs.{RUNS[name][0]}").get_config("tiny")
    config.optim.learning_rate = 0.02  # so that two iterations change what is said
    config.evaluate.every = 0
    config.stages.sft.scratch.architecture.kv_heads = 2  # so that heads divide over the mesh of eight devices
    config.update_from_flattened_dict(RUNS[name][2])
    return config


@pytest.fixture(scope="session")
def stages(once) -> Path:
    """A folder of the stages that all these runs have in common."""
    with once("online-stages") as (folder, made):
        if not made:
            runs = {"sft": sft.run, "compare": compare.run, "reward": reward.run}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(shard, "make_mesh", partial(shard.make_mesh, devices=jax.devices()[:1]))
                launch.Stages(folder, settings("grpo").stages, runs).path("stage:reward")
    return folder


def run(name, stages, folder, devices=1, **changed):
    for stage in STAGES:
        if not (folder / stage).exists():
            shutil.copytree(stages / stage, folder / stage)
    config = settings(name)
    config.update_from_flattened_dict(changed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "make_mesh", partial(shard.make_mesh, devices=jax.devices()[:devices]))
        ppo.run(config, folder, algorithm=RUNS[name][1])
    return folder


def metrics_of(folder):
    return [{k: x for k, x in line.items() if not k.startswith("time/")} for line in log.read_lines(folder / "metrics.jsonl")]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_begins_at_its_reference_and_leaves_a_model(name, stages, tmp_path):
    folder = run(name, stages, tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    assert all(math.isfinite(x) for x in summary.values()) and summary["proxy/before"] != summary["proxy/after"]
    first, *lines = metrics_of(folder)
    assert all(x is not None and math.isfinite(x) for line in (first, *lines) for x in line.values())
    assert len(lines) + 1 == settings(name).run.iterations * ppo.updates_of(settings(name).run)
    assert first["policy/kl"] == 0 and lines[-1]["train/skipped"] == 0
    if "policy/ratio" in first:
        assert first["policy/ratio"] == pytest.approx(1, abs=1e-6) and lines[0]["policy/ratio"] != 1
        assert first["policy/approx_kl"] < 1e-12 and first["policy/clipped"] == 0
    config, left = checkpoints.load(folder)
    assert config.scalar is None and "scalar" not in left
    _, before = checkpoints.load(folder / "sft")
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, left)
    assert min(jax.tree.leaves(moved["layers"])) > 0


def test_samples_of_a_prompt_stand_together_and_differ(stages, tmp_path, monkeypatch):
    asked, answered = [], []
    respond = ppo.respond

    def watched(job, params, documents, numbers, role, step, group=1):
        batch, scores, logp = respond(job, params, documents, numbers, role, step)
        if role == "sample":
            asked.append(np.asarray(numbers).reshape(-1, 4))
            answered.append(np.asarray(batch.tokens))
        return batch, scores, logp

    monkeypatch.setattr(ppo, "respond", watched)
    run("grpo", stages, tmp_path)
    assert all((numbers == numbers[:, :1]).all() and len(set(numbers[:, 0])) == 4 for numbers in asked)
    assert set(asked[0][:, 0]).isdisjoint(asked[1][:, 0])
    assert all(len({tuple(row) for row in tokens}) == 16 for tokens in answered)


def test_responses_that_are_used_again_are_scored_by_the_policy_as_it_is_then(stages, tmp_path):
    lines = [line for line in metrics_of(run("reuse", stages, tmp_path)) if "policy/kl" in line]
    first, again = lines
    assert again["reward/score"] == first["reward/score"] and again["policy/length"] == first["policy/length"]
    assert again["policy/kl"] != first["policy/kl"] == 0 and again["policy/entropy"] != first["policy/entropy"]


@pytest.mark.parametrize("name", ["grpo", "own_critic"])
def test_what_the_sampler_said_is_what_the_policy_says_but_for_rounding(name, stages, tmp_path):
    """So a run that does not score its responses again learns the same, in the same groups, which micro-batches divide."""
    changed = {"run.iterations": 1} | ({"run.accumulate": 2} if name == "grpo" else {})
    again, once = (run(name, stages, tmp_path / str(n), **changed | {"run.rescore": n == 0}) for n in (0, 1))
    for one, other in zip(metrics_of(again), metrics_of(once), strict=True):
        assert other == pytest.approx({k: one[k] for k in other}, rel=1e-3, abs=1e-4)


def test_a_critic_of_its_own_starts_as_the_reward_model(stages, tmp_path, monkeypatch):
    began, prepare = {}, ppo.prepare

    def watched(*args):
        job, state = prepare(*args)
        began.update(jax.device_get(state.params))
        return job, state

    monkeypatch.setattr(ppo, "prepare", watched)
    run("own_critic", stages, tmp_path)
    _, judge = checkpoints.load(stages / "reward")
    jax.tree.map(np.testing.assert_array_equal, began["critic"], judge)
    _, reference = checkpoints.load(stages / "sft")
    jax.tree.map(np.testing.assert_array_equal, began["policy"], reference)


def test_grpo_that_was_stopped_within_an_epoch_ends_as_if_it_was_not(stages, tmp_path, monkeypatch):
    """Also where the responses are those of an iteration before."""
    whole, stopped = (run("grpo", stages, tmp_path / "whole", **{"run.reuse": 2}), tmp_path / "stopped")
    step = ppo.step

    def told_to_stop(job, state, i):
        if i == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(job, state, i)

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "step", told_to_stop)
        with pytest.raises(SystemExit) as ended:
            run("grpo", stages, stopped, **{"run.reuse": 2})
    assert ended.value.code == 143 and metrics_of(stopped)[-1]["step"] == 12
    run("grpo", stages, stopped, **{"run.reuse": 2})
    assert metrics_of(stopped) == metrics_of(whole)
    models = [(folder / "model" / "model.safetensors").read_bytes() for folder in (whole, stopped)]
    assert models[0] == models[1]


@pytest.mark.parametrize("name", ["grpo", "own_critic"])
def test_eight_devices_are_one(name, stages, tmp_path):
    """Groups and minibatches of a half are split over four devices, parameters over two."""
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    one, eight = run(name, stages, tmp_path / "one"), run(name, stages, tmp_path / "eight", devices=8, **mesh)
    for here, there in zip(metrics_of(one), metrics_of(eight), strict=True):
        assert here == pytest.approx(there, rel=1e-3, abs=1e-3)
