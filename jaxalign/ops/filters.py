"""Cuts of the next-token distribution: logits [..., V] to logits, -inf where a token is out."""

import jax
import jax.numpy as jnp


def top_k(logits, k: int):
    """Keep the k largest (k = 0: all); ties of the k-th stay."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    kth = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits < kth, -jnp.inf, logits)


def top_p(logits, p: float):
    """Keep the smallest set of most likely tokens whose probability reaches p: the token that crosses p stays (p = 1: all).

    Holtzman et al. 2020. Differs from lm-human-preferences, which drops the crossing token.
    """
    if p >= 1.0:
        return logits
    order = jnp.flip(jnp.argsort(logits, axis=-1), -1)  # most likely first
    probs = jnp.take_along_axis(jax.nn.softmax(logits), order, -1)
    reached = jnp.cumsum(probs, -1) - probs  # probability of the more likely tokens
    kept = (reached < p).at[..., 0].set(True)
    threshold = jnp.where(kept, jnp.take_along_axis(logits, order, -1), jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits < threshold, -jnp.inf, logits)
