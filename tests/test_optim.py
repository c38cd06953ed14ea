"""Schedules, decay and Adam's epsilon."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.train import optim

BASE = {"learning_rate": 0.1, "steps": 10, "decay": "constant", "clip_norm": 0.0}


def first_update(params, grads, **hyper):
    tx = optim.adam(**{**BASE, **hyper})
    return tx.update(grads, tx.init(params), params)[0]


@pytest.mark.parametrize("decay, halfway, end", [("linear", 0.5, 0.0), ("cosine", 0.5, 0.0), ("constant", 1.0, 1.0)])
@pytest.mark.parametrize("warmup", [0, 4])
def test_schedules_warm_up_and_end_where_they_say(decay, halfway, end, warmup):
    rate = optim.schedule(learning_rate=3.0, steps=20, warmup=warmup, decay=decay)
    np.testing.assert_allclose(rate(warmup), 3.0)
    np.testing.assert_allclose(rate(warmup + (20 - warmup) / 2), 3.0 * halfway, atol=1e-6)
    np.testing.assert_allclose([rate(20), rate(30)], 3.0 * end, atol=1e-6)
    for update in range(warmup):
        np.testing.assert_allclose(rate(update), 3.0 * update / warmup, rtol=1e-6)
    assert all(rate(t) >= rate(t + 1) for t in range(warmup, 20))


def test_what_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="optim.decay = 'step'"):
        optim.schedule(learning_rate=1.0, steps=2, decay="step")
    with pytest.raises(ValueError, match="optim.eps_placement = 'keras'"):
        optim.adam(**BASE, eps_placement="keras")


def test_decay_touches_kernels_alone(tiny):
    zero = jax.tree.map(jnp.zeros_like, tiny.params)
    updates, _ = jax.tree_util.tree_flatten_with_path(first_update(tiny.params, zero, weight_decay=0.5))
    decayed = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in updates if np.any(x)}
    attention, mlp = [f"layers.attention.{x}" for x in "qkvo"], [f"layers.mlp.{x}" for x in ("gate", "up", "down")]
    assert set(decayed) == {f"{x}.kernel" for x in [*attention, *mlp, "head", "scalar"]}
    np.testing.assert_allclose(decayed["head.kernel"], -0.1 * 0.5 * tiny.params["head"]["kernel"], rtol=1e-5)


def test_decay_is_decoupled_from_the_gradient():
    params, grads = {"kernel": jnp.array([2.0])}, {"kernel": jnp.array([5.0])}
    without, decayed = first_update(params, grads), first_update(params, grads, weight_decay=0.5)
    np.testing.assert_allclose(decayed["kernel"] - without["kernel"], -0.1 * 0.5 * 2.0, rtol=1e-5)


@pytest.mark.parametrize("size", [0.0, 0.1, 30.0])
def test_clipping_is_that_of_optax_whether_the_norm_is_told_or_not(size):
    grads = {"a": size * jnp.arange(3.0), "b": size * jnp.ones((2, 2))}
    want = optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())[0]
    tx = optim.clip(1.0)
    for told in ({}, {"norm": optax.tree.norm(grads)}):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), tx.update(grads, tx.init(grads), **told)[0], want)


@pytest.mark.parametrize("t", [1, 10, 1000])
def test_tensorflows_epsilon_is_outside_the_bias_correction(t):
    """After t equal gradients g, m / (1 - b1^t) = g and v / (1 - b2^t) = g^2, so that both updates have a closed form."""
    g, eps, b2 = 0.01, 1e-2, 0.999
    for placement, denominator in (("pytorch", g + eps), ("tensorflow", g + eps / np.sqrt(1 - b2**t))):
        tx = optim.adam(**BASE, eps=eps, b2=b2, eps_placement=placement)

        def step(state, _, tx=tx):
            updates, state = tx.update(jnp.array([g]), state)
            return state, updates

        updates = jax.jit(lambda state, step=step: jax.lax.scan(step, state, length=t)[1])(tx.init(jnp.zeros(1)))
        np.testing.assert_allclose(updates[-1], -0.1 * g / denominator, rtol=2e-3)


def test_the_gradient_is_clipped_by_its_global_norm():
    """Seen in Adam's first moment, (1 - b1) times the gradient; Adam itself hides the scale of its first update."""
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    for clip, scale in ((1.0, 0.2), (10.0, 1.0), (0.0, 1.0)):
        tx = optim.adam(**{**BASE, "clip_norm": clip})
        moments = optax.tree.get(tx.update(grads, tx.init(grads), grads)[1], "mu")
        np.testing.assert_allclose([moments["a"][0], moments["b"][0]], [0.3 * scale, 0.4 * scale], rtol=1e-5)
