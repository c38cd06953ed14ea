"""Checkpoints: what comes back is what was saved, and what cannot be saved or cannot come back is said."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign import shard
from jaxalign.train import checkpoint
from jaxalign.types import Batch, Rollout, TrainState


@cache
def make(tx=None, scale=1.0, width=65):
    """A state whose kernel is large enough to be written to a file of its own; smaller arrays share one."""
    kernel = scale * jnp.asarray(np.random.default_rng(0).normal(size=(64, width)), jnp.float32)
    params = {"layer": {"kernel": kernel}, "bias": jnp.full((), scale, jnp.bfloat16)}
    return TrainState(jnp.int32(7), params, (tx or optax.adam(0.1)).init(params), {"beta": jnp.float32(0.1)})


def save(folder, *steps, keep=3, **kwargs):
    with checkpoint.Saver(folder, keep=keep) as saver:
        for step in steps:
            saver.save(step, make(scale=step, **kwargs), {"seconds": step / 3}, wait=True)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def names(folder):
    return sorted(found.name for found in folder.iterdir())


# ---------------------------------------------------------------- there and back


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


def test_all_that_a_loop_may_carry_comes_back_where_it_was(tmp_path):
    """An unfinished rollout split over rows, every kind of number, leaves of no elements, arrays that JAX may move."""
    rows = NamedSharding(shard.make_mesh(data=4, fsdp=2), P(shard.ROWS))
    batch = Batch(jnp.ones((8, 3), jnp.int32), jnp.ones((8, 3), jnp.int32), jnp.ones((8, 3)))
    rollout = Rollout(batch, *(jnp.arange(24.0).reshape(8, 3) + i for i in range(6)), jnp.arange(8.0))
    kinds = ("uint32", "bool", "float16", "float8_e4m3fn")
    loop = {
        "rollout": jax.device_put(rollout, rows),
        "kinds": {kind: jnp.asarray([0, 1, 1], kind) for kind in kinds},
        "nothing": (jnp.zeros((0, 3)), None, {}),
    }
    state = make().replace(loop=loop, guard={"applied": jnp.int32(5), "mean": jnp.float32(jnp.nan)})
    with checkpoint.Saver(tmp_path, keep=1) as saver:
        saver.save(1, state, {})
    found = checkpoint.restore(tmp_path, jax.tree.map(jnp.zeros_like, state)).state
    same(found, state)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(state)):
        assert x.sharding == y.sharding and x.committed == y.committed


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    change = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    # 16 MiB: still being written when it is changed
    state = TrainState(jnp.int32(0), {"kernel": jnp.zeros((1 << 22,))}, (), {})
    with checkpoint.Saver(tmp_path, keep=1) as saver:
        saver.save(1, state, {})
        for _ in range(5):
            state = change(state)
    kernel = checkpoint.load_params(tmp_path, state.params)["kernel"]
    assert float(kernel.min()) == float(kernel.max()) == 0.0


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


def test_parameters_alone_of_a_chosen_step(tmp_path):
    save(tmp_path, 1, 2)
    same(checkpoint.load_params(tmp_path, make().params), make(scale=2).params)
    same(checkpoint.load_params(tmp_path, make().params, step=1), make(scale=1).params)
    on_host = checkpoint.load_params(tmp_path, jax.eval_shape(lambda: make().params))
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(on_host))
    same(on_host, make(scale=2).params)
    with pytest.raises(FileNotFoundError, match=r"no step 3; it has \[1, 2\]"):
        checkpoint.load_params(tmp_path, make().params, step=3)


def test_parameters_of_a_run_that_goes_on_and_deletes_what_is_read(tmp_path):
    state = TrainState(jnp.int32(0), {str(name): jnp.ones((64, 65)) for name in range(8)}, (), {})

    def go_on():
        for step in range(1, 20):
            saver.save(step, state, {}, wait=True)

    with checkpoint.Saver(tmp_path, keep=1) as saver:
        saver.save(0, state, {}, wait=True)
        run = threading.Thread(target=go_on)
        run.start()
        while run.is_alive():
            same(checkpoint.load_params(tmp_path, state.params), state.params)
    assert checkpoint.steps(tmp_path) == [19]


# ---------------------------------------------------------------- which steps stay


SCORES = {1: 0.5, 2: 0.9, 3: float("nan"), 4: 0.1, 5: None, 6: 0.3}


@pytest.mark.parametrize(
    "rules, kept",
    [
        ({"keep": 2}, [5, 6]),
        ({"keep": 1, "keep_every": 3}, [3, 6]),
        ({"keep": 1, "best": "gold"}, [2, 6]),
        ({"keep": 1, "best": "-gold"}, [4, 6]),
        ({"keep": 2, "keep_every": 4, "best": "gold"}, [2, 4, 5, 6]),
        ({"keep": 1, "best": "other"}, [6]),
    ],
    ids=["last", "every", "largest", "smallest", "all", "unknown"],
)
def test_the_last_the_regular_and_the_best_stay(tmp_path, rules, kept):
    """Also where the run was interrupted in between: the metrics of older steps are read from them."""
    state = TrainState(jnp.int32(0), {"w": jnp.ones(3)}, (), {})
    for steps in ((1, 2, 3), (4, 5, 6)):
        with checkpoint.Saver(tmp_path, **rules) as saver:
            for step in steps:
                metrics = {} if SCORES[step] is None else {"gold": SCORES[step]}
                saver.save(step, state, {}, metrics=metrics, wait=True)
    assert names(tmp_path) == [str(step) for step in kept]


def test_a_run_that_keeps_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep = 0"):
        checkpoint.Saver(tmp_path, keep=0)


def test_a_save_waits_for_the_one_before(tmp_path):
    state = TrainState(jnp.int32(0), {"w": jax.random.normal(jax.random.key(0), (1 << 21,))}, (), {})
    with checkpoint.Saver(tmp_path, keep=9) as saver:
        for step in range(1, 5):
            saver.save(step, state, {})
            assert set(range(1, step)) <= set(checkpoint.steps(tmp_path))
    assert checkpoint.steps(tmp_path) == [1, 2, 3, 4] and saver.failures == []


# ---------------------------------------------------------------- what cannot be saved


@contextmanager
def files_of_at_most(size):
    """Writes that go on behind so many bytes fail, as they do on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def big(scale):
    return make().replace(params={"kernel": scale * jax.random.normal(jax.random.key(1), (1 << 18,))})  # 1 MiB


def wait_for(what):
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_full_disk_is_told_and_does_no_lasting_harm(tmp_path, capfd):
    with checkpoint.Saver(tmp_path, keep=2) as saver:
        saver.save(1, big(1), {}, wait=True)
        with files_of_at_most(200_000):
            for step in (2, 3):
                state = big(step)
                saver.save(step, state, {})
                wait_for(lambda: saver.failures)
                told = saver.failures.pop()
                assert told.startswith(f"checkpoint {step} was not saved: ") and "File too large" in told
                assert told.endswith(". Steps [1] are there.") and "\n" not in told and saver.failures == []
                assert names(tmp_path) == ["1"]
            with pytest.raises(OSError, match="checkpoint 4 was not saved: .*File too large") as caught:
                saver.save(4, big(4), {}, wait=True)
            assert "\n" not in str(caught.value) and saver.failures == []
        saver.save(5, big(5), {})
        saver.save(6, big(6), {}, wait=True)
        assert names(tmp_path) == ["5", "6"] and saver.failures == []
    same(checkpoint.restore(tmp_path, big(0)).state.params, big(6).params)
    assert capfd.readouterr().err == ""


def test_a_failure_that_the_last_save_met_is_not_swallowed(tmp_path):
    with files_of_at_most(200_000), pytest.raises(OSError, match="File too large"), checkpoint.Saver(tmp_path, keep=1) as saver:
        saver.save(1, big(1), {})
    with files_of_at_most(200_000), pytest.raises(KeyError) as caught, checkpoint.Saver(tmp_path, keep=1) as saver:
        saver.save(1, big(1), {})
        raise KeyError("the run ends for another reason")
    assert "checkpoint 1 was not saved" in caught.value.__notes__[0] and names(tmp_path) == []


def test_what_does_not_fit_is_not_begun(tmp_path):
    petabytes = make().replace(params={"kernel": np.broadcast_to(np.float32(0), (1 << 50,))})
    with checkpoint.Saver(tmp_path, keep=1) as saver:
        saver.save(1, petabytes, {})
        assert len(saver.failures) == 1 and "not saved: it needs 4,503,599,627 MB, and" in saver.failures.pop()
        with pytest.raises(OSError, match="No other is there"):
            saver.save(1, petabytes, {}, wait=True)
        assert names(tmp_path) == []
        saver.save(1, make(), {}, wait=True)


def test_a_folder_that_is_lost_is_told(tmp_path):
    with checkpoint.Saver(tmp_path / "lost", keep=1) as saver:
        (tmp_path / "lost").rmdir()
        with pytest.raises(OSError, match="checkpoint 1 was not saved: FileNotFoundError"):
            saver.save(1, make(), {}, wait=True)


def test_a_step_that_is_there_is_not_written_over(tmp_path):
    save(tmp_path, 1)
    with checkpoint.Saver(tmp_path, keep=1) as saver, pytest.raises(OSError, match=r"1 already exists.*Steps \[1\] are there"):
        saver.save(1, make(scale=5), {}, wait=True)
    same(checkpoint.restore(tmp_path, make()).state, make(scale=1))


def save_for_ever(folder):
    with checkpoint.Saver(folder, keep=2) as saver:
        for step in range(1, 1000):
            saver.save(step, big(step), {}, wait=True)


def program(call, *args):
    """Another Python that calls a function of this file."""
    code = f"import sys, test_checkpoint; test_checkpoint.{call}(*sys.argv[1:])"
    cache = jax.config.jax_compilation_cache_dir
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_killed_in_the_middle_of_a_save(tmp_path):
    process = program("save_for_ever", tmp_path)
    try:
        wait_for(lambda: len(checkpoint.steps(tmp_path)) > 1 and any(checkpoint.UNFINISHED in name for name in names(tmp_path)))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    newest = checkpoint.steps(tmp_path)[-1]
    found = checkpoint.restore(tmp_path, big(0))
    assert (found.step, found.skipped) == (newest, {})
    same(found.state.params, big(newest).params)
    (tmp_path / f"{newest + 9}{checkpoint.UNFINISHED}" / "params").mkdir(parents=True)
    with checkpoint.Saver(tmp_path, keep=1) as saver:
        saver.save(newest + 1, big(1), {})
    assert names(tmp_path) == [str(newest + 1)]


# ---------------------------------------------------------------- what was damaged


PLAIN = optax.sgd(0.1)  # whose state has no arrays
ITEMS = ("params", "loop")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with the steps 1 and 2. Step 2 may be damaged: `step_two` puts it right again."""
    folder = tmp_path_factory.mktemp("two")
    save(folder, 1, 2, tx=PLAIN)
    shutil.copytree(folder / "2", folder / "whole")
    return folder


def step_two(two):
    for found in two.glob("2*"):
        shutil.rmtree(found) if found.is_dir() and not found.is_symlink() else found.unlink()
    return Path(shutil.copytree(two / "whole", two / "2"))


def aside(two, what) -> bool:
    """Whether the damage to step 2 was seen, and step 1 came instead. Where it was not seen, nothing is different."""
    found = checkpoint.restore(two, make(PLAIN))
    if found.step == 2:
        assert found.meta == {"seconds": 2 / 3} and found.skipped == {}, what
        same(found.state, make(PLAIN, scale=2))
        return False
    assert found.step == 1 and list(found.skipped) == [2] and 10 < len(found.skipped[2]) < 400, what
    same(found.state, make(PLAIN, scale=1))
    assert names(two) == ["1", "2.corrupt", "whole"]
    return True


def flip(file, place, bit):
    data = bytearray(file.read_bytes())
    data[min(int(place * len(data)), len(data) - 1)] ^= 1 << bit
    file.write_bytes(data)


def parts(whole, files=True):
    return sorted(found.relative_to(whole) for found in whole.rglob("*") if found.is_file() == files)


def data_file(step):
    """The one that holds the kernel."""
    return max((step / "params").rglob("d/*"), key=lambda file: file.stat().st_size)


@pytest.mark.parametrize("place, bit", [(0.0, 0), (0.5, 7), (1.0, 1)])
def test_a_flipped_bit_in_any_file_is_seen_or_harmless(two, place, bit):
    seen = set()
    for part in parts(two / "whole"):
        flip(step_two(two) / part, place, bit)
        if aside(two, part):
            seen.add(part)
    record = Path("meta/metadata")
    assert {record, *(Path(f"{item}/manifest.ocdbt") for item in ITEMS)} <= seen
    if 0 < place < 1:
        assert data_file(two / "whole").relative_to(two / "whole") in seen


def dangle(path):
    path.unlink() if path.is_file() else shutil.rmtree(path)
    path.symlink_to("nowhere")


def obstruct(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        obstruct,
        dangle,
    ],
    ids=["halved", "emptied", "deleted", "directory", "dangling"],
)
def test_a_file_that_is_lost_is_seen_or_harmless(two, damage, capfd):
    seen = set()
    for part in parts(two / "whole"):
        damage(step_two(two) / part)
        if aside(two, part):
            seen.add(part)
    needed = {Path("meta/metadata"), *(Path(f"{item}/manifest.ocdbt") for item in ITEMS)}
    assert {*needed, data_file(two / "whole").relative_to(two / "whole")} <= seen
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("damage", [shutil.rmtree, dangle], ids=["deleted", "dangling"])
def test_a_folder_that_is_lost_is_seen_or_harmless(two, damage):
    seen = set()
    for part in parts(two / "whole", files=False):
        damage(step_two(two) / part)
        if aside(two, part):
            seen.add(part)
    assert {Path(name) for name in (*ITEMS, "meta", "params/d")} <= seen


@pytest.mark.parametrize("made", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")], ids=["folder", "file", "link"])
def test_what_only_has_the_name_of_a_step_is_set_aside(two, made):
    shutil.rmtree(step_two(two))
    made(two / "2")
    assert aside(two, made)


def test_arrays_of_another_step_or_another_shape_are_not_taken(two, tmp_path):
    """The record says what the arrays must be: where only they differ, the step is damaged, and not of another model."""
    save(tmp_path, 1, tx=PLAIN, width=64)
    for other, reason in ((two / "1", "not what was saved: params/.* and 1 more leaves"), (tmp_path / "1", ".")):
        shutil.rmtree(step_two(two) / "params")
        shutil.copytree(other / "params", two / "2" / "params")
        found = checkpoint.restore(two, make(PLAIN))
        assert found.step == 1
        assert re.search(reason, found.skipped[2])


def test_what_is_set_aside_may_be_saved_and_go_bad_again(two):
    for name in ("2.corrupt", "2.corrupt1"):
        if not (two / "2").exists():
            shutil.copytree(two / "whole", two / "2")
        (two / "2" / "meta" / "metadata").write_text("{")
        assert checkpoint.restore(two, make(PLAIN)).skipped[2].startswith("JSONDecodeError")
        assert (two / name).is_dir() and checkpoint.steps(two) == [1]
    step_two(two)


def test_another_model_is_not_damage(tmp_path):
    save(tmp_path, 1, 2)
    flip(data_file(tmp_path / "2"), 0.5, 3)
    with pytest.raises(checkpoint.Mismatch):
        checkpoint.restore(tmp_path, make(width=64))
    assert names(tmp_path) == ["1", "2"]


def test_where_nothing_can_be_read_nothing_is_touched(tmp_path):
    save(tmp_path, 1, 2)
    for step in (1, 2):
        flip(data_file(tmp_path / str(step)), 0.5, 3)
    with pytest.raises(
        ValueError, match="(?s)no checkpoint in .* can be read .step 2: not what .*step 1: not what .* start again"
    ) as caught:
        checkpoint.restore(tmp_path, make())
    assert names(tmp_path) == ["1", "2"] and "\n" not in str(caught.value)
    for step in (1, 2):
        (tmp_path / str(step)).rename(tmp_path / f"{step}.corrupt")
    with pytest.raises(ValueError, match="1.corrupt was set aside; 2.corrupt was set aside.*Delete the folder to start again"):
        checkpoint.restore(tmp_path, make())


def test_without_the_digests_arrays_are_taken_as_they_come(two):
    flip(data_file(step_two(two)), 0.5, 3)
    kernel = checkpoint.restore(two, make(PLAIN), verify=False).state.params["layer"]["kernel"]
    assert kernel.shape == (64, 65) and (kernel != make(scale=2).params["layer"]["kernel"]).any()
    same(checkpoint.load_params(two, make().params, verify=False)["layer"]["kernel"], kernel)


def test_damaged_parameters_of_another_run_are_refused_and_left(two):
    flip(data_file(step_two(two)), 0.5, 3)
    with pytest.raises(
        ValueError, match=r"step 2 in .* cannot be read: not what was saved: params/layer/kernel.*steps there: \[1\]"
    ):
        checkpoint.load_params(two, make().params)
    assert names(two) == ["1", "2", "whole"]
    same(checkpoint.load_params(two, make().params, step=1), make(scale=1).params)


OTHERS = {
    "shape": (lambda: make(PLAIN, width=2), r"params/layer/kernel is float32\[64,65\] in the checkpoint and float32\[64,2\] here"),
    "dtype": (
        lambda: make(PLAIN).replace(params=jax.tree.map(jnp.float32, make().params)),
        r"params/bias is bfloat16\[\] in the .* and float32\[\] here. ",
    ),
    "extra": (lambda: make(PLAIN).replace(loop={}), r"loop/loop/beta is float32\[\] in the checkpoint and absent here. "),
    "missing": (lambda: make(optax.sgd(0.1, momentum=0.9)), "opt/0/trace/bias is absent in the .*, and 1 more leaves differ"),
}


@pytest.mark.parametrize("like, says", OTHERS.values(), ids=OTHERS)
def test_another_state_is_refused_by_name_and_both_sides(two, like, says):
    step_two(two)
    with pytest.raises(checkpoint.Mismatch, match=says) as caught:
        checkpoint.restore(two, like())
    assert "\n" not in str(caught.value)
    assert checkpoint.steps(two) == [1, 2]


# ---------------------------------------------------------------- digests


def mix(x):
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def digest(x):
    """In NumPy: sums of mixes of each element's bits and its number."""
    bits = np.ascontiguousarray(x).view(f"uint{8 * x.dtype.itemsize}").astype(np.uint32).ravel()
    first = mix(bits ^ mix(np.arange(1, bits.size + 1, dtype=np.uint32)))
    return "".join(f"{int(part.sum(dtype=np.uint32)):08x}" for part in (first, mix(first ^ np.uint32(0x9E3779B9))))


def test_digests_are_of_the_bits_and_their_places_on_any_mesh(tmp_path):
    """A checkpoint of today must be whole tomorrow: the record has these numbers, whatever the arrays are split over."""
    draw = np.random.default_rng(3)
    kinds = ("float32", "bfloat16", "int8", "bool")
    hosts = {kind: jnp.asarray(draw.normal(size=(8, 4)) * 3, kind) for kind in kinds}
    hosts |= {"scalar": jnp.float32(-0.0), "nothing": jnp.zeros((0, 2)), "cube": jnp.arange(64.0).reshape(8, 4, 2)}
    where = NamedSharding(shard.make_mesh(data=2, fsdp=4), P(shard.ROWS))
    split = {name: jax.device_put(x, where) if x.ndim else x for name, x in hosts.items()}
    for step, params in enumerate((hosts, split)):
        with checkpoint.Saver(tmp_path, keep=2) as saver:
            saver.save(step, TrainState(jnp.int32(0), params, (), {}), {})
        leaves = json.loads((tmp_path / str(step) / "meta" / "metadata").read_text())["leaves"]
        assert {name: leaves[f"params/{name}"][1] for name in hosts} == {name: digest(x) for name, x in hosts.items()}
    assert leaves["params/bfloat16"][0] == "bfloat16[8,4]" and leaves["params/scalar"][1] != digest(np.float32(0.0))


# ---------------------------------------------------------------- two processes


def one_of_two(port, rank, folder):
    """Two steps are saved by both; of the second, what process 1 wrote is changed; both come to the first."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
    folder, mesh = Path(folder), shard.make_mesh(fsdp=4)

    def state(scale):
        draw = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
        where = {"kernel": NamedSharding(mesh, P("fsdp")), "copy": NamedSharding(mesh, P())}
        params = shard.put({"kernel": scale * draw, "copy": scale * draw[0]}, where)
        return TrainState(shard.put(np.int32(scale), NamedSharding(mesh, P())), params, (), {}, {})

    with checkpoint.Saver(folder, keep=2) as saver:
        for step in (1, 2, 3):
            saver.save(step, state(step), {"step": step}, wait=True)
        lacking = state(4).replace(guard=np.broadcast_to(np.float32(0), (1 << 50,)))
        with pytest.raises(OSError, match="checkpoint 4 was not saved|another process could not"):
            saver.save(4, lacking, {}, wait=True)
    found = checkpoint.restore(folder, state(0))
    assert found.step == 3 and found.skipped == {}
    if rank == "1":
        flip(max((folder / "3" / "params" / "ocdbt.process_1").rglob("d/*"), key=lambda file: file.stat().st_size), 0.5, 3)
    shard.together("damaged")
    found = checkpoint.restore(folder, state(0))
    assert found.step == 2 and found.meta == {"step": 2} and list(found.skipped) == [3]
    same(shard.fetch(found.state), shard.fetch(state(2)))


@pytest.mark.slow
def test_two_processes_save_and_judge_together(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [program("one_of_two", port, rank, tmp_path) for rank in range(2)]
    try:
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    assert names(tmp_path) == ["2", "3.corrupt"]
    params = checkpoint.load_params(tmp_path, {"kernel": jnp.zeros((64, 64)), "copy": jnp.zeros(64)})
    np.testing.assert_array_equal(params["kernel"], 2 * np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32))
