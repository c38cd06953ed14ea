"""The tiny world is what it says, and a program over many settings is the same as one for each."""

import json
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import hypergradient as hypergradient_config
from configs import sweep as sweep_config
from experiments import hypergradient, sweep, tiny_world
from experiments.settings import check
from jaxalign import score
from jaxalign.objectives import distill, online, preference, reward, supervised
from jaxalign.ops.masked import masked_sum
from jaxalign.types import Batch


@pytest.fixture(scope="module")
def world():
    return jax.tree.map(lambda x: x[0], tiny_world.of_seeds([3, 4], temperature=0.7, beta=0.5))


def small(variant, **sections):
    config = sweep_config.get_config(variant)
    config.run.update(updates=8 if variant in sweep_config.ONLINE else 4, looks=1)
    config.sweep.seed = (3, 4)
    for name, settings in sections.items():
        config[name].update(settings)
    check(config)
    return config


def test_the_reference_is_a_law_whose_gold_has_mean_0_and_std_1(world):
    p = np.exp(world.ref_logp)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose((p * world.gold).sum(1).mean(), 0, atol=1e-5)
    np.testing.assert_allclose((p * np.square(world.gold)).sum(1).mean(), 1, atol=1e-5)


def test_no_held_out_prompt_has_a_word_that_training_has_not(world):
    trained = np.array(tiny_world.PROMPTS[: -tiny_world.HELD_OUT])
    assert all(set(trained[:, place]) == set(tiny_world.WORDS) for place in (0, 1))
    numbers = tiny_world.examples(world, jnp.arange(500), 1).prompts
    assert set(np.asarray(numbers)) == set(range(len(trained)))


def test_gold_of_a_sampled_row_is_that_of_its_response(world):
    prompts, responses = jnp.array([0, 7, 35]), jnp.array([0, 100, 258])
    np.testing.assert_array_equal(tiny_world.reward_of(world, tiny_world.rows(prompts, responses)), world.gold[prompts, responses])


def test_the_teacher_says_the_demonstrators_law_token_by_token(world):
    """The product of its probabilities along a response is the response's."""
    found = tiny_world.taught(world, world.ref, jnp.arange(64))
    of_token = jnp.where(found.ids == found.batch.tokens[..., None], found.logp, 0).sum(-1)
    examples = tiny_world.examples(world, jnp.arange(64), 1, world.best_logp)
    wanted = world.best_logp[examples.prompts, examples.responses[:, 0]]
    np.testing.assert_allclose(masked_sum(of_token, found.batch.targets, 1), wanted, atol=1e-4)


def test_annotators_agree_with_gold_as_bradley_and_terry_have_it(world):
    found = tiny_world.examples(world, jnp.arange(20000), 2)
    gold = world.gold[found.prompts[:, None], found.responses]
    p = jax.nn.sigmoid((gold[:, 0] - gold[:, 1]) / world.temperature)
    first = found.opinions[:, 0, 0] > found.opinions[:, 0, 1]
    np.testing.assert_allclose((first - p).mean(), 0, atol=0.012)  # 3.5 standard errors
    np.testing.assert_allclose(first[p > 0.8].mean(), p[p > 0.8].mean(), atol=0.02)


def test_a_judge_that_is_gold_has_the_best_policy_at_its_kl(world):
    """The frontier is what no policy is above: the best one is on it, the judged one below."""
    best = tiny_world.frontier(world, sweep.BETAS)
    untrained = tiny_world.of_judge(world, world.ref)
    demonstrators = tiny_world._outcome(world, world.best_logp[-tiny_world.HELD_OUT :])
    np.testing.assert_allclose(untrained["kl/held_out"], 0, atol=1e-5)  # it scores all alike
    assert untrained["judge/accuracy"] == 0.5
    at = np.interp(demonstrators["kl/held_out"], best["kl/held_out"][::-1], best["gold/held_out"][::-1])
    np.testing.assert_allclose(demonstrators["gold/held_out"], at, rtol=0.01)


@pytest.mark.slow
def test_settings_learn_as_if_each_were_alone():
    """Seeds, learning rates and a number of the objective at once."""
    config = small("ipo", sweep={"learning_rate": (1e-3, 3e-3), "beta": (0.1, 0.5)})
    settings, found = sweep.sweep(config)
    assert len(settings) == 8 and settings[5] == {"seed": 4, "learning_rate": 1e-3, "beta": 0.5}
    alone = small("ipo", optim={"learning_rate": 1e-3}, objective={"beta": 0.5})
    for name, x in sweep.sweep(alone)[1].items():
        if name != "reward/accuracy":  # before anything is learnt all rewards are equal, but for rounding
            np.testing.assert_allclose(found[name][5], x[1], rtol=2e-3, atol=2e-4, err_msg=name)
    assert len({round(float(x), 4) for x in found["gold/held_out"][:, -1]}) == 8


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["forward_kl", "classify", "kto", "remax", "ppo_ptx", "online_dpo"])
def test_every_kind_of_method_raises_gold(variant):
    """One of each kind of data; two seeds, one program."""
    config = sweep_config.get_config(variant)
    config.run.update(updates=96, looks=2)
    config.sweep.seed = (0, 1)
    gold = sweep.sweep(config)[1]["gold/held_out"]
    assert (gold[:, -1] > gold[:, 0] + 0.1).all()


def test_configs_have_every_objective_and_all_of_its_numbers():
    for module in (supervised, distill, preference, reward):
        name = module.__name__.rpartition(".")[2]
        known = {f"{name}.{found}" for found in sweep.named.objectives(module)}
        assert known - {"reward.process"} == {method for method in sweep_config.OFFLINE if method.startswith(f"{name}.")}
    assert sweep_config.ONLINE.keys() >= {name for name in sweep.named.objectives(online) if name != "mixed"}
    for variant in sweep_config.VARIANTS:
        config = sweep_config.get_config(variant)
        check(config)
        sweep.method_of(config)


@pytest.mark.slow
def test_an_objective_of_ones_own_leaves_what_a_run_leaves(tmp_path):
    pytest.importorskip("matplotlib")

    def likely(params, data: Batch, *, model, power: float):
        said, _ = score.evaluate(model, params, data)
        return -masked_sum(jnp.exp(said.logp) ** power, data.targets), {"weight": data.targets.sum()}

    config = small("sft")
    config.objective = {"power": 0.5}
    sweep.run(config, tmp_path, objective=likely)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 4, 0, 4] and {"gold/held_out", "kl/held_out"} <= lines[0].keys()
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert json.loads((tmp_path / "summary.json").read_text())["supervised.sft"]["gold/share"] <= 1


def test_what_cannot_be_swept_is_said():
    config = small("reinforce")
    config.run.baseline = "learned"
    config.sweep.value_weight = (0.1, 0.5)
    with pytest.raises(ValueError, match="value_weight.* chooses code"):
        sweep.sweep(config)
    config = small("dpo")
    config.sweep.beta = (0.1, -1.0)
    with pytest.raises(ValueError, match=r"sweep.beta = -1.0: it is a number above 0"):
        check(config)
    config.method = "preference.dpoo"
    with pytest.raises(ValueError, match="dpoo"):
        sweep.method_of(config)


@pytest.mark.slow
def test_the_slope_through_training_is_that_of_differences(world):
    """Forward mode, reverse mode and central differences agree about beta after 4 updates of DPO."""
    config = hypergradient_config.get_config()
    config.run.updates = 4
    gold = partial(hypergradient.held_out_gold, world=world, config=config, method=sweep.method_of(config))
    at, by = jnp.float32(np.log(0.3)), 0.1
    value, forward = jax.jit(lambda x: jax.jvp(gold, (x,), (jnp.float32(1),)))(at)
    reverse = jax.jit(jax.grad(gold))(at)
    several = jax.jit(jax.vmap(gold))(at + by * jnp.array([-1.0, 0.0, 1.0]))
    np.testing.assert_allclose(several[1], value, rtol=1e-3)
    assert abs(forward) > 1e-3
    np.testing.assert_allclose(forward, reverse, rtol=1e-2)
    np.testing.assert_allclose(forward, (several[2] - several[0]) / (2 * by), rtol=0.1)


def test_the_page_of_objectives_has_all_of_them():
    page = (Path(__file__).parents[1] / "OBJECTIVES.md").read_text()
    for variant in sweep_config.VARIANTS:
        assert f"sweep.py:{variant}`" in page and f"docs/objectives/{variant}.png" in page, variant
    for figure in re.findall(r"\]\((docs/.*?)\)", page):
        assert (Path(__file__).parents[1] / figure).exists(), figure
