"""Checkpoints: the only file that knows Orbax.

    checkpoints/
        12/               the state after 12 steps of the loop
            params, opt   arrays, by the path of their leaf
            loop          the same, of {"step", "loop", "guard"} of TrainState; its frozen weights are nowhere
            meta          the record, JSON, with its own sha256:
                            meta      whatever the loop wants to know again
                            metrics   of this step
                            leaves    {"params/embed/tokens": ["float32[13,8]", digest of its bits]}
        10.corrupt/       could not be read, or was not what was saved; set aside

A step's folder gets its name when it is complete, so a save that was killed leaves nothing that looks like one. What a disk loses
or changes later is seen, too: a step comes back where its record is whole, and every leaf has the digest that it was saved with.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxalign import shard
from jaxalign.types import TrainState

UNFINISHED = ".orbax-checkpoint-tmp"  # in the names of folders that are being written or deleted

# Orbax logs each save, and a failure at length. Reads that go on after one has failed talk to a loop that it closed
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
logging.getLogger("asyncio").addFilter(lambda record: "tensorstore" not in record.getMessage())
_told = sys.unraisablehook
sys.unraisablehook = lambda it: None if str(it.exc_value) == "Event loop is closed" else _told(it)

# Devices that hold copies of an array share the writing of it, for which a slice is compiled a shape: not worth it for small ones
_ARRAYS = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=64 << 20)
ocp.type_handlers.register_type_handler(jax.Array, _ARRAYS, override=True)


class Mismatch(ValueError):
    """The checkpoint can be read, but it is of another model, optimiser or loop."""


class _Damaged(Exception):
    """A step that cannot be read, or is not what was saved."""


class Restored(NamedTuple):
    step: int  # steps of the loop that were done
    state: TrainState
    meta: dict
    skipped: dict[int, str]  # newer steps that could not be read, and why


def steps(folder) -> list[int]:
    """The complete steps in a folder of checkpoints, oldest first."""
    folder = Path(folder)
    return sorted(int(found.name) for found in folder.iterdir() if found.name.isdigit()) if folder.is_dir() else []


class Saver:
    """Saves in the background. One writer a folder: it first sweeps away what a killed one left.

    failures: a line for each step that was not saved, for the loop to tell and to remove; it may go on.
    Args:
        keep: how many of the last steps stay; keep_every: multiples of this stay, too (0: none).
        best: a metric, and the step where it was largest stays, too; "-nll/held_out": where it was smallest.
    """

    def __init__(self, folder, *, keep: int, keep_every: int = 0, best: str = ""):
        if keep < 1:
            raise ValueError(f"keep = {keep}: at least the last checkpoint must stay")
        self.folder, self.keep, self.keep_every, self.best = Path(folder).resolve(), keep, keep_every, best
        self.failures, self.lost = [], False  # lost: the last one that was begun
        self.thread, self.metrics = None, {}
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            for step in steps(self.folder):
                with suppress(Exception):  # whatever is wrong with its record, it is not known to be the best
                    self.metrics[step] = _record(self.folder / str(step))["metrics"]
        shard.together("checkpoints swept")
        self.writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())

    def save(self, step: int, state: TrainState, meta: dict, *, metrics: dict[str, float] | None = None, wait: bool = False):
        """Returns as soon as the save before is complete and the state is copied, so that it may be donated. All processes save the
        same steps.

        wait: until this step is complete, too; OSError where it cannot be saved. Else `failures` tells that.
        """
        self._join()
        leaves, metrics, self.lost = _flat(_trees(state)), metrics or {}, False
        if lacking := _of_any(self._lacks_room(leaves) if jax.process_index() == 0 else ""):
            self._lose(step, lacking)
        else:
            digests = _digests(leaves)
            table = {name: [_kind(x), digests[name]] for name, x in leaves.items()}
            record = json.loads(json.dumps({"meta": meta, "metrics": metrics, "leaves": table}))
            items = {item: ocp.args.StandardSave(part) for item, part in _parts(leaves).items()}
            items["meta"] = ocp.args.JsonSave(record | {"sha256": _sha256(record)})
            try:
                self.writer.save(self.folder / str(step), args=ocp.args.Composite(**items))
            except Exception as error:  # Orbax and TensorStore raise whatever they meet, down to a bare Exception
                self._lose(step, _reason(error))
            else:
                self.thread = threading.Thread(target=self._commit, args=(step, metrics))
                self.thread.start()
        if wait:
            self._join()
            if failure := _of_any(self.failures.pop() if self.lost else ""):
                raise OSError(failure)

    def _commit(self, step: int, metrics: dict):
        try:
            self.writer.wait_until_finished()
        except BaseException as error:
            self._lose(step, _reason(error))
            return
        if jax.process_index() == 0:
            self.metrics[step] = metrics
            try:
                self._prune()
            except OSError as error:
                self.failures.append(f"old checkpoints in {self.folder} cannot be deleted: {_reason(error)}")

    def _lose(self, step: int, reason: str):
        if jax.process_index() == 0:
            self._sweep()
        kept = steps(self.folder)
        there = f"Steps {kept} are there." if kept else "No other is there."
        self.failures.append(f"checkpoint {step} was not saved: {reason}. {there}")
        self.lost = True

    def _lacks_room(self, leaves: dict) -> str:
        try:
            needed, free = sum(x.nbytes for x in leaves.values()), shutil.disk_usage(self.folder).free
        except OSError as error:
            return _reason(error)
        return "" if needed <= free else f"it needs {needed / 1e6:,.0f} MB, and {self.folder} has {free / 1e6:,.0f} MB free"

    def _prune(self):
        found = steps(self.folder)
        kept = set(found[-self.keep :]) | {step for step in found if self.keep_every and step % self.keep_every == 0}
        sign, name = (-1, self.best[1:]) if self.best.startswith("-") else (1, self.best)
        scores = {step: sign * self.metrics[step][name] for step in found if name in self.metrics.get(step, {})}
        scored = [step for step in scores if math.isfinite(scores[step])]
        kept |= {max(scored, key=lambda step: (scores[step], step))} if scored else set()
        for step in set(found) - kept:  # renamed first: what is half deleted must not look like a step
            gone = (self.folder / str(step)).rename(_free(self.folder / f"{step}{UNFINISHED}-old"))
            shutil.rmtree(gone, ignore_errors=True)

    def _sweep(self):
        for unfinished in self.folder.glob(f"*{UNFINISHED}*"):
            shutil.rmtree(unfinished, ignore_errors=True)

    def _join(self):
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """Waits for the save in the background. A failure of it that was not told is an OSError, or a note to the error here."""
        self._join()
        self.writer.close()
        if self.lost and self.failures:
            if error is None:
                raise OSError(self.failures[-1])
            error.add_note(self.failures[-1])


def restore(folder, like: TrainState, *, verify: bool = True) -> Restored | None:
    """The newest readable step, with the shapes, dtypes and shardings of `like`, and its frozen weights; None where none is.

    A step that cannot be read, or does not have its digests, is renamed to N.corrupt once an older one has been read instead.
    verify=False: take arrays as they come, where comparing the digests of a very large model takes too long.
    Raises ValueError where none can be read, and Mismatch, naming the leaf and both sides, where the newest readable one is not of
    this shape.
    """
    folder, skipped = Path(folder).resolve(), {}
    for step in reversed(steps(folder)):
        try:
            trees, meta = _load(folder / str(step), _trees(like), verify)
        except _Damaged as error:
            skipped[step] = str(error)
            continue
        if jax.process_index() == 0:
            for bad in skipped:
                (folder / str(bad)).rename(_free(folder / f"{bad}.corrupt"))
        shard.together("checkpoints set aside")
        return Restored(step, like.replace(params=trees["params"], opt=trees["opt"], **trees["loop"]), meta, skipped)
    reasons = [f"step {step}: {reason}" for step, reason in skipped.items()]
    reasons = reasons or [f"{found.name} was set aside" for found in sorted(folder.glob("*.corrupt*"))]
    if reasons:
        said = "; ".join(reasons)
        raise ValueError(f"no checkpoint in {folder} can be read ({said}). Delete the folder to start again from step 0.")
    return None


def load_params(folder, like, step: int | None = None, *, verify: bool = True):
    """The parameters alone, of a run that may still be going on: of `step`, or the newest. `like` has shapes and dtypes, and
    shardings: leaves without come back as NumPy.

    Raises FileNotFoundError where there is no such step, Mismatch where the parameters are others, ValueError where the step cannot
    be read or does not have its digests; the folder is left as it is.
    """
    folder, found = Path(folder).resolve(), steps(folder)
    if not found or step not in (None, *found):
        raise FileNotFoundError(f"{folder} has no step{'' if step is None else f' {step}'}; it has {found}")
    asked = found[-1] if step is None else step
    try:
        return _load(folder / str(asked), {"params": like}, verify)[0]["params"]
    except _Damaged as error:
        others = steps(folder)
        if step is None and asked not in others:  # the run went on and deleted it
            return load_params(folder, like, verify=verify)
        others = [other for other in others if other != asked]
        raise ValueError(f"step {asked} in {folder} cannot be read: {error}. Other steps there: {others}.") from None


def _load(path: Path, like: dict[str, Any], verify: bool) -> tuple[dict[str, Any], dict]:
    """The trees of one step by name, and its meta. Raises Mismatch or _Damaged, on all processes alike."""
    record, leaves = _tried(_record, path), _flat(like)
    table = {name: said for name, said in record["leaves"].items() if name.partition("/")[0] in like}
    _compare(path, {name: kind for name, (kind, _) in table.items()}, {name: _kind(x) for name, x in leaves.items()})
    found = _tried(_arrays, path, leaves)
    if verify:
        digests = _digests(found)
        wrong = [name for name, (_, digest) in table.items() if digest != digests[name]]
        if wrong:
            raise _Damaged(f"not what was saved: {wrong[0]}{f' and {len(wrong) - 1} more leaves' if len(wrong) > 1 else ''}")
    return jax.tree.unflatten(jax.tree.structure(like), found.values()), record["meta"]


def _tried(read, *args):
    """read(*args). Where that fails on any process, _Damaged on all."""
    found, reason = None, ""
    try:
        found = read(*args)
    except Exception as error:
        reason = _reason(error)
    if reason := _of_any(reason):
        raise _Damaged(reason)
    return found


def _record(path: Path) -> dict:
    record = json.loads((path / "meta" / "metadata").read_text())
    if record.pop("sha256") != _sha256(record):
        raise ValueError("not what was saved: meta")
    return record


def _arrays(path: Path, like: dict) -> dict:
    """The leaves of a step, in the order of `like` and where those are: NumPy where they are on no device."""

    def place(x):  # an array that JAX may move is read as NumPy first, so that it may move this one, too
        return x.sharding if getattr(x, "sharding", None) and getattr(x, "committed", True) else None

    def blank(x):
        on = place(x)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on) if on else np.broadcast_to(np.zeros((), x.dtype), x.shape)

    found = {name: np.zeros(x.shape, x.dtype) for name, x in like.items() if not x.size}
    reader = ocp.StandardCheckpointHandler()  # and not a checkpointer: where it fails, no process waits for another
    for item, part in _parts(like).items():
        found |= reader.restore(path / item, args=ocp.args.StandardRestore({name: blank(x) for name, x in part.items()}))
    on_device = {name for name, x in like.items() if place(x) or isinstance(x, jax.Array)}
    return {name: jax.device_put(found[name], place(x)) if name in on_device else found[name] for name, x in like.items()}


def _compare(path: Path, found: dict, wanted: dict):
    wrong = {leaf for leaf in found | wanted if found.get(leaf) != wanted.get(leaf)}
    if wrong:  # where parameters are others, so is the state of the optimiser
        leaf = min(wrong, key=lambda leaf: (not leaf.startswith("params/"), leaf))
        more = f", and {len(wrong) - 1} more leaves differ" if len(wrong) > 1 else ""
        raise Mismatch(
            f"{path} is not of this run: {leaf} is {found.get(leaf, 'absent')} in the checkpoint and "
            f"{wanted.get(leaf, 'absent')} here{more}. Take the settings that it was made with, or another workdir."
        )


def _trees(state: TrainState) -> dict[str, Any]:
    loop = {"step": state.step, "loop": state.loop, "guard": state.guard}
    return {"params": state.params, "opt": state.opt, "loop": loop}


def _flat(trees: dict[str, Any]) -> dict[str, jax.Array]:
    """{"params/embed/tokens": leaf}, in the order of jax.tree.leaves. Named tuples and dicts, tuples and lists are one here."""
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}
    if len(flat) != len(leaves):
        raise ValueError("two leaves of the state have the same path")
    return flat


def _parts(leaves: dict) -> dict[str, dict]:
    """What Orbax gets: the leaves by the first part of their name, without those that have no elements, which it refuses."""
    parts = {}
    for name, x in leaves.items():
        if x.size:
            parts.setdefault(name.partition("/")[0], {})[name] = x
    return parts


def _kind(x) -> str:
    return f"{np.dtype(x.dtype)}[{','.join(map(str, x.shape))}]"


@jax.jit
def _digest(x):
    """u32 [], u32 []: sums over the elements, mod 2^32, of two mixes of an element's bits and its place.

    The first mix is a bijection of the bits, so one element that is another always shows; of more, all but 2^-64. The sums are the
    same however the array is split over devices.
    """
    u32 = jnp.uint32

    def mix(x):  # lowbias32 of Wellons' hash-prospector, a bijection
        x = (x ^ (x >> 16)) * u32(0x7FEB352D)
        x = (x ^ (x >> 15)) * u32(0x846CA68B)
        return x ^ (x >> 16)

    bits = x if x.dtype == bool else jax.lax.bitcast_convert_type(x, f"uint{8 * min(4, x.dtype.itemsize)}")
    bits, place = bits.astype(u32), u32(1)
    for axis in range(bits.ndim):
        stride = math.prod(bits.shape[axis + 1 :]) % 2**32
        place = place + jax.lax.broadcasted_iota(u32, bits.shape, axis) * u32(stride)
    first = mix(bits ^ mix(place))
    mixed = (first, mix(first ^ u32(0x9E3779B9)))
    return jax.lax.reduce(mixed, (u32(0), u32(0)), lambda a, b: (a[0] + b[0], a[1] + b[1]), tuple(range(bits.ndim)))


def _digests(leaves: dict) -> dict[str, str]:
    sums = jax.device_get({name: shard.one_at_a_time(_digest(x)) for name, x in leaves.items()})
    return {name: f"{first:08x}{second:08x}" for name, (first, second) in sums.items()}


def _any(mine: bool) -> bool:
    """Whether it is so on any process."""
    return mine if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(mine)).any())


def _of_any(reason: str) -> str:
    """A reason where any process has one: its own, where it has."""
    return (reason or "another process could not") if _any(bool(reason)) else ""


def _sha256(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    line = (str(error).splitlines() or [""])[0].partition(" [tensorstore_spec")[0]
    return f"{type(error).__name__}: {line if len(line) < 300 else f'{line[:100]} ... {line[-180:]}'}"


def _free(path: Path) -> Path:
    """The path, with a number where it is taken."""
    taken = 0
    while os.path.lexists(tried := path.with_name(f"{path.name}{taken or ''}")):
        taken += 1
    return tried
