"""Long arrays in parts, so that what is large about a token is never held for all of them."""

import jax
import jax.numpy as jnp


def by_chunk(one, parts, *, chunk: int = 128):
    """one(parts), which must treat columns alike, on `chunk` columns at a time; the backward pass computes each part again.

    Args: parts: a tree of [B,T,...]; one: such a tree -> another. -> the tree of one(parts), [B,T,...]
    """
    rows, length = jax.tree.leaves(parts)[0].shape[:2]
    if length <= chunk:
        return one(parts)
    spare = -length % chunk

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, spare)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(rows, -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    done = jax.lax.map(jax.checkpoint(one), jax.tree.map(split, parts))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(rows, -1, *x.shape[3:])[:, :length], done)
