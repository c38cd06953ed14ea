"""What tells before a run whether the machines are fit for it, what starts it on them, and what makes a second start fast."""

import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import yaml
from jax.experimental.compilation_cache import compilation_cache

from configs import ppo
from experiments import launch, preflight
from jaxalign.train import log

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "experiments" / "launch"
SCRIPTS = {path.name: path for path in sorted(LAUNCH.iterdir())}


@pytest.fixture
def check(monkeypatch, capsys):
    """(workdir, mesh) -> the exit code of preflight, and the words of the table and below it."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(workdir, **mesh):
        config = ppo.get_config("tiny")
        config.mesh.update(mesh)
        try:
            code = preflight.run(config, str(workdir)) or 0
        except SystemExit as ended:
            code = ended.code
        return code, capsys.readouterr().out

    return call


@pytest.fixture
def cached_in():
    """(folder, or None) -> JAX keeps compiled programs there, all of them, until the test ends."""
    kept = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in kept}

    def call(folder, seconds=0):
        for name, value in zip(kept, (folder and str(folder), seconds), strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    yield call
    call(*before.values())


def test_machines_that_are_fit(check, tmp_path):
    code, said = check(tmp_path / "run", data=2, fsdp=2, tensor=2)
    assert code == 0 and "wrong" not in said, said
    assert re.search(r"devices +│ 8 cpu +│ ok", said) and re.search(r"mesh +│ data 2, fsdp 2, tensor 2, sequence 1 +│ ok", said)
    for number in ("workdir written", "workdir read", "all-reduce over data", "all-reduce over fsdp", "all-reduce over tensor"):
        assert float(re.search(rf"{number}, .B/s +│ ([\d.e+]+) +│ ok", said)[1]) > 0
    assert re.search(r"a train step +│ losses 16, ", said)
    assert not list((tmp_path / "run").iterdir())


def test_what_is_wrong_is_said_with_what_to_do(check, tmp_path, cached_in):
    (tmp_path / "file").touch()
    cached_in(tmp_path / "gone")
    code, said = check(tmp_path / "file" / "run", data=3)
    assert code == 1
    assert "NotADirectoryError" in said and "\nworkdir: give a --workdir where" in said
    assert "needs 3 devices, here are 8" in said and "\nsettings and mesh: change that setting" in said
    assert "\ncompilation cache: give a folder that can be written" in said


@pytest.mark.parametrize(
    "broken, says", [("sum", "wrong sums on \\[CpuDevice"), ("step", r"losses \[64.0, .*\], where \[64, .* right")]
)
def test_a_device_that_computes_wrong_numbers_is_seen(check, tmp_path, monkeypatch, broken, says):
    monkeypatch.setattr(preflight, "FILE", 2**10)
    add, sgd = jax.lax.psum, preflight.optax.sgd
    if broken == "sum":
        monkeypatch.setattr(jax.lax, "psum", lambda x, axis: add(x, axis) + (jax.lax.axis_index(axis) == 1) * (x == 7))
    else:
        monkeypatch.setattr(preflight.optax, "sgd", lambda rate: sgd(2 * rate))
    code, said = check(tmp_path, tensor=8, data=1)
    assert code == 1 and re.search(says, said) and "replace" in said


def programs(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*-cache")}


@pytest.mark.slow
def test_two_processes_and_a_second_start_that_compiles_nothing(tmp_path):
    """At the second start the workdir is one on each machine, which both must see, too."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XDG_CACHE_HOME": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)

    def start(*workdirs):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = f"127.0.0.1:{free.getsockname()[1]}"
        given = [sys.executable, "-m", "experiments.preflight", "--config=configs/ppo.py:tiny", "--config.mesh.fsdp=2"]
        processes = [
            subprocess.Popen(
                [*given, f"--workdir={workdir}", f"--distributed={place}/2/{number}"],
                cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for number, workdir in enumerate(workdirs)
        ]  # fmt: skip
        said = [process.communicate(timeout=120)[0] for process in processes]
        return [process.returncode for process in processes], said

    codes, said = start(tmp_path / "run", tmp_path / "run")
    assert codes == [0, 0] and "processes: 2" in said[0] and "all-reduce over fsdp" in said[0] and "verdict" not in said[1], said
    made = programs(tmp_path / "jaxalign")
    codes, said = start(tmp_path / "a", tmp_path / "b")
    assert codes == [1, 1] and "give a --workdir on storage that all machines mount" in said[0], said
    assert made and programs(tmp_path / "jaxalign") == made and "persistent compilation cache" not in said[0], said


def test_kept_programs_that_are_damaged_do_no_harm(tmp_path, monkeypatch, cached_in):
    cached_in(None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    launch.keep_compiled()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "jaxalign")

    def start():
        jax.clear_caches()
        return [jax.jit(lambda x, k=k: x @ x + k)(jnp.eye(3)).tolist() for k in (1, 2)]

    right = start()
    for i, path in enumerate(programs(tmp_path)):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content[: 99 if i % 2 else None])
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
        assert start() == right


@pytest.mark.parametrize("kept", ["mine", ""])
def test_where_programs_are_kept_is_the_users_to_say(tmp_path, monkeypatch, cached_in, kept):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached_in(kept)
    launch.keep_compiled()
    assert jax.config.jax_compilation_cache_dir in (kept, None)


def test_no_folder_for_programs_is_no_error(tmp_path, monkeypatch, cached_in):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    cached_in(None)
    launch.keep_compiled()
    assert jax.config.jax_compilation_cache_dir is None


def test_the_files_for_clusters_can_be_read():
    assert Path(launch.__file__) == LAUNCH.with_suffix(".py")  # the folder beside it hides it not
    assert {path.suffix for path in SCRIPTS.values()} == {".md", ".sh", ".yaml"}
    for path in SCRIPTS.values():
        if path.suffix == ".sh":
            subprocess.run(["bash", "-n", path], check=True)
    task = yaml.safe_load(SCRIPTS["skypilot.yaml"].read_text())
    subprocess.run(["bash", "-n"], input=task["setup"] + task["run"], check=True, text=True)


def test_the_commands_in_them_are_real():
    said = "".join(path.read_text().replace("\\\n", "") for path in SCRIPTS.values())
    commands = re.findall(r"python -m experiments\.(\w+)([^\n`\"]*)", said)
    assert {name for name, _ in commands} == {"ppo", "preflight", "plan"} and len(commands) >= 7
    for name, given in commands:
        assert (ROOT / "experiments" / f"{name}.py").is_file()
        file, variant = re.search(r"--config=(\S+\.py):(\w+)", given).groups()
        config = runpy.run_path(str(ROOT / file))["get_config"](variant)
        flag = re.findall(r"--([\w.]+)=", given)
        assert {x for x in flag if x.startswith("config.")} <= {f"config.{path}" for path in log.flat(config.to_dict())}
        assert {x for x in flag if "." not in x} <= {"config", "workdir", "distributed", "topology"}


@pytest.fixture
def cluster(tmp_path):
    """(script, programs, **environment) -> its exit code, and the commands that it gave to these programs, {name: shell script}."""

    def call(script, programs, **environment):
        for name, body in ({"sleep": "", "activate": ""} | programs).items():
            (tmp_path / name).write_text(f"#!/bin/bash\necho {name} $* >> {tmp_path}/given\n{body}\n")
            (tmp_path / name).chmod(0o755)
        text = SCRIPTS[script].read_text().replace(". /shared/venv/bin/activate", "")
        path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HERE": str(tmp_path)}
        ended = subprocess.run(["bash", "-c", text], env=os.environ | path | environment, timeout=30)
        return ended.returncode, (tmp_path / "given").read_text()

    return call


@pytest.mark.parametrize(
    "ends, again",
    [("exit 0", False), ("exit 1", False), ("exit 75", True), ("exit 143", True), ("kill -TERM $PPID; exit 143", False)],
    ids=["done", "mistake", "peer lost", "time is up", "cancelled"],
)
def test_slurm_starts_again_what_can_go_on(cluster, ends, again):
    code, given = cluster("slurm.sh", {"srun": ends, "scontrol": ""}, SLURM_JOB_ID="7")
    assert "python -m experiments.ppo" in given and ("scontrol requeue 7" in given) == again
    assert code == int(ends.split()[-1])


def test_a_slice_that_is_taken_away_is_asked_for_again(cluster, tmp_path):
    queue = """
    case "$4" in
      describe) cat $HERE/state; exit ;;
      create) echo ACTIVE > $HERE/state ;;
      delete) rm $HERE/state ;;
      ssh) [[ "$*" == *experiments.ppo* && ! -e $HERE/taken ]] && touch $HERE/taken && echo SUSPENDED > $HERE/state && exit 255 ;;
    esac
    exit 0
    """
    code, given = cluster("tpu_queued_resources.sh", {"gcloud": queue}, PROJECT="p", ZONE="z", NFS="n:/s")
    said = re.findall(r"queued-resources (\w+)", given)
    assert code == 0 and [x for x in said if x != "describe"] == ["create", "ssh", "ssh", "delete", "create", "ssh", "ssh"]
