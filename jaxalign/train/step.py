"""One update, as a pure function of the state and the data."""

import jax
import jax.numpy as jnp
import optax

from jaxalign.types import TrainState


def make_step(objective, tx: optax.GradientTransformation, *, accumulate: int = 1):
    """-> step(state, data, *, axis=None) -> (state, metrics), to be compiled by `shard.compile_step`.

    The loss is sum / weight over the whole global batch: sums are added over micro-batches and devices first, and divided once, in
    float32. Metrics: every sum of the objective so divided, and loss/total, train/grad_norm (before clipping), train/weight.
    Args:
        objective: (params, data) -> (sum, {"weight": n, ...sums}).
        accumulate: micro-batches a step; the rows of `data` are dealt to them in turn.
        axis (of the step): mesh axis or axes to sum over, where every device runs its own copy (shard_map, pmap).
    """
    gradient = jax.value_and_grad(objective, has_aux=True)

    def sums_of(params, data):
        (loss, sums), grads = gradient(params, data)
        return jax.tree.map(lambda x: x.astype(jnp.float32), (grads, {**sums, "loss/total": loss}))

    def step(state: TrainState, data, *, axis=None):
        if accumulate == 1:
            grads, sums = sums_of(state.params, data)
        else:
            parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), data)

            def add(total, part):
                return jax.tree.map(jnp.add, total, sums_of(state.params, part)), None

            shapes = jax.eval_shape(sums_of, state.params, jax.tree.map(lambda x: x[0], parts))
            zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            (grads, sums), _ = jax.lax.scan(add, zero, parts)
        if axis is not None:
            grads, sums = jax.lax.psum((grads, sums), axis)
        weight = sums.pop("weight")
        grads, metrics = jax.tree.map(lambda x: x / jnp.maximum(weight, 1e-9), (grads, sums))
        updates, opt = tx.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics |= {"train/grad_norm": optax.tree.norm(grads), "train/weight": weight}
        return state.replace(step=state.step + 1, params=params, opt=opt), metrics

    return step
