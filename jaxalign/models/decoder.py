"""One decoder for the families that a config can tell apart: Llama, Qwen2, GPT-2, GPT-NeoX.

The parameter tree, leaves of `layers` stacked on a first axis of L:

    embed   tokens [V,D], positions [context,D] (learned positions only)
    layers  attention_norm, attention {q, k, v, o}, mlp_norm, mlp {gate, up, down}; each with kernel and, by config, bias
    norm    scale [D], bias [D]
    head    kernel [V,D] (untied only; the layout that a decode step reads fastest)
    scalar  kernel [D], bias [] (reward models and value heads only)
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign.models.attention import attend, positions_of, rope
from jaxalign.shard import constrain_rows, declared
from jaxalign.types import Model

ACTIVATIONS = {"silu": jax.nn.silu, "gelu": lambda x: jax.nn.gelu(x, approximate=False), "gelu_tanh": jax.nn.gelu}
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclass(frozen=True)
class DecoderConfig:
    """An architecture. Defaults are Llama's."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int  # width of the MLP's hidden layer
    context: int  # most tokens of a document
    norm: str = "rms"  # or "layer"
    norm_eps: float = 1e-5
    activation: str = "silu"  # ACTIVATIONS
    gated: bool = True  # down(act(gate x) * up x), else down(act(up x))
    positions: str = "rope"  # or "learned"
    rope_theta: float = 10000.0
    rope_fraction: float = 1.0  # of the head's dimensions
    parallel: bool = False  # attention and MLP read the same residual stream (GPT-NeoX)
    qkv_bias: bool = False
    out_bias: bool = False  # of the attention's output
    mlp_bias: bool = False
    tied: bool = False  # the head is the embedding
    scalar: float | None = None  # std of a scalar head's first kernel (0 for a value head); None: no such head
    dtype: str = "float32"  # of activations and of the weights as they are used; parameters stay float32
    remat: str = "none"  # what a layer's backward pass recomputes: REMAT

    def __post_init__(self):
        known = {"norm": ("rms", "layer"), "activation": ACTIVATIONS, "positions": ("rope", "learned"), "remat": REMAT}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} = {getattr(self, name)!r}; there are {', '.join(values)}")


def _normal(std):
    return nn.initializers.normal(std)


class Norm(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x):
        c, x32 = self.config, x.astype(jnp.float32)
        if c.norm == "layer":
            x32 = x32 - x32.mean(-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt((x32**2).mean(-1, keepdims=True) + c.norm_eps)
        x32 = x32 * self.param("scale", declared(nn.initializers.ones, "embed"), (c.width,))[None, None]
        if c.norm == "layer":
            x32 = x32 + self.param("bias", declared(nn.initializers.zeros, "embed"), (c.width,))[None, None]
        return x32.astype(x.dtype)


class Linear(nn.Module):
    """x times a kernel, contracting x's last axes with the kernel's first."""

    shape: tuple  # of the kernel
    names: tuple  # of the kernel's axes
    contract: int = 1  # how many axes of x are summed over
    bias: bool = False
    std: float = 0.02

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", declared(_normal(self.std), *self.names), self.shape)
        axes = (tuple(range(x.ndim - self.contract, x.ndim)), tuple(range(self.contract)))
        y = jax.lax.dot_general(x, kernel.astype(x.dtype), (axes, ((), ())))
        if self.bias:
            zeros = declared(nn.initializers.zeros, *self.names[self.contract :])
            y = y + self.param("bias", zeros, self.shape[self.contract :]).astype(x.dtype)[None, None]
        return y


class Attention(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x, where, cache, layer):
        c = self.config
        shape, kv_shape = (c.width, c.heads, c.head_dim), (c.width, c.kv_heads, c.head_dim)
        q = Linear(shape, ("embed", "heads", "head"), bias=c.qkv_bias, name="q")(x)
        k = Linear(kv_shape, ("embed", "kv_heads", "head"), bias=c.qkv_bias, name="k")(x)
        v = Linear(kv_shape, ("embed", "kv_heads", "head"), bias=c.qkv_bias, name="v")(x)
        if c.positions == "rope":
            turn = {"theta": c.rope_theta, "fraction": c.rope_fraction}
            q, k = rope(q, where["positions"], **turn), rope(k, where["positions"], **turn)
        if cache is not None:  # k, v [L,B,S,G,K]: this layer's part takes in the new columns
            start = (layer, 0, where["at"], 0, 0)
            cache = {
                "k": jax.lax.dynamic_update_slice(cache["k"], k[None], start),
                "v": jax.lax.dynamic_update_slice(cache["v"], v[None], start),
            }
            k, v = (jax.lax.dynamic_index_in_dim(cache[name], layer, keepdims=False) for name in "kv")
        out = attend(q, k, v, where["segments"], where["key_segments"], at=where["at"])
        std = 0.02 / (2 * c.layers) ** 0.5
        back = Linear((c.heads, c.head_dim, c.width), ("heads", "head", "embed"), 2, c.out_bias, std, name="o")
        return back(out), cache


class Mlp(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x):
        c, act = self.config, ACTIVATIONS[self.config.activation]
        wide = {"shape": (c.width, c.mlp), "names": ("embed", "mlp"), "bias": c.mlp_bias}
        up = Linear(**wide, name="up")(x)
        hidden = act(Linear(**wide, name="gate")(x)) * up if c.gated else act(up)
        std = 0.02 / (2 * c.layers) ** 0.5
        return Linear((c.mlp, c.width), ("mlp", "embed"), bias=c.mlp_bias, std=std, name="down")(hidden)


class Block(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, carry, layer, where):
        x, cache = carry
        out, cache = Attention(self.config, name="attention")(Norm(self.config, name="attention_norm")(x), where, cache, layer)
        mlp, mlp_norm = Mlp(self.config, name="mlp"), Norm(self.config, name="mlp_norm")
        if self.config.parallel:
            x = x + out + mlp(mlp_norm(x))
        else:
            x = x + out
            x = x + mlp(mlp_norm(x))
        return (constrain_rows(x), cache), None


class Embedding(nn.Module):
    config: DecoderConfig

    def setup(self):
        c = self.config
        self.tokens = self.param("tokens", declared(_normal(0.02), "vocab", "embed"), (c.vocab, c.width))
        if c.positions == "learned":
            self.positions = self.param("positions", declared(_normal(0.01), "context", "embed"), (c.context, c.width))

    def __call__(self, tokens, positions):
        x = jnp.asarray(self.tokens)[tokens]  # parameters may be NumPy arrays, which no tracer indexes
        if self.config.positions == "learned":
            x = x + jnp.asarray(self.positions)[positions]
        return x.astype(self.config.dtype)


class Decoder(nn.Module):
    config: DecoderConfig

    def setup(self):
        c = self.config
        self.embed = Embedding(c)
        block = Block if REMAT[c.remat] is None else nn.remat(Block, policy=REMAT[c.remat], prevent_cse=False)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=c.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c)
        self.norm = Norm(c)
        if not c.tied:
            self.head = Head(c)
        if c.scalar is not None:
            self.scalar = Scalar(c)

    def __call__(self, tokens, segments, cache=None, at=0):
        keys = segments if cache is None else jax.lax.dynamic_update_slice_in_dim(cache["segments"], segments, at, 1)
        columns = keys.shape[1]
        if columns > self.config.context and self.config.positions == "learned":
            raise ValueError(f"rows of {columns} tokens, but this model has {self.config.context} learned positions")
        positions = jax.lax.dynamic_slice_in_dim(positions_of(keys), at, tokens.shape[1], 1)
        where = {"segments": segments, "key_segments": keys, "positions": positions, "at": at}
        x = constrain_rows(self.embed(tokens, positions))
        kv = None if cache is None else {"k": cache["k"], "v": cache["v"]}
        (x, kv), _ = self.layers((x, kv), jnp.arange(self.config.layers), where)
        return self.norm(x), None if cache is None else {**kv, "segments": keys}

    def unembed(self, hidden):
        kernel = self.embed.tokens if self.config.tied else self.head()
        return jnp.einsum("...d,vd->...v", hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)

    def to_scalar(self, hidden):
        return self.scalar(hidden)

    def everything(self, tokens, segments):
        """Touches every parameter, to initialise them."""
        hidden, _ = self(tokens, segments)
        return self.unembed(hidden), self.scalar(hidden) if self.config.scalar is not None else None


class Head(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self):
        return self.param("kernel", declared(_normal(0.02), "vocab", "embed"), (self.config.vocab, self.config.width))


class Scalar(nn.Module):
    """h . w + b in float32: a reward or a value."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, hidden):
        kernel = self.param("kernel", declared(_normal(self.config.scalar), "scalar"), (self.config.width,))
        return hidden.astype(jnp.float32) @ kernel + self.param("bias", declared(nn.initializers.zeros), ())


def build(config: DecoderConfig) -> Model:
    """The model of this architecture, as pure functions."""
    module = Decoder(config)

    def init(key):
        tokens = jnp.zeros((1, 1), jnp.int32)
        return module.init(key, tokens, jnp.ones_like(tokens), method="everything")["params"]

    def apply(params, tokens, segments, cache=None, at=0):
        return module.apply({"params": params}, tokens, segments, cache, at)

    def unembed(params, hidden):
        return module.apply({"params": params}, hidden, method="unembed")

    def scalar(params, hidden):
        return module.apply({"params": params}, hidden, method="to_scalar")

    def cache(rows, length):
        kv = jnp.zeros((config.layers, rows, length, config.kv_heads, config.head_dim), config.dtype)
        return {"k": kv, "v": kv, "segments": jnp.zeros((rows, length), jnp.int32)}

    return Model(config, init, apply, unembed, scalar, cache)
