"""A simulated annotator errs exactly as often as Bradley and Terry say."""

import numpy as np
import pytest

from jaxalign.feedback.annotators import prefer, probability

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
