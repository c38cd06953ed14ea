"""Encoder-decoders: T5, T5 1.1 and Flan-T5. Raffel et al. 2020, section 2.1; Shazeer 2020 for the gated MLP.

The encoder reads `source`, the decoder's document k attends to source segment k: both sides may be padded anywhere, or packed.
A decoder's document begins with the token `start`, so that the one shift of `score` is T5's own shift to the right.

The parameter tree, leaves of `layers` stacked on a first axis, of the encoder's layers or of the decoder's:

    embed    tokens [V,D], for both sides
    encoder  distances [buckets,H], layers {attention_norm, attention {q, k, v, o}, mlp_norm, mlp {gate, up, down}}, norm
    decoder  the same, with layers.cross_norm and layers.cross {q, k, v, o} between; `last`, by an adapter, the last of its layers
    head     kernel [V,D] (untied only)
    scalar   kernel [D], bias [] (reward models and value heads only)
"""

import math
from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxalign.models.attention_blocks import ATTENDED
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


@dataclass(frozen=True)
class EncDecConfig:
    """An architecture. Defaults are those of the first T5."""

    vocab: int
    width: int
    encoder_layers: int
    layers: int  # of the decoder
    heads: int
    head_dim: int
    mlp: int  # width of the MLP's hidden layer
    buckets: int = 32  # of distances between tokens
    furthest: int = 128  # distances from here on share a bucket
    norm_eps: float = 1e-6
    activation: str = "relu"  # parts.ACTIVATIONS; "gelu_tanh" of T5 1.1
    gated: bool = False  # down(act(gate x) * up x), of T5 1.1, else down(act(up x))
    tied: bool = True  # the head is the embedding
    head_scaled: bool = True  # logits come times width^-1/2: T5, not T5 1.1
    start: int = 0  # id of the token that decoding starts with
    scalar: float | None = None  # std of a scalar head's first kernel (0 for a value head); None: no such head
    dtype: str = "float32"  # of activations and of the weights as they are used; parameters stay float32
    remat: str = "dots"  # what a layer's backward pass recomputes: parts.REMAT
    attention: str = "xla"  # how it is computed: no other way has a bias of distances
    adapter: Adapter | None = None  # what is trained instead of all, of kinds lora, ia3, last (of the decoder) and head; None: all

    norm = "rms"  # what Norm and Mlp ask for, and T5 has in one way
    mlp_bias = False

    def __post_init__(self):
        if isinstance(self.adapter, dict):  # as JSON has it
            object.__setattr__(self, "adapter", Adapter(**self.adapter))
        if self.adapter and self.adapter.virtual:  # an encoder's virtual tokens read the source: every document has its own
            raise ValueError(f"adapter kind = {self.adapter.kind!r} is for decoders; an encoder-decoder has the others")
        if not self.top < self.layers:
            raise ValueError(f"adapter layers = {self.top}: fewer than all {self.layers} of the decoder")
        for name, values in (("activation", ACTIVATIONS), ("remat", REMAT), ("attention", ("xla",))):
            if getattr(self, name) not in values:
                raise ValueError(f"{name} = {getattr(self, name)!r}; there are {', '.join(values)}")
        if self.buckets < 4 or self.buckets % 2 or self.furthest <= self.buckets // 2:
            told = f"buckets = {self.buckets}, furthest = {self.furthest}"
            raise ValueError(f"{told}: buckets are even, 4 or more, and furthest is above their half")
        if not 0 <= self.start < self.vocab:
            raise ValueError(f"start = {self.start} is no token of a vocabulary of {self.vocab}")

    @property
    def top(self) -> int:
        """How many of the decoder's layers are in `last`."""
        return self.adapter.top if self.adapter else 0


def bucket(distance, count: int, furthest: int, *, both_ways: bool):
    """Which of `count` buckets a distance falls into, the key's position less the query's: i32 of its shape.

    Half of a direction's buckets hold one distance each, the others ever more, on a log scale up to `furthest`. Raffel et al. 2020
    section 2.1; mesh_tensorflow, _relative_position_bucket. From a table that NumPy makes, for logarithms that differ in the last
    bit would tell distances apart otherwise on every kind of device.
    Args: both_ways: half of all buckets are for keys that come after; else those share the first.
    """
    count = count // 2 if both_ways else count
    exact, all_of_them = count // 2, np.arange(furthest + 1, dtype=np.int32)
    ratio = np.log(np.maximum(all_of_them, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(furthest / exact))
    far = exact + (ratio * np.float32(count - exact)).astype(np.int32)
    table = jnp.asarray(np.where(all_of_them < exact, all_of_them, np.minimum(far, count - 1)))
    if both_ways:
        return table[jnp.minimum(jnp.abs(distance), furthest)] + jnp.where(distance > 0, count, 0)
    return table[jnp.clip(-distance, 0, furthest)]


def same_document(q_segments, k_segments):
    """bool [B,T,S]: query and key are real, and of one document."""
    return (q_segments[:, :, None] == k_segments[:, None, :]) & (q_segments > 0)[:, :, None]


class Attention(nn.Module):
    """softmax(q.k + bias) v, in float32; q.k is not scaled, for q's first values are. A query that sees no key gets 0."""

    config: EncDecConfig

    def setup(self):
        c = self.config
        shape, names = (c.width, c.heads, c.head_dim), ("embed", "heads", "head")
        self.q = Linear(shape, names, std=(c.width * c.head_dim) ** -0.5, adapter=c.adapter)
        self.k = Linear(shape, names, std=c.width**-0.5, adapter=c.adapter)
        self.v = Linear(shape, names, std=c.width**-0.5, adapter=c.adapter)
        self.o = Linear((*shape[1:], c.width), (*names[1:], "embed"), 2, std=(c.heads * c.head_dim) ** -0.5, adapter=c.adapter)

    def keys(self, x):
        """What is attended to: {"k", "v"}, [B,S,H,K] each."""
        return {"k": self.k(x), "v": self.v(x)}

    def __call__(self, x, kv, mask, bias=None):
        out = jax.nn.dot_product_attention(self.q(x), kv["k"], kv["v"], bias=bias, mask=mask[:, None], scale=1.0)
        out = checkpoint_name(out, ATTENDED)
        return self.o(jnp.where(mask.any(-1)[:, :, None, None], out, 0))


class Block(nn.Module):
    """A layer of the encoder, or, where it attends to a source, of the decoder. -> (x, cache), keys of a source newly read"""

    config: EncDecConfig
    crosses: bool

    @nn.compact
    def __call__(self, carry, layer, where):
        c, (x, cache) = self.config, carry
        attention, y = Attention(c, name="attention"), Norm(c, name="attention_norm")(x)
        kv = attention.keys(y)
        if cache is not None:  # k, v [L,B,T,H,K]: this layer's part takes in the new columns
            start = (layer["index"], 0, where["at"], 0, 0)
            cache = jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice(old, new[None], start), cache, kv)
            kv = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer["index"], keepdims=False), cache)
        x = x + attention(y, kv, where["mask"], where["bias"])
        kept = None
        if self.crosses:
            cross = Attention(c, name="cross")
            kv = layer["source"] if "source" in layer else cross.keys(where["encoded"])
            kept = None if cache is None else kv
            x = x + cross(Norm(c, name="cross_norm")(x), kv, where["source_mask"])
        x = x + Mlp(c, (c.width**-0.5, c.mlp**-0.5), name="mlp")(Norm(c, name="mlp_norm")(x))
        return (constrain_rows(x), cache), kept


class Stack(nn.Module):
    """The layers of one side."""

    config: EncDecConfig
    count: int
    top: int = 0  # how many of them are in `last`
    crosses: bool = False

    def setup(self):
        c = self.config
        self.layers = stacked(Block, self.count - self.top, c, self.crosses)
        if self.top:
            self.last = stacked(Block, self.top, c, self.crosses)
        self.norm = Norm(c)
        self.distances = self.param("distances", declared(normal(c.width**-0.5), None, "heads"), (c.buckets, c.heads))

    def __call__(self, x, segments, keys, at=0, cache=None, kept=None, **where):
        """-> hidden [B,T,D], cache, keys of the source. Args: keys, the segments that are attended to; kept, a source's keys."""
        c = self.config
        distance = jnp.arange(keys.shape[1])[None] - (at + jnp.arange(segments.shape[1]))[:, None]  # columns as positions:
        mask = same_document(segments, keys)  # a document is contiguous
        if self.crosses:
            mask = mask & (distance <= 0)[None]
        bias = jnp.asarray(self.distances)[bucket(distance, c.buckets, c.furthest, both_ways=not self.crosses)]  # [T,S,H]
        where |= {"mask": mask, "bias": bias.transpose(2, 0, 1)[None], "at": at}
        layer = {"index": jnp.arange(self.count)} | ({} if kept is None else {"source": kept})
        below = self.count - self.top
        (x, cache), kept = self.layers((x, cache), jax.tree.map(lambda of: of[:below], layer), where)
        if self.top:
            (x, cache), more = self.last((x, cache), jax.tree.map(lambda of: of[below:], layer), where)
            kept = jax.tree.map(lambda *of: jnp.concatenate(of), kept, more)
        return self.norm(x), cache, kept


class EncoderDecoder(nn.Module):
    config: EncDecConfig

    def setup(self):
        c = self.config
        self.embed = Embedding(c)
        self.encoder = Stack(c, c.encoder_layers)
        self.decoder = Stack(c, c.layers, c.top, crosses=True)
        if not c.tied:
            self.head = Head(c, std=c.width**-0.5)
        if c.scalar is not None:
            self.scalar = Scalar(c)

    def __call__(self, tokens, segments, cache=None, at=0, source=None, source_segments=None, group=1):
        cache = {} if cache is None else cache
        keys, kept, encoded = segments, cache.get("source"), None
        if "segments" in cache:
            keys = jax.lax.dynamic_update_slice_in_dim(cache["segments"], segments, at, 1)
        if source is not None:
            of_group = source[::group], source_segments[::group]  # rows that share a source
            encoded, _, _ = self.encoder(constrain_rows(self.embed(of_group[0])), of_group[1], of_group[1])
            if group > 1:
                encoded = repeated(encoded, len(source))
                encoded = if_same(encoded, (of_group[0], source), (of_group[1], source_segments))
            kept = None
        elif kept is None:
            raise ValueError("the rows have no source, which an encoder-decoder needs: prompts go there (data.text.source_target)")
        else:
            source_segments = cache["source_segments"]
        where = {"encoded": encoded, "source_mask": same_document(segments, source_segments)}
        x = constrain_rows(self.embed(tokens))
        hidden, kv, kept = self.decoder(x, segments, keys, at, cache.get("kv"), kept, **where)
        if cache:
            cache = {"kv": kv, "segments": keys, "source": kept, "source_segments": source_segments}
        return hidden, cache or None

    def unembed(self, hidden):
        c, kernel = self.config, self.embed.tokens if self.config.tied else self.head()
        logits = jnp.einsum("...d,vd->...v", hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
        return logits * c.width**-0.5 if c.head_scaled else logits

    def to_scalar(self, hidden):
        return self.scalar(hidden)

    def everything(self, tokens, segments):
        """Touches every parameter, to initialise them."""
        hidden, _ = self(tokens, segments, source=tokens, source_segments=segments)
        return self.unembed(hidden), self.scalar(hidden) if self.config.scalar is not None else None


class Embedding(nn.Module):
    config: EncDecConfig

    def setup(self):
        c = self.config
        self.tokens = self.param("tokens", declared(normal(1.0), "vocab", "embed"), (c.vocab, c.width))

    def __call__(self, tokens):
        return jnp.asarray(self.tokens)[tokens].astype(self.config.dtype)  # parameters may be NumPy arrays, which no tracer indexes


def build(config: EncDecConfig) -> Model:
    """The model of this architecture, as pure functions.

    `apply` with a source reads it, and a cache keeps what the decoder attends to; without one it is taken from the cache.
    """
    module = EncoderDecoder(config)

    def init(key):
        tokens = jnp.zeros((1, 1), jnp.int32)
        return module.init(key, tokens, jnp.ones_like(tokens), method="everything")["params"]

    def apply(params, tokens, segments, cache=None, at=0, source=None, source_segments=None, shared=(1, 0)):
        group = 1 if cache is not None else shared[0]
        return module.apply({"params": params}, tokens, segments, cache, at, source, source_segments, group)

    def unembed(params, hidden):
        return module.apply({"params": params}, hidden, method="unembed")

    def scalar(params, hidden):
        return module.apply({"params": params}, hidden, method="to_scalar")

    def cache(rows, length):
        kv = jnp.zeros((config.layers, rows, length, config.heads, config.head_dim), config.dtype)
        return {"kv": {"k": kv, "v": kv}, "segments": jnp.zeros((rows, length), jnp.int32)}

    return Model(config, init, apply, unembed, scalar, cache, partial(head_of, config))
