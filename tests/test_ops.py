"""Laws of the equations; their numbers are in test_golden. Those of pairs are in test_preference."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxalign.ops import (
    advantages,
    aggregate,
    best_of_n,
    calibration,
    divergences,
    filters,
    overoptimisation,
    policy,
    preference,
    supervised,
    truthfulness,
)
from jaxalign.ops.chunks import by_chunk
from jaxalign.ops.masked import masked_mean, masked_sum, masked_variance, whiten
from jaxalign.ops.vote import Vote, vote

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


# --------------------------------------------------------- groups

SCORES = jnp.array([1.0, 0.0, 0.5, 2.0, 0.1, 0.1, 0.1, 0.1, -1.0, jnp.nan, 3.0, jnp.nan, jnp.nan, 7.0, jnp.nan, jnp.nan])
GROUPED = {
    "dr_grpo": advantages.dr_grpo,
    "rloo": advantages.rloo,
    "grpo": partial(advantages.grpo, eps=1e-9),
    "grpo_over_batch": advantages.grpo_over_batch,
}


@pytest.mark.parametrize("name", GROUPED)
def test_a_group_is_compared_with_itself_alone(name):
    """Sums are 0 in each group; missing scores and groups without a difference give exactly 0; no score enters another group."""
    advantage = jax.jit(GROUPED[name], static_argnums=1)(SCORES, 4).reshape(4, 4)
    assert np.isfinite(advantage).all()
    close(advantage.sum(1), 0)
    assert not advantage[1].any() and not advantage[3].any()  # 0.1 four times, of which float32 has no exact mean; and one alone
    assert not advantage[2, 1] and not advantage[2, 3] and advantage[2, 0] < 0 < advantage[2, 2]
    if name != "grpo_over_batch":
        other = SCORES.at[8].set(50.0)
        close(GROUPED[name](other, 4)[:8], advantage.ravel()[:8])


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("group", [1, 3])
def test_what_makes_no_group_is_refused(name, group):
    with pytest.raises(ValueError, match=f"16 scores do not make groups of {group}"):
        GROUPED[name](SCORES, group)


def test_leave_one_out_is_what_its_name_says():
    got = advantages.rloo(SCORES[:4], 4)
    close(got, [SCORES[i] - jnp.delete(SCORES[:4], i).mean() for i in range(4)])
    close(advantages.rloo(SCORES[8:12], 4), [-4, 0, 4, 0])  # of the two that are given
    close(advantages.dr_grpo(SCORES[:4], 4), SCORES[:4] - SCORES[:4].mean())


@pytest.mark.parametrize("ddof", [0, 1])
def test_a_groups_advantages_have_no_units(ddof):
    score = SCORES.at[4:].set(jnp.nan)
    advantage = advantages.grpo(score, 4, eps=0.0, ddof=ddof)
    close(jnp.std(advantage[:4], ddof=ddof), 1)
    close(advantages.grpo(10 * score - 3, 4, eps=0.0, ddof=ddof), advantage)


def test_only_groups_with_a_difference_teach():
    np.testing.assert_array_equal(advantages.dynamic_sampling(SCORES, 4), [True, False, True, False])


MODES = {
    "token_mean": aggregate.token_mean,
    "seq_mean_token_mean": aggregate.seq_mean_token_mean,
    "seq_mean_token_sum": aggregate.seq_mean_token_sum,
    "seq_sum_const": partial(aggregate.seq_sum_const, length=7),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_mean_over_responses_adds_up_over_parts_of_a_batch(mode):
    weights = jnp.concatenate([WEIGHTS, jnp.zeros((1, 7))])
    x = jnp.concatenate([REWARD + NAN, jnp.full((1, 7), jnp.nan)])

    def total(x, weights):
        how, n = MODES[mode](weights)
        return masked_sum(x, how), n

    whole, parts = total(x, weights), [total(x[rows], weights[rows]) for rows in (slice(0, 1), slice(1, 4))]
    close(jax.tree.map(jnp.add, *parts), whole)
    per_row = [np.asarray(x[r])[np.asarray(weights[r]) > 0] for r in range(3)]
    want = {
        "token_mean": np.concatenate(per_row).mean(),
        "seq_mean_token_mean": np.mean([row.mean() for row in per_row]),
        "seq_mean_token_sum": np.mean([row.sum() for row in per_row]),
        "seq_sum_const": np.mean([row.sum() / 7 for row in per_row]),
    }
    close(whole[0] / whole[1], want[mode])
    assert total(x, 0 * weights) == (0, 0)


# --------------------------------------------------------- losses


def test_ratios_of_whole_responses():
    assert policy.sequence_ratio(REWARD, REWARD, WEIGHTS).tolist() == [[1], [1], [1]]
    close(policy.sequence_ratio(REWARD + 0.1, REWARD + NAN, WEIGHTS)[:, 0], jnp.exp(0.1 * WEIGHTS.sum(1)))
    close(policy.gspo_ratio(REWARD + 0.1, REWARD + NAN, WEIGHTS), jnp.exp(jnp.full((3, 1), 0.1)))
    assert np.isfinite(policy.sequence_ratio(REWARD + 1e4, REWARD, WEIGHTS)).all()


def test_cispo_learns_from_every_token_with_a_weight_that_is_clipped():
    logp = jnp.array([-1.0, -1.0, -1.0])
    ratio = jnp.array([0.1, 1.0, 9.0])
    slope = jax.grad(lambda x: policy.cispo(x, jnp.exp(x - jax.lax.stop_gradient(x)) * ratio, 2.0, clip_high=0.5).sum())(logp)
    close(slope, [-0.2, -2.0, -3.0])
    close(policy.cispo(logp, ratio, 2.0, clip_low=0.2, clip_high=0.5), [1.6, 2.0, 3.0])


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


def test_smoothing_goes_from_the_target_to_the_uniform():
    logp = jax.nn.log_softmax(REWARD)
    close(supervised.label_smoothed(logp[:, 0], logp.mean(-1), smoothing=0.0), -logp[:, 0])
    close(supervised.label_smoothed(logp[:, 0], logp.mean(-1), smoothing=1.0), -logp.mean(-1))
    close(supervised.z_loss(jax.nn.logsumexp(logp, axis=-1)), 0)


def test_divergences_are_never_negative_and_0_only_of_equals():
    assert (divergences.exact(REWARD, VALUE) > 0).all() and (divergences.k3(REWARD, VALUE) > 0).all()
    close(divergences.exact(REWARD, REWARD + 2.0), 0)
    assert not np.any(divergences.k1(REWARD, REWARD)) and not np.any(divergences.k3(REWARD, REWARD))


def test_divergences_of_distributions():
    logp, logq = jax.nn.log_softmax(REWARD), jax.nn.log_softmax(VALUE)
    close(divergences.kl(logp, logq), divergences.exact(REWARD, VALUE))
    some = jnp.log(jnp.array([0.5, 0.5, 0.0]))  # what never happens costs nothing
    close(divergences.kl(some, jnp.log(jnp.array([0.25, 0.25, 0.5]))), jnp.log(2.0))
    assert np.isfinite(jax.grad(divergences.kl)(some, logq[0, :3])).all()

    half = divergences.generalised_jsd(logp, logq, beta=0.5)
    close(half, divergences.generalised_jsd(logq, logp, beta=0.5))
    assert (half > 0).all() and (half < np.log(2)).all()
    with jax.enable_x64(True):
        p, q = (jax.nn.log_softmax(jnp.asarray(np.asarray(x), jnp.float64)) for x in (REWARD, VALUE))
        close(divergences.generalised_jsd(p, q, beta=1e-6) / 1e-6, divergences.kl(p, q))
        close(divergences.generalised_jsd(p, q, beta=1 - 1e-6) / 1e-6, divergences.kl(q, p))


def test_distances_in_meaning():
    """0 where the model is sure of the target, what enumeration gives else, and no gradient to the embedding."""
    table = jnp.asarray(draw.normal(size=(7, 4)), jnp.float32)
    logp, tokens = jax.nn.log_softmax(REWARD), jnp.array([0, 3, 6])
    between = ((table[:, None] - table[None]) ** 2).sum(-1)
    close(supervised.expected_square_distance(logp, table, tokens), (jnp.exp(logp) * between[tokens]).sum(-1), 1e-4)
    sure = jnp.log(jnp.clip(jax.nn.one_hot(tokens, 7), 1e-30))
    for distance in (supervised.expected_square_distance, supervised.cosine_distance):
        close(distance(sure, table, tokens), 0, 1e-5)
        assert (distance(logp, table, tokens) > 0).all()
        assert not jax.grad(lambda e, d=distance: d(logp, e, tokens).sum())(table).any()
        assert np.isfinite(distance(logp, 0 * table, tokens)).all()


def equations(a, b, c):
    """Each of them, of a."""
    ones, weights, tokens = jnp.ones_like(a), WEIGHTS.astype(a.dtype), jnp.arange(3)
    logp, logq = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
    return {
        "dual_clip": policy.clipped_surrogate(jnp.exp(0.1 * a), b, dual_clip=3.0),
        "value": policy.clipped_value_loss(a, b, c),
        "reinforce": policy.reinforce(a, b),
        "rloo": policy.clipped_surrogate(policy.sequence_ratio(0.1 * a, 0.1 * b, ones), c),
        "gspo": policy.clipped_surrogate(policy.gspo_ratio(0.1 * a, 0.1 * b, ones), c),
        "bradley_terry": preference.bradley_terry(a, b, c),
        "robust": preference.robust_bradley_terry(a, b, noise=0.2),
        "rao_kupper": preference.rao_kupper(a, b, 0.5, 0.2, theta=1.5),
        "best_of_k": preference.best_of_k(a, b == b.max(1, keepdims=True), b > -0.5),
        "k_wise": preference.k_wise(a, b, b > -0.5)[0],
        "ipo": preference.ipo(a, b, beta=0.3),
        "exo": preference.exo(a, b, smoothing=0.1),
        "nca": preference.nca(a, b),
        "kto": preference.kto(a, b > 0, 0.1, beta=0.5),
        "orpo": preference.orpo(-jnp.exp(a), -jnp.exp(b), weight=0.5),
        "alpha": preference.alpha_link(a, alpha=0.5),
        "js": preference.js_link(a),
        "exact": divergences.exact(a, b),
        "k3": divergences.k3(a, b),
        "jsd": divergences.generalised_jsd(logq, logp, beta=0.3),
        "square_distance": supervised.expected_square_distance(logp, b.T, tokens),
        "cosine_distance": supervised.cosine_distance(logp, b.T, tokens),
        "whiten": whiten(a, weights),
        "gae": advantages.gae(b, a, weights)[0],
    }


def test_gradients_are_those_of_finite_differences():
    with jax.enable_x64(True):
        a, b, c = (jnp.asarray(np.asarray(x), jnp.float64) for x in (REWARD, VALUE, OTHER))
        each = jax.jit(lambda a: equations(a, b, c))
        check_grads(each, (a,), order=1, modes=["rev"], atol=1e-4, rtol=1e-4)


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


# --------------------------------------------------------- best of n, over-optimisation, calibration, votes


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_best_of_n_is_the_mean_over_all_subsets(n):
    scores = jnp.array([0.3, -1.0, 2.0, 0.3, 0.7])
    close(best_of_n.expected_max(scores, n), np.mean([max(some) for some in itertools.combinations(scores.tolist(), n)]))
    with pytest.raises(ValueError, match="the best of 6 cannot be estimated from 5 scores"):
        best_of_n.expected_max(scores, 6)


@pytest.mark.parametrize("n", [1, 2, 8, 100])
def test_what_best_of_n_draws_and_what_it_costs(n):
    probs = jnp.array([0.5, 0.3, 0.15, 0.05])
    drawn = best_of_n.probabilities(probs, n)
    close(drawn.sum(), 1)
    if n == 2:
        want = np.zeros(4)
        for i, j in itertools.product(range(4), repeat=2):
            want[max(i, j)] += probs[i] * probs[j]
        close(drawn, want)
    if n == 1:
        close(drawn, probs)
        assert best_of_n.kl(1) == 0
    assert divergences.kl(jnp.log(drawn), jnp.log(probs)) <= best_of_n.kl(n) + 1e-6


def test_the_laws_of_overoptimisation_are_found_again():
    d = jnp.array([0.3, 0.9, 2.0, 4.0])
    laws = [
        (overoptimisation.best_of_n, overoptimisation.fit_best_of_n, overoptimisation.best_of_n_peak),
        (overoptimisation.rl, overoptimisation.fit_rl, overoptimisation.rl_peak),
    ]
    for law, fit, peak in laws:
        assert law(jnp.zeros(1), 1.3, 0.4) == 0
        close(fit(d, law(d, 1.3, 0.4)), (1.3, 0.4), 1e-4)
        at, best = peak(1.3, 0.4)
        close(law(at, 1.3, 0.4), best)
        close(jax.grad(law)(at, 1.3, 0.4), 0)


def test_thresholds_are_where_the_choice_changes():
    table = truthfulness.Table(hedged_wrong=-1.0)  # a table where to hedge may be best
    answer, hedge = truthfulness.thresholds(table)
    assert hedge < answer
    for p, best in ((hedge - 0.01, 2), (hedge + 0.01, 1), (answer - 0.01, 1), (answer + 0.01, 0)):
        assert np.argmax(truthfulness.expected(jnp.float32(p), table)) == best
    flags = np.array(list(itertools.product([0, 1], repeat=3))).T
    np.testing.assert_array_equal(truthfulness.reward(*flags, table), [0, -4, 0, -1, 0, 1, 0, 0.5])
    with pytest.raises(ValueError, match="must fall"):
        truthfulness.thresholds(truthfulness.Table(hedged_wrong=-5.0))


def test_calibration_is_how_far_confidence_is_from_being_right():
    sure = jnp.array([0.75, 0.75, 0.75, 0.75, 1.0])
    close(calibration.ece(sure, jnp.array([1.0, 1, 1, 0, 1])), 0)
    close(calibration.ece(sure, jnp.zeros(5)), sure.mean())
    close(calibration.ece(jnp.array([0.0, 0.05]), jnp.array([0.0, 1.0]), bins=10), 0.475)
    labels = jnp.array([0, 2])
    close(calibration.brier(jax.nn.one_hot(labels, 3), labels), 0)
    close(calibration.brier(jax.nn.one_hot(labels, 3), jnp.array([1, 1])), 2)


def test_a_vote_counts_what_cannot_be_read_but_does_not_elect_it():
    assert vote(["7", None, None, "7", "5"]) == Vote("7", 0.4, [0, 3])
    assert vote([None, None]) == Vote(None, 0.0, []) == vote([])


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_change_nothing(chunk):
    parts = {"x": REWARD, "y": jnp.stack([VALUE, OTHER], -1)}

    def one(parts):
        return jnp.sin(parts["x"]), parts["x"][..., None] * parts["y"]

    def total(parts, function):
        return sum(x.sum() for x in jax.tree.leaves(function(parts)))

    jax.tree.map(close, by_chunk(one, parts, chunk=chunk), one(parts))
    jax.tree.map(close, jax.grad(total)(parts, partial(by_chunk, one, chunk=chunk)), jax.grad(total)(parts, one))
