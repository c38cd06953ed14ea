"""What a step makes of a batch: measured, and compared."""

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign import shard
from jaxalign.contract.layout import Table
from jaxalign.train.step import make_step
from jaxalign.types import TrainState


class Numbers(NamedTuple):
    """What a step makes of a batch: everything but the weight is divided by it."""

    weight: float
    metrics: dict  # name -> float; with loss/total
    gradient: dict  # path -> array


class Bench(NamedTuple):
    """All that a law needs."""

    objective: Any
    params: Any
    table: Table
    measure: Any  # (leaves [ROWS, ...], params=params) -> Numbers
    ids: list  # token ids to try, in order
    tolerance: float
    examples: int
    on_policy: dict
    unit: str | None
    reads_weights: bool | None = None


@cache
def cheap():
    """Compiler options for programs that run a few times: on CPU, those that compile in a fifth of the time, where XLA has them."""
    options = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda x: x + 1, compiler_options=options)(0)
    except jax.errors.JaxRuntimeError:
        return None
    return options if jax.default_backend() == "cpu" else None


def _paths(tree) -> dict:
    return {"gradient" + jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def measure_of(objective, params, table: Table):
    """-> (leaves, params) -> Numbers, compiled; one program a shape."""
    compiled = jax.jit(jax.value_and_grad(objective, has_aux=True), compiler_options=cheap())

    def measure(leaves, params=params) -> Numbers:
        (loss, sums), grads = jax.device_get(compiled(params, table.tree.unflatten(leaves)))
        sums = {name: float(x) for name, x in {**sums, "loss/total": loss}.items()}
        weight = sums.pop("weight")
        by = max(weight, 1e-9)  # as the step divides
        return Numbers(weight, {name: x / by for name, x in sums.items()}, {name: x / by for name, x in _paths(grads).items()})

    return measure


def step_of(bench: Bench, compile_step, *, accumulate: int = 1):
    """-> (leaves) -> Numbers of make_step, whose optimiser writes down the gradient. compile_step(step, state) -> run(data)"""
    tx = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, _, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
    )
    state = shard.fetch(TrainState(jnp.int32(0), bench.params, tx.init(bench.params)))
    run = compile_step(make_step(bench.objective, tx, accumulate=accumulate), state)

    def measure(leaves) -> Numbers:
        after, metrics = shard.fetch(run(bench.table.tree.unflatten(leaves)))
        own = {name: float(x) for name, x in metrics.items() if not name.startswith("train/")}
        return Numbers(float(metrics["train/weight"]), own, _paths(after.opt))

    return measure


def compare(want: Numbers, got: Numbers) -> tuple[float, str]:
    """-> (the largest deviation, what deviates so). A metric's is relative to it + 0.1, a gradient's to its leaf's largest."""
    if want.metrics.keys() != got.metrics.keys():
        return np.inf, f"the metrics are {sorted(got.metrics)} instead of {sorted(want.metrics)}"
    largest = max((np.abs(x).max(initial=0) for x in want.gradient.values()), default=0)
    pairs = {name: (x, got.metrics[name], 0.1 + abs(x)) for name, x in want.metrics.items()}
    for name, x in want.gradient.items():
        pairs[name] = x, got.gradient[name], np.abs(x).max(initial=0) + 1e-2 * largest + 1e-3
    found = [(0.0, "nothing")]
    for name, (a, b, scale) in pairs.items():
        off = np.asarray(abs(a - b) / scale)
        if off.size:
            at = np.unravel_index(np.where(np.isfinite(off), off, np.inf).argmax(), off.shape)
            place = f"{name}{[int(i) for i in at]}" if at else name
            largest_off = float(off[at]) if np.isfinite(off[at]) else np.inf
            found.append((largest_off, f"{place} is {np.asarray(b)[at]:.7g} instead of {np.asarray(a)[at]:.7g}"))
    return max(found, key=lambda pair: pair[0])
