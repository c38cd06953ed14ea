"""Laws of the equations; their numbers are in test_golden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxalign.ops import advantages, divergences, filters, policy, preference, supervised
from jaxalign.ops.masked import masked_mean, masked_sum, masked_variance, whiten

draw = np.random.default_rng(7)
REWARD, VALUE, OTHER = (jnp.asarray(x, jnp.float32) for x in draw.normal(size=(3, 3, 7)))
WEIGHTS = jnp.array([[0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0], [1, 0, 0, 1, 1, 0, 1]], jnp.float32)  # the last has gaps
NAN = jnp.where(WEIGHTS > 0, 0, jnp.nan)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


# --------------------------------------------------------- masked


def test_a_masked_sum_does_not_see_a_nan():
    x, weights = jnp.array([jnp.nan, 1.0, jnp.inf, 3.0]), jnp.array([0.0, 1.0, 0.0, 0.5])
    assert masked_sum(x, weights) == 2.5
    close(masked_mean(x, weights), 2.5 / 1.5)
    assert masked_mean(x, 0 * weights) == 0 and masked_variance(x, 0 * weights) == 0


def test_white_is_mean_0_and_variance_1_whatever_the_units():
    white = whiten(REWARD + NAN, WEIGHTS)
    close(masked_mean(white, WEIGHTS), 0)
    close(masked_variance(white, WEIGHTS), 1, 1e-4)
    close(whiten(5 * REWARD - 3, WEIGHTS), white, 1e-4)
    close(masked_mean(whiten(REWARD, WEIGHTS, shift_mean=False), WEIGHTS), masked_mean(REWARD, WEIGHTS))
    close(masked_variance(whiten(REWARD, WEIGHTS, ddof=1), WEIGHTS, ddof=1), 1, 1e-4)
    assert not np.any(white[WEIGHTS == 0])


def test_what_has_no_spread_whitens_to_0():
    close(whiten(jnp.full((2, 3), 4.0), jnp.ones((2, 3))), 0)
    close(whiten(jnp.ones((1, 3)), jnp.array([[0.0, 1.0, 0.0]]), ddof=1), 0)


# --------------------------------------------------------- advantages


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (0.9, 0.0), (0.8, 1.0)])
def test_advantages_are_discounted_sums_of_td_errors_over_the_tokens_that_count(gamma, lam):
    advantage, target = advantages.gae(REWARD + NAN, VALUE + NAN, WEIGHTS, gamma=gamma, lam=lam)
    for row in range(3):
        on = np.flatnonzero(WEIGHTS[row])
        r, v = np.asarray(REWARD[row, on], np.float64), np.append(VALUE[row, on], 0.0)
        delta = r + gamma * v[1:] - v[:-1]
        want = [sum((gamma * lam) ** k * delta[t + k] for k in range(len(on) - t)) for t in range(len(on))]
        close(advantage[row, on], want)
        close(target[row, on], want + v[:-1])
    assert not np.any(advantage[WEIGHTS == 0]) and not np.any(target[WEIGHTS == 0])


def test_returns_are_sums_of_rewards_to_come():
    returns = advantages.reward_to_go(REWARD, WEIGHTS)
    close(returns[0, 2], REWARD[0, 2:].sum())
    close(returns[2, 0], REWARD[2, jnp.array([0, 3, 4, 6])].sum())
    close(advantages.gae(REWARD, VALUE, WEIGHTS, lam=1.0)[1], returns)  # with lam = 1 the value is regressed on the return


def test_the_last_token_and_the_slot_after_it():
    none = jnp.zeros((1, 7))
    weights = jnp.concatenate([WEIGHTS, none])
    np.testing.assert_array_equal(jnp.argmax(advantages.last_of(weights), 1)[:3], [6, 3, 6])
    np.testing.assert_array_equal(advantages.last_of(weights).sum(1), [1, 1, 1, 0])
    np.testing.assert_array_equal(advantages.slot_after(weights).sum(1), weights.sum(1) + jnp.array([0, 1, 0, 0]))


@pytest.mark.parametrize("after_last", [False, True])
def test_token_rewards_sum_to_the_score_less_the_price_of_kl(after_last):
    score = jnp.array([1.0, -2.0, 3.0])
    reward = advantages.token_rewards(REWARD + NAN, VALUE + NAN, WEIGHTS, score, 0.3, after_last=after_last)
    close(reward.sum(1), score - 0.3 * masked_sum(divergences.k1(REWARD, VALUE), WEIGHTS, 1))


def test_a_response_without_an_end_is_replaced_or_charged():
    score, ended = jnp.array([1.0, 2.0]), jnp.array([True, False])
    np.testing.assert_array_equal(advantages.without_eos(score, ended), score)
    np.testing.assert_array_equal(advantages.without_eos(score, ended, penalty=5.0), [1, -3])
    np.testing.assert_array_equal(advantages.without_eos(score, ended, replace=-1.0), [1, -1])


# --------------------------------------------------------- losses


def test_the_clip_stops_only_what_would_go_further():
    ratio = jnp.array([0.5, 0.9, 1.1, 1.5])
    slope = jax.vmap(jax.grad(policy.clipped_surrogate), (0, None))
    np.testing.assert_array_equal(slope(ratio, 2.0), [-2, -2, -2, 0])
    np.testing.assert_array_equal(slope(ratio, -2.0), [0, 2, 2, 2])
    assert (policy.clipped_surrogate(ratio, 2.0) >= -2 * ratio).all()
    close(policy.clipped_surrogate(jnp.array([1.25, 9.0]), 1.0, clip_high=0.3), [-1.25, -1.3])
    close(policy.clipped_surrogate(jnp.array([9.0, 2.0]), -1.0, dual_clip=3.0), [3, 2])
    close(policy.clipped_surrogate(ratio, 2.0, dual_clip=3.0), policy.clipped_surrogate(ratio, 2.0))


def test_the_value_loss_is_at_least_the_square_and_equals_it_within_the_clip():
    square = 0.5 * (VALUE - OTHER) ** 2
    assert (policy.clipped_value_loss(VALUE, REWARD, OTHER, clip=0.2) >= square - 1e-6).all()
    close(policy.clipped_value_loss(VALUE, VALUE + 0.1, OTHER, clip=0.2), square)


def test_preferences_of_a_pair_sum_to_1():
    a, b, margin = REWARD[0], VALUE[0], OTHER[0]
    one, other = preference.bradley_terry(a, b, margin), preference.bradley_terry(b, a, -margin)
    close(jnp.exp(-one) + jnp.exp(-other), 1)
    close(preference.bradley_terry(a + 7, b + 7), preference.bradley_terry(a, b))
    assert np.isfinite(preference.bradley_terry(jnp.array([-1e4]), jnp.array([1e4]))).all()
    close(preference.centring(a, -a), 0)


def test_smoothing_goes_from_the_target_to_the_uniform():
    logp = jax.nn.log_softmax(REWARD)
    close(supervised.label_smoothed(logp[:, 0], logp.mean(-1), smoothing=0.0), -logp[:, 0])
    close(supervised.label_smoothed(logp[:, 0], logp.mean(-1), smoothing=1.0), -logp.mean(-1))
    close(supervised.z_loss(jax.nn.logsumexp(logp, axis=-1)), 0)


def test_divergences_are_never_negative_and_0_only_of_equals():
    assert (divergences.exact(REWARD, VALUE) > 0).all() and (divergences.k3(REWARD, VALUE) > 0).all()
    close(divergences.exact(REWARD, REWARD + 2.0), 0)
    assert not np.any(divergences.k1(REWARD, REWARD)) and not np.any(divergences.k3(REWARD, REWARD))


def test_gradients_are_those_of_finite_differences():
    with jax.enable_x64(True):
        a, b, c = (jnp.asarray(np.asarray(x), jnp.float64) for x in (REWARD, VALUE, OTHER))
        check = [
            (lambda x: policy.clipped_surrogate(jnp.exp(0.1 * x), b, dual_clip=3.0), a),
            (lambda x: policy.clipped_value_loss(x, b, c), a),
            (lambda x: policy.reinforce(x, b), a),
            (lambda x: preference.bradley_terry(x, b, c), a),
            (lambda x: divergences.exact(x, b), a),
            (lambda x: divergences.k3(x, b), a),
            (lambda x: whiten(x, jnp.asarray(WEIGHTS, jnp.float64)), a),
            (lambda x: advantages.gae(a, x, jnp.asarray(WEIGHTS, jnp.float64))[0], b),
        ]
        for f, x in check:
            check_grads(f, (x,), order=1, modes=["rev"], atol=1e-4, rtol=1e-4)


# --------------------------------------------------------- filters


def test_top_k_keeps_k_and_ties():
    logits = jnp.array([[0.0, 3.0, 1.0, 2.0], [1.0, 1.0, 0.0, 2.0]])
    np.testing.assert_array_equal(jnp.isfinite(filters.top_k(logits, 2)), [[0, 1, 0, 1], [1, 1, 0, 1]])
    for k in (0, 4, 9):
        assert filters.top_k(logits, k) is logits


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p):
    logits = jnp.asarray(draw.normal(0, 2, (20, 9)), jnp.float32)
    kept = np.isfinite(filters.top_p(logits, p))
    probs = np.asarray(jax.nn.softmax(logits))
    for row in range(20):
        inside = np.sort(probs[row][kept[row]])
        assert inside.sum() >= p - 1e-6  # it reaches p,
        assert inside[1:].sum() < p + 1e-6  # not without its least likely token,
        assert inside.min() >= probs[row][~kept[row]].max(initial=0.0)  # and holds the most likely
    assert filters.top_p(logits, 1.0) is logits


@pytest.mark.parametrize("p", [0.0, 1e-9])
def test_top_p_always_keeps_the_most_likely(p):
    logits = jnp.array([[0.0, 3.0, 1.0], [5.0, -1.0, 4.0]])
    np.testing.assert_array_equal(jnp.isfinite(filters.top_p(logits, p)), [[0, 1, 0], [1, 0, 0]])
