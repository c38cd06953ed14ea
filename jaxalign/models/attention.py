"""Attention over packed rows, and rotary positions."""

import jax
import jax.numpy as jnp


def positions_of(segments):
    """i32 [B,T]: how many tokens stand before this one in its document; 0 at padding."""
    column = jnp.arange(segments.shape[1])[None]
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
    start = jax.lax.cummax(jnp.where(segments != before, column, 0), axis=1)
    return jnp.where(segments > 0, column - start, 0)


def rope(x, positions, *, theta: float = 10000.0, fraction: float = 1.0):
    """Rotary positions in the half-split order of Hugging Face. Su et al. 2021.

    Args: x [B,T,H,K]; positions i32 [B,T]; `fraction` of K turns, the rest passes (GPT-NeoX). -> [B,T,H,K]
    """
    turning = int(x.shape[-1] * fraction)
    inverse = theta ** -(jnp.arange(0, turning, 2, dtype=jnp.float32) / turning)  # [turning/2]
    angle = positions[:, :, None, None].astype(jnp.float32) * inverse[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b, rest = jnp.split(x.astype(jnp.float32), [turning // 2, turning], axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x.dtype)


def attend(q, k, v, q_segments, k_segments, *, at=0):
    """Causal attention within documents; softmax in float32; a row of padding gives 0. -> [B,T,H,K]

    Args: q [B,T,H,K]; k, v [B,S,G,K], each serving H/G query heads; segments [B,T] and [B,S]; query 0 is column `at` of the keys.
    """
    columns = at + jnp.arange(q.shape[1])
    causal = jnp.arange(k.shape[1])[None, :] <= columns[:, None]
    same = q_segments[:, :, None] == k_segments[:, None, :]
    mask = causal[None] & same & (q_segments > 0)[:, :, None]
    out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
    return jnp.where((q_segments > 0)[:, :, None, None], out, 0)
