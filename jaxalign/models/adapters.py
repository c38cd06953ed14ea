"""What is trained of a model, apart from what is not: LoRA, (IA)3, prefixes and prompts, the last layers, the head (parts.Adapter).

An adapted model is a model like any other: its config says the adapter, its tree has the adapter's leaves. `split` takes the tree
apart for a TrainState, `types.join` puts it together again; the frozen leaves are the same arrays all the time. So the policy that
a run starts from, which is its reference, costs no second copy of them.

    config, params = adapt(config, params, Adapter("lora"), key)    to begin with
    frozen, trained = split(params, trained_leaves(config))
    config, params = merge(config, join(frozen, trained))           the plain model that says the same
"""

import re
from dataclasses import replace
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models import Config, build, peft
from jaxalign.models.parts import ADDED, AT_INPUT, Adapter
from jaxalign.shard import unbox
from jaxalign.types import join

TRAINED = rf"{ADDED}|(^|\.)(last|scalar|classes)\.|^critic\."  # and a critic that is a model of its own


def trained_leaves(config: Config) -> str:
    """Regular expression for the names of the leaves that are trained, for `split`."""
    return TRAINED if config.adapter else ""


def split(params, leaves: str):
    """-> (frozen, trained): trained are the leaves in whose names, such as "layers.mlp.down.kernel", the expression is found.

    Leaves may be boxed. frozen is () where all is trained. Raises ValueError where nothing is.
    """

    def part(tree, path, wanted):
        kept = {}
        for name, x in tree.items():
            x = part(x, f"{path}{name}.", wanted) if isinstance(x, dict) else x
            if x if isinstance(x, dict) else bool(re.search(leaves, f"{path}{name}")) == wanted:
                kept[name] = x
        return kept

    frozen, trained = (part(params, "", wanted) for wanted in (False, True))
    if not trained:
        raise ValueError(f"nothing would be trained: no parameter's name has {leaves!r}, such as a model without a scalar head")
    return frozen or (), trained


def adapt(config: Config, params, adapter: Adapter, key):
    """A plain model with an adapter, its new leaves read from adapter.source or drawn from the key. -> (config, params)

    `merge` is the inverse.
    Raises ValueError where the model has an adapter already, or the adapter fits no part of it; as peft.load, too.
    """
    if config.adapter:
        raise ValueError(f"the model has an adapter already, {config.adapter}: merge it first")
    if adapter.source:
        config, params = peft.load(adapter.source, config, params)
        if config.adapter.kind != adapter.kind:
            raise ValueError(f"{adapter.source} holds an adapter of kind {config.adapter.kind}, not {adapter.kind}")
        return config, params
    config = replace(config, adapter=adapter)
    if adapter.kind == "last":
        below = config.layers - config.top
        parts = {"layers": itemgetter(slice(below)), "last": itemgetter(slice(below, None))}
        params = _decoder(params, lambda of: {name: jax.tree.map(part, of["layers"]) for name, part in parts.items()})
    if adapter.kind in ("last", "head"):
        return config, params

    def added(key):
        return split(unbox(build(config).init(key)), ADDED)[1]

    try:
        return config, join(params, jax.jit(added)(key))
    except ValueError as error:
        raise ValueError(
            f"adapter targets = {adapter.targets!r} are in no name of a dense layer, such as layers.mlp.down"
        ) from error


def neutral(params):
    """The same parameters, with which LoRA and (IA)3 change nothing: the model below them. All other leaves are the same arrays.

    Virtual tokens stay as they are, for none says nothing.
    """

    def one(path, x):
        value = {"lora_b": 0, "ia3": 1}.get(path[-1].key)
        return x if value is None else jnp.full_like(x, value, device=x.sharding)

    return jax.tree_util.tree_map_with_path(one, params)


def merge(config: Config, params):
    """The plain model that gives the same numbers. -> (config, params); leaves that no adapter changes are the same arrays.

    W' = W + s A B for LoRA; for (IA)3, kernel and bias times the vector. Computed in float32 where they lie.
    Raises ValueError for virtual tokens, which no weight of a plain model can stand for.
    """
    adapter = config.adapter
    if adapter is None:
        return config, params
    if adapter.kind in ("prefix", "prompt"):
        raise ValueError(
            f"a {adapter.kind} is no weight of the model, so it cannot be merged: models.peft exports it beside the model"
        )
    plain = replace(config, adapter=None)
    if adapter.kind == "last":

        def whole(*x):
            return _numpy_of(x[0]).concatenate(x)

        return plain, _decoder(params, lambda of: {"layers": jax.tree.map(whole, of["layers"], of["last"])})
    return plain, _merged(params, "", adapter)


def _decoder(params, change):
    """The parameters with other layers, those that change(decoder) gives: of all of a model, or of its part `decoder`."""
    if "decoder" in params:
        return params | {"decoder": _decoder(params["decoder"], change)}
    return {name: x for name, x in params.items() if name not in ("layers", "last")} | change(params)


def _merged(tree, path: str, adapter: Adapter):
    if not isinstance(tree, dict):
        return tree
    if "lora_a" in tree:
        a, b, kernel = tree["lora_a"], tree["lora_b"], tree["kernel"]
        layers, rank = a.shape[0], a.shape[-1]
        product = (a.reshape(layers, -1, rank) * adapter.scale) @ b.reshape(layers, rank, -1)
        tree = {name: x for name, x in tree.items() if name not in ("lora_a", "lora_b")}
        return tree | {"kernel": kernel + product.reshape(kernel.shape)}
    if "ia3" in tree:
        by, kernel = tree["ia3"], tree["kernel"]
        ones, at_input = (1,) * (kernel.ndim - by.ndim), path.endswith(f"{AT_INPUT}.")
        shape = by.shape + ones if at_input else by.shape[:1] + ones + by.shape[1:]
        out = {"kernel": kernel * by.reshape(shape)}
        if "bias" in tree:
            out["bias"] = tree["bias"] if at_input else tree["bias"] * by
        return out
    return {name: _merged(x, f"{path}{name}.", adapter) for name, x in tree.items()}


def _numpy_of(x):
    """The library that made an array."""
    return jnp if isinstance(x, jax.Array) else np
