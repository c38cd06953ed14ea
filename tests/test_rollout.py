"""From responses and scores to what an update learns from, against loops a reader can check."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import rollout, shard
from jaxalign.models import decoder
from jaxalign.ops import advantages
from jaxalign.sample import sample
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
        "reward/abstained": 0.0,
        "value/explained": 1 - np.var(advantages) / np.var(targets),
        "advantage/std": np.std(advantages),
    }
    assert found.keys() == wanted.keys()
    for key in wanted:
        assert float(found[key]) == pytest.approx(wanted[key], rel=1e-4, abs=1e-5), key


def test_a_response_without_a_score_is_as_if_it_were_not_there():
    scores = np.where(np.arange(5) == 1, np.nan, SCORES)
    assemble, describe = jax.jit(rollout.assemble), jax.jit(rollout.describe, static_argnums=2)
    entropy = np.ones((5, T), np.float32)
    found = assemble(responses(), *said_of(), scores, jnp.float32(BETA))
    rest = np.arange(5) != 1
    fewer = assemble(jax.tree.map(lambda x: x[rest], responses()), *[x[rest] for x in said_of()], SCORES[rest], jnp.float32(BETA))
    for name in ("reward", "advantage", "target", "score"):
        np.testing.assert_allclose(getattr(found, name)[rest], getattr(fewer, name), atol=1e-6)
        assert not np.asarray(getattr(found, name)[1]).any()
    assert not np.asarray(found.batch.targets[1]).any()
    told, of_fewer = describe(found, entropy, EOS), describe(fewer, entropy[rest], EOS)
    assert told.pop("reward/abstained") == pytest.approx(0.2) and of_fewer.pop("reward/abstained") == 0
    for name in told:
        assert float(told[name]) == pytest.approx(float(of_fewer[name]), rel=1e-5, abs=1e-6), name
    none = describe(assemble(responses(), *said_of(), np.full(5, np.nan), jnp.float32(BETA)), entropy, EOS)
    assert none["reward/abstained"] == 1 and all(np.isfinite(x) for x in none.values())


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


# --------------------------------------------------------- groups, of two: the fifth response of the file is left out

GROUP, FOUR = 2, slice(0, 4)
ESTIMATORS = {f.__name__: f for f in (advantages.rloo, advantages.dr_grpo, advantages.grpo)}


def four(x):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[FOUR], x)


def grouped(scores=SCORES, beta=BETA, **settings):
    assemble = jax.jit(partial(rollout.assemble_groups, group=GROUP, **settings))
    return assemble(four(responses()), *four(said_of()), jnp.asarray(scores[FOUR]), jnp.float32(beta))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_samples_of_a_prompt_are_compared_by_their_scores_less_the_price_of_kl(name):
    found = grouped(estimator=ESTIMATORS[name])
    logp, ref_logp, _ = said_of()
    here = np.asarray(responses().weights) > 0
    net = (SCORES - BETA * np.where(here, logp - ref_logp, 0).sum(axis=1))[FOUR]
    for i, r in enumerate(net):
        pair = net[i - i % 2 : i - i % 2 + 2]
        wanted = {
            "rloo": r - pair[1 - i % 2],
            "dr_grpo": r - pair.mean(),
            "grpo": (r - pair.mean()) / (pair.std(ddof=1) + 1e-4),
        }[name]
        np.testing.assert_allclose(found.advantage[i], np.where(here[i], wanted, 0), rtol=1e-4)
    np.testing.assert_allclose(found.reward.sum(axis=1), net, rtol=1e-5)
    np.testing.assert_array_equal(found.score, SCORES[FOUR])
    shift = np.where(here[FOUR], found.target - found.value, 0)
    np.testing.assert_allclose(shift, found.advantage, atol=1e-6)


def test_long_responses_are_penalised_and_not_in_the_score():
    plain, ramped = grouped(), grouped(longest=5, overlong=4)
    penalty = -np.array([2, 4, 0, 4]) / 4  # of 3, 5, 1 and 5 tokens, where more than 1 costs
    np.testing.assert_allclose(ramped.reward.sum(1) - plain.reward.sum(1), penalty, atol=1e-6)
    np.testing.assert_array_equal(ramped.score, plain.score)


def test_a_sample_without_a_score_is_in_no_baseline_also_when_it_is_used_again():
    scores = np.array([np.nan, 1.0, 4.0, 2.0, 0.0], np.float32)
    found = grouped(scores, 0.0)
    assert not np.asarray(found.advantage[:2]).any() and not np.asarray(found.batch.targets[0]).any()
    assert np.asarray(found.batch.targets[1]).any()
    assemble = jax.jit(partial(rollout.assemble_groups, group=GROUP))
    again = assemble(found.batch, *four(said_of()), found.score, jnp.float32(0))  # the score of what abstained is kept as 0
    np.testing.assert_array_equal(again.advantage, found.advantage)
    plain = jax.jit(rollout.assemble)
    first = plain(responses(), *said_of(), scores, jnp.float32(BETA))
    second = plain(first.batch, *said_of(), first.score, jnp.float32(BETA))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_groups_that_teach_nothing_lose_their_weight_and_are_counted():
    entropy = jnp.ones((4, T))
    for scores, equal in (([1, 1, 0, 1], [True, False]), ([1, np.nan, 3, 3], [True, True]), ([0, 2, 1, 0], [False, False])):
        data = grouped(np.array([*scores, 0], np.float32))
        kept = jax.jit(rollout.without_equals, static_argnums=1)(data, GROUP)
        weights = np.asarray(data.batch.weights) * ~np.repeat(equal, 2)[:, None]
        np.testing.assert_array_equal(kept.batch.weights, weights)
        told = jax.jit(rollout.describe, static_argnums=(2, 3))(data, entropy, EOS, GROUP)
        assert float(told["reward/equal"]) == np.mean(equal)
    assert "reward/equal" not in jax.jit(rollout.describe, static_argnums=2)(data, entropy, EOS)


def test_of_each_group_the_best_is_chosen_and_the_worst_rejected():
    scores = np.array([3, 5, np.nan, 1, 2, 1, 0, 0], np.float32)
    rows = np.array([0, 1, 2, 3, 1, 0, 3, 4])
    data = jax.jit(partial(rollout.assemble_groups, group=4))(
        *jax.tree.map(lambda x: jnp.asarray(x)[rows], (responses(), *said_of())), scores, jnp.float32(0)
    )
    pairs = jax.jit(rollout.best_and_worst, static_argnums=1)(data, 4)
    np.testing.assert_array_equal(pairs.chosen.tokens, np.asarray(data.batch.tokens)[[1, 4]])
    np.testing.assert_array_equal(pairs.rejected.tokens, np.asarray(data.batch.tokens)[[3, 6]])
    _, ref_logp, _ = said_of()
    totals = np.where(np.asarray(responses().weights) > 0, ref_logp, 0).sum(axis=1)[rows]
    np.testing.assert_allclose(pairs.ref_chosen, totals[[1, 4]], rtol=1e-5)
    np.testing.assert_allclose(pairs.ref_rejected, totals[[3, 6]], rtol=1e-5)
    none = jax.jit(rollout.best_and_worst, static_argnums=1)(data.replace(score=0 * data.score), 4)
    assert not np.asarray(none.chosen.weights).any() and not np.asarray(none.rejected.weights).any()


def test_importance_weights_are_capped_and_1_for_what_the_policy_itself_drew():
    data = grouped()
    drawn = jnp.where(data.batch.targets > 0, data.logp, jnp.nan)
    np.testing.assert_array_equal(rollout.corrected(data, drawn, cap=2.0).advantage, data.advantage)
    for less, weight in ((0.5, np.exp(0.5)), (-0.5, np.exp(-0.5)), (3.0, 2.0)):
        found = rollout.corrected(data, drawn - less, cap=2.0)
        np.testing.assert_allclose(found.advantage, weight * data.advantage, rtol=1e-5)
        np.testing.assert_array_equal(found.target, data.target)


# --------------------------------------------------------- a critic of its own


@pytest.fixture(scope="module")
def two(tiny):
    """A policy without a head, and a critic that is another model; their parameters beside each other."""
    policy = decoder.build(replace(tiny.config, scalar=None))
    other = decoder.build(replace(tiny.config, width=16))
    shapes = shard.unbox(jax.eval_shape(other.init, jax.random.key(0)))
    draw = np.random.default_rng(5)
    critic = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(0, 0.6, leaf.shape), leaf.dtype), shapes)
    own = {name: leaf for name, leaf in tiny.params.items() if name != "scalar"}
    return policy, other, rollout.with_critic(policy, other), {"policy": own, "critic": critic}


def test_a_critic_of_its_own_gives_the_values_and_nothing_else(two):
    policy, critic, both, params = two
    batch = responses()
    logp, entropy, value = jax.jit(partial(rollout.said, both, temperature=0.7))(params, batch)
    want_logp, want_entropy, none = jax.jit(partial(rollout.said, policy, temperature=0.7))(params["policy"], batch)
    _, _, want_value = jax.jit(partial(rollout.said, critic, temperature=0.7))(params["critic"], batch)
    for found, wanted in ((logp, want_logp), (entropy, want_entropy), (value, want_value)):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert not np.asarray(none).any() and np.asarray(want_value).std() > 0

    def value_loss(params):
        return (rollout.said(both, params, batch, temperature=1.0)[2] ** 2).sum()

    slopes = jax.jit(jax.grad(value_loss))(params)
    assert not any(np.any(x) for x in jax.tree.leaves(slopes["policy"]))
    assert any(np.any(x) for x in jax.tree.leaves(slopes["critic"]))
    shapes = jax.tree.map(lambda x: x.shape, shard.unbox(jax.eval_shape(both.init, jax.random.key(0))))
    assert shapes == jax.tree.map(lambda x: x.shape, params)


def test_a_policy_decodes_as_it_does_without_its_critic(two):
    policy, _, both, params = two
    tokens = jnp.array([[0, 3, 4], [5, 6, 7]])
    prompts = Batch(tokens, (tokens > 0).astype(jnp.int32), jnp.zeros((2, 3)))
    keys = jax.random.split(jax.random.key(1), 2)
    drawn = [
        jax.jit(partial(sample, model, length=5, eos=EOS))(its, keys, prompts)
        for model, its in ((both, params), (policy, params["policy"]))
    ]
    jax.tree.map(np.testing.assert_array_equal, *drawn)
