"""Over-optimisation: laws of what optimises are exact, what is read off them is right, and findings say what the ways show."""

from html import escape

import jax.numpy as jnp
import numpy as np
import pytest

from configs import overoptimization as configs
from experiments import overoptimization, sweep
from experiments import overoptimization_read as read
from experiments.overoptimization_read import Way
from experiments.settings import check
from jaxalign import oracle
from jaxalign.ops import best_of_n, overoptimisation
from jaxalign.train import log

D = np.linspace(0, 2.4, 25)


def ways(b, seeds=3, ends=None):
    """Ways on Gao's law of RL with a = 1 and this b in worlds that differ a little."""
    gold = np.array([np.asarray(overoptimisation.rl(jnp.asarray(D), 1.0, b)) + 0.01 * seed * D for seed in range(seeds)])
    d = np.broadcast_to(D, gold.shape)
    return Way(d**2, gold if ends is None else np.minimum(gold, ends), d, gold)


def found_with(b):
    many = {"PPO": ("proxy", "width 4", "worst of ensemble", "KL at 0.3"), "best-of-n": ("proxy", "width 4", "worst of ensemble")}
    found = {how: dict.fromkeys(many[how], ways(b)) for how in ("best-of-n", "PPO")}
    found["PPO"]["KL at 0.3"] = Way(*(x[:, :9] for x in ways(b)))
    return found


def said_of(found):
    families = {"width": ["width 4", "proxy"]}
    laws = {
        how: {name: read.fitted(*law, found[how][name], D[1:], seed=0, rounds=8) for name in families["width"]}
        for how, law in read.LAWS.items()
    }
    return read.findings(found, laws, families), laws


def test_laws_of_best_of_n_are_those_of_enumeration():
    ref_logp = jnp.log(jnp.array([[[0.2, 0.5, 0.3]], [[0.6, 0.3, 0.1]]]))  # [N,H,S]
    scores = jnp.array([[[1.0, -1.0, 3.0]], [[0.0, 1.0, 2.0]]])
    found = overoptimization.best_of(ref_logp, scores, np.array([1.0, 3.0]))
    for seed in range(2):
        np.testing.assert_allclose(found[seed, 0], ref_logp[seed], atol=1e-6)
        np.testing.assert_allclose(found[seed, 1, 0], oracle.best_of(ref_logp[seed, 0], scores[seed, 0], 3), atol=1e-5)


def test_a_way_is_what_the_laws_have_more_than_the_reference():
    ref_logp = jnp.log(jnp.array([[[0.5, 0.5], [0.75, 0.25]]]))  # of one seed, two prompts
    logp = jnp.stack([ref_logp, jnp.log(jnp.array([[[0.25, 0.75], [0.75, 0.25]]]))], axis=1)
    gold, proxy, judge = (jnp.array([x]) for x in ([[0.0, 4.0], [1.0, 1.0]], [[2.0, 0.0], [5.0, 0.0]], [[0.0, 0.0], [0.0, 9.0]]))
    found = read.way(logp, ref_logp, gold, proxy, judge)
    kl = 0.25 * np.log(0.5) + 0.75 * np.log(1.5)
    for x, want in zip(found, (kl / 2, 0.5, -0.25, 0), strict=True):
        np.testing.assert_allclose(x, [[0, want]], atol=1e-6)


def test_where_one_stops_is_chosen_without_ones_own_gold():
    gold = np.array([[0.0, 5.0, 1.0], [0.0, 1.0, 4.0], [0.0, 1.0, 2.0]])
    found = Way(np.array([[0.0, 1.0, 4.0]] * 3), gold, gold, -gold)
    np.testing.assert_array_equal(read.most(found), [1, 5 - 4, 1])  # places 2, 1, 1
    np.testing.assert_array_equal(read.stopped_by_judge(found), [0, 0, 0])
    np.testing.assert_array_equal(read.at_kl(found, [0.25, 2.25, 9.0]), [2.5, 2.5, 2.0])


@pytest.mark.parametrize("how", read.LAWS)
def test_a_law_is_found_again_and_its_band_says_how_surely(how):
    law, fit = read.LAWS[how]
    each = np.array([np.asarray(law(jnp.asarray(D), a, 0.4)) for a in (0.9, 1.1)])
    both = Way(np.broadcast_to(D**2, each.shape), each, each, each)
    found = read.fitted(law, fit, both, D, seed=0, rounds=50)
    np.testing.assert_allclose([found["a"], found["b"], found["r2"]], [1, 0.4, 1], atol=1e-3)
    np.testing.assert_allclose(found["curve"], each.mean(0), atol=1e-3)
    np.testing.assert_allclose(found["band"], each, atol=1e-3)  # of two seeds the extremes are either alone
    assert overoptimisation.r_squared(jnp.full(4, 1.5), jnp.arange(4.0)) == 0


def test_findings_say_a_turn_over_where_there_is_one_and_none_where_there_is_none():
    turned, laws = said_of(found_with(1.5))
    assert laws["PPO"]["proxy"]["r2"] > 0.999 > laws["best-of-n"]["proxy"]["r2"]
    assert all("less than where the other seeds have most" in turned[k] for k in (0, 1))
    assert any("KL at 0.3" in line and "more than without;" in line and "no different" in line for line in turned)
    assert any("stopped by other seeds' gold" in line and "more than at the end" in line for line in turned)
    assert sum("b is no different (0 ± 0), the most gold no different (0 ± 0)" in line for line in turned) == 2
    rising, _ = said_of(found_with(0.1))
    assert all("no different (0 ± 0) than where the other seeds have most" in rising[k] for k in (0, 1))
    better = found_with(1.5)
    better["PPO"]["proxy"] = ways(0.5)
    assert any("PPO, width" in line and " less, the most gold" in line and " more. (" in line for line in said_of(better)[0])


def test_a_proxy_differs_from_the_first_in_one_thing():
    config = configs.get_config()
    proxies = overoptimization.proxies_of(config)
    assert all(sum(a != b for a, b in zip(x, proxies["proxy"], strict=True)) == (x != proxies["proxy"]) for x in proxies.values())
    assert read.families(config)["comparisons"] == ["comparisons 100", "comparisons 300", "proxy", "comparisons 3000"]
    for variant in configs.VARIANTS:
        config = configs.get_config(variant)
        check(config)
        for stage in config.stages.values():
            sweep.method_of(stage)
    config.varied.width = (6,)
    with pytest.raises(ValueError, match=r"varied.width = .*: it is a tuple of which each is a multiple of 4"):
        check(config)


@pytest.mark.slow
def test_the_laboratory_in_small_turns_over(tmp_path):
    config = configs.get_config("fast")
    overoptimization.run(config, tmp_path)
    summary = log.read_json(tmp_path / "summary.json")
    for name in ("proxy", "comparisons 100", "mean of ensemble"):
        most, end = (summary[f"best-of-n/{name}/{what}"] for what in ("most gold", "gold at the end"))
        assert most > 0.05 and most > end
        kl = summary[f"best-of-n/{name}/KL at the end"]
        assert 2 < kl <= best_of_n.kl(overoptimization.SIZES[-1]) + 1e-3
    assert 0 < summary["PPO/KL at 0.3/KL at the end"] < summary["PPO/proxy/KL at the end"]
    figures = log.read_json(tmp_path / "figures.json")
    assert {len(point) for figure in figures.values() for curve in figure["curves"].values() for point in curve} == {3}
    said = (tmp_path / "findings.txt").read_text()
    assert "best-of-n: at the end" in said and escape(said.splitlines()[0]) in (tmp_path / "report.html").read_text()
