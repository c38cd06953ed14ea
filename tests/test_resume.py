"""A run that is killed again and again, at random moments, is the run that was not.

pytest tests/test_resume.py --kills=20 --kill-seed=3
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxalign.models import checkpoints
from jaxalign.train import checkpoint, log

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys, json
from pathlib import Path
import jax
from configs import ppo as configs
from experiments import compare, launch, ppo, reward, sft

settings = json.loads(sys.stdin.readline())  # all is imported by now: what follows is the run
jax.config.update("jax_num_cpu_devices", settings["devices"])
launch._join(settings["distributed"])
config = configs.get_config("tiny")
config.update_from_flattened_dict(settings["changed"])
config.mesh.update(settings["mesh"])
name, workdir = settings["name"], Path(settings["workdir"])
if name == "ppo":
    ppo.run(config, workdir)
else:
    stage = config.stages[name].copy_and_resolve_references()
    runs = {"sft": sft.run, "compare": compare.run, "reward": reward.run}
    runs[name](stage, workdir, launch.Stages(Path(settings["stages"]), config.stages, runs))
print("came to", "the end")
"""


@pytest.fixture(scope="module")
def kills(request):
    return request.config.getoption("--kills")


@pytest.fixture(scope="module")
def program(kills, tmp_path_factory):
    """(name, workdir, **settings) -> a process. Another one is always on its way through its imports."""
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    changed = {
        "optim.learning_rate": 0.02,
        "stages.sft.scratch.architecture.kv_heads": 2,  # heads divide over a mesh with tensor=2
        "run.iterations": kills,  # of 8 updates each; enough of them for every kill
        "evaluate.every": 2,
        "loop.save_every": 3,
        "stages.sft.run.steps": 60 * kills,
        "stages.sft.loop.save_every": 25,
        "stages.sft.loop.log_every": 1,
        "stages.sft.evaluate.every": 40,
        "stages.sft.guard.sigmas": 3.0,
        "stages.reward.run.steps": 60 * kills,
        "stages.reward.loop.save_every": 25,
    }

    def prepare():
        out = open(tmp_path_factory.mktemp("said") / "said.txt", "w+")  # noqa: SIM115 (closed with the process)
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], cwd=ROOT, env=os.environ | cache | {"JAX_PLATFORMS": "cpu"}, text=True,
            stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
        process.said = Path(out.name)
        return process

    ready = [prepare()]

    def start(name, workdir, *, devices=2, mesh=(-1, 1, 1), distributed="", **more):
        settings = {"name": name, "workdir": str(workdir), "devices": devices, "distributed": distributed}
        settings["mesh"] = dict(zip(("data", "fsdp", "tensor"), mesh))
        settings |= {"changed": changed | more, "stages": str(workdir.parent / "whole")}
        process = ready.pop()
        process.stdin.write(json.dumps(settings) + "\n")
        process.stdin.close()
        ready.append(prepare())
        return process

    yield start
    for process in ready:
        process.kill()
        process.wait()


def ended(process) -> str:
    code = process.wait(timeout=400)
    said = process.said.read_text()
    assert code == 0 and "came to the end" in said, said[-3000:]
    return said


@pytest.fixture(scope="module")
def whole(program, once):
    """An uninterrupted PPO run with its stages."""
    with once("resume") as (root, made):
        if not made:
            ended(program("ppo", root / "whole"))
    return root / "whole"


def record(folder):
    """All that must be equal: metrics, samples, the model, and the digests of the last checkpoint, which holds the optimiser."""
    metrics = [{k: x for k, x in line.items() if not k.startswith("time/")} for line in log.read_lines(folder / "metrics.jsonl")]
    last = checkpoint.steps(folder / "checkpoints")[-1]
    leaves = json.loads((folder / "checkpoints" / str(last) / "meta" / "metadata").read_text())["leaves"]
    return metrics, (folder / "samples.jsonl").read_bytes(), (folder / "model" / "model.safetensors").read_bytes(), last, leaves


def lines(folder) -> int:
    found = folder / "metrics.jsonl"
    return found.read_bytes().count(b"\n") if found.exists() else 0


def strike(process, folder, moment: str, draw: random.Random):
    """SIGKILL at about this moment. -> whether the run was still going on"""
    checkpoints, before = folder / "checkpoints", lines(folder)
    more, deadline = draw.randint(1, 5), time.monotonic() + 200

    def there():
        if moment == "start":
            return True
        if moment == "save":
            return checkpoints.exists() and any("tmp" in found.name for found in checkpoints.iterdir())
        if moment == "rollout":  # of PPO: behind the last update on the rollout before
            return lines(folder) > before and lines(folder) % 8 == 1
        return lines(folder) >= before + more  # in the middle of an epoch

    while process.poll() is None and not there():
        assert time.monotonic() < deadline, process.said.read_text()[-3000:]
        time.sleep(0.001)
    time.sleep(draw.uniform(0, {"start": 3.0, "save": 0.05, "rollout": 0.2, "update": 0.05}[moment]))
    process.send_signal(signal.SIGKILL)
    process.wait()
    return process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("name", ["sft", "reward", "ppo"])
def test_killed_again_and_again_it_comes_to_the_same_numbers(name, program, whole, kills, request):
    folder, draw = whole.parent / f"killed-{name}", random.Random(f"{name} {request.config.getoption('--kill-seed')}")
    if name == "ppo":
        for stage in ("sft", "compare", "reward"):
            shutil.copytree(whole / stage, folder / stage)
    moments = ["save", "update", "rollout" if name == "ppo" else "update", "start"]
    struck = 0
    while struck < kills:
        assert strike(program(name, folder), folder, moments[struck % 4], draw), f"it ended after {struck} of {kills} kills"
        struck += 1
    saved = checkpoint.steps(folder / "checkpoints")  # none, where every kill was faster than the first save
    said = ended(program(name, folder))
    assert ("resuming at step" in said) == bool(saved) and "set aside" not in said, said
    assert record(folder) == record(whole if name == "ppo" else whole / name)


SHORT = {"run.iterations": 3, "optim.learning_rate": 0.001}  # so that no sample turns on the last bit


@pytest.fixture(scope="module")
def half(program, whole, once):
    """A short PPO run with its stages, and the same run as it was when it was told to stop in the middle of an epoch."""
    with once("resume-half") as (root, made):
        folder, short = root / "stopped", root / "short"
        if not made:
            for stage in ("sft", "compare", "reward"):
                shutil.copytree(whole / stage, folder / stage)
                shutil.copytree(whole / stage, short / stage)
            ended(program("ppo", short, **SHORT))
            process = program("ppo", folder, **SHORT)
            while lines(folder) < 12:
                assert process.poll() is None, process.said.read_text()[-3000:]
                time.sleep(0.005)
            process.terminate()
            assert process.wait(timeout=60) == 143
    return folder, short


def close(folder, whole):
    """The numbers of two runs that ended, to 1e-5, and what was said, exactly."""
    for one, other in zip(log.read_lines(folder / "samples.jsonl"), log.read_lines(whole / "samples.jsonl"), strict=True):
        assert one["response"] == other["response"]
    (metrics, *_), (wanted, *_) = record(folder), record(whole)
    for one, other in zip(metrics, wanted, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    pairs = (checkpoints.load(run / "model")[1] for run in (folder, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *pairs)


def test_it_goes_on_on_another_mesh(half, program, tmp_path):
    stopped, short = half
    folder = shutil.copytree(stopped, tmp_path / "run")
    said = ended(program("ppo", folder, devices=8, mesh=(2, 2, 2), **SHORT))
    assert "resuming at step" in said
    close(folder, short)


def test_it_goes_on_in_two_processes(half, program, tmp_path):
    stopped, short = half
    folder = shutil.copytree(stopped, tmp_path / "run")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}/2"
    both = [program("ppo", folder, devices=1, distributed=f"{place}/{number}", **SHORT) for number in range(2)]
    said = [ended(one) for one in both]
    assert "resuming at step" in said[0]
    close(folder, short)
