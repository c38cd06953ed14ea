"""What all models are made of: norms, linear maps, MLPs, heads. Parameters are declared with their logical axes (shard.RULES).

A part reads the fields of the config that it needs: of a `decoder.DecoderConfig` or an `encdec.EncDecConfig`.
"""

import math
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxalign.models.attention_blocks import ATTENDED
from jaxalign.shard import declared

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}

KEPT = jax.checkpoint_policies.save_only_these_names(ATTENDED)
REMAT = {  # what a layer's backward pass computes again
    "none": None,
    "dots": lambda primitive, *args, **how: primitive is _product or KEPT(primitive, *args, **how),  # all but these two
    "full": jax.checkpoint_policies.nothing_saveable,  # all
}
AT_INPUT = "mlp.down"  # where ia3 is at the input of a dense layer
ADAPTERS = ("lora", "ia3", "prefix", "prompt", "last", "head")
ADDED = r"(^|\.)(lora_a|lora_b|ia3|prefix|prompt)(\.|$)"  # leaves that a plain model does not have


@dataclass(frozen=True)
class Adapter:
    """What of a model is trained instead of all its weights, and what is added to it for that. `models.adapters` has the rest.

    lora    y = x W + s (x A) B on dense layers; s = alpha/rank (Hu et al. 2021), or alpha/sqrt(rank) (rsLoRA, Kalajdzievski 2023)
    ia3     a dense layer's output, or the input of an MLP's way down, times a vector (Liu et al. 2022)
    prefix  keys and values of each layer, that every document attends to as its first tokens (Li & Liang 2021)
    prompt  embeddings, that every document has as its first tokens (Lester et al. 2021)
    last    the last layers themselves
    head    nothing but the scalar head

    A scalar head is trained with any of them. lora and ia3 change nothing until they are trained.
    """

    kind: str  # ADAPTERS
    targets: str = (
        "attention|mlp"  # lora, ia3: regular expression, searched in names such as "layers.attention.q", "layers.mlp.down"
    )
    rank: int = 16  # lora
    alpha: float = 32.0  # lora
    rank_stabilised: bool = False  # lora: s = alpha/sqrt(rank)
    length: int = 16  # prefix, prompt: tokens; they take as many of a model's positions
    layers: int = 2  # last
    source: str = ""  # lora, ia3, prefix, prompt: a folder of PEFT's or of a run, which says all but the kind; "": a new one

    def __post_init__(self):
        if self.kind not in ADAPTERS:
            raise ValueError(f"adapter kind = {self.kind!r}; there are {', '.join(ADAPTERS)}")
        if min(self.rank, self.length, self.layers) < 1 or not self.alpha > 0:
            raise ValueError(f"rank, alpha, length and layers are above 0: {self}")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(f"adapter targets = {self.targets!r} is no regular expression: {error}") from error

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)

    @property
    def virtual(self) -> int:
        """How many tokens stand before each document."""
        return self.length if self.kind in ("prefix", "prompt") else 0

    @property
    def top(self) -> int:
        """How many of the last layers are trained."""
        return self.layers if self.kind == "last" else 0


def normal(std):
    return nn.initializers.normal(std)


def uniform(key, shape, dtype=jnp.float32, *, bound):
    """Between -bound and bound."""
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def product(x, kernel, contract: int):
    """x times a kernel, contracting the last `contract` axes of x with the first of the kernel.

    JAX's own product but for one thing: of x and the gradient the smaller one stands first in that of the kernel, for XLA's CPU
    compiler transposes what stands first. It is a primitive, so every derivative and every map goes through it.
    """
    return _product.bind(x, kernel.astype(x.dtype), contract=contract)


def _plain(x, kernel, *, contract):
    axes = tuple(range(x.ndim - contract, x.ndim)), tuple(range(contract))
    return jax.lax.dot_general(x, kernel, (axes, ((), ())))


def _of_x(g, x, kernel, *, contract):
    axes = tuple(range(x.aval.ndim - contract, g.ndim)), tuple(range(contract, kernel.ndim))
    return jax.lax.dot_general(g, kernel, (axes, ((), ())))


def _of_kernel(g, x, kernel, *, contract):
    rows = tuple(range(x.ndim - contract))
    if x.size <= g.size:
        return jax.lax.dot_general(x, g, ((rows, rows), ((), ())))
    outs = g.ndim - len(rows)
    return jnp.moveaxis(jax.lax.dot_general(g, x, ((rows, rows), ((), ()))), range(outs), range(-outs, 0))


def _mapped(operands, axes, *, contract):
    if axes[1] is None:
        return _product.bind(jnp.moveaxis(operands[0], axes[0], 0), operands[1], contract=contract), 0
    return jax.vmap(partial(_plain, contract=contract), axes)(*operands), 0


_product = Primitive("product")
_product.def_impl(jax.jit(_plain, static_argnames="contract"))
_product.def_abstract_eval(lambda x, kernel, *, contract: x.update(shape=x.shape[: x.ndim - contract] + kernel.shape[contract:]))
mlir.register_lowering(_product, mlir.lower_fun(_plain, multiple_results=False))
ad.defbilinear(_product, _of_x, _of_kernel)
batching.primitive_batchers[_product] = _mapped


def stacked(block, count: int, config, *args):
    """`count` layers of a block, (carry, layer, where) -> (carry, out), in turn: parameters, `layer` and out are [count,...]"""
    if REMAT[config.remat] is not None:
        block = nn.remat(block, policy=REMAT[config.remat], prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        length=count,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(config, *args)


def repeated(x, rows: int):
    """Each row of x as often as makes so many."""
    return jnp.repeat(x, rows // len(x), axis=0)


def if_same(hidden, *pairs):
    """The hidden states [B,T,D], NaN in rows for which the parts of a pair, [B/n,S] and [B,S], differ: nothing is learned."""
    same = jnp.stack([(repeated(of_group, len(own)) == own).all(axis=1) for of_group, own in pairs])
    return jnp.where(same.all(axis=0)[:, None, None], hidden, jnp.nan)


class Norm(nn.Module):
    config: Any
    shape: tuple = ()  # of the last axes of x, which are normalised together; (): the width
    names: tuple = ("embed",)  # of these axes

    @nn.compact
    def __call__(self, x):
        c, shape, x32 = self.config, self.shape or (self.config.width,), x.astype(jnp.float32)
        axes, ones = tuple(range(-len(shape), 0)), (1,) * (x.ndim - len(shape))

        def parameter(name, init):
            return self.param(name, declared(init, *self.names), shape).reshape(ones + shape)

        if c.norm == "layer":
            x32 = x32 - x32.mean(axes, keepdims=True)
        x32 = x32 * jax.lax.rsqrt((x32**2).mean(axes, keepdims=True) + c.norm_eps)
        if c.norm == "rms_plus_one":
            x32 = x32 * (1 + parameter("scale", nn.initializers.zeros))
        else:
            x32 = x32 * parameter("scale", nn.initializers.ones)
        if c.norm == "layer":
            x32 = x32 + parameter("bias", nn.initializers.zeros)
        return x32.astype(x.dtype)


class Linear(nn.Module):
    """x times a kernel, contracting x's last axes with the kernel's first; and what an adapter adds that targets this layer."""

    shape: tuple  # of the kernel
    names: tuple  # of the kernel's axes
    contract: int = 1  # how many axes of x are summed over
    bias: bool = False
    std: float = 0.02
    adapter: Adapter | None = None

    @nn.compact
    def __call__(self, x):
        (ins, outs), (in_names, out_names) = ((of[: self.contract], of[self.contract :]) for of in (self.shape, self.names))
        kernel = self.param("kernel", declared(normal(self.std), *self.names), self.shape)
        bias = self.param("bias", declared(nn.initializers.zeros, *out_names), outs) if self.bias else None
        name = ".".join(self.path)
        kind = self.adapter.kind if self.adapter and re.search(self.adapter.targets, name) else None

        def times(y, shape, names):
            return y * self.param("ia3", declared(nn.initializers.ones, *names), shape).astype(y.dtype)[None, None]

        if kind == "ia3" and name.endswith(AT_INPUT):
            x = times(x, ins, in_names)
        y = product(x, kernel, self.contract)
        if kind == "lora":
            rank, bound = self.adapter.rank, math.prod(ins) ** -0.5
            a = self.param("lora_a", declared(partial(uniform, bound=bound), *in_names, None), (*ins, rank))
            b = self.param("lora_b", declared(nn.initializers.zeros, None, *out_names), (rank, *outs))
            y = y + product(product(x, a, self.contract) * self.adapter.scale, b, 1)
        if bias is not None:
            y = y + bias.astype(x.dtype)[None, None]
        return times(y, outs, out_names) if kind == "ia3" and not name.endswith(AT_INPUT) else y


class Mlp(nn.Module):
    config: Any
    stds: tuple  # of the kernels into the hidden layer, and out of it

    @nn.compact
    def __call__(self, x):
        c, act = self.config, ACTIVATIONS[self.config.activation]
        wide = {"shape": (c.width, c.mlp), "names": ("embed", "mlp"), "bias": c.mlp_bias, "std": self.stds[0], "adapter": c.adapter}
        up = Linear(**wide, name="up")(x)
        hidden = act(Linear(**wide, name="gate")(x)) * up if c.gated else act(up)
        down = Linear((c.mlp, c.width), ("mlp", "embed"), bias=c.mlp_bias, std=self.stds[1], adapter=c.adapter, name="down")
        return down(hidden)


class Head(nn.Module):
    config: Any
    std: float = 0.02

    @nn.compact
    def __call__(self):
        return self.param("kernel", declared(normal(self.std), "vocab", "embed"), (self.config.vocab, self.config.width))


def head_of(config, params):
    """Model.head: the head, or the embedding that is it."""
    name = "embed" if config.tied else "head"
    return {name: params[name]}


class Scalar(nn.Module):
    """h . w + b in float32: a reward or a value."""

    config: Any

    @nn.compact
    def __call__(self, hidden):
        kernel = self.param("kernel", declared(normal(self.config.scalar), "scalar"), (self.config.width,))
        return hidden.astype(jnp.float32) @ kernel + self.param("bias", declared(nn.initializers.zeros), ())
