"""The next-token distribution: cuts of it, logits [..., V] to logits, -inf where a token is out; and a draw."""

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

    Holtzman et al. 2020. Differs from lm-human-preferences, which drops the crossing token. The set is {v: z_v >= x} for the
    largest x with which it reaches p. No sort: float32s are numbered in their order, and 32 bisections leave one of 2^32.
    """
    if p >= 1.0:
        return logits
    z = logits.astype(jnp.float32)
    probs = jax.nn.softmax(z)

    def halve(_, bounds):
        low, high = bounds
        middle = (low | high) - ((low ^ high) >> 1)  # their mean, rounded up, without an overflow
        reaches = jnp.where(z >= _float(middle), probs, 0).sum(-1, keepdims=True) >= p
        return jnp.where(reaches, middle, low), jnp.where(reaches, high, middle - 1)

    top = z.max(-1, keepdims=True)
    low, _ = jax.lax.fori_loop(0, 32, halve, (_number(jnp.full_like(top, -jnp.inf)), _number(top)))
    return jnp.where(z < _float(low), -jnp.inf, logits)


def _flip(n):
    return jnp.where(n < 0, n ^ 0x7FFFFFFF, n)


def _number(x):
    """Of float32s in their order, which one x is: i32, negative where x is."""
    return _flip(jax.lax.bitcast_convert_type(x, jnp.int32))


def _float(n):
    """The inverse of `_number`."""
    return jax.lax.bitcast_convert_type(_flip(n), jnp.float32)


def categorical(u, logits, block: int = 128):
    """Token v with probability softmax(logits)_v, by inversion: a block of tokens by u[0], one of that block by u[1]. -> i32 [...]

    Two random numbers a draw, where the maximum with Gumbel noise takes V of them, and a small model's decode step half its time.
    Args: u [...,2], uniform in [0, 1).
    """
    p = jnp.exp(logits - logits.max(-1, keepdims=True))
    p = jnp.pad(p, ((0, 0),) * (p.ndim - 1) + ((0, -p.shape[-1] % block),)).reshape(*p.shape[:-1], -1, block)
    at = _invert(u[..., 0], p.sum(-1))
    inside = jnp.take_along_axis(p, at[..., None, None], axis=-2)[..., 0, :]
    return (at * block + _invert(u[..., 1], inside)).astype(jnp.int32)


def _invert(u, mass):
    """The first n with sum(mass[:n + 1]) > u sum(mass), none of no mass: sums that are rounded are not quite in order."""
    some, upto = mass > 0, jnp.cumsum(mass, -1)
    total = jnp.where(some, upto, 0).max(-1, keepdims=True)
    return jnp.argmax(some & (upto > u[..., None] * total), axis=-1)
