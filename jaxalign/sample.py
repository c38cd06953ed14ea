"""Prefill once, then a token at a time with an explicit cache. Decoding runs the forward function of scoring and training."""

import jax
import jax.numpy as jnp

from jaxalign.ops import filters
from jaxalign.score import of_logits
from jaxalign.types import Batch, Model


def choose(keys, logits, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0):
    """Draw one token a row. -> (tokens i32 [B], logp f32 [B], drawn_logp f32 [B])

    logp is of the tempered distribution, which scoring and training speak of; drawn_logp of what top-k and top-p left of it.
    Temperature 0 takes the most likely token; both log-probabilities are then of temperature 1.
    Args: keys [B], one a row, so that a draw depends on no other row; logits [B,V].
    Raises ValueError for a temperature, top_k or top_p below 0.
    """
    if min(temperature, top_k, top_p) < 0:
        raise ValueError(f"temperature = {temperature}, top_k = {top_k}, top_p = {top_p}: none may be below 0")
    if temperature == 0:
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logp = of_logits(logits, tokens).logp
        return tokens, logp, logp
    z = logits.astype(jnp.float32) / temperature
    kept = filters.top_p(filters.top_k(z, top_k), top_p)
    tokens = jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)
    logp = of_logits(logits, tokens, temperature=temperature).logp
    drawn = logp if kept is z else jnp.take_along_axis(jax.nn.log_softmax(kept), tokens[:, None], axis=-1)[:, 0]
    return tokens, logp, drawn


def sample(
    model: Model,
    params,
    keys,
    prompts: Batch,
    *,
    length: int,
    eos: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
):
    """Continue prompts by up to `length` tokens, up to and including EOS. -> (Batch, logp, drawn_logp), each [B, T + length]

    The batch's weights are 1 on the tokens drawn. What follows EOS is padding: token 0, segment 0.
    Args:
        keys: random keys [B], one a row; draw i of a row is keyed by fold_in(key, i), whatever the rest of the batch does.
        prompts: left-padded, so that every row's last column is its last token.
        eos: id of the token that ends a response; -1 for none.
    """
    rows, start = prompts.tokens.shape
    cache = model.cache(rows, start + length)
    hidden, cache = model.read(params, prompts, cache, 0)

    def draw(i, logits):
        at = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        return choose(at, logits, temperature=temperature, top_k=top_k, top_p=top_p)

    def one(carry):
        i, cache, logits, live, out = carry
        token, logp, drawn = draw(i, logits)
        column = (jnp.where(live, token, 0), live, jnp.where(live, logp, 0), jnp.where(live, drawn, 0))
        out = jax.tree.map(lambda o, x: o.at[:, i].set(x.astype(o.dtype)), out, column)
        segment = jnp.where(live, prompts.segments[:, -1], 0)
        hidden, cache = model.apply(params, column[0][:, None], segment[:, None], cache, start + i)
        return i + 1, cache, model.unembed(params, hidden[:, 0]), live & (token != eos), out

    def unfinished(carry):
        return (carry[0] < length) & carry[3].any()

    ints, floats = jnp.zeros((rows, length), jnp.int32), jnp.zeros((rows, length), jnp.float32)
    live = prompts.segments[:, -1] > 0
    first = (jnp.int32(0), cache, model.unembed(params, hidden[:, -1]), live, (ints, floats, floats, floats))
    tokens, weights, logp, drawn = jax.lax.while_loop(unfinished, one, first)[-1]

    none = jnp.zeros((rows, start), jnp.float32)
    segments = weights.astype(jnp.int32) * prompts.segments[:, -1:]
    batch = Batch(
        jnp.concatenate([prompts.tokens, tokens], axis=1),
        jnp.concatenate([prompts.segments, segments], axis=1),
        jnp.concatenate([none, weights], axis=1),
        prompts.source,
        prompts.source_segments,
    )
    return batch, jnp.concatenate([none, logp], axis=1), jnp.concatenate([none, drawn], axis=1)
