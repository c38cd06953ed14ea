"""One update is the same however it is cut and compiled."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import shard
from jaxalign.objectives import supervised
from jaxalign.train import optim
from jaxalign.train.step import make_step
from jaxalign.types import Batch, Model, TrainState

ADAM = {"learning_rate": 0.01, "steps": 10, "eps": 1e-5, "weight_decay": 0.1, "clip_norm": 1.0}
ROWS, LENGTH = 16, 6
LOSSES, GRAD_NORMS = [2.7566826, 3.1889577, 3.2185130], [1.7307428, 1.7229781, 1.7612181]


def batches(many):
    """Rows of different lengths and weights, so that a mean of means is wrong."""
    draw = np.random.default_rng(4)
    shape = (ROWS, LENGTH)
    made = []
    for _ in range(many):
        real = np.arange(LENGTH)[None] < draw.integers(2, LENGTH + 1, (ROWS, 1))
        made.append(
            Batch(
                draw.integers(0, 14, shape, np.int32), real.astype(np.int32), (real * draw.integers(0, 2, shape)).astype(np.float32)
            )
        )
    return made


def build(tiny, **hyper):
    """(step, host state): SFT with Adam, a schedule, clipping and decay."""
    tx = optim.adam(**ADAM)
    step = make_step(partial(supervised.sft, model=tiny.model), tx, **hyper)
    return step, jax.device_get(TrainState(jnp.int32(0), tiny.params, tx.init(tiny.params)))


def where_of(tiny, mesh):
    tx = optim.adam(**ADAM)

    def make(key):
        params = tiny.model.init(key)
        return TrainState(jnp.int32(0), params, tx.init(params))

    return shard.shardings(jax.eval_shape(make, jax.random.key(0)), mesh)


def three_updates(run, state, place=lambda batch: batch):
    """-> (parameters, number of updates, metrics of each)"""
    seen = []
    for batch in batches(3):
        state, metrics = run(state, place(batch))
        seen.append(shard.fetch(metrics))
    return shard.fetch(state.params), shard.fetch(state.step), seen


@pytest.fixture(scope="module")
def plain(tiny):
    """Three updates on one device, no mesh."""
    step, state = build(tiny)
    return three_updates(jax.jit(step), state)


def same(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance), a, b)


@pytest.mark.parametrize("accumulate", [2, 8])
def test_micro_batches_change_nothing(tiny, plain, accumulate):
    step, state = build(tiny, accumulate=accumulate)
    same(three_updates(jax.jit(step), state), plain)


@pytest.mark.parametrize(
    "how, sizes, accumulate",
    [
        ("jit", (8, 1, 1), 1),
        ("jit", (1, 8, 1), 1),
        ("jit", (4, 2, 1), 2),
        ("jit", (2, 2, 2), 2),
        ("shard_map", (8, 1, 1), 1),
        ("shard_map", (4, 2, 1), 2),
        ("pmap", (8, 1, 1), 2),
    ],
)
def test_devices_change_nothing(tiny, plain, how, sizes, accumulate):
    mesh = shard.make_mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
    step, state = build(tiny, accumulate=accumulate)
    where = where_of(tiny, mesh)
    if how == "jit":
        state = shard.put(state, where)
    run = shard.compile_step(step, mesh, where, how)
    same(three_updates(run, state, lambda batch: shard.place(batch, mesh)), plain)


@pytest.mark.parametrize("how", ["shard_map", "pmap"])
def test_what_copies_parameters_refuses_to_split_them(tiny, how):
    mesh = shard.make_mesh(data=4, tensor=2)
    with pytest.raises(ValueError, match="tensor=1"):
        shard.compile_step(lambda state, data, axis=None: None, mesh, None, how)
    with pytest.raises(ValueError, match="'xmap'"):
        shard.compile_step(lambda state, data, axis=None: None, shard.make_mesh(), None, "xmap")


def test_the_state_is_donated(tiny):
    """The old parameters' memory is given up, and the new ones do not need it."""
    mesh = shard.make_mesh(data=4, fsdp=2)
    step, host = build(tiny)
    where = where_of(tiny, mesh)
    run = shard.compile_step(step, mesh, where)
    state = shard.put(host, where)
    new, _ = run(state, shard.place(batches(1)[0], mesh))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
    assert jax.tree.map(lambda x: x.sharding, new) == where
    assert np.isfinite(shard.fetch(new.params["norm"]["scale"])).all()


def test_one_update_of_a_bigram_model_by_hand():
    """loss = 1/n sum_t w_t -log softmax(table[a])[b]; gradient = 1/n sum_t w_t (softmax - onehot); descent at rate 0.5."""
    table = np.random.default_rng(5).normal(size=(14, 14))
    model = Model(
        config=SimpleNamespace(scalar=None),
        init=None,
        apply=lambda params, tokens, segments: (params[tokens], None),
        unembed=lambda params, hidden: hidden,
        scalar=None,
        cache=None,
    )
    batch, tx = batches(1)[0], optax.sgd(0.5)
    start = jnp.asarray(table, jnp.float32)
    step = jax.jit(make_step(partial(supervised.sft, model=model), tx, accumulate=4))
    state, metrics = step(TrainState(jnp.int32(0), start, tx.init(start)), batch)

    p = np.exp(table) / np.exp(table).sum(1, keepdims=True)
    loss, grad, n = 0.0, np.zeros_like(table), 0.0
    for tokens, segments, weights in zip(batch.tokens, batch.segments, batch.weights):
        for t in range(1, LENGTH):
            if segments[t]:
                before, now, w = tokens[t - 1], tokens[t], float(weights[t])
                loss, n = loss - w * np.log(p[before, now]), n + w
                grad[before] += w * (p[before] - np.eye(14)[now])
    same(state.params, table - 0.5 * grad / n)
    same((metrics["loss/total"], metrics["train/weight"]), (loss / n, n))
    same(metrics["train/grad_norm"], np.linalg.norm(grad / n))
    assert state.step == 1


def test_the_numbers_of_three_updates(plain):
    """Pinned: a change of model, loss, gradient, clipping or optimiser shows here first."""
    _, step, metrics = plain
    assert step == 3
    same([m["loss/total"] for m in metrics], LOSSES, 1e-4)
    same([m["train/grad_norm"] for m in metrics], GRAD_NORMS, 1e-4)


@pytest.mark.parametrize(
    "returned", [lambda loss: loss, lambda loss: (loss, {}), lambda loss: (loss, {"loss": loss})], ids=range(3)
)
def test_an_objective_without_a_weight_is_told_what_one_returns(tiny, returned):
    step = make_step(lambda params, data: returned(data.weights.sum()), optim.adam(learning_rate=0.1, steps=1))
    with pytest.raises(TypeError, match=r"an objective returns \(sum, \{'weight': n, ...\}\).*; this one: PyTreeDef"):
        step(TrainState(jnp.int32(0), tiny.params, None), batches(1)[0])


def test_rows_divide_into_micro_batches(tiny):
    step = make_step(partial(supervised.sft, model=tiny.model), optim.adam(learning_rate=0.1, steps=1), accumulate=3)
    with pytest.raises(ValueError, match="accumulate = 3: 4 rows do not divide"):
        step(TrainState(jnp.int32(0), tiny.params, None), jax.tree.map(lambda x: x[:4], batches(1)[0]))


def test_a_batch_of_weight_0_moves_nothing(tiny):
    tx = optim.adam(learning_rate=0.1, steps=10, decay="constant")
    step = jax.jit(make_step(partial(supervised.sft, model=tiny.model), tx))
    batch = batches(1)[0]
    state, metrics = step(TrainState(jnp.int32(0), tiny.params, tx.init(tiny.params)), batch.replace(weights=0 * batch.weights))
    same(state.params, tiny.params, 0)
    assert state.step == 0 and metrics["train/skipped"] == 1
    assert metrics["train/weight"] == 0 and all(np.isfinite(x) for x in metrics.values())


def line(sigmas=0.0, window=4, **hyper):
    """A loss of slope `data` in one parameter, under Adam: each number of the data is the gradient of an update."""

    def objective(params, data):
        return (params["w"] * data["slope"]).sum(), {"weight": data["weight"].sum(), "seen/slope": data["slope"].sum()}

    tx = optax.adam(0.1)
    params = {"w": jnp.float32(1)}
    run = jax.jit(make_step(objective, tx, sigmas=sigmas, window=window, **hyper))

    def walk(slopes):
        state, seen = TrainState(jnp.int32(0), params, tx.init(params)), []
        for slope in slopes:
            state, metrics = run(state, {"slope": jnp.float32([slope]), "weight": jnp.ones(1)})
            seen.append(jax.device_get(metrics))
        return jax.device_get(state), seen

    return walk


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("places", [[0], [3], [5, 6, 7], [0, 1, 2, 4, 9]])
def test_a_step_that_is_not_finite_leaves_no_trace_but_its_count(bad, places):
    walk, slopes = line(sigmas=6.0), [1.0, 2.0, 0.5, 1.5, 1.0, 0.7]
    with_bad, good = [], iter(slopes)
    while len(with_bad) < len(slopes) + len(places):
        with_bad.append(bad if len(with_bad) in places else next(good))
    (found, seen), (wanted, _) = walk(with_bad), walk(slopes)
    counts = {"skipped": len(places), "skipped_in_a_row": 0}
    jax.tree.map(np.testing.assert_array_equal, found, wanted.replace(guard={**wanted.guard, **counts}))
    runs = np.cumsum([slope is bad for slope in with_bad])
    assert [m["train/skipped"] for m in seen] == runs.tolist()
    assert max(m["train/skipped_in_a_row"] for m in seen) == max(np.diff([-1, *[n for n in range(20) if n not in places]]) - 1)


def test_a_spike_is_skipped_once_there_is_something_to_compare_it_with():
    walk = line(sigmas=3.0)
    state, seen = walk([1.0, 3.0, 1.1, 0.9, 1.0, 1.2, 1.0, 1.1, 0.9, 1.0, 1.0, 1.1, 0.9, 1.0, 9.0, 1.0])
    assert [m["train/skipped"] for m in seen] == [0] * 14 + [1, 1]  # the second is one of the first `window`
    assert state.step == 15
    state, seen = line(sigmas=3.0)([1.0] * 6 + [1.0001, 1.0])  # equal norms: the slightest excess is a spike, rounding is none
    assert [m["train/skipped"] for m in seen] == [0] * 6 + [1, 1]
    state, seen = line()([1.0] * 9 + [1e6])  # none are looked for
    assert seen[-1]["train/skipped"] == 0


def test_the_record_is_of_the_mean_and_the_variance():
    norms = [1.0, 4.0, 2.5, 3.0]
    guard = line(window=4)(norms)[0].guard
    assert guard["mean"] == pytest.approx(np.mean(norms), rel=1e-6)
    assert guard["variance"] == pytest.approx(np.var(norms), rel=1e-6)
    far = line(window=4)([*norms, *[7.0] * 60])[0].guard  # what is long past is forgotten
    assert far["mean"] == pytest.approx(7.0, rel=1e-5) and far["variance"] < 1e-4


def test_an_update_above_a_limit_is_held_back_and_not_counted_as_skipped():
    state, seen = line(hold_above={"seen/slope": 2.0, "train/nothing": None})([1.0, 3.0, 2.0, np.nan])
    assert [m["train/held"] for m in seen] == [0, 1, 0, 0]
    assert [m["train/skipped"] for m in seen] == [0, 0, 0, 1]
    assert state.step == 2
    jax.tree.map(np.testing.assert_array_equal, state.params, line()([1.0, 2.0])[0].params)


@pytest.mark.parametrize("how, sizes", [("jit", (4, 2, 1)), ("shard_map", (8, 1, 1)), ("pmap", (8, 1, 1))])
def test_what_one_device_finds_unsound_all_skip(tiny, how, sizes):
    mesh = shard.make_mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
    step, host = build(tiny)
    where = where_of(tiny, mesh)
    run = shard.compile_step(step, mesh, where, how)
    batch = batches(1)[0]
    batch = batch.replace(weights=np.where(np.arange(ROWS)[:, None] == 3, np.float32(np.inf), batch.weights))
    state, metrics = run(shard.put(host, where) if how == "jit" else host, shard.place(batch, mesh))
    same(shard.fetch((state.params, state.opt)), (host.params, host.opt), 0)
    assert shard.fetch(metrics["train/skipped"]) == 1
