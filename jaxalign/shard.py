"""Where arrays live: one mesh of four axes, one rule table, and the three ways to compile a step over it.

    data      rows of the batch; parameters are copies
    fsdp      rows of the batch; parameters are split, gathered where they are used
    tensor    heads, MLP columns and vocabulary; rows are copies
    sequence  columns of the rows, for long ones (models.attention "ring"); parameters are copies

Parameters declare logical axes where they are made (`declared`); RULES says which mesh axis each goes to.
"""

from functools import partial

import jax
import numpy as np
from flax import struct
from flax.core import meta
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor", "sequence")
ROWS = ("data", "fsdp")  # the mesh axes that the rows of a batch are split over
RULES = {
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "layers": None,
    "head": None,
    "context": None,
    "scalar": None,
    "rows": ROWS,
}


class Declared(struct.PyTreeNode, meta.AxisMetadata):
    """A parameter in a box that names its axes. `flax.core.meta.unbox` opens it, and constrains nothing by doing so."""

    value: jax.Array
    names: tuple = struct.field(pytree_node=False)

    def unbox(self):
        return self.value

    def replace_boxed(self, val):
        return self.replace(value=val)

    def add_axis(self, index, params):
        return self.replace(names=(*self.names[:index], params[meta.PARTITION_NAME], *self.names[index:]))

    def remove_axis(self, index, params):
        return self.replace(names=self.names[:index] + self.names[index + 1 :])


def declared(init, *names):
    """The initializer `init`, its result boxed with the logical names of its axes."""
    return lambda *args: Declared(init(*args), names)


def declare_rows(tree):
    """Every leaf [B, ...] in a box that says that its rows are split over ROWS."""
    return jax.tree.map(lambda x: Declared(x, ("rows",)), tree)


def unbox(tree):
    return meta.unbox(tree)


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, sequence: int = 1, devices=None) -> Mesh:
    """A mesh of AXES over all devices; one size may be -1: whatever is left.

    Raises ValueError where the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor, sequence]
    if sizes.count(-1) == 1:
        known = -np.prod(sizes)
        sizes[sizes.index(-1)] = max(1, len(devices) // int(known))
    if min(sizes) < 1 or np.prod(sizes) != len(devices):
        asked = f"data={data}, fsdp={fsdp}, tensor={tensor}, sequence={sequence}"
        raise ValueError(f"mesh {asked} needs {abs(np.prod(sizes))} devices, here are {len(devices)}; -1 fills one axis")
    # jax.make_mesh refuses axes that are a part of a pod's own, such as tensor=4 of 16x16, but for some kinds of chips
    placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec(names, rules=RULES) -> P:
    """The PartitionSpec of an array with these logical axes. KeyError for an unknown name; ValueError where two axes collide."""
    axes = [rules[name] if name is not None else None for name in names]
    used = [axis for axis in axes if axis is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {names} all go to one mesh axis: {axes}")
    return P(*axes)


def shardings(abstract, mesh: Mesh, rules=RULES):
    """The NamedSharding of every leaf of a tree, as `jax.eval_shape` gives it: by declared axes, else one copy everywhere.

    Raises ValueError, with the leaf's path, where an axis does not divide.
    """

    def one(path, leaf):
        if not isinstance(leaf, Declared):
            return NamedSharding(mesh, P())
        where = spec(leaf.names, rules)
        for size, axis, name in zip(leaf.value.shape, where, leaf.names):
            parts = 1 if axis is None else np.prod([mesh.shape[one] for one in (axis if isinstance(axis, tuple) else [axis])])
            if size % parts:
                leaf_name = jax.tree_util.keystr(path)
                raise ValueError(f"{leaf_name}: axis '{name}' of {size} does not divide over mesh axis '{axis}' of {parts}")
        return leaf.replace_boxed(NamedSharding(mesh, where))

    return unbox(jax.tree_util.tree_map_with_path(one, abstract, is_leaf=lambda x: isinstance(x, Declared)))


def create(make, mesh: Mesh, *args):
    """make(*args) with every leaf made where it belongs: no device ever holds the whole of a sharded tree. -> (tree, shardings)"""
    where = shardings(jax.eval_shape(make, *args), mesh)
    with jax.set_mesh(mesh):
        return one_at_a_time(jax.jit(lambda *a: unbox(make(*a)), out_shardings=where)(*args)), where


def split_of(shape, mesh) -> P:
    """Of an array [B, ...]: its rows over ROWS and, where it has columns [B,T,...] that divide, these over `sequence`."""
    columns = mesh.shape["sequence"]
    return P(ROWS, "sequence") if columns > 1 and len(shape) > 1 and shape[1] % columns == 0 else P(ROWS)


def auto_mesh():
    """The mesh that is set, where the compiler splits the work over it; None outside a mesh and inside shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or any(mesh._name_to_type.get(axis) != AxisType.Auto for axis in AXES) else mesh


def constrain_rows(x):
    """Split as by `split_of` and no further: for activations [B, ...]. The identity where there is no `auto_mesh`.

    Those of one token, [B,1,D], are split over fsdp by their width, as weights are: then they move to the weights, which are more.
    """
    mesh = auto_mesh()
    if mesh is None:
        return x
    one_token = x.ndim == 3 and x.shape[1] == 1
    return jax.lax.with_sharding_constraint(x, P("data", None, "fsdp") if one_token else split_of(x.shape, mesh))


def on_rows(function, whole, rows):
    """function(whole, rows), each device on its own of these rows [B,...], which it treats alike. -> a tree of [B,...]

    Parameters in `whole` are gathered over fsdp once, and their gradient is summed over rows once, whatever loops are in
    `function`; the compiler would do it in each turn. Nothing else changes, and nothing at all without an `auto_mesh`.
    """
    mesh = auto_mesh()
    if mesh is None or len(jax.tree.leaves(rows)[0]) % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return function(whole, rows)
    split = {"in_specs": (P(), P(ROWS)), "out_specs": P(ROWS), "axis_names": set(ROWS), "check_vma": False}
    return jax.shard_map(function, **split)(whole, rows)


def put(tree, where):
    """Host arrays, the same on every process, as global arrays with these shardings."""

    def one(x, sharding):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree, where)


def place(rows, mesh: Mesh):
    """Host arrays [B, ...], the same on every process, split as by `split_of`. ValueError where B does not divide."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    for x in jax.tree.leaves(rows):
        if len(x) % parts:
            raise ValueError(f"{len(x)} rows do not divide over data x fsdp = {parts} devices")
    return put(rows, jax.tree.map(lambda x: NamedSharding(mesh, split_of(np.shape(x), mesh)), rows))


def fetch(tree):
    """Arrays as NumPy on this host, whole, wherever their parts live."""

    def one(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return np.asarray(x)
        if not x.ndim:
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        rows = max(1, len(x) * 2**28 // max(x.nbytes, 1))  # a chip may not have room for more than some layers' weights
        parts = (x[start : start + rows] for start in range(0, max(len(x), 1), rows))
        return np.concatenate([np.asarray(multihost_utils.process_allgather(part, tiled=True)) for part in parts])

    return jax.tree.map(one, tree)


def together(what: str):
    """Wait until every process has come here: what process 0 wrote before is then there for all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def crowded(mesh: Mesh) -> bool:
    """Whether devices of this mesh are CPUs that share few threads. There the collectives of a program which has many at a time,
    such as one that shares prompts (Model.sharing), were seen to wait for each other's for ever."""
    return mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"


def one_at_a_time(out):
    """`out` itself. Several CPU devices share few threads, and two programs in flight could wait for each other's for ever: there
    it waits for the program that makes it, so that no other begins."""
    return jax.block_until_ready(out) if jax.default_backend() == "cpu" and jax.device_count() > 1 else out


def on_mesh(compiled, mesh: Mesh):
    """A function that calls `compiled` with this mesh set, so that `constrain_rows` inside it knows the mesh.

    Its `lower(*args)` is that of `jax.jit`: arguments may be shapes, and devices those of another machine.
    """

    def run(*args):
        with jax.set_mesh(mesh):
            return one_at_a_time(compiled(*args))

    def lower(*args):
        with jax.set_mesh(mesh):
            return compiled.lower(*args)

    run.lower = lower
    return run


def compile_step(step, mesh: Mesh, where, how: str = "jit"):
    """A step(state, data, *, axis) -> (state, metrics), compiled over the mesh; the state is donated, but for state.frozen.

    how = "jit"        the path: XLA splits the work by `where`, the state's shardings
          "shard_map"  every device runs the step on its rows, sums go over the mesh explicitly; the state is copied
          "pmap"       the same by jax.pmap
    The last two are checked alternatives for meshes that only split rows. Results are equal to rounding.
    """

    def apart(state, frozen, data, **axis):
        state, metrics = step(state.replace(frozen=frozen), data, **axis)
        return state.replace(frozen=()), metrics

    def whole(run):
        def call(state, data):
            after, metrics = run(state.replace(frozen=()), state.frozen, data)
            return after.replace(frozen=state.frozen), metrics

        call.lower = lambda state, data: run.lower(state.replace(frozen=()), state.frozen, data)
        return call

    if how == "jit":
        return whole(on_mesh(jax.jit(apart, out_shardings=(where.replace(frozen=()), None), donate_argnums=0), mesh))
    if (mesh.shape["tensor"], mesh.shape["sequence"]) != (1, 1):
        raise ValueError(f"{how} splits nothing but rows: it needs a mesh with tensor=1 and sequence=1, not {dict(mesh.shape)}")
    if how == "shard_map":
        split = jax.shard_map(partial(apart, axis=ROWS), mesh=mesh, in_specs=(P(), P(), P(ROWS)), out_specs=P(), check_vma=False)
        return whole(jax.jit(split, donate_argnums=0))
    if how == "pmap":
        devices = list(mesh.devices.flat)
        split = jax.pmap(partial(apart, axis="rows"), axis_name="rows", in_axes=(None, None, 0), out_axes=None, devices=devices)
        parts = len(devices)
        return whole(
            lambda state, frozen, data: split(state, frozen, jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), data))
        )
    raise ValueError(f"how = {how!r}; there are 'jit', 'shard_map' and 'pmap'")
