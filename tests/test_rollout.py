"""From responses and scores to what an update learns from, against loops a reader can check."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import rollout
from jaxalign.types import Batch

EOS, BETA = 2, 0.3
T, PROMPT = 9, 4  # columns, and those of the left-padded prompts
LENGTHS = np.array([3, 5, 1, 5, 2])  # tokens of each response; 5 fill the row
ENDS = np.array([True, False, True, True, False])  # with EOS
SETTINGS = {
    "default": {},
    "discounted": {"gamma": 0.9, "lam": 0.7, "whiten_advantages": False},
    "returns": {"lam": 1.0, "whiten_advantages": False},
}


def responses(left=0, right=0, pad=0):
    """Prompts of 1 to 4 tokens with an EOS in each, their responses, and so many more columns of padding."""
    draw = np.random.default_rng(0)
    tokens, segments, weights = np.full((5, T), pad, np.int32), np.zeros((5, T), np.int32), np.zeros((5, T), np.float32)
    for r, (length, ends) in enumerate(zip(LENGTHS, ENDS, strict=True)):
        start = PROMPT - (r % PROMPT + 1)
        stop = PROMPT + length
        tokens[r, start:stop] = draw.integers(3, 14, stop - start)
        tokens[r, start] = EOS
        tokens[r, stop - 1] = EOS if ends else 5
        segments[r, start:stop], weights[r, PROMPT:stop] = 1, 1
    wide = [np.pad(x, ((0, 0), (left, right)), constant_values=fill) for x, fill in ((tokens, pad), (segments, 0), (weights, 0))]
    return Batch(*map(jnp.asarray, wide))


def said_of(left=0, right=0):
    """Log-probabilities of policy and reference, and values [B,T]; NaN where no token of a response stands, but for the values."""
    draw = np.random.default_rng(1)
    logp, ref_logp, value = -draw.exponential(1, (5, T)), -draw.exponential(1, (5, T)), draw.normal(0, 1, (5, T))
    here = np.asarray(responses().weights) > 0
    arrays = [np.where(here, logp, np.nan), np.where(here, ref_logp, np.nan), value]
    return [np.pad(x, ((0, 0), (left, right)), constant_values=9.0).astype(np.float32) for x in arrays]


SCORES = np.array([2.0, -1.0, 0.5, 3.0, -2.0], np.float32)


@pytest.fixture(scope="module")
def made():
    """(name of SETTINGS, padding) -> the Rollout, each compiled once."""
    compiled = {name: jax.jit(partial(rollout.assemble, **settings)) for name, settings in SETTINGS.items()}
    return lambda name, left=0, right=0: jax.device_get(
        compiled[name](responses(left, right, pad=EOS), *said_of(left, right), SCORES, jnp.float32(BETA))
    )


def by_loop(row, *, gamma=1.0, lam=0.95, **_):
    """Rewards, advantages that are not whitened, and value targets of one row, in float64. -> [T] each, 0 elsewhere"""
    logp, ref_logp, value = (x[row].astype(float) for x in said_of())
    last = PROMPT + LENGTHS[row] - 1
    steps = list(range(PROMPT, last + 1))
    reward = np.zeros(T)
    reward[steps] = -BETA * (logp[steps] - ref_logp[steps])
    reward[steps[-1]] += SCORES[row]
    advantage = np.zeros(T)
    for t in reversed(steps):
        later = t + 1 in steps
        delta = reward[t] + gamma * (value[t + 1] if later else 0) - value[t]
        advantage[t] = delta + gamma * lam * (advantage[t + 1] if later else 0)
    target = np.zeros(T)
    target[steps] = advantage[steps] + value[steps]
    return reward, advantage, target


@pytest.mark.parametrize("name", SETTINGS)
def test_rewards_sum_to_the_score_less_the_price_of_kl(made, name):
    logp, ref_logp, _ = said_of()
    kl = np.where(np.asarray(responses().weights) > 0, logp - ref_logp, 0).sum(axis=1)
    np.testing.assert_allclose(made(name).reward.sum(axis=1), SCORES - BETA * kl, rtol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_score_lands_once_on_the_last_token(made, name):
    logp, ref_logp, _ = said_of()
    penalty = np.where(np.asarray(responses().weights) > 0, -BETA * (logp - ref_logp), 0)
    last = PROMPT + LENGTHS - 1
    np.testing.assert_allclose(made(name).reward - penalty, SCORES[:, None] * (np.arange(T)[None] == last[:, None]), atol=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_advantages_and_targets_are_those_of_a_loop(made, name):
    found, here = made(name), np.asarray(responses().weights) > 0
    reward, advantage, target = (np.stack(x) for x in zip(*[by_loop(row, **SETTINGS[name]) for row in range(5)], strict=True))
    np.testing.assert_allclose(found.reward, reward, atol=1e-5)
    np.testing.assert_allclose(found.target[here], target[here], atol=1e-5)  # of advantages before they are whitened
    if SETTINGS[name].get("whiten_advantages", True):
        advantage = np.where(here, (advantage - advantage[here].mean()) / advantage[here].std(), 0)
    np.testing.assert_allclose(found.advantage[here], advantage[here], atol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_padding_changes_nothing(made, name):
    entropy = np.random.default_rng(2).exponential(1, (5, T + 5)).astype(np.float32)
    narrow, wide = made(name), made(name, left=2, right=3)
    for field in ("reward", "advantage", "target"):
        x = np.pad(getattr(narrow, field), ((0, 0), (2, 3)))
        np.testing.assert_allclose(getattr(wide, field), x, atol=1e-6)
    describe = jax.jit(rollout.describe, static_argnums=2)
    one, other = describe(narrow, entropy[:, 2:-3], EOS), describe(wide, entropy, EOS)
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_allclose(one[key], other[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_logged_is_what_a_loop_counts(made, name):
    entropy = np.random.default_rng(2).exponential(1, (5, T)).astype(np.float32)
    found = jax.jit(rollout.describe, static_argnums=2)(made(name), entropy, EOS)
    (logp, ref_logp, _), weights = said_of(), np.asarray(responses().weights)
    k1 = k2 = k3 = tokens = surprise = 0.0
    advantages, targets = [], []
    for r in range(5):
        _, advantage, target = by_loop(r, **SETTINGS[name])
        for t in range(T):
            if weights[r, t]:
                gap = float(logp[r, t]) - float(ref_logp[r, t])
                k1, k2, k3 = k1 + gap, k2 + gap**2 / 2, k3 + np.exp(-gap) - 1 + gap
                tokens, surprise = tokens + 1, surprise + entropy[r, t]
                advantages, targets = [*advantages, advantage[t]], [*targets, target[t]]
    wanted = {
        "policy/kl": k1 / 5,
        "policy/kl_k2": k2 / 5,
        "policy/kl_k3": k3 / 5,
        "policy/entropy": surprise / tokens,
        "policy/length": LENGTHS.mean(),
        "policy/eos_rate": ENDS.mean(),
        "reward/score": SCORES.mean(),
        "reward/score_std": SCORES.std(),
        "reward/total": SCORES.mean() - BETA * k1 / 5,
        "value/explained": 1 - np.var(advantages) / np.var(targets),
        "advantage/std": np.std(advantages),
    }
    assert found.keys() == wanted.keys()
    for key in wanted:
        assert float(found[key]) == pytest.approx(wanted[key], rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("pad", [0, EOS])
def test_a_response_has_ended_where_its_own_last_token_is_eos(pad):
    batch = responses(left=1, right=2, pad=pad)
    assert rollout.ended(batch, EOS).tolist() == ENDS.tolist()
    none = batch.replace(weights=0 * batch.weights)
    assert rollout.ended(none, EOS).tolist() == [0] * 5  # the EOS of a prompt ends nothing


def test_a_policy_that_is_its_reference_has_no_kl_at_all(tiny):
    said = jax.jit(partial(rollout.said, tiny.model, temperature=0.7))
    batch = responses()
    logp, entropy, value = said(tiny.params, batch)
    ref_logp, _, _ = said(jax.tree.map(jnp.copy, tiny.params), batch)
    here = np.asarray(batch.weights) > 0
    assert (np.asarray(logp)[here] < -0.05).all() and (np.asarray(entropy)[here] > 0.05).all() and np.asarray(value)[here].std() > 0
    data = rollout.assemble(batch, logp, ref_logp, value, jnp.asarray(SCORES), BETA)
    found = rollout.describe(data, entropy, EOS)
    assert [float(found[key]) for key in ("policy/kl", "policy/kl_k2", "policy/kl_k3")] == [0, 0, 0]
    np.testing.assert_array_equal(data.reward.sum(axis=1), SCORES)
