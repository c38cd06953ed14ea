"""Attention over packed rows, and rotary positions."""

import jax
import jax.numpy as jnp


def positions_of(segments):
    """i32 [B,T]: how many tokens stand before this one in its document; 0 at padding."""
    column = jnp.arange(segments.shape[1])[None]
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
    start = jax.lax.cummax(jnp.where(segments != before, column, 0), axis=1)
    return jnp.where(segments > 0, column - start, 0)


def frequencies(size: int, theta: float = 10000.0, scaling: tuple = ()):
    """Radians that each pair of `size` dimensions turns a position: theta^(-2j/size). Su et al. 2021. -> f32 [size/2]

    Args: scaling, for contexts longer than those first trained on: (factor,) divides all of them (Chen et al. 2023); (factor, low,
    high, context) divides those of fewer than `low` turns in the first `context` positions, leaves those of more than `high`, and
    goes over linearly in between (Llama 3.1).
    """
    inverse = theta ** -(jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    if not scaling:
        return inverse
    factor, *bands = scaling
    if not bands:
        return inverse / factor
    low, high, context = bands
    kept = jnp.clip((context * inverse / (2 * jnp.pi) - low) / (high - low), 0, 1)
    return kept * inverse + (1 - kept) * inverse / factor


def rope(x, positions, inverse=None):
    """Rotary positions in the half-split order of Hugging Face. Su et al. 2021.

    Args: x [B,T,H,K]; positions i32 [B,T]; inverse f32 [J], of `frequencies` (None: of all of K): the first 2J dimensions turn, the
    rest passes (GPT-NeoX). -> [B,T,H,K]
    """
    inverse = frequencies(x.shape[-1]) if inverse is None else inverse
    angle = positions[:, :, None, None].astype(jnp.float32) * inverse[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    half = inverse.shape[0]
    a, b, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x.dtype)


def soft_cap(x, cap: float | None):
    """cap tanh(x / cap), between -cap and cap; None: x. Gemma 2, section 2."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(q, k, v, q_segments, k_segments, *, at=0, before=0, window=None, scale: float | None = None, cap: float | None = None):
    """Causal attention within documents; softmax in float32; a row of padding gives 0. -> [B,T,H,K]

    Args: q [B,T,H,K]; k, v [B,S,G,K], each serving H/G query heads; segments [B,T] and [B,S]; query 0 is column `at` of the keys.
        before: so many keys stand before those S, of no segment: every document sees them, whatever its window.
        window: how many tokens of its document a query sees, itself the last; None: all before it.
        scale: of the scores q.k, None: 1/sqrt(K); cap: their soft cap.
    """
    columns = at + jnp.arange(q.shape[1])
    apart = (
        columns[:, None] - jnp.arange(k_segments.shape[1])[None, :]
    )  # [T,S]; in columns as in positions: a document is contiguous
    seen = apart >= 0 if window is None else (apart >= 0) & (apart < window)
    same = q_segments[:, :, None] == k_segments[:, None, :]
    mask = seen[None] & same & (q_segments > 0)[:, :, None]
    mask = jnp.pad(mask, ((0, 0), (0, 0), (before, 0)), constant_values=True)
    if cap is None:
        out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale)
    else:  # which jax's own does not know
        out = _capped(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale, cap)
    return jnp.where((q_segments > 0)[:, :, None, None], out, 0)


def _capped(q, k, v, mask, scale, cap):
    rows, length, heads, size = q.shape
    q = q.reshape(rows, length, k.shape[2], -1, size)
    scores = soft_cap(jnp.einsum("btgrk,bsgk->bgrts", q, k, preferred_element_type=jnp.float32) * scale, cap)
    p = jax.nn.softmax(jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min), axis=-1)
    return jnp.einsum("bgrts,bsgk->btgrk", p.astype(v.dtype), v).reshape(rows, length, heads, size)
