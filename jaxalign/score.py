"""What a model says of tokens that are given: the only place where a shift happens."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.ops.chunks import by_chunk
from jaxalign.types import Array, Batch, Model


class Scores(NamedTuple):
    """About each token, given those before it in its document; f32 [B,T]. Of no meaning where `batch.targets` cannot be > 0."""

    logp: Array  # nats, tempered
    entropy: Array  # nats, of the tempered distribution that the token was drawn from
    log_z: Array  # log sum_v exp(z_v / temperature)
    mean_logp: Array  # 1/V sum_v log p_v


def shift(x):
    """Entry t becomes what stood at t - 1; 0 enters."""
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)) + ((0, 0),) * (x.ndim - 2))


def of_logits(logits, tokens, *, temperature: float = 1.0) -> Scores:
    """Scores of `tokens` [...] under logits [..., V], in float32. No shift."""
    z = logits.astype(jnp.float32) / temperature
    log_z = jax.nn.logsumexp(z, axis=-1)
    p = jnp.exp(z - log_z[..., None])
    logp = jnp.take_along_axis(z, tokens[..., None], axis=-1)[..., 0] - log_z
    return Scores(logp, log_z - (p * z).sum(-1), log_z, z.mean(-1) - log_z)


def of_hidden(model: Model, params, hidden, tokens, *, temperature: float = 1.0, chunk: int = 128) -> Scores:
    """Scores of `tokens` [B,T] from the states [B,T,D] that predict them, never holding more than [B,chunk,V] logits."""

    def one(part):
        return of_logits(model.unembed(params, part[0]), part[1], temperature=temperature)

    return by_chunk(one, (hidden, tokens), chunk=chunk)


def evaluate(model: Model, params, batch: Batch, *, temperature: float = 1.0):
    """Scores of every token of a batch, and the value before it. -> (Scores, value f32 [B,T] or None)

    The value is the scalar head's where the model has one. What is not used is not computed, under jit.
    """
    hidden, _ = model.read(params, batch)
    before = shift(hidden)
    value = None if model.config.scalar is None else model.scalar(params, before)
    return of_hidden(model, params, before, batch.tokens, temperature=temperature), value


def last_scalar(model: Model, params, batch: Batch):
    """The scalar head at each row's last real token, which is found from segments, never from token ids. -> f32 [B]"""
    hidden, _ = model.read(params, batch)
    return model.scalar(params, last_of(hidden, batch.segments))


def last_of(hidden, segments):
    """The state at each row's last real token. -> [B,D]"""
    column = jnp.arange(segments.shape[1])[None]
    last = jnp.where(segments > 0, column, 0).max(axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
