"""Attention that never holds more than a block of its scores: for long rows, for packed ones, and over a mesh axis of columns.

Dao et al. 2022 (FlashAttention) and, where the keys go round a ring of devices, Liu et al. 2023, in plain JAX. A pair of blocks in
which no query sees a key is skipped. Derivatives are by a rule that knows the softmax's normaliser, so that the backward pass, the
rule's transpose, computes the scores of a pair again and keeps none.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

BLOCK = 128  # queries, and keys
EVERY = -1  # the segment of keys that every document sees
LOW = -1e30  # below every score, and finite
ATTENDED = "attention"  # the name of what it gives, for `remat`, which keeps it


def soft_cap(x, cap: float | None):
    """cap tanh(x / cap), between -cap and cap; None: x. Gemma 2, section 2."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def visible(q_at, k_at, window):
    """bool [B,t,s]: which keys a query sees. Args: q_at, k_at: segments [B,t] and columns [t], as of `attention.attend`."""
    (q_segments, q_columns), (k_segments, k_columns) = q_at, k_at
    apart = q_columns[:, None] - k_columns[None, :]  # in columns as in positions: a document is contiguous
    seen = apart >= 0 if window is None else (apart >= 0) & (apart < window)
    seen = seen[None] & (q_segments[:, :, None] == k_segments[:, None, :])
    return (seen | (k_segments == EVERY)[:, None, :]) & (q_segments > 0)[:, :, None]


def blocks(q, k, v, q_at, k_at, window, scale, cap, ring=None):
    """The attention of `attention.attend`. -> [B,T,H,K]

    Args: q_at, k_at: segments [B,T] and [B,S], EVERY for keys that all documents see, and columns [T] and [S].
        ring: the mesh axis that columns are split over, inside shard_map: k and v go from device to device until all have seen all.
            A layer's backward pass holds k and v of all columns at a time, and no other array of theirs.
    """
    rows, length, heads, size = q.shape
    q = q.reshape(rows, length, k.shape[2], -1, size)
    queries, keys = _cut((q, *q_at), length), _cut((k, v, *k_at), k.shape[1])
    out, _ = _attend(scale, cap, ring, queries[0], *keys[:2], (queries[1:], keys[2:], window))
    return out.swapaxes(0, 1).reshape(rows, -1, heads, size)[:, :length]


def _cut(arrays, length: int):
    """Columns [B,T,...] or [T] as blocks [n,B,t,...] or [n,t]; what is added at the end is of segment 0."""
    spare = -length % min(BLOCK, length)

    def cut(x):
        axis = min(x.ndim - 1, 1)
        x = jnp.pad(x, [(0, spare if i == axis else 0) for i in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, min(BLOCK, length), *x.shape[axis + 1 :]), axis, 0)

    return tuple(map(cut, arrays))


def _scores(q, k, scale, cap):
    """f32 [B,G,R,t,s]"""
    return soft_cap(jnp.einsum("btgrk,bsgk->bgrts", q, k, preferred_element_type=jnp.float32) * scale, cap)


def _mix(p, v):
    """f32 [B,G,R,t,K]: values by probabilities, which are as precise as values are."""
    return jnp.einsum("bgrts,bsgk->bgrtk", p.astype(v.dtype), v, preferred_element_type=jnp.float32)


def _through(one, states, queries, keys, where, ring):
    """states, one for each block of queries, after one(state, query, key, seen) for each block of keys that is seen of it."""
    q_at, k_at, window = where

    @partial(jax.checkpoint, prevent_cse=False)
    def pair(state, query, at, key):
        seen = visible(at, key[1], window)[:, None, None]
        return jax.lax.cond(seen.any(), lambda: one(state, query, key[0], seen), lambda: state)

    @partial(jax.checkpoint, prevent_cse=False)
    def block(state, query, at, keys):
        return jax.lax.scan(lambda state, key: (pair(state, query, at, key), None), state, keys)[0]

    def all_blocks(states, keys):
        return jax.lax.map(lambda part: block(*part, keys), (states, queries, q_at))

    if ring is None:
        return all_blocks(states, (keys, k_at))
    size = jax.lax.axis_size(ring)
    onward = [(i, (i + 1) % size) for i in range(size)]

    def turn(carry, _):
        states, keys = carry
        return (all_blocks(states, keys), jax.lax.ppermute(keys, ring, onward)), None

    return jax.lax.scan(turn, (states, (keys, k_at)), length=size)[0][0]


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _attend(scale, cap, ring, q, k, v, where):
    """-> [n,B,t,G,R,K], and the logarithm of the softmax's normaliser, f32 [n,B,G,R,t]"""

    def one(state, q, key, seen):
        (top, total, out), (k, v) = state, key
        scores = jnp.where(seen, _scores(q, k, scale, cap), LOW)
        higher = jnp.maximum(top, scores.max(-1))
        p, fade = jnp.where(seen, jnp.exp(scores - higher[..., None]), 0), jnp.exp(top - higher)
        return higher, total * fade + p.sum(-1), out * fade[..., None] + _mix(p, v)

    n, rows, length, *heads, size = q.shape
    of_each = jnp.zeros((n, rows, *heads, length), jnp.float32)
    states = (of_each + LOW, of_each, jnp.zeros((*of_each.shape, size), jnp.float32))
    top, total, out = _through(one, states, q, (k, v), where, ring)
    total = jnp.where(total > 0, total, 1)  # of padding
    return jnp.moveaxis(out / total[..., None], 4, 2).astype(q.dtype), top + jnp.log(total)


@_attend.defjvp
def _tangent(scale, cap, ring, primals, tangents):
    """dout = sum_s p_s (dv_s + (ds_s - mean ds) v_s), mean ds = sum_s p_s ds_s: the softmax's rule, block by block."""
    (q, k, v, where), (dq, dk, dv, _) = primals, tangents
    out, log_total = checkpoint_name(_attend(scale, cap, ring, q, k, v, where), ATTENDED)

    def one(state, query, key, seen):
        (q, log_total, dq), (k, v, dk, dv) = query, key
        scores, change = jax.jvp(partial(_scores, scale=scale, cap=cap), (q, k), (dq, dk))
        p = jnp.where(seen, jnp.exp(jnp.where(seen, scores, LOW) - log_total[..., None]), 0)
        change = p * change
        return state[0] + change.sum(-1), state[1] + _mix(p, dv) + _mix(change, v)

    states = (jnp.zeros_like(log_total), jnp.zeros((*log_total.shape, q.shape[-1]), jnp.float32))
    mean, mixed = _through(one, states, (q, log_total, dq), (k, v, dk, dv), where, ring)
    change = jnp.moveaxis(mixed, 4, 2) - out * jnp.moveaxis(mean, 4, 2)[..., None]
    return (out, log_total), (change.astype(out.dtype), mean)
