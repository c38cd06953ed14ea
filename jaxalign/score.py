"""What a model says of tokens that are given: the only place where a shift happens."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign import shard
from jaxalign.ops import chunks
from jaxalign.types import Array, Batch, Model


class Scores(NamedTuple):
    """About each token, given those before it in its document; f32 [B,T]. Of no meaning where `batch.targets` are 0."""

    logp: Array  # nats, tempered
    entropy: Array  # nats, of the tempered distribution that the token was drawn from
    log_z: Array  # log sum_v exp(z_v / temperature)
    mean_logp: Array  # 1/V sum_v log p_v


def shift(x):
    """Entry t becomes what stood at t - 1; 0 enters."""
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)) + ((0, 0),) * (x.ndim - 2))


def of_logits(logits, tokens, *, temperature: float = 1.0) -> Scores:
    """Scores of `tokens` [...] under logits [..., V], in float32. No shift."""
    return _of_tempered(logits.astype(jnp.float32) / temperature, tokens)


@jax.custom_jvp
def _of_tempered(z, tokens):
    log_z = jax.nn.logsumexp(z, axis=-1)
    p = jnp.exp(z - log_z[..., None])
    logp = jnp.take_along_axis(z, tokens[..., None], axis=-1)[..., 0] - log_z
    return Scores(logp, log_z - (p * z).sum(-1), log_z, z.mean(-1) - log_z)


@_of_tempered.defjvp
def _tangent(primals, tangents):
    """d log Z = sum_v p_v dz_v and dH = -sum_v p_v (z_v - E z) dz_v, from the scores: one pass over the vocabulary."""
    (z, tokens), (dz, _) = primals, tangents
    said = _of_tempered(z, tokens)
    p, mean_z = jnp.exp(z - said.log_z[..., None]), said.log_z - said.entropy
    of_log_z, of_token = (p * dz).sum(-1), jnp.take_along_axis(dz, tokens[..., None], axis=-1)[..., 0]
    of_entropy = -(p * (z - mean_z[..., None]) * dz).sum(-1)
    return said, Scores(of_token - of_log_z, of_entropy, of_log_z, dz.mean(-1) - of_log_z)


def by_chunk(model: Model, params, one, parts, *, chunk: int = 128):
    """`ops.chunks.by_chunk` of one(head, parts), on each device's rows; head: what of the parameters unembed reads."""
    return shard.on_rows(lambda head, parts: chunks.by_chunk(partial(one, head), parts, chunk=chunk), model.head(params), parts)


def of_hidden(model: Model, params, hidden, tokens, wanted=None, *, temperature: float = 1.0, chunk: int = 64) -> Scores:
    """Scores of `tokens` [B,T] from the states [B,T,D] that predict them, never holding more than [B,chunk,V] logits.

    Args: wanted: bool [B,T]; None: all. Each row's wanted tokens are moved to its first chunks; chunks in which no row has any cost
    nothing, and their scores are 0.
    """

    def one(head, part):
        hidden, tokens, wanted = part

        def said():
            return of_logits(model.unembed(head, hidden), tokens, temperature=temperature)

        return jax.lax.cond(wanted.any(), said, lambda: Scores(*[jnp.zeros(tokens.shape, jnp.float32)] * 4))

    if wanted is None or tokens.shape[1] <= chunk:
        wanted = jnp.ones(tokens.shape, bool) if wanted is None else wanted
        return by_chunk(model, params, one, (hidden, tokens, wanted), chunk=chunk)
    first = jnp.argsort(~wanted, axis=1)  # columns, those wanted before the others
    hidden = jnp.take_along_axis(hidden, first[..., None], axis=1)
    parts = hidden, *(jnp.take_along_axis(x, first, axis=1) for x in (tokens, wanted))
    moved = by_chunk(model, params, one, parts, chunk=chunk)
    back = jnp.argsort(first, axis=1)
    return jax.tree.map(lambda x: jnp.take_along_axis(x, back, axis=1), moved)


def evaluate(model: Model, params, batch: Batch, *, temperature: float = 1.0):
    """Scores of every token of a batch, and the value before it. -> (Scores, value f32 [B,T] or None)

    The value is the scalar head's where the model has one. What is not used is not computed, under jit; nor are scores of chunks
    of columns without a target (`of_hidden`).
    """
    hidden, _ = model.read(params, batch)
    before = shift(hidden)
    value = None if model.config.scalar is None else model.scalar(params, before)
    return of_hidden(model, params, before, batch.tokens, batch.targets > 0, temperature=temperature), value


def scalars(model: Model, params, batch: Batch):
    """The scalar head at each token, once it is read: no shift. -> f32 [B,T]"""
    return model.scalar(params, model.read(params, batch)[0])


def last_scalar(model: Model, params, batch: Batch):
    """The scalar head at each row's last real token, which is found from segments, never from token ids. -> f32 [B]"""
    hidden, _ = model.read(params, batch)
    return model.scalar(params, last_of(hidden, batch.segments))


def last_of(hidden, segments):
    """The state at each row's last real token. -> [B,D]"""
    column = jnp.arange(segments.shape[1])[None]
    last = jnp.where(segments > 0, column, 0).max(axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
