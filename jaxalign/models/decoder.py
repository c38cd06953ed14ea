"""One decoder for the families that a config can tell apart: GPT-2, GPT-NeoX, Llama, Mistral, Phi-3, Qwen2, Qwen3, OLMo-2, Gemma-2
and Gemma-3.

The parameter tree, leaves of `layers` stacked on a first axis of L:

    embed   tokens [V,D], positions [context,D] (learned positions only)
    layers  attention_norm, attention {q, k, v, o}, mlp_norm, mlp {gate, up, down}; each with kernel and, by config, bias;
            by config also attention_post_norm, mlp_post_norm, and attention {q_norm, k_norm}
    norm    scale [D], bias [D]
    head    kernel [V,D] (untied only; the layout that a decode step reads fastest)
    scalar  kernel [D], bias [] (reward models and value heads only)

An adapter (parts.Adapter) adds to it: lora_a, lora_b or ia3 beside a kernel; prefix {k, v} [L,P,G,K]; prompt {tokens} [P,D], which
the layers read once as a document of their own, for none of them sees a later token; or `last`, the last of `layers`.
"""

from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign.models.attention import ATTENTION, attend, frequencies, positions_of, rope, soft_cap
from jaxalign.models.parts import (
    ACTIVATIONS,
    REMAT,
    Adapter,
    Head,
    Linear,
    Mlp,
    Norm,
    Scalar,
    head_of,
    if_same,
    normal,
    repeated,
    stacked,
)
from jaxalign.shard import constrain_rows, declared
from jaxalign.types import Model

EVERYTHING = 2**30  # a window that no document fills


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
    norm: str = "rms"  # or "layer", or "rms_plus_one": by 1 + scale, not by scale (Gemma)
    norm_place: str = "pre"  # what goes into attention and MLP is normalised, what comes out ("post"), or "both"
    qk_norm: str = "none"  # of queries and keys, before they turn: each "head" by itself, or the whole "width" of all heads
    norm_eps: float = 1e-5
    activation: str = "silu"  # ACTIVATIONS
    gated: bool = True  # down(act(gate x) * up x), else down(act(up x))
    positions: str = "rope"  # or "learned"
    rope_theta: float = 10000.0
    rope_fraction: float = 1.0  # of the head's dimensions
    rope_scaling: tuple = ()  # for long contexts: (factor,) or (factor, low, high, context), as attention.frequencies has them
    windows: tuple = ()  # one a layer: how many tokens one sees, itself the last; 0: all before it. (): all, in every layer
    local_theta: float | None = None  # rope_theta of the layers that have a window, which rope_scaling leaves alone; None: as all
    query_size: int | None = None  # scores are q.k / sqrt(query_size); None: head_dim
    score_cap: float | None = None  # soft cap of the scores
    logit_cap: float | None = None  # soft cap of the logits
    embed_scaled: bool = False  # embeddings come in times sqrt(width)
    parallel: bool = False  # attention and MLP read the same residual stream (GPT-NeoX)
    qkv_bias: bool = False
    out_bias: bool = False  # of the attention's output
    mlp_bias: bool = False
    tied: bool = False  # the head is the embedding
    scalar: float | None = None  # std of a scalar head's first kernel (0 for a value head); None: no such head
    dtype: str = "float32"  # of activations and of the weights as they are used; parameters stay float32
    remat: str = "dots"  # what a layer's backward pass recomputes: REMAT
    attention: str = "xla"  # how it is computed: ATTENTION, as attention.attend has them
    adapter: Adapter | None = None  # what is trained instead of all; None: all

    def __post_init__(self):
        known = {
            "norm": ("rms", "layer", "rms_plus_one"),
            "norm_place": ("pre", "post", "both"),
            "qk_norm": ("none", "head", "width"),
            "activation": ACTIVATIONS,
            "positions": ("rope", "learned"),
            "remat": REMAT,
            "attention": ATTENTION,
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} = {getattr(self, name)!r}; there are {', '.join(values)}")
        for name in ("rope_scaling", "windows"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists, and a config must have a hash
        if isinstance(self.adapter, dict):
            object.__setattr__(self, "adapter", Adapter(**self.adapter))
        if not self.top < self.layers:
            raise ValueError(f"adapter layers = {self.top}: fewer than all {self.layers}")
        if self.attention == "cudnn" and (self.dtype == "float32" or self.score_cap is not None):
            told = f"here dtype = {self.dtype}, score_cap = {self.score_cap}"
            raise ValueError(f"attention = cudnn computes in bfloat16 or float16, and without a cap of the scores; {told}")
        if self.attention in ("splash", "ring") and self.virtual:
            told = "which all documents see: take xla, blocks or cudnn"
            raise ValueError(f"attention = {self.attention} has no virtual tokens, of adapter kind {self.adapter.kind}, {told}")
        if len(self.rope_scaling) not in (0, 1, 4):
            raise ValueError(f"rope_scaling = {self.rope_scaling}; there are (), (factor,) and (factor, low, high, context)")
        if self.windows and (len(self.windows) != self.layers or min(self.windows) < 0 or not any(self.windows)):
            raise ValueError(
                f"windows = {self.windows}; give each of {self.layers} layers its own, 0 for none, or () for none at all"
            )
        if self.local_theta is not None and not self.windows:
            raise ValueError(f"local_theta = {self.local_theta} is for layers that have a window, but windows = ()")

    @property
    def spans(self) -> tuple:
        """`windows`, where none is one that no document fills."""
        return tuple(window or EVERYTHING for window in self.windows)

    @property
    def top(self) -> int:
        """How many of the layers are in `last`."""
        return self.adapter.top if self.adapter else 0

    @property
    def virtual(self) -> int:
        """How many virtual tokens stand before each document."""
        return self.adapter.virtual if self.adapter else 0


class Attention(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x, where, cache, layer):
        c = self.config
        shape, names = (c.width, c.heads, c.head_dim), ("embed", "heads", "head")
        kv_shape, kv_names = (c.width, c.kv_heads, c.head_dim), ("embed", "kv_heads", "head")
        q = Linear(shape, names, bias=c.qkv_bias, adapter=c.adapter, name="q")(x)
        k = Linear(kv_shape, kv_names, bias=c.qkv_bias, adapter=c.adapter, name="k")(x)
        v = Linear(kv_shape, kv_names, bias=c.qkv_bias, adapter=c.adapter, name="v")(x)
        if c.qk_norm != "none":
            first = {"width": 1, "head": 2}[c.qk_norm]  # of the axes that are normalised together
            q = Norm(c, shape[first:], names[first:], name="q_norm")(q)
            k = Norm(c, kv_shape[first:], kv_names[first:], name="k_norm")(k)
        if c.positions == "rope":
            inverse = where["inverse"][layer.get("rope", 0)]
            q, k = rope(q, where["positions"], inverse), rope(k, where["positions"], inverse)
        if cache is not None:  # k, v [L,B,S,G,K]: this layer's part takes in the new columns
            start = (layer["index"], 0, where["at"], 0, 0)
            cache = {
                "k": jax.lax.dynamic_update_slice(cache["k"], k[None], start),
                "v": jax.lax.dynamic_update_slice(cache["v"], v[None], start),
            }
            k, v = (jax.lax.dynamic_index_in_dim(cache[name], layer["index"], keepdims=False) for name in "kv")
        kept = {"k": k, "v": v} if "keep" in where else None
        for name in ("read", "prefix"):  # what stands before, of as many rows or fewer
            if name in layer:
                first = [repeated(layer[name][of], len(k)) for of in "kv"]
                k, v = (jnp.concatenate([x.astype(k.dtype), own], axis=1) for x, own in zip(first, (k, v), strict=True))
        before = c.virtual if "prefix" in layer else 0
        scores = {"scale": None if c.query_size is None else c.query_size**-0.5, "cap": c.score_cap}
        scores |= {"window": layer.get("window"), "windows": c.spans, "implementation": c.attention}
        out = attend(q, k, v, where["segments"], where["key_segments"], at=where["at"], before=before, **scores)
        std = 0.02 / (2 * c.layers) ** 0.5
        back = Linear((c.heads, c.head_dim, c.width), ("heads", "head", "embed"), 2, c.out_bias, std, c.adapter, name="o")
        return back(out), cache, kept


class Block(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, carry, layer, where):
        c, (x, cache) = self.config, carry

        before, after = c.norm_place != "post", c.norm_place != "pre"

        def norm(x, name, here):
            return Norm(c, name=name)(x) if here else x

        out, cache, kept = Attention(c, name="attention")(norm(x, "attention_norm", before), where, cache, layer)
        attended = x + norm(out, "attention_post_norm", after)
        out = Mlp(c, (0.02, 0.02 / (2 * c.layers) ** 0.5), name="mlp")(norm(x if c.parallel else attended, "mlp_norm", before))
        x = attended + norm(out, "mlp_post_norm", after)
        return (constrain_rows(x), cache), kept


class Embedding(nn.Module):
    config: DecoderConfig

    def setup(self):
        c = self.config
        self.tokens = self.param("tokens", declared(normal(0.02), "vocab", "embed"), (c.vocab, c.width))
        if c.positions == "learned":
            self.positions = self.param("positions", declared(normal(0.01), "context", "embed"), (c.context, c.width))

    def __call__(self, tokens, positions):
        x = self.place(jnp.asarray(self.tokens)[tokens], positions)  # parameters may be NumPy arrays, which no tracer indexes
        return x * jnp.asarray(self.config.width**0.5, x.dtype) if self.config.embed_scaled else x

    def place(self, x, positions):
        """Embeddings at these positions."""
        if self.config.positions == "learned":
            x = x + jnp.asarray(self.positions)[positions]
        return x.astype(self.config.dtype)


class Prefix(nn.Module):
    """Keys and values of virtual tokens, {"k", "v"} [L,1,P,G,K], as they are after their rotation."""

    config: DecoderConfig

    @nn.compact
    def __call__(self):
        c = self.config
        init, shape = declared(normal(0.02), "layers", None, "kv_heads", "head"), (c.layers, c.virtual, c.kv_heads, c.head_dim)
        return {name: self.param(name, init, shape)[:, None] for name in "kv"}


class Prompt(nn.Module):
    """Embeddings of virtual tokens, [1,P,D]."""

    config: DecoderConfig

    @nn.compact
    def __call__(self):
        c = self.config
        return self.param("tokens", declared(normal(0.02), None, "embed"), (c.virtual, c.width))[None]


class Decoder(nn.Module):
    config: DecoderConfig

    def setup(self):
        c = self.config
        self.embed = Embedding(c)
        self.layers = stacked(Block, c.layers - c.top, c)
        if c.top:
            self.last = stacked(Block, c.top, c)
        if c.virtual and c.adapter.kind == "prefix":
            self.prefix = Prefix(c)
        elif c.virtual:
            self.prompt = Prompt(c)
        self.norm = Norm(c)
        if not c.tied:
            self.head = Head(c)
        if c.scalar is not None:
            self.scalar = Scalar(c)

    def __call__(self, tokens, segments, cache=None, at=0, read=None, keep=False):
        """-> hidden [B,T,D], cache.

        Args: read: what stands before these tokens, of B/n rows, as a call with `keep` gave it in the place of a cache.
        """
        c, keys = self.config, segments
        if cache is not None:
            keys = jax.lax.dynamic_update_slice_in_dim(cache["segments"], segments, at, 1)
        if read is not None:
            keys, at = jnp.concatenate([repeated(read["segments"], len(tokens)), segments], axis=1), read["segments"].shape[1]
        columns = c.virtual + keys.shape[1]
        if columns > c.context and c.positions == "learned":
            raise ValueError(f"rows of {columns} tokens, but this model has {c.context} learned positions")
        positions = c.virtual + jax.lax.dynamic_slice_in_dim(positions_of(keys), at, tokens.shape[1], 1)
        where = {"segments": segments, "key_segments": keys, "positions": positions, "at": at}
        layers = {"index": jnp.arange(c.layers)}  # what differs from layer to layer
        if c.windows:
            layers["window"] = jnp.asarray(c.spans)
        if c.positions == "rope":
            size = int(c.head_dim * c.rope_fraction)
            kinds = [frequencies(size, c.rope_theta, c.rope_scaling)]
            if c.local_theta is not None:
                kinds.append(frequencies(size, c.local_theta))
                layers["rope"] = jnp.asarray([int(window > 0) for window in c.windows])
            where["inverse"] = jnp.stack(kinds)
        if c.virtual:
            layers["prefix"] = self.virtual(cache or read or {}, layers, where)
        if read is not None:
            layers["read"] = {"k": read["k"], "v": read["v"]}
        x = constrain_rows(self.embed(tokens, positions))
        kv = None if cache is None else {"k": cache["k"], "v": cache["v"]}
        x, kv, kept = self.through(x, kv, layers, where | ({"keep": ()} if keep else {}))
        if cache is not None or keep:
            cache = {**(kept if keep else kv), "segments": keys} | {name: layers[name] for name in layers.keys() & {"prefix"}}
        return self.norm(x), cache

    def through(self, x, kv, layers, where):
        """All layers, one after the other. -> x, cache, keys and values [L,B,T,G,K] where they are to be kept"""
        below = self.config.layers - self.config.top
        (x, kv), kept = self.layers((x, kv), jax.tree.map(lambda of: of[:below], layers), where)
        if self.config.top:
            (x, kv), more = self.last((x, kv), jax.tree.map(lambda of: of[below:], layers), where)
            kept = jax.tree.map(lambda *of: jnp.concatenate(of), kept, more)
        return x, kv, kept

    def virtual(self, cache, layers, where):
        """Keys and values of the virtual tokens, {"k", "v"} [L,1,P,G,K]; a cache keeps what was read of them."""
        c = self.config
        if "prefix" in cache:
            return cache["prefix"]
        if c.adapter.kind == "prefix":
            return self.prefix()
        ones, positions = jnp.ones((1, c.virtual), jnp.int32), jnp.arange(c.virtual)[None]
        alone = where | {"segments": ones, "key_segments": ones, "positions": positions, "at": 0, "keep": ()}
        return self.through(self.embed.place(self.prompt(), positions), None, layers, alone)[2]

    def unembed(self, hidden):
        kernel = self.embed.tokens if self.config.tied else self.head()
        logits = jnp.einsum("...d,vd->...v", hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
        return soft_cap(logits, self.config.logit_cap)

    def to_scalar(self, hidden):
        return self.scalar(hidden)

    def everything(self, tokens, segments):
        """Touches every parameter, to initialise them."""
        hidden, _ = self(tokens, segments)
        return self.unembed(hidden), self.scalar(hidden) if self.config.scalar is not None else None


def build(config: DecoderConfig) -> Model:
    """The model of this architecture, as pure functions."""
    module = Decoder(config)

    def init(key):
        tokens = jnp.zeros((1, 1), jnp.int32)
        return module.init(key, tokens, jnp.ones_like(tokens), method="everything")["params"]

    def apply(params, tokens, segments, cache=None, at=0, source=None, source_segments=None, shared=(1, 0)):
        if source is not None:
            raise ValueError("the rows have a source, but a decoder alone has no encoder to read it")
        group, columns = shared
        if cache is not None or group == 1:
            return module.apply({"params": params}, tokens, segments, cache, at)
        prompts = tokens[::group, :columns], segments[::group, :columns]
        first, read = module.apply({"params": params}, *prompts, keep=True)
        rest, _ = module.apply({"params": params}, tokens[:, columns:], segments[:, columns:], read=read)
        hidden = jnp.concatenate([repeated(first, len(tokens)), rest], axis=1)
        return if_same(hidden, (prompts[0], tokens[:, :columns]), (prompts[1], segments[:, :columns])), None

    def unembed(params, hidden):
        return module.apply({"params": params}, hidden, method="unembed")

    def scalar(params, hidden):
        return module.apply({"params": params}, hidden, method="to_scalar")

    def cache(rows, length):
        kv = jnp.zeros((config.layers, rows, length, config.kv_heads, config.head_dim), config.dtype)
        return {"k": kv, "v": kv, "segments": jnp.zeros((rows, length), jnp.int32)}

    return Model(config, init, apply, unembed, scalar, cache, partial(head_of, config))
