"""Several processes of one run: what ends one of them ends all, and says so. (Their numbers: test_experiments, test_resume.)"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxalign.train import checkpoint, log

ROOT = Path(__file__).parents[1]
PROGRAM = """
import os, sys, time
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 4)
number, count, place, folder, stop, seconds, stuck = sys.argv[1:]
number, count, folder, stop, seconds = int(number), int(count), Path(folder), int(stop), float(seconds)
if count > 1:
    jax.distributed.initialize(place, count, number, heartbeat_timeout_seconds=10)
import jax.numpy as jnp, numpy as np, optax
from jaxalign import shard
from jaxalign.train import loop
from jaxalign.train.step import make_step
from jaxalign.types import TrainState

def objective(params, x):
    return ((x @ params["w"] - 1.0) ** 2).sum(), {"weight": jnp.float32(x.shape[0])}

mesh = shard.make_mesh(data=2, fsdp=-1)
tx = optax.adam(0.01)
def make():
    params = {"w": shard.Declared(jnp.linspace(0, 1, 64).reshape(16, 4), ("embed", None))}
    return TrainState(jnp.int32(0), params, tx.init(params))
state, where = shard.create(make, mesh)
step = shard.compile_step(make_step(objective, tx), mesh, where)

def data_at(i):
    time.sleep(100 if stuck == f"{number},{i}" else seconds)
    return shard.place(np.random.default_rng(i).normal(size=(8, 16)).astype(np.float32), mesh)

how = {"log_every": 1, "save_every": 20, "keep": 2, "stuck_seconds": 3.0 if stuck else 300.0}
loop.fit(step, state, data_at, workdir=folder, stop=stop, config={}, **how)
print("came to", "the end")
"""


def start(tmp_path, folder, count, *, stop=120, seconds=0.02, stuck=""):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    started = []
    for number in range(count):
        arguments = [number, count, place, tmp_path / folder, stop, seconds, stuck]
        out = open(tmp_path / f"{folder}-{number}-{time.monotonic_ns()}.txt", "w+")  # noqa: SIM115 (closed with the process)
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *map(str, arguments)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
        process.said = Path(out.name)
        started.append(process)
    return started


def ended(processes):
    """-> the exit code and the words of each"""
    codes = [process.wait(timeout=120) for process in processes]
    return codes, [process.said.read_text() for process in processes]


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    yield
    for process in getattr(request.node, "processes", []):
        process.kill()


def wait_for_lines(folder, many, processes):
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(log.read_lines(folder / "metrics.jsonl")) < many:
        assert all(process.poll() is None for process in processes), processes[0].said.read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def losses(folder):
    return [line["loss/total"] for line in log.read_lines(folder / "metrics.jsonl")]


def params(folder):
    like = {"w": jax.ShapeDtypeStruct((16, 4), np.float32)}
    return np.asarray(checkpoint.load_params(folder / "checkpoints", like)["w"])


@pytest.mark.slow
def test_one_process_that_is_told_to_stop_stops_all_at_one_step_and_another_number_goes_on(tmp_path, request):
    codes, said = ended(start(tmp_path, "whole", 1))
    assert codes == [0], said
    request.node.processes = both = start(tmp_path, "two", 2)
    wait_for_lines(tmp_path / "two", 5, both)
    both[1].send_signal(signal.SIGTERM)  # the other one hears of it
    codes, said = ended(both)
    assert codes == [143, 143], said
    at = checkpoint.steps(tmp_path / "two" / "checkpoints")[-1]
    assert 5 <= at < 115 and f"SIGTERM: stopped at step {at} of 120, saved" in said[0]
    codes, said = ended(start(tmp_path, "two", 1, stop=at + 5))  # one process goes on
    assert codes == [0] and f"resuming at step {at}" in said[0], said
    request.node.processes = both = start(tmp_path, "two", 2)  # and two again
    codes, said = ended(both)
    assert codes == [0, 0] and f"resuming at step {at + 5}" in said[0], said
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "whole"), rtol=1e-5)
    np.testing.assert_allclose(params(tmp_path / "two"), params(tmp_path / "whole"), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_processes_with_different_settings_do_not_begin(tmp_path, request):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    request.node.processes = both = []
    for number, rate in enumerate((1e-3, 1e-2)):
        out = open(tmp_path / f"{number}.txt", "w+")  # noqa: SIM115 (closed with the process)
        command = [sys.executable, "-m", "experiments.sft", "--config=configs/sft.py:tiny", f"--workdir={tmp_path / 'run'}"]
        command += [f"--config.optim.learning_rate={rate}", f"--distributed={place}/2/{number}"]
        both.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=out, stderr=out))
        both[-1].said = Path(out.name)
    codes, said = ended(both)
    assert all(codes) and not (tmp_path / "run").exists()
    assert any("processes 1 were given other settings than process 0" in each for each in said), said


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_other_with_a_word(tmp_path, request):
    request.node.processes = both = start(tmp_path, "two", 2, stop=100_000)
    wait_for_lines(tmp_path / "two", 30, both)
    both[1].kill()
    codes, said = ended(both)
    assert codes[0] in (75, -signal.SIGABRT) and codes[1] == -signal.SIGKILL, said
    assert "another process of this run has ended" in said[0] or "another task died" in said[0]
    request.node.processes = both = start(tmp_path, "two", 2)
    codes, said = ended(both)
    assert codes == [0, 0] and "resuming at step" in said[0], said
    whole = start(tmp_path, "whole", 1)
    assert ended(whole)[0] == [0]
    np.testing.assert_allclose(params(tmp_path / "two"), params(tmp_path / "whole"), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_process_that_is_stuck_is_seen_by_all(tmp_path, request):
    request.node.processes = both = start(tmp_path, "two", 2, stuck="1,12")
    codes, said = ended(both)
    assert 70 in codes and 0 not in codes, said
    assert any("stuck on process" in one and "the stacks are above" in one for one in said)
    assert "data_at" in said[1] and "stuck on process 1 of 2: step 13 has run for" in said[1]  # where it hangs
    assert json.loads((tmp_path / "two" / "metrics.jsonl").read_text().splitlines()[-1])["step"] >= 11
