"""The loop: a run that was interrupted, in whatever way, is the run that was not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import shard
from jaxalign.objectives.supervised import sft
from jaxalign.train import checkpoint, log, loop
from jaxalign.train.step import make_step
from jaxalign.types import Batch, TrainState

RUN = {"config": {"optim": {"rate": 0.1}}, "log_every": 1, "save_every": 4, "keep": 2}


def regression():
    """An iteration in the manner of PPO: two compiled updates, and a coefficient that is carried on. -> (step, state)"""
    tx = optax.adam(0.1)

    @partial(jax.jit, donate_argnums=0)
    def update(state, x):
        def loss(params):
            return ((x @ params["w"] - 1.0) ** 2).mean() + state.loop["beta"] * (params["w"] ** 2).sum()

        value, grads = jax.value_and_grad(loss)(state.params)
        updates, opt = tx.update(grads, state.opt)
        beta = state.loop["beta"] * jnp.where(value > 0.5, 1.1, 0.9)
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt, {"beta": beta}), value

    def step(state, data):
        state, _ = update(state, data)
        state, value = update(state, data)
        samples = [{"prompt": "p", "response": f"{float(data.sum()):.6f}"}]
        return state, {"loss/total": value, "kl/beta": jnp.copy(state.loop["beta"]), "samples": samples}

    params = {"w": jnp.zeros(3)}
    return step, TrainState(jnp.int32(0), params, tx.init(params), {"beta": jnp.float32(0.1)})


def data_at(i):
    return jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (8, 3))


def fit(workdir, stop, *, step=None, data_at=data_at, **more):
    made, state = regression()
    return loop.fit(step or made, state, data_at, workdir=workdir, stop=stop, **{**RUN, **more})


def records(workdir):
    """Both logs, without what may differ."""
    kept = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in log.read_lines(workdir / "metrics.jsonl")]
    return kept, (workdir / "samples.jsonl").read_bytes()


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of 40 steps. -> (folder, final state)"""
    folder = tmp_path_factory.mktemp("whole")
    return folder, fit(folder, 40)


def test_a_run_that_was_stopped_is_the_run_that_was_not(tmp_path, whole, capsys):
    class Crash(Exception):
        pass

    def failing(i):
        if i == 14:
            raise Crash
        return data_at(i)

    with pytest.raises(Crash):
        fit(tmp_path, 40, data_at=failing)
    assert checkpoint.steps(tmp_path / "checkpoints") == [8, 12]
    capsys.readouterr()
    state = fit(tmp_path, 40)
    assert "resuming at step 12 of 40" in capsys.readouterr().out
    same(state, whole[1])
    assert int(state.step) == 80
    assert records(tmp_path) == records(whole[0])
    assert [line["step"] for line in records(tmp_path)[0]] == list(range(1, 41))
    fit(tmp_path, 40)
    assert "resuming at step 40 of 40" in (said := capsys.readouterr().out) and "nothing is left to do" in said
    assert records(tmp_path) == records(whole[0])


def test_supervised_training_resumes_on_its_mesh_and_on_another(tmp_path, tiny):
    objective = partial(sft, model=tiny.model, label_smoothing=0.0, z_loss=0.0)
    tx = optax.adamw(1e-2)

    def make(params):
        return TrainState(jnp.int32(0), params, tx.init(params))

    def on(**axes):
        mesh = shard.make_mesh(**axes)
        where = shard.shardings(jax.eval_shape(lambda key: make(tiny.model.init(key)), jax.random.key(0)), mesh)
        step = shard.compile_step(make_step(objective, tx), mesh, where)

        def data_at(i):
            tokens = np.random.default_rng(i).integers(0, 13, (8, 6)).astype(np.int32)
            return shard.place(Batch(tokens, np.ones_like(tokens), np.ones((8, 6), np.float32)), mesh)

        def run(folder, stop):
            state = shard.put(jax.tree.map(np.asarray, make(tiny.params)), where)
            return shard.fetch(loop.fit(step, state, data_at, workdir=tmp_path / folder, stop=stop, **RUN))

        return run

    here, there = on(data=4, fsdp=2), on(data=4, tensor=2)
    once = here("once", 6)
    here("twice", 3)
    shutil.copytree(tmp_path / "twice", tmp_path / "moved")
    same(here("twice", 6), once)
    assert records(tmp_path / "twice") == records(tmp_path / "once")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), there("moved", 6), once)


def start(folder, stop=40):
    """The same run in a process of its own, 30 ms a step."""
    code = (
        "import sys, time, jax; jax.config.update('jax_num_cpu_devices', 8)\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path; import test_loop as t\n"
        f"t.fit(Path({str(folder)!r}), {stop}, data_at=lambda i: time.sleep(0.03) or t.data_at(i))\n"
        "print('came to', 'the end')"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(process, ready):
    for _ in range(1200):
        if ready():
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    raise AssertionError("nothing came of it")


def test_interrupted_terminated_and_killed(tmp_path, whole):
    """One run, four processes: SIGTERM, SIGINT, SIGKILL, and to the end."""
    done = 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        process = start(tmp_path)
        wait_for(process, lambda: len(log.read_lines(tmp_path / "metrics.jsonl")) >= done + 6)  # noqa: B023 (called here)
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
        assert "came to the end" not in said
        if done:
            assert f"resuming at step {done} of 40" in said
        saved = checkpoint.steps(tmp_path / "checkpoints")[-1]
        if number == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode == 128 + number
            assert f"{number.name}: stopped at step {saved} of 40, saved. The same command resumes: " in said
            assert [line["step"] for line in records(tmp_path)[0]] == list(range(1, saved + 1))
            assert saved >= done + 6
        assert saved < len(records(tmp_path)[0]) if number == signal.SIGKILL else saved < 40
        done = saved
    process = start(tmp_path)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "came to the end" in said
    assert records(tmp_path) == records(whole[0])
    same(checkpoint.restore(tmp_path / "checkpoints", regression()[1]).state, whole[1])


def test_signal_handlers_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def stopping(done, state):
        if done:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as ended:
        fit(tmp_path, 9, hooks=[stopping])
    assert ended.value.code == 143
    assert checkpoint.steps(tmp_path / "checkpoints") == [1]
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_an_unreadable_newest_checkpoint_is_said_and_made_good(tmp_path, whole, capsys):
    fit(tmp_path, 11)
    (tmp_path / "checkpoints" / "11" / "meta" / "metadata").write_text("{")
    capsys.readouterr()
    state = fit(tmp_path, 40)
    said = capsys.readouterr().out
    assert "WARNING: checkpoint 11 cannot be read and was set aside as 11.corrupt (JSONDecodeError" in said
    assert "resuming at step 8 of 40" in said
    same(state, whole[1])
    assert records(tmp_path) == records(whole[0])


def test_a_changed_config_is_printed_and_another_identity_refused(tmp_path, capsys):
    fit(tmp_path, 2, identity={"tokenizer": "abc"})
    fit(tmp_path, 3, identity={"tokenizer": "abc"}, config={"optim": {"rate": 0.2}})
    assert "config changed: optim.rate: 0.1 -> 0.2" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text()) == {"optim": {"rate": 0.2}}
    with pytest.raises(ValueError, match="has tokenizer = abc, this command has def"):
        fit(tmp_path, 4, identity={"tokenizer": "def"})
    with pytest.raises(ValueError, match="has tokenizer = abc, this command has absent"):
        fit(tmp_path, 4)
    assert json.loads((tmp_path / "config.json").read_text()) == {"optim": {"rate": 0.2}}
    fit(tmp_path, 4, identity={"tokenizer": "abc"})


@pytest.mark.parametrize("at, saved", [(0, []), (3, []), (4, [4]), (6, [4])])
def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(tmp_path, at, saved):
    with pytest.raises(FloatingPointError, match=f"loss/total is nan at step {at + 1}. Nothing of it was saved"):
        fit(tmp_path, 9, data_at=lambda i: data_at(i) * (jnp.nan if i == at else 1.0), log_every=100)
    assert checkpoint.steps(tmp_path / "checkpoints") == saved
    last = log.read_lines(tmp_path / "metrics.jsonl")[-1]
    assert last["step"] == at + 1 and last["loss/total"] is None


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    def step(state, data):
        return state.replace(params={"w": state.params["w"] / 0.0}), {"loss/total": jnp.float32(1.0)}

    with pytest.raises(FloatingPointError, match="the parameters are not finite after step 4, though its loss is"):
        fit(tmp_path, 9, step=step)
    assert checkpoint.steps(tmp_path / "checkpoints") == []


def test_hooks_see_each_state_and_may_add_to_its_line(tmp_path):
    seen = []

    def every_third(done, state):
        seen.append((done, int(state.step)))
        return {"eval/twice": 2 * done} if done % 3 == 0 else None

    def run(stop):
        fit(tmp_path, stop, hooks=[every_third], log_every=100, step=lambda *args: quiet(regression()[0], *args))

    run(8)
    assert seen == [(done, 2 * done) for done in range(9)]
    lines = log.read_lines(tmp_path / "metrics.jsonl")
    assert [(line["step"], line.get("eval/twice")) for line in lines] == [(0, 0), (1, None), (3, 6), (6, 12), (8, None)]
    assert "loss/total" not in lines[0] and all("loss/total" in line for line in lines[1:])
    run(10)  # what was seen before is not looked at again
    assert seen[9:] == [(9, 18), (10, 20)]


def test_a_line_is_written_where_new_names_come_up(tmp_path):
    """As at an update that begins with a new rollout."""

    def step(state, i):
        return state, {"loss/total": jnp.float32(i)} | ({"reward/score": jnp.float32(-i)} if i % 4 == 2 else {})

    fit(tmp_path, 9, step=step, data_at=lambda i: i, log_every=100)
    assert [line["step"] for line in log.read_lines(tmp_path / "metrics.jsonl")] == [1, 3, 7, 9]


def quiet(step, *args):
    state, metrics = step(*args)
    return state, {name: x for name, x in metrics.items() if name != "samples"}


def test_a_line_has_the_time_and_the_compilations(tmp_path):
    made, _ = regression()
    wide = jax.jit(lambda x: x * 2)
    fit(tmp_path, 6, step=made, data_at=lambda i: wide(jnp.zeros((8 if i < 4 else 12, 3)))[:8], tokens_per_step=24)
    lines = log.read_lines(tmp_path / "metrics.jsonl")
    assert all(line["time/tokens_per_s"] == 24 / line["time/step_s"] for line in lines)
    count = [line["time/compiles"] for line in lines]
    assert count[0] > 0 and count[2] == count[1] and count[5] > count[3]
    elapsed = lines[-1]["time/elapsed_s"]
    fit(tmp_path, 7, step=made)
    assert log.read_lines(tmp_path / "metrics.jsonl")[-1]["time/elapsed_s"] > elapsed


def test_the_loop_waits_for_no_step_that_it_has_just_begun(tmp_path):
    """The metrics of step i are read after step i + 1 was asked for."""
    order = []

    class Watched:
        shape, dtype = (), np.dtype(np.float32)

        def __init__(self, i):
            self.i = i

        def __array__(self, *args, **kwargs):
            order.append(("read", self.i))
            return np.ones((), np.float32)

    def step(state, i):
        order.append(("step", i))
        return state, {"loss/total": Watched(i)}

    fit(tmp_path, 3, step=step, data_at=lambda i: i, save_every=100)
    first = [order.index(("read", i)) for i in range(3)]
    assert order.index(("step", 1)) < first[0] < order.index(("step", 2)) < first[1] < first[2]


def test_the_clock_saves_too(tmp_path):
    fit(tmp_path, 5, save_every=100, save_seconds=0.0, keep=9)
    assert checkpoint.steps(tmp_path / "checkpoints") == [1, 2, 3, 4, 5]


def test_what_stays_of_the_checkpoints(tmp_path):
    """The last two, each tenth, and the best, which its metric has saved; also where the run was interrupted."""

    def held_out(done, state):
        return {"nll/held_out": abs(done - 7.0)} if done % 7 == 0 else {}

    for stop in (9, 23):
        fit(tmp_path, stop, hooks=[held_out], save_every=5, keep=2, keep_every=10, best="-nll/held_out")
    assert checkpoint.steps(tmp_path / "checkpoints") == [7, 10, 20, 21, 23]


def guarded(bad):
    """A step that skips what is not finite, on data that is not finite at the steps in `bad`. -> (step, state, data_at)"""
    tx = optax.adam(0.1)

    def objective(params, x):
        return ((x @ params["w"] - 1.0) ** 2).sum(), {"weight": jnp.float32(len(x))}

    params = {"w": jnp.zeros(3)}
    step = jax.jit(make_step(objective, tx), donate_argnums=0)
    return step, TrainState(jnp.int32(0), params, tx.init(params)), lambda i: data_at(i) * (jnp.nan if i in bad else 1.0)


def test_a_few_unsound_steps_are_survived_and_too_many_end_the_run_in_its_last_good_state(tmp_path, capsys):
    def run(folder, stop, bad):
        step, state, data = guarded(bad)
        return loop.fit(step, state, data, workdir=tmp_path / folder, stop=stop, **{**RUN, "patience": 3})

    survived = run("few", 12, {0, 4, 5, 8})
    assert (int(survived.step), int(survived.guard["skipped"])) == (8, 4) and np.isfinite(survived.params["w"]).all()
    lines = log.read_lines(tmp_path / "few" / "metrics.jsonl")
    assert [line["train/skipped"] for line in lines] == [1, 1, 1, 1, 2, 3, 3, 3, 4, 4, 4, 4]
    assert [line["loss/total"] is None for line in lines] == [i in {0, 4, 5, 8} for i in range(12)]

    bad = set(range(5, 12))
    with pytest.raises(FloatingPointError, match="4 updates in a row were skipped.*saved at step 9.*behind those rows"):
        run("many", 20, bad)
    good = run("good", 5, set())
    found = checkpoint.restore(tmp_path / "many" / "checkpoints", guarded(bad)[1])
    same(found.state.params, good.params)
    same(found.state.opt, good.opt)
    with pytest.raises(FloatingPointError):  # on from there: the rows are still bad
        run("many", 20, bad)
    assert int(run("many", 20, set()).step) > 5


def test_a_run_that_cannot_be_saved_goes_on_and_says_so(tmp_path, capsys):
    """A file stands where the folder of step 4 wants to be."""

    def in_the_way(done, state):
        if done == 3:
            (tmp_path / "checkpoints" / "4").write_text("")

    fit(tmp_path, 9, hooks=[in_the_way])
    assert capsys.readouterr().out.count("WARNING: checkpoint 4 was not saved") == 1
    found = checkpoint.restore(tmp_path / "checkpoints", regression()[1])
    assert found.step == 9 and not found.skipped
