"""Checkpoints to our models' trees and back, as the tables of `names` say: arrays and configs, no files."""

import math
import re
import reprlib
from dataclasses import fields as dataclass_fields
from functools import cache
from typing import Any, NamedTuple, get_args

import jax
import numpy as np

from jaxalign.models import Config, build
from jaxalign.models.decoder import DecoderConfig
from jaxalign.models.encdec import EncDecConfig
from jaxalign.models.names import ACTIVATION_SPELLINGS, ACTIVATIONS, BUFFERS, FAMILIES, LACKING, REQUIRED, Family
from jaxalign.models.spellings import read_forward, read_rope, read_windows, write_forward, write_rope, write_windows
from jaxalign.shard import unbox

SIZES = {"V": "vocab", "C": "context", "D": "width", "H": "heads", "G": "kv_heads", "K": "head_dim", "M": "mlp", "R": "buckets"}
LARGEST = {int: 2**31 - 1, float: 1e30}  # of a config's numbers: token ids and positions are int32
_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 100


def brief(value) -> str:
    """repr of what a stranger wrote, for an error message: one line, cut in length and depth."""
    return _brief.repr(value)


class Tensor(NamedTuple):
    """An array in a file: its shape is known, its numbers are fetched by read() -> f32."""

    shape: tuple
    read: Any


def rearrange(x, layout: str, sizes: dict, *, back: bool = False):
    """An array from the left axes of a layout to the right ones, or back. The inverse is the same layout read the other way."""
    old, new = reversed(layout.split("->")) if back else layout.split("->")
    axes = [[a for a in re.findall(r"\w", side) if a != "1"] for side in (old, new)]  # an axis of 1 only counts in shapes
    split = x.reshape([sizes[a] for a in axes[0]])
    return split.transpose([axes[0].index(a) for a in axes[1]]).reshape(shape_of(new, sizes))


def shape_of(side: str, sizes: dict) -> tuple:
    groups = re.findall(r"\([^)]*\)|\w", side)
    return tuple(math.prod(1 if a == "1" else sizes[a] for a in re.findall(r"\w", group)) for group in groups)


def split(x, layout: str, sizes: dict) -> list:
    """The leaves that a tensor holds: joined by + along its first axis, or sharing one layout's axis N, or one alone."""
    if "+" not in layout:
        x = rearrange(x, layout, sizes)
        return [x] if sizes["N"] == 1 else list(x)
    layouts = layout.split("+")
    ends = np.cumsum([shape_of(part.split("->")[0], sizes)[0] for part in layouts])
    return [rearrange(part, own, sizes) for part, own in zip(np.split(x, ends[:-1]), layouts)]


def join(parts: list, layout: str, sizes: dict):
    """The inverse of `split`."""
    if "+" not in layout:
        return rearrange(parts[0] if sizes["N"] == 1 else np.stack(parts), layout, sizes, back=True)
    return np.concatenate([rearrange(part, own, sizes, back=True) for part, own in zip(parts, layout.split("+"))])


def flatten(tree) -> dict:
    """{"layers.attention.q.kernel": leaf, ...}"""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {".".join(key.key for key in path): leaf for path, leaf in leaves}


def nest(flat: dict) -> dict:
    tree = {}
    for path, leaf in flat.items():
        *above, last = path.split(".")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


@cache
def leaves_of(config: Config) -> dict:
    """The model's own tree: {path: shape}."""
    abstract = unbox(jax.eval_shape(build(config).init, jax.random.key(0)))
    return {path: leaf.shape for path, leaf in flatten(abstract).items()}


def family_for(name: str, config: Config) -> Family:
    """The family, with the rows that this config has."""
    family = FAMILIES[name]
    return family._replace(rows=family.rows(config)) if callable(family.rows) else family


def plan(rows, config: Config):
    """What a file of this config holds. -> [(tensor name, its shape, layer or None, row, sizes)]

    Raises ValueError where the family has no name for a leaf of the tree.
    """
    expected = leaves_of(config)
    sizes = {letter: getattr(config, field) for letter, field in SIZES.items() if hasattr(config, field)}
    sizes |= {"P": 2, "J": config.head_dim // 2}
    rows = [row for row in rows if set(row[2:]) <= expected.keys()]
    if nameless := expected.keys() - {leaf for row in rows for leaf in row[2:]}:
        raise ValueError(f"this family has no tensor for {', '.join(sorted(nameless))} of {config}")
    out, counts = [], [expected[row[2]][0] if "{}" in row[0] else 1 for row in rows]
    for layer in range(max(counts)):
        for row, count in zip(rows, counts):
            if layer < count:
                own = sizes | {"N": len(row) - 2}
                parts = [shape_of(part.split("->")[0], own) for part in row[1].split("+")]
                shape = (sum(part[0] for part in parts), *parts[0][1:]) if len(parts) > 1 else parts[0]
                out.append((row[0].format(layer), shape, layer if "{}" in row[0] else None, row, own))
    return out


def assemble(rows, config: Config, tensors: dict, where) -> dict:
    """The model's tree, f32 NumPy, from {name: Tensor}. ValueError, naming `where`, for missing, unknown, wrongly shaped ones."""
    layers = config.layers + getattr(config, "encoder_layers", 0)
    asked = config.vocab * config.width + layers * config.width * (config.heads * config.head_dim + config.mlp)
    if asked > (held := sum(math.prod(tensor.shape) for tensor in tensors.values())):  # before a loop or an array is made of it
        raise ValueError(f"{where}: there are {held} weights, and the config asks for {asked} or more: {config}")
    wanted = plan(rows, config)
    missing = [entry for entry in wanted if entry[0] not in tensors and entry[0] != "score.bias"]
    if missing:
        name, shape = missing[0][:2]
        raise ValueError(f"{where}: tensor '{name}' of shape {shape} is missing, and {len(missing) - 1} more of this config's")
    if unknown := sorted(tensors.keys() - {entry[0] for entry in wanted}):
        shape, more = tensors[unknown[0]].shape, len(unknown) - 1
        raise ValueError(
            f"{where}: tensor {brief(unknown[0])} of shape {shape}, and {more} more, have no place in this model: {config}"
        )
    for name, shape, *_ in wanted:
        if name in tensors and tensors[name].shape != shape:
            raise ValueError(f"{where}: tensor '{name}' has shape {tensors[name].shape} where the config asks for {shape}")
    flat = {path: np.zeros(shape, np.float32) for path, shape in leaves_of(config).items()}
    for name, _, layer, (_, layout, *leaves), sizes in wanted:
        if name in tensors:
            for leaf, part in zip(leaves, split(tensors[name].read(), layout, sizes), strict=True):
                flat[leaf][... if layer is None else layer] = part
    return nest(flat)


def disassemble(rows, config: Config, params):
    """The inverse of `assemble`: {name: Tensor} of a tree of host arrays. ValueError where the tree is not this config's."""
    flat, expected = flatten(params), leaves_of(config)
    for path in sorted(flat.keys() | expected.keys()):
        have = np.shape(flat[path]) if path in flat else None
        if have != expected.get(path):
            raise ValueError(f"parameter {path}: the tree has shape {have}, its config asks for {expected.get(path)}")

    def tensor(shape, layer, layout, leaves, sizes):
        def read():
            parts = [np.asarray(flat[leaf], np.float32)[... if layer is None else layer] for leaf in leaves]
            return np.ascontiguousarray(join(parts, layout, sizes))

        return Tensor(shape, read)

    return {name: tensor(shape, layer, row[1], row[2:], sizes) for name, shape, layer, row, sizes in plan(rows, config)}


def canonical(family: Family, tensors: dict, where) -> dict:
    """The tensors of a file under the family's names: aliases and bare names mapped, buffers left out; unknown names as they are.

    Raises ValueError where one tensor is there under two spellings.
    """
    known, out = {row[0] for row in family.rows}, {}
    for name, tensor in tensors.items():
        spellings = (name, family.aliases.get(name, name), family.prefix + name)
        ours = next((x for x in spellings if known & {x, re.sub(r"\.\d+\.", ".{}.", x, count=1)}), None)
        if ours is None and BUFFERS.search(name):
            continue
        ours = ours or name
        if ours in out:
            raise ValueError(f"{where}: tensor {brief(ours)} is there under two spellings, {brief(name)} is one")
        out[ours] = tensor
    return out


def read_config(raw: dict, where, **own):
    """(family name, config) of a config.json. ValueError, naming the key, for what our models do not do."""
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"{where}: model_type {brief(kind)} is not among those that jaxalign knows: {', '.join(FAMILIES)}")
    family = FAMILIES[kind]

    def refuse(key, value):
        raise ValueError(f"{where}: {key} = {brief(value)} asks for something that the decoder does not compute")

    rope = read_rope(raw, family, refuse)
    old = {key: raw[spelling] for key, spelling in family.rope.items() if raw.get(spelling) is not None}
    forward = read_forward(raw) if family.config is EncDecConfig else {}
    flat = {k: v for k, v in {**raw, **old, **rope, **forward}.items() if v is not None}
    ours = {key for key, _ in family.fields.values()}
    for key, harmless in LACKING.items():
        if key not in ours and flat.get(key, harmless) != harmless:
            refuse(key, flat[key])
    if "rope_fraction" in family.fields and family.fields["rope_fraction"][0] is None and flat.get("partial_rotary_factor", 1) != 1:
        refuse("partial_rotary_factor", flat["partial_rotary_factor"])

    f = {}
    for field, (key, default) in family.fields.items():
        if field == "windows":
            continue
        type_ = family.config.__dataclass_fields__[field].type
        if args := get_args(type_):  # number | None, and null is not an absent key
            type_ = args[0]
            if key not in flat and raw.get(key, default) is None:
                f[field] = None
                continue
        value = flat.get(key, default)
        if value is REQUIRED:
            raise ValueError(f"{where}: {key} is missing")
        value = value(f) if callable(value) else value
        if field == "activation":
            if not isinstance(value, str) or value not in ACTIVATION_SPELLINGS:
                refuse(key, value)
            value = ACTIVATION_SPELLINGS[value]
        least = -1 if field == "start" else 0  # a token's id may be 0
        if type(value) not in ((int, float) if type_ is float else (type_,)) or (type_ in (int, float) and value <= least):
            above = f" above {least}" if type_ in (int, float) else ""
            raise ValueError(f"{where}: {key or field} = {brief(value)} should be of type {type_.__name__}{above}")
        if type_ in LARGEST and not value <= LARGEST[type_]:  # NaN is not
            raise ValueError(f"{where}: {key or field} = {brief(value)} is not a number up to {LARGEST[type_]}")
        f[field] = type_(value)
    windows = read_windows(raw, family, f["layers"], refuse)
    if family.config is EncDecConfig:
        try:
            return kind, EncDecConfig(**f, **own)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if f["heads"] % f["kv_heads"]:
        raise ValueError(f"{where}: {f['heads']} attention heads do not divide over {f['kv_heads']} key/value heads")
    if f["positions"] == "rope" and (f["rope_fraction"] > 1 or int(f["head_dim"] * f["rope_fraction"]) % 2):
        raise ValueError(f"{where}: {f['rope_fraction']} of {f['head_dim']} dimensions of a head do not turn in pairs")
    return kind, DecoderConfig(**f, rope_scaling=flat["rope_scaling"], windows=windows, **own)


def write_config(name: str, config: Config) -> dict:
    """The config.json of an architecture, in the family's keys and in both spellings of rotary ones. Inverse of `read_config`.

    Raises ValueError, naming the fields, where the family cannot say this config.
    """
    family = FAMILIES[name]
    if not isinstance(config, family.config):
        raise ValueError(f"the family {name} is of {family.config.__name__}, not of {type(config).__name__}")
    raw = {key: getattr(config, field) for field, (key, _) in family.fields.items() if key is not None}
    for key in ("hidden_act", "hidden_activation", "activation_function", "dense_act_fn"):
        if key in raw:
            raw[key] = ACTIVATIONS[raw[key]]
    if family.rope:
        raw = write_rope(raw, family, config)
    if "windows" in family.fields:
        raw |= write_windows(family, config)
    if family.config is EncDecConfig:
        raw |= write_forward(raw) | {"is_encoder_decoder": True}
    raw["model_type"] = name
    own = {name: getattr(config, name) for name in ("dtype", "remat", "attention", "scalar")}
    again = read_config(raw, f"family {name}", **own)[1]
    names = [x.name for x in dataclass_fields(config)]
    if lost := [f"{x}={getattr(config, x)!r}" for x in names if getattr(config, x) != getattr(again, x)]:
        raise ValueError(f"the family {name} has no way to say {', '.join(lost)}")
    classifier = config.scalar is not None
    raw["architectures"] = [family.architectures[classifier]]
    return raw | ({"num_labels": 1} if classifier else {})


def family_of(config: Config) -> str:
    """The first family that can say this config. ValueError where none can."""
    reasons = []
    for name, family in FAMILIES.items():
        if not isinstance(config, family.config):
            continue
        try:
            write_config(name, config)
            return name
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(f"no family of checkpoints fits this config: {'; '.join(reasons)}")
