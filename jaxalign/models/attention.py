"""Attention over packed rows, and rotary positions."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxalign.models.attention_blocks import ATTENDED, EVERY, blocks, soft_cap, visible
from jaxalign.shard import ROWS, auto_mesh

ATTENTION = ("xla", "blocks", "cudnn", "splash", "ring")  # implementations of `attend`


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


def attend(
    q,
    k,
    v,
    q_segments,
    k_segments,
    *,
    at=0,
    before=0,
    window=None,
    windows: tuple = (),
    scale: float | None = None,
    cap: float | None = None,
    implementation: str = "xla",
):
    """Causal attention within documents; softmax in float32; a row of padding gives 0. -> [B,T,H,K]

    Args: q [B,T,H,K]; k, v [B,S,G,K], each serving H/G query heads; segments [B,T] and [B,S]; query 0 is column `at` of the keys.
        before: so many keys stand before those S, of no segment: every document sees them, whatever its window.
        window: how many tokens of its document a query sees, itself the last; None: all before it.
        windows: what `window` may be where it is traced: splash has a kernel for each.
        scale: of the scores q.k, None: 1/sqrt(K); cap: their soft cap.
        implementation: one of ATTENTION. All give the same, to rounding.
            xla     jax's own; holds the scores, [B,H,T,S]
            blocks  attention_blocks: plain JAX, on any device; skips blocks that no query sees, of other documents too
            cudnn   a GPU's kernel, for 16-bit numbers without a cap. It is told of causality, to skip by, and all else as a bias
                    [B,1,T,S]: the lengths that it takes instead are wrong of rows that are packed or padded on the left.
            splash  a TPU's kernel (interpreted elsewhere, slowly); skips what is later or outside of the window. It has no
                    derivatives in forward mode
            ring    blocks, the columns split over the mesh axis `sequence` where they divide
            One query alone, as in decoding, is xla's with all of them. Where keys are others than the queries' own columns (of a
            cache, or `before`), splash and ring are as blocks is.
    """
    q_at = q_segments, at + jnp.arange(q.shape[1])
    k_at = jnp.pad(k_segments, ((0, 0), (before, 0)), constant_values=EVERY), jnp.arange(-before, k_segments.shape[1])
    how = {"scale": q.shape[-1] ** -0.5 if scale is None else scale, "cap": cap}
    own_keys = q.shape[1] == k.shape[1]
    if q.shape[1] == 1 or implementation == "xla":
        out = _xla(q, k, v, visible(q_at, k_at, window), **how)
    elif implementation == "cudnn":
        out = _cudnn(q, k, v, visible(q_at, k_at, window), **how, is_causal=own_keys)
    elif implementation == "splash" and own_keys:
        out = _on_devices(partial(_splash, **how, windows=windows or (window,)), q, k, v, q_at, k_at, window)
    else:
        ring = "sequence" if implementation == "ring" and own_keys else None
        out = _on_devices(partial(blocks, **how), q, k, v, q_at, k_at, window, ring)
    return checkpoint_name(jnp.where((q_segments > 0)[:, :, None, None], out, 0), ATTENDED)


def _xla(q, k, v, mask, *, scale, cap):
    if cap is None:
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale)
    rows, length, heads, size = q.shape  # jax's own knows no cap
    q = q.reshape(rows, length, k.shape[2], -1, size)
    scores = soft_cap(jnp.einsum("btgrk,bsgk->bgrts", q, k, preferred_element_type=jnp.float32) * scale, cap)
    p = jax.nn.softmax(jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min), axis=-1)
    return jnp.einsum("bgrts,bsgk->btgrk", p.astype(v.dtype), v).reshape(rows, length, heads, size)


def _cudnn(q, k, v, mask, *, scale, cap, is_causal):
    if cap is not None:
        raise ValueError(f"cuDNN has no soft cap of scores; cap = {cap}")
    length = q.shape[1]
    q, k, v = (_longer(x, 2) for x in (q, k, v))  # its backward pass takes even numbers of columns
    mask = jnp.pad(mask, ((0, 0), (0, q.shape[1] - length), (0, k.shape[1] - mask.shape[2])))[:, None]
    how = {"scale": scale, "is_causal": is_causal, "implementation": "cudnn"}
    return jax.nn.dot_product_attention(q, k, v, mask=mask, **how)[:, :length]


def _longer(x, multiple: int):
    """[B,T,...] with zeros behind, T a multiple of this."""
    return jnp.pad(x, [(0, -size % multiple if axis == 1 else 0) for axis, size in enumerate(x.shape)])


def _splash(q, k, v, q_at, k_at, window, *, scale, cap, windows):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # what is experimental, the others do not depend on

    length, heads = q.shape[1:3]
    q, k, v, segments = (_longer(x, 128) for x in (q * scale, k, v, q_at[0]))  # padding sees padding, of which nothing is kept
    columns = q.shape[1]
    block = next(size for size in (512, 256, 128) if columns % size == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    kinds = windows if windows == (None,) else sorted({*windows})

    def kernel_of(window, interpret):
        mask = splash.LocalMask((columns, columns), (min(window or columns, columns) - 1, 0), 0)
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([mask] * heads),
            block_sizes=splash.BlockSizes(**dict.fromkeys(names, block)),
            attn_logits_soft_cap=cap,
            residual_checkpoint_name=ATTENDED,
            interpret=interpret,
        )
        return jax.vmap(lambda q, k, v, segments: kernel(q, k, v, splash.SegmentIds(segments, segments)))

    def run(interpret, which, *args):
        return jax.lax.switch(which, [kernel_of(window, interpret) for window in kinds], *args)

    which = 0 if len(kinds) == 1 else jnp.argmax(jnp.asarray(kinds) == window)
    args = which, *(x.swapaxes(1, 2) for x in (q, k, v)), segments
    return jax.lax.platform_dependent(*args, tpu=partial(run, False), default=partial(run, True)).swapaxes(1, 2)[:, :length]


def _on_devices(run, q, k, v, q_at, k_at, window, ring=None):
    """run(q, k, v, q_at, k_at, window): each device on its rows and heads, and with a ring on its columns, where they divide.

    For what a kernel does the compiler cannot split, and what each device skips the others need not know.
    """
    mesh = auto_mesh()
    if mesh is None:
        return run(q, k, v, q_at, k_at, window)

    def axes(names, *sizes):
        return names if all(size % math.prod(mesh.shape[name] for name in names) == 0 for size in sizes) else None

    rows, heads = axes(ROWS, len(q)), axes(("tensor",), q.shape[2], k.shape[2])
    columns = axes((ring,), q.shape[1]) if ring else None
    of, at = P(rows, columns, heads), (P(rows, columns), P(columns))
    if columns:
        run = partial(run, ring=ring)
    return jax.shard_map(run, in_specs=(of, of, of, at, at, P()), out_specs=of, check_vma=False)(q, k, v, q_at, k_at, window)
