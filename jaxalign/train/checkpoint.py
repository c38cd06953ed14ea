"""Checkpoints: the only file that knows Orbax.

    checkpoints/
        12/           the state after 12 steps of the loop
            params, opt, loop    arrays; loop is {"step": TrainState.step, "loop": TrainState.loop}
            meta                 JSON, whatever the loop wants to know again
        10.corrupt/   could not be read; set aside

A step's folder gets its name when it is complete, so a save that was killed leaves nothing that looks like one.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxalign import shard
from jaxalign.types import TrainState

UNFINISHED = "*.orbax-checkpoint-tmp*"


def _loud(record):
    return record.levelno >= logging.ERROR or "orbax" not in record.pathname


logging.getLogger("absl").addFilter(_loud)  # Orbax tells absl's log of every save, at the level of a warning


# Devices that hold copies of an array share the writing of it, for which a slice is compiled a shape: not worth it for small ones
_ARRAYS = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=64 << 20)
ocp.type_handlers.register_type_handler(jax.Array, _ARRAYS, override=True)


class Mismatch(ValueError):
    """The checkpoint can be read, but it is of another model, optimiser or loop."""


class Restored(NamedTuple):
    step: int  # steps of the loop that were done
    state: TrainState
    meta: dict
    skipped: dict[int, str]  # newer steps that could not be read, and why


def _items(state: TrainState) -> dict[str, Any]:
    # Orbax refuses an item that is empty, as optax.identity's state is: it saves {"state": ()}
    return {"params": state.params, "opt": {"state": state.opt}, "loop": {"step": state.step, "loop": state.loop}}


def steps(folder) -> list[int]:
    """The complete steps in a folder of checkpoints, oldest first."""
    folder = Path(folder)
    return sorted(int(found.name) for found in folder.iterdir() if found.name.isdigit()) if folder.is_dir() else []


class Saver:
    """Saves in the background and keeps the last `keep` steps. One writer a folder: it first sweeps away what a killed one left."""

    def __init__(self, folder, *, keep: int):
        folder = Path(folder).resolve()
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for unfinished in folder.glob(UNFINISHED):
                shutil.rmtree(unfinished)
        shard.together("checkpoints swept")
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self.manager = ocp.CheckpointManager(folder, options=options, item_names=("params", "opt", "loop", "meta"))

    def save(self, step: int, state: TrainState, meta: dict):
        """Returns as soon as the state is copied, so that it may be donated. Raises what an earlier save died of."""
        items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        self.manager.save(step, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta)), force=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.manager.close()  # waits for the save in the background


def restore(folder, like: TrainState) -> Restored | None:
    """The newest readable step, with the shapes, dtypes and shardings of `like`; None where the folder holds no step.

    A step that cannot be read is renamed to N.corrupt once an older one has been read instead. Raises ValueError where none can be
    read, and Mismatch, naming the leaf and both sides, where the newest readable one is not of this shape.
    """
    folder, skipped = Path(folder).resolve(), {}
    for step in reversed(steps(folder)):
        try:
            items, meta = (
                _load(folder / str(step), _items(like)),
                json.loads((folder / str(step) / "meta" / "metadata").read_text()),
            )
        except Mismatch:
            raise
        except Exception as error:  # Orbax and TensorStore raise whatever they meet, down to a bare Exception
            skipped[step] = _reason(error)
            continue
        shard.together("checkpoints read")
        if jax.process_index() == 0:
            for bad in skipped:
                (folder / str(bad)).rename(_free(folder / f"{bad}.corrupt"))
        shard.together("checkpoints set aside")
        state = like.replace(params=items["params"], opt=items["opt"]["state"], **items["loop"])
        return Restored(step, state, meta, skipped)
    if skipped:
        reasons = "; ".join(f"step {step}: {reason}" for step, reason in skipped.items())
        raise ValueError(f"no checkpoint in {folder} can be read ({reasons}). Delete the folder to start again from step 0.")
    return None


def load_params(folder, like, step: int | None = None):
    """The parameters alone, of a run that may still be going on: of `step`, or the newest. `like` has shapes, dtypes and shardings.

    Raises FileNotFoundError where there is no such step, Mismatch where the parameters are others.
    """
    folder, found = Path(folder).resolve(), steps(folder)
    if not found or step not in (None, *found):
        raise FileNotFoundError(f"{folder} has no step{'' if step is None else f' {step}'}; it has {found}")
    return _load(folder / str(found[-1] if step is None else step), {"params": like})["params"]


def _load(path: Path, like: dict[str, Any]) -> dict[str, Any]:
    """The named items of one step. Shapes and dtypes are compared first: Orbax would cast, and say little of shapes."""
    with ocp.StandardCheckpointer() as reader:
        for name, tree in like.items():
            found = reader.metadata(path / name).item_metadata
            if found is None:  # metadata() swallows the reason, restore() says it
                reader.restore(path / name)
                raise OSError(f"{name} has no metadata")
            _compare(path, name, _leaves(found.tree), _leaves(tree))
        return {name: reader.restore(path / name, jax.tree.map(_abstract, tree)) for name, tree in like.items()}


def _abstract(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))


def _leaves(tree) -> dict[str, str]:
    """{"embed/tokens": "float32[13,8]"}. Named tuples and dicts, tuples and lists are one thing here, as on disk."""

    def name(path):
        return "/".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {name(path): f"{np.dtype(x.dtype)}[{','.join(map(str, x.shape))}]" for path, x in leaves if hasattr(x, "shape")}


def _compare(path: Path, item: str, found: dict, wanted: dict):
    wrong = [leaf for leaf in sorted(found | wanted) if found.get(leaf) != wanted.get(leaf)]
    if wrong:
        leaf, more = wrong[0], f", and {len(wrong) - 1} more leaves differ" if len(wrong) > 1 else ""
        raise Mismatch(
            f"{path} is not of this run: {item}/{leaf} is {found.get(leaf, 'absent')} in the checkpoint and "
            f"{wanted.get(leaf, 'absent')} here{more}. Take the settings that it was made with, or another workdir."
        )


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def _free(path: Path) -> Path:
    """The path, with a number where it is taken."""
    taken = 0
    while (tried := path.with_name(f"{path.name}{taken or ''}")).exists():
        taken += 1
    return tried
