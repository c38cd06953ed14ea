"""Checkpoints: what comes back is what was saved, and what cannot come back is said."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import shard
from jaxalign.train import checkpoint
from jaxalign.types import TrainState


def make(tx=None, scale=1.0, width=3):
    params = {"layer": {"kernel": scale * jnp.arange(4.0 * width).reshape(4, width)}, "bias": jnp.full((), scale, jnp.bfloat16)}
    return TrainState(jnp.int32(7), params, (tx or optax.adam(0.1)).init(params), {"beta": jnp.float32(0.1)})


def save(folder, *steps, keep=3, **kwargs):
    with checkpoint.Saver(folder, keep=keep) as saver:
        for step in steps:
            saver.save(step, make(scale=step, **kwargs), {"seconds": step / 3})


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize(
    "tx", [optax.sgd(0.1), optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))], ids=["sgd", "adamw"]
)
def test_the_newest_comes_back_whole_and_the_last_are_kept(tmp_path, tx):
    assert checkpoint.restore(tmp_path / "none", make(tx)) is None
    save(tmp_path, 1, 2, 10, keep=2, tx=tx)
    assert checkpoint.steps(tmp_path) == [2, 10]
    found = checkpoint.restore(tmp_path, make(tx))
    assert (found.step, found.meta, found.skipped) == (10, {"seconds": 10 / 3}, {})
    same(found.state, make(tx, scale=10))


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    change = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = make().replace(params={"kernel": jnp.zeros((1 << 22,))})  # 16 MiB: still being written when it is changed
    with checkpoint.Saver(tmp_path, keep=1) as saver:
        saver.save(1, state, {})
        for _ in range(5):
            state = change(state)
    kernel = checkpoint.load_params(tmp_path, state.params)["kernel"]
    assert float(kernel.min()) == float(kernel.max()) == 0.0


def test_what_a_killed_save_left_is_swept_away(tmp_path):
    (tmp_path / "5.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    save(tmp_path, 3)
    assert [found.name for found in tmp_path.iterdir()] == ["3"]


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "array": lambda step: [halve(found) for found in (step / "params").rglob("d/*")],
    "manifest": lambda step: halve(step / "opt" / "manifest.ocdbt"),
    "metadata": lambda step: halve(step / "loop" / "_METADATA"),
    "json": lambda step: halve(step / "meta" / "metadata"),
    "lost": lambda step: (step / "meta").rename(step / "elsewhere"),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # TensorStore talks to a loop that Orbax closed
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_an_unreadable_step_is_set_aside_for_an_older_one(tmp_path, damage):
    save(tmp_path, 1, 2)
    damage(tmp_path / "2")
    found = checkpoint.restore(tmp_path, make())
    assert found.step == 1
    same(found.state, make(scale=1))
    assert list(found.skipped) == [2] and len(found.skipped[2]) > 10
    assert (tmp_path / "2.corrupt").is_dir() and checkpoint.steps(tmp_path) == [1]
    save(tmp_path, 2)  # the number is free again, and may go bad again
    damage(tmp_path / "2")
    assert checkpoint.restore(tmp_path, make()).step == 1
    assert (tmp_path / "2.corrupt1").is_dir()


def test_where_nothing_can_be_read_nothing_is_touched(tmp_path):
    save(tmp_path, 1)
    DAMAGE["json"](tmp_path / "1")
    with pytest.raises(ValueError, match="no checkpoint in .* can be read .step 1: JSONDecodeError"):
        checkpoint.restore(tmp_path, make())
    assert checkpoint.steps(tmp_path) == [1]


@pytest.mark.parametrize(
    "like, says",
    [
        (make(width=2), r"params/layer/kernel is float32\[4,3\] in the checkpoint and float32\[4,2\] here"),
        (
            make().replace(params={**make().params, "bias": jnp.zeros(())}),
            r"params/bias is bfloat16\[\] in the .* and float32\[\] here",
        ),
        (make().replace(loop={}), r"loop/loop/beta is float32\[\] in the checkpoint and absent here"),
        (make(optax.sgd(0.1, momentum=0.9)), "and [0-9]+ more leaves differ"),
    ],
    ids=["shape", "dtype", "extra", "optimiser"],
)
def test_another_state_is_refused_by_name_and_both_sides(tmp_path, like, says):
    save(tmp_path, 1, 2)
    with pytest.raises(checkpoint.Mismatch, match=says) as caught:
        checkpoint.restore(tmp_path, like)
    assert "\n" not in str(caught.value)
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_parameters_alone_of_a_chosen_step(tmp_path):
    save(tmp_path, 1, 2)
    same(checkpoint.load_params(tmp_path, make().params), make(scale=2).params)
    same(checkpoint.load_params(tmp_path, make().params, step=1), make(scale=1).params)
    with pytest.raises(FileNotFoundError, match=r"no step 3; it has \[1, 2\]"):
        checkpoint.load_params(tmp_path, make().params, step=3)


def test_saved_on_one_mesh_and_restored_on_another(tmp_path, tiny):
    def on(**axes):
        mesh = shard.make_mesh(**axes)
        where = shard.shardings(jax.eval_shape(tiny.model.init, jax.random.key(0)), mesh)
        return TrainState(jnp.int32(1), shard.put(tiny.params, where), (), {}), where

    state, _ = on(data=4, fsdp=2)
    with checkpoint.Saver(tmp_path, keep=1) as saver:
        saver.save(1, state, {})
    other, where = on(data=4, tensor=2)
    blank = other.replace(params=jax.tree.map(lambda x: x * 0, other.params))
    found = checkpoint.restore(tmp_path, blank).state
    same(found.params, tiny.params)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), found.params, where))
