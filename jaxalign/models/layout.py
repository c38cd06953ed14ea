"""Checkpoints to the decoder's tree and back, as the tables of `names` say: arrays and configs, no files."""

import math
import re
from dataclasses import fields as dataclass_fields
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxalign.models.decoder import DecoderConfig, build
from jaxalign.models.names import ACTIVATION_SPELLINGS, ACTIVATIONS, BUFFERS, FAMILIES, LACKING, REQUIRED, Family
from jaxalign.shard import unbox


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
def leaves_of(config: DecoderConfig) -> dict:
    """The decoder's own tree: {path: shape}."""
    abstract = unbox(jax.eval_shape(build(config).init, jax.random.key(0)))
    return {path: leaf.shape for path, leaf in flatten(abstract).items()}


def plan(rows, config: DecoderConfig):
    """What a file of this config holds. -> [(tensor name, its shape, layer or None, row, sizes)]

    Raises ValueError where the family has no name for a leaf of the tree.
    """
    c, expected = config, leaves_of(config)
    sizes = {"V": c.vocab, "C": c.context, "D": c.width, "H": c.heads, "G": c.kv_heads, "K": c.head_dim, "M": c.mlp}
    sizes |= {"P": 2, "J": c.head_dim // 2}
    rows = [row for row in rows if set(row[2:]) <= expected.keys()]
    if nameless := expected.keys() - {leaf for row in rows for leaf in row[2:]}:
        raise ValueError(f"this family has no tensor for {', '.join(sorted(nameless))} of {config}")
    out = []
    for layer in range(c.layers):
        for row in rows:
            if ("{}" in row[0]) or layer == 0:
                own = sizes | {"N": len(row) - 2}
                shape = shape_of(row[1].split("->")[0], own)
                out.append((row[0].format(layer), shape, layer if "{}" in row[0] else None, row, own))
    return out


def assemble(rows, config: DecoderConfig, tensors: dict, where) -> dict:
    """The decoder's tree, f32 NumPy, from {name: Tensor}. ValueError, naming `where`, for missing, unknown, wrongly shaped ones."""
    wanted = plan(rows, config)
    missing = [entry for entry in wanted if entry[0] not in tensors and entry[0] != "score.bias"]
    if missing:
        name, shape = missing[0][:2]
        raise ValueError(f"{where}: tensor '{name}' of shape {shape} is missing, and {len(missing) - 1} more of this config's")
    if unknown := sorted(tensors.keys() - {entry[0] for entry in wanted}):
        shape, more = tensors[unknown[0]].shape, len(unknown) - 1
        raise ValueError(f"{where}: tensor '{unknown[0]}' of shape {shape}, and {more} more, have no place in this model: {config}")
    for name, shape, *_ in wanted:
        if name in tensors and tensors[name].shape != shape:
            raise ValueError(f"{where}: tensor '{name}' has shape {tensors[name].shape} where the config asks for {shape}")
    flat = {path: np.zeros(shape, np.float32) for path, shape in leaves_of(config).items()}
    for name, _, layer, (_, layout, *leaves), sizes in wanted:
        if name in tensors:
            x = rearrange(tensors[name].read(), layout, sizes)
            for leaf, part in zip(leaves, x if len(leaves) > 1 else [x], strict=True):
                flat[leaf][... if layer is None else layer] = part
    return nest(flat)


def disassemble(rows, config: DecoderConfig, params):
    """The inverse of `assemble`: {name: Tensor} of a tree of host arrays. ValueError where the tree is not this config's."""
    flat, expected = flatten(params), leaves_of(config)
    for path in sorted(flat.keys() | expected.keys()):
        have = np.shape(flat[path]) if path in flat else None
        if have != expected.get(path):
            raise ValueError(f"parameter {path}: the tree has shape {have}, its config asks for {expected.get(path)}")

    def tensor(shape, layer, layout, leaves, sizes):
        def read():
            parts = [np.asarray(flat[leaf], np.float32)[... if layer is None else layer] for leaf in leaves]
            return np.ascontiguousarray(rearrange(np.stack(parts) if len(parts) > 1 else parts[0], layout, sizes, back=True))

        return Tensor(shape, read)

    return {name: tensor(shape, layer, row[1], row[2:], sizes) for name, shape, layer, row, sizes in plan(rows, config)}


def canonical(family: Family, tensors: dict, where) -> dict:
    """The tensors of a file under the family's names: aliases and bare names mapped, buffers left out; unknown names as they are.

    Raises ValueError where one tensor is there under two spellings.
    """
    known, out = {row[0] for row in family.rows}, {}
    for name, tensor in tensors.items():
        spellings = (name, family.aliases.get(name, name), family.prefix + name)
        ours = next((x for x in spellings if re.sub(r"\.\d+\.", ".{}.", x, count=1) in known), None)
        if ours is None and BUFFERS.search(name):
            continue
        ours = ours or name
        if ours in out:
            raise ValueError(f"{where}: tensor '{ours}' is there under two spellings, '{name}' is one")
        out[ours] = tensor
    return out


def read_config(raw: dict, where, **own):
    """(family name, DecoderConfig) of a config.json. ValueError, naming the key, for what the decoder does not do."""
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"{where}: model_type {kind!r} is not among those that jaxalign knows: {', '.join(FAMILIES)}")
    family = FAMILIES[kind]

    def refuse(key, value):
        raise ValueError(f"{where}: {key} = {value!r} asks for something that the decoder does not compute")

    for key in ("rope_parameters", "rope_scaling"):
        rope = raw.get(key) or {}
        if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
            refuse(key, rope)
        if any(isinstance(x, dict) for x in rope.values()):  # one rope a kind of layer
            refuse(key, rope)
    old = {key: raw[spelling] for key, spelling in family.rope.items() if raw.get(spelling) is not None}
    flat = {k: v for k, v in {**raw, **old, **(raw.get("rope_parameters") or {})}.items() if v is not None}
    for key, harmless in LACKING.items():
        if flat.get(key, harmless) != harmless:
            refuse(key, flat[key])
    windowed = flat.get("max_window_layers", 0) < flat.get("num_hidden_layers", 1)
    if flat.get("sliding_window") and flat.get("use_sliding_window", kind != "qwen2") and windowed:
        refuse("sliding_window", flat["sliding_window"])
    if any(layer != "full_attention" for layer in flat.get("layer_types", [])):
        refuse("layer_types", flat["layer_types"])
    if "rope_fraction" in family.fields and family.fields["rope_fraction"][0] is None and flat.get("partial_rotary_factor", 1) != 1:
        refuse("partial_rotary_factor", flat["partial_rotary_factor"])

    f = {}
    for field, (key, default) in family.fields.items():
        value = flat.get(key, default)
        if value is REQUIRED:
            raise ValueError(f"{where}: {key} is missing")
        value = value(f) if callable(value) else value
        if field == "activation":
            if value not in ACTIVATION_SPELLINGS:
                refuse(key, value)
            value = ACTIVATION_SPELLINGS[value]
        type_ = DecoderConfig.__dataclass_fields__[field].type
        if type(value) not in ((int, float) if type_ is float else (type_,)) or (type_ in (int, float) and value <= 0):
            above = " above 0" if type_ in (int, float) else ""
            raise ValueError(f"{where}: {key or field} = {value!r} should be of type {type_.__name__}{above}")
        f[field] = type_(value)
    if f["heads"] % f["kv_heads"]:
        raise ValueError(f"{where}: {f['heads']} attention heads do not divide over {f['kv_heads']} key/value heads")
    return kind, DecoderConfig(**f, **own)


def write_config(name: str, config: DecoderConfig) -> dict:
    """The config.json of an architecture, in the family's keys and in both spellings of rotary ones. Inverse of `read_config`.

    Raises ValueError, naming the fields, where the family cannot say this config.
    """
    family = FAMILIES[name]
    raw = {key: getattr(config, field) for field, (key, _) in family.fields.items() if key is not None}
    for key in ("hidden_act", "activation_function"):
        if key in raw:
            raw[key] = ACTIVATIONS[raw[key]]
    if family.rope:
        new = {key: raw.pop(key) for key in family.rope}
        raw |= {spelling: new[key] for key, spelling in family.rope.items()}
        raw["rope_parameters"] = {**new, "rope_type": "default"}
    raw["model_type"] = name
    own = {"dtype": config.dtype, "remat": config.remat, "scalar": config.scalar}
    again = read_config(raw, f"family {name}", **own)[1]
    names = [x.name for x in dataclass_fields(config)]
    if lost := [f"{x}={getattr(config, x)!r}" for x in names if getattr(config, x) != getattr(again, x)]:
        raise ValueError(f"the family {name} has no way to say {', '.join(lost)}")
    classifier = config.scalar is not None
    raw["architectures"] = [family.architectures[classifier]]
    return raw | ({"num_labels": 1} if classifier else {})


def family_of(config: DecoderConfig) -> str:
    """The first family that can say this config. ValueError where none can."""
    reasons = []
    for name in FAMILIES:
        try:
            write_config(name, config)
            return name
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(f"no family of checkpoints fits this config: {'; '.join(reasons)}")
