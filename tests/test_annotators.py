"""A simulated annotator errs exactly as often as Bradley and Terry say, or by the fault that he is given."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.feedback import annotators
from jaxalign.feedback.annotators import prefer, probability
from jaxalign.ops import preference

MANY = 20000


def draws(seed):
    return np.random.default_rng([seed, 4]).random(MANY)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("gap", [-3.0, -0.4, 0.0, 0.4, 3.0])
def test_the_rate_of_agreement_is_the_probability(gap, temperature):
    a = np.random.default_rng(0).normal(0, 1, MANY)
    first, ceiling = prefer(a + gap, a, draws(1), temperature=temperature)
    p = 1 / (1 + np.exp(-gap / temperature))
    np.testing.assert_allclose(probability(a + gap, a, temperature=temperature), p)
    assert abs(first.mean() - p) < 4 * (p * (1 - p) / MANY) ** 0.5
    np.testing.assert_allclose(ceiling, max(p, 1 - p))


def test_the_ceiling_is_what_a_judge_who_knew_would_reach():
    a, b = np.random.default_rng(0).normal(0, 1, (2, MANY))
    first, ceiling = prefer(a, b, draws(2), temperature=0.7)
    right = (a > b) == first
    assert abs(right.mean() - ceiling.mean()) < 4 * (ceiling * (1 - ceiling)).sum() ** 0.5 / MANY
    assert 0.75 < ceiling.mean() < 0.95
    blind = np.random.default_rng(3).random(MANY) < 0.5
    assert (blind == first).mean() < 0.52  # who guesses does not


def test_draws_are_independent_and_of_their_seed():
    same = np.zeros(MANY)
    first, ceiling = prefer(same, same, draws(0), temperature=1.0)
    again, other = (prefer(same, same, draws(seed), temperature=1.0)[0] for seed in (0, 1))
    assert (first == again).all() and abs((first == other).mean() - 0.5) < 0.02 and (ceiling == 0.5).all()
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.03


def test_what_is_said_of_a_pair_depends_on_its_own_draw():
    a, b = np.random.default_rng(0).normal(0, 1, (2, MANY))
    whole, some = draws(5), np.random.default_rng(1).permutation(MANY)[:100]
    for said, again in zip(prefer(a, b, whole, temperature=1.0), prefer(a[some], b[some], whole[some], temperature=1.0)):
        np.testing.assert_array_equal(said[some], again)


def test_a_cold_annotator_never_errs():
    with np.errstate(over="raise"):
        first, ceiling = prefer([1.0, 0.0], [0.0, 1.0], draws(0)[:2], temperature=1e-4)
    assert first.tolist() == [True, False] and (ceiling > 1 - 1e-9).all()


# --------------------------------------------------------- annotators with faults


def felt(gap, *, temperature=1.0, many=MANY):
    """Opinions of pairs whose first is better by `gap`. -> [N,1,2]"""
    return annotators.opinions(np.array([gap, 0.0]), np.random.default_rng(6).random((many, 1, 2)), temperature=temperature)


@pytest.mark.parametrize("gap, temperature", [(0.0, 1.0), (0.8, 1.0), (-0.8, 2.0)])
def test_opinions_are_compared_as_bradley_and_terry_have_it(gap, temperature):
    opinions = felt(gap, temperature=temperature)
    won, tied = annotators.compare(opinions)
    assert abs(won.mean() - probability(gap, 0.0, temperature=temperature)) < 4 * 0.5 / MANY**0.5 and not tied.any()
    np.testing.assert_allclose(opinions.mean((0, 1)), [gap, 0.0], atol=4 * 1.3 * temperature / MANY**0.5)  # std of Gumbel: 1.28


def test_ties_are_rao_and_kuppers():
    gap, temperature, theta = 0.6, 0.5, 1.8
    won, tied = annotators.compare(felt(gap, temperature=temperature), within=temperature * np.log(theta))
    for share, at in ((won, (1.0, 0.0)), (tied, (0.0, 1.0)), (~won & ~tied, (0.0, 0.0))):
        law = np.exp(-preference.rao_kupper(jnp.float32(gap / temperature), jnp.float32(0), *at, theta=theta))
        assert abs(share.mean() - law) < 4 * 0.5 / MANY**0.5


def test_who_did_not_look_is_right_half_of_the_time():
    opinions, draws = felt(100.0), np.random.default_rng(7).random((MANY, 1))
    opinions[::2] = opinions[::2, :, ::-1]  # every other pair the other way round
    truly, _ = annotators.compare(opinions)
    for sloppiness, right in ((0.0, 1.0), (0.4, 0.6), (1.0, 0.0)):  # the row before is always the other way round
        said, _ = annotators.compare(annotators.careless(opinions, draws, sloppiness=sloppiness))
        assert abs((said == truly).mean() - right) < 0.015
    mixed = opinions[np.random.default_rng(8).permutation(MANY)]
    said, _ = annotators.compare(annotators.careless(mixed, draws, sloppiness=0.4))
    assert abs((said == annotators.compare(mixed)[0]).mean() - 0.8) < 0.015


def test_what_is_liked_and_by_how_much():
    liked = annotators.liking([1.0, 2.0], taste=[1.0, -1.0], disagreement=0.5, length=[3, 1], bias=0.25)
    np.testing.assert_allclose(liked, [1 + 0.5 + 0.75, 2 - 0.5 + 0.25])
    pairs = np.array([[0.0, 0.4], [2.0, 1.0], [0.0, 9.0]])
    np.testing.assert_array_equal(annotators.how_much(pairs, cuts=(0.5, 1.5, 3.0)), [0, 1, 3])


def test_a_rating_is_where_the_scale_stands():
    np.testing.assert_array_equal(annotators.rate(np.array([-9.0, -1.2, 0.2, 9.0]), levels=7), [1, 3, 4, 7])
    zero = annotators.zero_points(np.array([1.0, 0.0]), np.array([[0.1, 0.0], [0.1, -0.5]]), spread=2.0)
    np.testing.assert_allclose(zero, [[2.2, 0.0], [2.4, -1.0]])
    np.testing.assert_array_equal(annotators.rate(np.zeros((2, 2)), zero, levels=7), [[6, 4], [6, 3]])
