"""One update, as a pure function of the state and the data."""

import jax
import jax.numpy as jnp
import optax

from jaxalign.types import TrainState, join


def make_step(
    objective,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    sigmas: float = 0.0,
    window: int = 100,
    hold_above: dict[str, float] | None = None,
):
    """-> step(state, data, *, axis=None) -> (state, metrics), to be compiled by `shard.compile_step`.

    The loss is sum / weight over the whole global batch: sums are added over micro-batches and devices first, and divided once, in
    float32. Metrics: every sum of the objective so divided, and loss/total, train/grad_norm (before clipping), train/weight.

    An update that is not sound is skipped: parameters, optimiser and the record of gradient norms stay as they are, and
    train/skipped (since the beginning) and train/skipped_in_a_row count it. Sound is a finite loss and gradient, a weight above 0,
    and, with `sigmas`, a gradient norm within mean + sigmas * std of the last `window` applied updates, once there were as many.
    Args:
        objective: (params, data) -> (sum, {"weight": n, ...sums}), of all parameters; the gradient is that of state.params alone.
        accumulate: micro-batches a step; the rows of `data` are dealt to them in turn.
        sigmas: how many standard deviations make a spike; 0 for none.
        window: updates that the mean and variance reach back, exponentially.
        hold_above: {metric: limit}; an update at which a metric is above its limit is not applied, and train/held is 1. So
            {"policy/approx_kl": 0.1} ends the epochs on a rollout that the policy has moved away from.
        axis (of the step): mesh axis or axes to sum over, where every device runs its own copy (shard_map, pmap).
    """
    tx = optax.with_extra_args_support(tx)

    def loss_of(params, frozen, data):
        found = objective(join(frozen, params), data)
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict) and "weight" in found[1]):
            told = jax.tree.structure(found)
            raise TypeError(f"an objective returns (sum, {{'weight': n, ...}}), for the step to divide by n; this one: {told}")
        return found

    gradient = jax.value_and_grad(loss_of, has_aux=True)
    limits = {name: limit for name, limit in (hold_above or {}).items() if limit is not None}

    def sums_of(params, frozen, data):
        (loss, sums), grads = gradient(params, frozen, data)
        return jax.tree.map(lambda x: x.astype(jnp.float32), (grads, {**sums, "loss/total": loss}))

    def step(state: TrainState, data, *, axis=None):
        if accumulate == 1:
            grads, sums = sums_of(state.params, state.frozen, data)
        else:
            if (rows := len(jax.tree.leaves(data)[0])) % accumulate:
                raise ValueError(f"accumulate = {accumulate}: {rows} rows do not divide into as many micro-batches")
            parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), data)

            def add(total, part):
                return jax.tree.map(jnp.add, total, sums_of(state.params, state.frozen, part)), None

            shapes = jax.eval_shape(sums_of, state.params, state.frozen, jax.tree.map(lambda x: x[0], parts))
            zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            (grads, sums), _ = jax.lax.scan(add, zero, parts)
        if axis is not None:
            grads, sums = jax.lax.psum((grads, sums), axis)
        weight = sums.pop("weight")
        share = 1 / jnp.maximum(weight, 1e-9)
        metrics = jax.tree.map(lambda x: x * share, sums)
        norm = optax.tree.norm(grads) * share

        sound = jnp.isfinite(metrics["loss/total"]) & jnp.isfinite(norm) & (weight > 0)
        if sigmas:
            usual = state.guard["mean"] + sigmas * jnp.sqrt(state.guard["variance"])
            sound &= (norm <= usual * (1 + 1e-5)) | (state.guard["applied"] < window)  # norms may all be equal, but for rounding
        free = jnp.bool_(True)
        for name, limit in limits.items():
            free &= metrics[name] <= limit

        def update(params, opt):
            # the mean is taken here, for what enters a conditional is written to memory
            updates, opt = tx.update(jax.tree.map(lambda x: x * share, grads), opt, params, norm=norm)
            return optax.apply_updates(params, updates), opt

        apply = sound & free
        params, opt = jax.lax.cond(apply, update, lambda *same: same, state.params, state.opt)
        guard = _record(state.guard, norm, apply=apply, skip=~sound, window=window)
        metrics |= {"train/grad_norm": norm, "train/weight": weight}
        metrics |= {f"train/{name}": guard[name] for name in ("skipped", "skipped_in_a_row")}
        if limits:
            metrics["train/held"] = (sound & ~free).astype(jnp.float32)
        return state.replace(step=state.step + apply, params=params, opt=opt, guard=guard), metrics

    return step


def _record(guard: dict, norm, *, apply, skip, window: int) -> dict:
    """Mean and variance move by 1/n up to n = window (Welford 1962), then by 1/window; only norms that were applied move them."""
    share = 1 / jnp.minimum(guard["applied"] + 1, window).astype(jnp.float32)
    off = jnp.where(apply, norm - guard["mean"], 0)
    variance = (1 - share) * (guard["variance"] + share * off**2)
    return {
        "applied": guard["applied"] + apply,
        "skipped": guard["skipped"] + skip,
        "skipped_in_a_row": jnp.where(skip, guard["skipped_in_a_row"] + 1, 0),
        "mean": guard["mean"] + share * off,
        "variance": jnp.where(apply, variance, guard["variance"]),
    }
