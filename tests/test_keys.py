"""A draw is keyed by what it is for, never by where it happens."""

import jax
import numpy as np
import pytest

from jaxalign import keys


def numbers(keys):
    return jax.random.key_data(keys).tolist()


def test_a_rows_key_does_not_depend_on_the_batch_around_it():
    base = keys.key(0, "sample", 3)
    whole = dict(zip([7, 2, 9, 4], numbers(keys.of_rows(base, [7, 2, 9, 4])), strict=True))
    for other in ([4, 9, 2, 7], [9], [2, 100, 7]):
        assert all(key == whole.get(n, key) for n, key in zip(other, numbers(keys.of_rows(base, np.array(other))), strict=True))


def test_an_example_that_comes_twice_is_drawn_anew():
    base = keys.key(0, "sample")
    twice = numbers(keys.of_rows(base, [5, 6, 5, 5]))
    assert len(set(map(tuple, twice))) == 4
    assert twice[:2] == numbers(keys.of_rows(base, [5, 6])) and [twice[0], twice[2]] == numbers(keys.of_rows(base, [5, 5]))


def test_seed_role_and_every_counter_make_another_key():
    made = [
        keys.key(seed, role, *counters) for seed in (0, 1) for role in keys.ROLES for counters in ((), (0,), (1,), (0, 1), (1, 0))
    ]
    rows = [row for key in made for row in numbers(keys.of_rows(key, [0, 1, 0]))]
    assert len({tuple(numbers(key)) for key in made}) == len(made) and len(set(map(tuple, rows))) == len(rows)
    assert numbers(keys.key(1, "shuffle", 4, 2)) == numbers(keys.key(1, "shuffle", 4, 2))


def test_a_role_that_is_not_on_the_list_is_refused():
    with pytest.raises(ValueError, match="role 'smaple'; there are init, sample, .*compare, annotate"):
        keys.key(0, "smaple")
