"""Whether the machines are fit for a run: the run's own command, with preflight for its program, and as many processes.

    python -m experiments.preflight --config=configs/ppo.py:llama3_8b --workdir=/shared/runs/ppo --distributed=auto

Process 0 prints one table: a check a line, what the processes found (once where it is the same, else the least and the most, or
each), the verdict; below it, what to do. Exit code: 0, or 1 where something is wrong. After PATIENCE a process ends with the stack
that shows where it hangs.
"""

import faulthandler
import hashlib
import json
import os
import platform
import shutil
import socket
import statistics
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments import launch, settings
from jaxalign import shard
from jaxalign.train import log
from jaxalign.train.step import make_step
from jaxalign.train.watch import peers
from jaxalign.types import TrainState

PATIENCE = 600  # seconds
SIGHT = 10  # seconds until a file of another process must be seen
FILE = 2**26  # bytes that each process writes and reads
SENT = 2**22  # float32 that each device sends
ROOM = 2**12  # bytes of what one process says at once


class Row(NamedTuple):
    check: str
    found: list  # of each process
    help: str = ""  # what to do, where something is wrong

    def __str__(self):
        values = [f"{x:.3g}" if isinstance(x, float) else str(x) for x in self.found]
        if len(set(values)) == 1:
            return values[0]
        if all(isinstance(x, float) for x in self.found):
            least, most = np.argmin(self.found), np.argmax(self.found)
            return f"{values[least]} (process {least}) to {values[most]} (process {most})"
        return "; ".join(
            f"{x} (process {', '.join(str(i) for i, y in enumerate(values) if x == y)})" for x in dict.fromkeys(values)
        )


class Failed(Exception):
    """A check that could not be made somewhere, with its row. All processes raise it together."""


def gather(x) -> list:
    """What every process says, in their order. It is JSON, and short."""
    said = np.frombuffer(json.dumps(x).encode().ljust(ROOM), np.uint8)
    return [json.loads(bytes(row)) for row in multihost_utils.process_allgather(said)]


def attempt(check: str, look, help: str) -> list:
    """What look() finds on every process. Raises Failed, with the reasons and the help, where it raises on one."""
    try:
        found = [look(), ""]
    except Exception as error:  # whatever it is: the other processes wait for the word
        found = [None, f"{type(error).__name__}: {str(error)[:300]}"]
    found = gather(found)
    if any(reason for _, reason in found):
        raise Failed(Row(check, [reason or "ok" for _, reason in found], help))
    return [x for x, _ in found]


def alike(check: str, found: list, help: str) -> Row:
    return Row(check, found, help if len(set(found)) > 1 else "")


def devices() -> list[Row]:
    """Every process knows those of all, with nothing sent between them."""
    every = [Counter(x.device_kind for x in jax.devices() if x.process_index == i) for i in range(jax.process_count())]
    found = [", ".join(f"{count} {kind}" for kind, count in kinds.items()) for kinds in every]
    return [alike("devices", found, "restart the machine that has others, or replace it")]


def versions(config) -> list[Row]:
    """And memory, source, settings: if they differ, so may the programs, and the processes wait for each other for ever."""
    device = jax.local_devices()[0]
    here = {"python": platform.python_version(), "jax": jax.__version__, "jaxlib": jaxlib.__version__}
    here["libtpu, CUDA"] = " ".join(device.client.platform_version.split())[:200]
    memory = (device.memory_stats() or {}).get("bytes_limit")
    here["memory of a device"] = f"{memory / 2**30:.3g} GiB" if memory else "untold"
    root = Path(__file__).parents[1]
    sources = [path.read_bytes() for folder in ("jaxalign", "experiments") for path in sorted((root / folder).rglob("*.py"))]
    for name, content in (("source", b"".join(sources)), ("settings", json.dumps(log.plain(config), sort_keys=True).encode())):
        here[name] = hashlib.sha256(content).hexdigest()[:12]
    every = gather(here)
    return [alike(name, [one[name] for one in every], "make it the same everywhere") for name in here]


def clocks() -> list[Row]:
    """How far each is ahead of the last one, at best of three looks, which all processes take at once."""
    stamps = [gather(time.time()) for _ in range(4)][1:]
    ahead = min(([x - min(look) for x in look] for look in stamps), key=max)
    return [Row("clock ahead, s", ahead, "set the clocks by NTP (chrony, systemd-timesyncd)" if max(ahead) > 1 else "")]


def storage(workdir: str) -> list[Row]:
    """Each process writes a file, renames a folder as a checkpoint's commit does, and reads what the next process wrote."""
    mark, me, after = gather(time.time_ns())[0], jax.process_index(), (jax.process_index() + 1) % jax.process_count()
    folder = launch.local(workdir) / f".preflight-{mark}"

    def content(process: int) -> bytes:
        return np.random.default_rng([mark, process]).bytes(FILE)

    def write():
        (folder / f"{me}.new").mkdir(parents=True)
        data, began = content(me), time.monotonic()
        with open(folder / f"{me}.new" / "data", "wb") as file:
            file.write(data)
            os.fsync(file.fileno())
        os.rename(folder / f"{me}.new", folder / str(me))
        return FILE / 1e6 / (time.monotonic() - began), shutil.disk_usage(folder).free / 1e9

    def read():
        path, deadline = folder / str(after) / "data", time.monotonic() + SIGHT
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        with open(path, "rb") as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # else it may come from memory
            began = time.monotonic()
            data = file.read()
        speed = FILE / 1e6 / (time.monotonic() - began)
        if data != content(after):
            raise OSError(f"{path} is not what process {after} wrote")
        return speed

    try:
        wrote = attempt("workdir", write, "give a --workdir where every process can write files, and rename folders")
        shared = "give a --workdir on storage that all machines mount (NFS, Filestore, Lustre)"
        was_read = attempt("workdir", read, shared)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = zip(("written, MB/s", "free, GB", "read, MB/s"), (*zip(*wrote), was_read))
    return [Row(f"workdir {name}", list(values)) for name, values in found]


def cache() -> list[Row]:
    """Where compiled programs are kept. Process 0 writes there; the others find them if they see the same folder."""
    folder = jax.config.jax_compilation_cache_dir
    if not folder or "://" in folder:
        return [Row("compilation cache", gather(folder or "none: each start compiles all"))]
    mark = Path(folder) / f".preflight-{gather(time.time_ns())[0]}"
    help = "give a folder that can be written: JAX_COMPILATION_CACHE_DIR=..."
    attempt("compilation cache", lambda: mark.touch() if jax.process_index() == 0 else None, help)
    found = gather(folder if mark.exists() else f"{folder}, where process 0 does not write: each start compiles all")
    mark.unlink(missing_ok=True)
    return [Row("compilation cache", found)]


def fits(config) -> list[Row]:
    """Whether the settings are right, and the mesh can be made."""

    def make():
        settings.check(config)
        return ", ".join(f"{axis} {size}" for axis, size in shard.make_mesh(**config.mesh).shape.items())

    return [Row("settings and mesh", attempt("settings and mesh", make, "change that setting"))]


def traffic(axis: str, mesh) -> list[Row]:
    """An all-reduce over one axis of the mesh alone, its sums checked. GB/s: 2 (n-1)/n x bytes / median seconds, as NCCL counts."""
    size, split = mesh.shape[axis], partial(jax.shard_map, mesh=mesh, out_specs=P(shard.AXES), check_vma=False)
    make = jax.jit(split(lambda: jnp.arange(SENT) % 251 + jax.lax.axis_index(axis).astype(jnp.float32), in_specs=()))
    add = jax.jit(split(lambda x: jax.lax.psum(x, axis), in_specs=P(shard.AXES)))
    right = size * (np.arange(SENT, dtype=np.float32) % 251) + size * (size - 1) / 2  # whole and below 2^24, so exact

    def measure():
        given, seconds = jax.block_until_ready(make()), []
        for _ in range(6):
            began = time.monotonic()
            sums = jax.block_until_ready(add(given))
            seconds.append(time.monotonic() - began)
        if wrong := [x.device for x in sums.addressable_shards if not np.array_equal(x.data, right)]:
            raise ArithmeticError(f"wrong sums on {wrong}")
        return 2 * (size - 1) / size * 4 * SENT / 1e9 / statistics.median(seconds[1:])

    name = f"all-reduce over {axis}, GB/s"
    return [Row(name, attempt(name, measure, "a link or a device is broken: replace the machine that found it, or its neighbour"))]


def training(mesh) -> list[Row]:
    """Two steps of least squares, the parameters split over the whole mesh, against NumPy."""
    rows, wide, out = 8 * mesh.shape["data"] * mesh.shape["fsdp"], 8 * mesh.shape["fsdp"], 8 * mesh.shape["tensor"]
    x, tx = np.random.default_rng(0).normal(size=(rows, wide)).astype(np.float32), optax.sgd(0.1)
    right = [out, out * ((x @ (0.2 * x.mean(0)) - 1) ** 2).mean()]

    def objective(params, x):
        return ((x @ params["w"] - 1) ** 2).sum(), {"weight": jnp.float32(len(x))}

    def make():
        params = {"w": shard.Declared(jnp.zeros((wide, out)), ("embed", "mlp"))}
        return TrainState(jnp.int32(0), params, tx.init(params))

    def train():
        state, where = shard.create(make, mesh)
        step, data = shard.compile_step(make_step(objective, tx), mesh, where), shard.place(x, mesh)
        state, first = step(state, data)
        losses = [float(metrics["loss/total"]) for metrics in (first, step(state, data)[1])]
        if not np.allclose(losses, right, rtol=0.02):  # TPUs multiply in bfloat16
            raise ArithmeticError(f"losses {losses}, where {right} are right")
        return f"losses {losses[0]:.6g}, {losses[1]:.6g}"

    help = "a device computes wrong numbers: replace its machine"
    return [alike("a train step", attempt("a train step", train, help), help)]


def run(config, workdir: str):
    rows = []

    def sound(check, *args) -> bool:
        try:
            found = check(*args)
        except Failed as failed:
            found = failed.args
        rows.extend(found)
        return not any(row.help for row in found)

    with peers():
        if sound(devices):  # what is sent between processes supposes that all have as many
            same = sound(versions, config)
            for check in (clocks, partial(storage, workdir), cache):
                sound(check)
            if sound(fits, config) and same:
                mesh = shard.make_mesh(**config.mesh)
                for axis in (axis for axis, size in mesh.shape.items() if size > 1):
                    sound(traffic, axis, mesh)
                sound(training, mesh)
    if jax.process_index() == 0:
        table = Table("check", "found", "verdict", title=f"processes: {jax.process_count()}; number 0 on {socket.gethostname()}")
        for row in rows:
            table.add_row(row.check, str(row), Text("wrong", "red") if row.help else "ok")
        Console(markup=False).print(table)
        for row in (row for row in rows if row.help):
            print(f"{row.check}: {row.help}")
    if any(row.help for row in rows):
        sys.exit(1)


def main(config):
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    run(config, flags.FLAGS.workdir)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/ppo", "Folder of the run.")
    launch.main(main, "ppo", folder=False, check=lambda config: None)
