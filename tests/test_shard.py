"""Where arrays live, on one process and on two."""

import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxalign import shard
from jaxalign.models import decoder
from jaxalign.objectives import supervised
from jaxalign.train import optim
from jaxalign.train.step import make_step
from jaxalign.types import Batch, TrainState

CONFIG = decoder.DecoderConfig(vocab=14, width=8, layers=2, heads=4, kv_heads=2, head_dim=4, mlp=12, context=64)


def boxed(shape, *names):
    return shard.Declared(jax.ShapeDtypeStruct(shape, jnp.float32), names)


def test_a_mesh_fills_one_axis_and_refuses_what_does_not_multiply():
    assert shard.make_mesh().shape == {"data": 8, "fsdp": 1, "tensor": 1, "sequence": 1}
    assert shard.make_mesh(data=2, fsdp=-1, tensor=2).shape == {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}
    assert shard.make_mesh(data=1, devices=jax.devices()[:1]).size == 1
    for sizes in ({"data": 3}, {"data": -1, "fsdp": 3}, {"data": 16}, {"data": -1, "fsdp": -1}, {"data": 0}):
        with pytest.raises(ValueError, match="8"):
            shard.make_mesh(**sizes)


def test_axes_go_where_the_rules_say():
    assert shard.spec(("layers", "embed", "heads", "head")) == P(None, "fsdp", "tensor", None)
    assert shard.spec(("vocab", None)) == P("tensor", None)
    with pytest.raises(ValueError, match="one mesh axis"):
        shard.spec(("heads", "mlp"))
    with pytest.raises(KeyError, match="breadth"):
        shard.spec(("embed", "breadth"))


def test_every_parameter_declares_axes_that_fit_it():
    """And every large one is split over both mesh axes that split parameters."""
    abstract = jax.eval_shape(decoder.build(CONFIG).init, jax.random.key(0))
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract, is_leaf=lambda x: isinstance(x, shard.Declared))
    for path, leaf in leaves:
        assert isinstance(leaf, shard.Declared), path
        assert len(leaf.names) == leaf.value.ndim, path
        if "layers" in jax.tree_util.keystr(path):
            assert leaf.names[0] == "layers" and leaf.value.shape[0] == CONFIG.layers, path
        if leaf.value.ndim - ("layers" in leaf.names) > 1:
            assert set(shard.spec(leaf.names)) >= {"fsdp", "tensor"}, path


def test_an_axis_that_does_not_divide_is_named():
    mesh = shard.make_mesh(data=2, fsdp=2, tensor=2)
    with pytest.raises(ValueError, match=r"\['a'\]\['kernel'\].*'mlp' of 5.*'tensor' of 2"):
        shard.shardings({"a": {"kernel": boxed((4, 5), "embed", "mlp")}}, mesh)


def start(key):
    params = decoder.build(CONFIG).init(key)
    return TrainState(jnp.int32(0), params, optim.adam(learning_rate=0.01, steps=10).init(params))


def test_a_state_is_made_in_parts():
    """Every device holds its part alone, of the parameters and of Adam's moments; the numbers are those of one device."""
    mesh = shard.make_mesh(data=2, fsdp=2, tensor=2)
    state, where = shard.create(start, mesh, jax.random.key(0))
    assert jax.tree.map(lambda x: x.sharding, state) == where
    split = 0
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(where)):
        parts = 2 ** sum(axis is not None for axis in sharding.spec)
        assert all(part.data.size * parts == leaf.size for part in leaf.addressable_shards)
        split += parts == 4
    assert split == 3 * 9  # embed, head, q, k, v, o, gate, up, down: and two moments of each
    one = shard.unbox(jax.jit(start)(jax.random.key(0)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), shard.fetch(state), one)


def test_rows_are_placed_and_fetched():
    mesh = shard.make_mesh(data=2, fsdp=2, tensor=2)
    rows = {"a": np.arange(24.0).reshape(8, 3), "b": np.arange(8)}
    placed = shard.place(rows, mesh)
    assert {part.data.shape for part in placed["a"].addressable_shards} == {(2, 3)}
    jax.tree.map(np.testing.assert_array_equal, shard.fetch(placed), rows)
    with pytest.raises(ValueError, match="6 rows do not divide over data x fsdp = 4"):
        shard.place({"a": np.zeros((6, 2))}, mesh)


def test_rows_are_constrained_inside_a_mesh_and_untouched_outside():
    x = jnp.ones((8, 4))
    assert shard.constrain_rows(x) is x
    mesh = shard.make_mesh(data=4, tensor=2)
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: shard.constrain_rows(2 * x))(x)
    assert {part.data.shape for part in y.addressable_shards} == {(2, 4)}


# --------------------------------------------------------- two processes


def train(mesh):
    """Three updates of a small model from text. -> (parameters, losses), whole, on every process."""
    tx = optim.adam(learning_rate=0.01, steps=10, eps=1e-5)
    state, where = shard.create(start, mesh, jax.random.key(0))
    step = make_step(partial(supervised.sft, model=decoder.build(CONFIG)), tx, accumulate=2)
    run, draw, losses = shard.compile_step(step, mesh, where), np.random.default_rng(6), []
    for _ in range(3):
        tokens, segments = draw.integers(0, 14, (16, 6), np.int32), np.ones((16, 6), np.int32)
        batch = Batch(tokens, segments, draw.integers(0, 2, tokens.shape).astype(np.float32))
        state, metrics = run(state, shard.place(batch, mesh))
        losses.append(float(shard.fetch(metrics["loss/total"])))
    return jax.tree.leaves(shard.fetch(state.params)), losses


def one_of_two(port, rank, out):
    """What each of the two processes runs, with half of the devices."""
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
    assert len(jax.devices()) == 8 and len(jax.local_devices()) == 4
    params, losses = train(shard.make_mesh(data=4, fsdp=2))
    np.savez(out, *params, losses=losses)


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    program = "import sys, test_shard; test_shard.one_of_two(*sys.argv[1:])"
    files = [tmp_path / f"{rank}.npz" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(port), str(rank), str(file)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, file in enumerate(files)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    params, losses = train(shard.make_mesh(data=4, fsdp=2))
    for file in files:
        got = np.load(file)
        np.testing.assert_allclose(got["losses"], losses, atol=1e-5)
        for number, leaf in enumerate(params):
            np.testing.assert_allclose(got[f"arr_{number}"], leaf, atol=1e-5)
