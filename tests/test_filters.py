"""Cuts where logits tie, have both signs or are cut already; and draws by inversion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.ops import filters


@pytest.mark.parametrize("p", [0.05, 0.6, 0.97])
def test_top_p_keeps_all_that_tie_with_its_last_token(p):
    z = np.random.default_rng(0).integers(-8, 5, (40, 30)) / 4.0  # a few values, many times each
    z[:, :3], z[:20, 3:9] = [0.0, -0.0, 1e-40], -np.inf
    z = z.astype(np.float32)
    kept = np.isfinite(jax.jit(lambda z: filters.top_p(z, p))(z))
    probs = np.exp(z.astype(np.float64))
    probs /= probs.sum(1, keepdims=True)
    for row, values in enumerate(z):
        reach = [x for x in np.unique(values) if probs[row][values >= x].sum() >= p]
        np.testing.assert_array_equal(kept[row], (values >= max(reach) - 1e-30) & (values > -np.inf))


def test_a_draw_by_inversion_takes_each_token_for_its_share_of_the_square():
    rng, side, vocab = np.random.default_rng(1), 200, 300  # three blocks, the last not full
    logits = np.where(rng.random(vocab) < 0.4, -np.inf, rng.normal(0, 2, vocab)).astype(np.float32)
    at = (np.arange(side) + 0.5) / side
    u = np.stack(np.meshgrid(at, at), -1).reshape(-1, 2).astype(np.float32)
    u = np.concatenate([u, np.stack(np.meshgrid([0, 1 - 2**-24], [0, 1 - 2**-24]), -1).reshape(-1, 2).astype(np.float32)])
    tokens = np.asarray(jax.jit(filters.categorical)(u, jnp.broadcast_to(logits, (len(u), vocab))))
    assert np.isfinite(logits[tokens]).all() and tokens.max() < vocab  # at the corners too
    seen, p = np.bincount(tokens, minlength=vocab) / len(u), np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(seen, p, atol=1.5 / side)
    assert np.abs(seen - p).sum() < 0.15
