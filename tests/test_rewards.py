"""Scores: their scale, the price of KL, and a sentiment that follows its own laws."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign import rewards, score
from jaxalign.rewards import sentiment
from jaxalign.types import Batch

VALENCES = {"good": 0.5, "great": 1.0, "bad": -0.5, "dull": -1.0}


def test_a_folded_model_gives_the_normalised_scores(tiny):
    draw = np.random.default_rng(1)
    tokens, lengths = draw.integers(0, 14, (24, 7), np.int32), draw.integers(1, 8, (24, 1))
    real = (np.arange(7)[None] < lengths).astype(np.int32)
    batch = Batch(tokens, real, np.zeros((24, 7), np.float32))
    measure = jax.jit(lambda params: score.last_scalar(tiny.model, params, batch))
    before = np.asarray(measure(tiny.params))
    assert before.std() > 0.1
    for mean, std in ((0.0, 1.0), (-3.0, 0.25)):
        gain, bias = rewards.normaliser(before, mean=mean, std=std)
        kept = jax.tree.map(jnp.copy, tiny.params)
        after = np.asarray(measure(rewards.fold(tiny.params, gain, bias)))
        np.testing.assert_allclose(after, np.float32(gain) * before + np.float32(bias), rtol=1e-5, atol=1e-5)
        assert after.mean() == pytest.approx(mean, abs=1e-5) and after.std() == pytest.approx(std, rel=1e-5)
        jax.tree.map(np.testing.assert_array_equal, tiny.params, kept)  # the model that came in is as it was


@pytest.mark.parametrize("scores", [[2.0] * 3, [0.1] * 100, [0.0], [1.0, float("nan")]])
def test_scores_that_cannot_be_normalised_are_refused(scores):
    with pytest.raises(ValueError, match=f"{len(scores)} scores, all .* cannot be normalised"):
        rewards.normaliser(np.float32(scores))


def test_the_bias_of_the_reference_scores_it_0_on_average():
    scores = jnp.array([1.0, -2.0, 7.0])
    assert (scores - rewards.reference_bias(scores)).mean() == pytest.approx(0, abs=1e-6)


ENSEMBLE = jnp.asarray(np.random.default_rng(5).normal(0, 2, (4, 30)), jnp.float32)
COMBINED = {
    "mean": rewards.mean_score,
    "worst": rewards.worst_score,
    "uncertainty_weighted": partial(rewards.uncertainty_weighted, coefficient=0.7),
}


@pytest.mark.parametrize("name", COMBINED)
def test_an_ensemble_of_one_is_that_one_and_of_equals_each(name):
    combine = jax.jit(COMBINED[name])
    np.testing.assert_allclose(combine(ENSEMBLE[:1]), ENSEMBLE[0], rtol=1e-6)
    np.testing.assert_allclose(combine(jnp.tile(ENSEMBLE[:1], (3, 1))), ENSEMBLE[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(combine(ENSEMBLE[::-1]), combine(ENSEMBLE), rtol=1e-5, atol=1e-6)  # in whatever order
    np.testing.assert_allclose(combine(ENSEMBLE + 3), combine(ENSEMBLE) + 3, rtol=1e-5, atol=1e-5)


def test_doubt_lowers_the_score_of_an_ensemble():
    mean, worst = rewards.mean_score(ENSEMBLE), rewards.worst_score(ENSEMBLE)
    assert (worst < mean).all() and (worst[None] <= ENSEMBLE).all()
    np.testing.assert_allclose(rewards.uncertainty_weighted(ENSEMBLE, coefficient=0.0), mean, rtol=1e-6)
    np.testing.assert_allclose(
        rewards.uncertainty_weighted(ENSEMBLE, coefficient=0.7), np.mean(ENSEMBLE, 0) - 0.7 * np.var(ENSEMBLE, 0), rtol=1e-4
    )


def test_an_ensemble_abstains_where_a_member_does():
    scores = ENSEMBLE.at[2, 5].set(jnp.nan)
    for combine in COMBINED.values():
        assert np.isnan(combine(scores)[5]) and np.isfinite(np.delete(combine(scores), 5)).all()


@pytest.mark.parametrize(
    "kl, factor",
    [(6.0, 1.0), (6.6, 1 + 0.1 * 64 / 1000), (600.0, 1 + 0.2 * 64 / 1000), (5.4, 1 - 0.1 * 64 / 1000), (0.0, 1 - 0.2 * 64 / 1000)],
)
def test_kl_above_its_target_raises_its_price_by_a_bounded_step(kl, factor):
    beta = rewards.update_beta(jnp.float32(0.1), jnp.float32(kl), 64, target=6.0, horizon=1000.0)
    assert float(beta) == pytest.approx(0.1 * factor, rel=1e-6)


@pytest.mark.parametrize("limit, kl, error", [(0.5, 60.0, 0.5), (0.5, 0.0, -0.5), (0.5, 8.4, 0.4), (0.0, 60.0, 0.0)])
def test_the_step_is_bounded_by_its_limit(limit, kl, error):
    beta = rewards.update_beta(jnp.float32(0.1), jnp.float32(kl), 64, target=6.0, horizon=1000.0, limit=limit)
    assert float(beta) == pytest.approx(0.1 * (1 + error * 64 / 1000), rel=1e-6)


def test_an_infinite_horizon_keeps_the_price():
    assert rewards.update_beta(jnp.float32(0.1), jnp.float32(99.0), 64, target=6.0, horizon=float("inf")) == np.float32(0.1)


@pytest.mark.parametrize(
    "text, points",
    [
        ("the film was good .", 0.5),
        ("The film was GOOD!", 0.5),
        ("good and dull", -0.5),
        ("very good", 0.75),
        ("slightly bad", -0.25),
        ("not good", -0.375),
        ("never dull", 0.75),
        ("it wasn't good", -0.375),
        ("Don't say dull , good", 1.25),
        ("I can't say it isn't good", 0.28125),  # two negations
        ("not very good", -0.5625),
        ("not bad and good", 0.875),  # a negation is spent on the first word that has a valence
        ("not a film that is good", -0.375),  # however far away in its clause
        ("not for me . good", 0.5),  # and ends with it
        ("not , good", 0.5),
        ("very ; good", 0.5),
        ("it is never , ever , dull", -1.0),
        ("a film", 0.0),
        ("", 0.0),
        ("goodness badly", 0.0),  # words, not parts of words
    ],
)
def test_negations_and_modifiers_hold_to_the_end_of_their_clause(text, points):
    assert sentiment(text, VALENCES) == pytest.approx(points)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["good", "great", "bad", "dull", "not", "very", "film", ".", ","]), max_size=12))
def test_saying_it_again_does_not_pay(words):
    once = " ".join(words)
    assert sentiment(f"{once} . {once}", VALENCES) == pytest.approx(sentiment(once, VALENCES))


def test_texts_are_scored_one_by_one():
    scores = rewards.score_texts(len, ["", "ab", "abc"])
    assert scores.tolist() == [0, 2, 3] and scores.dtype == np.float32


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_gives_no_number_abstains(value):
    scores = rewards.score_texts({"the first": 1.0, "the second": value}.get, ["the first", "the second", "the first"])
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, [1, np.nan, 1])


@pytest.mark.filterwarnings("error")
def test_a_reward_that_raises_abstains_and_says_so():
    with pytest.warns(UserWarning, match="the reward failed, ZeroDivisionError: division by zero; the first text was 'b'"):
        scores = rewards.score_texts(lambda text: 1 / (text != "b"), ["a", "b"])
    np.testing.assert_array_equal(scores, [1, np.nan])
