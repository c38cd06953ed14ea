"""Weighted sums and moments over [B, T] in which an entry of weight 0 does not exist."""

import jax
import jax.numpy as jnp


def masked(x, weights):
    """x where weights > 0, else 0, so that nothing (not even a NaN) leaves a masked entry."""
    return jnp.where(weights > 0, x, 0)


def masked_sum(x, weights, axis=None):
    """sum(x w)."""
    return (masked(x, weights) * weights).sum(axis)


def masked_mean(x, weights, axis=None):
    """sum(x w) / sum(w), and 0 where sum(w) = 0."""
    total = weights.sum(axis)
    return masked_sum(x, weights, axis) / jnp.where(total == 0, 1, total)


def masked_variance(x, weights, ddof: int = 0):
    """sum(w (x - mean)^2) / (sum(w) - ddof); 0 where nothing is left to divide by."""
    centred = x - masked_mean(x, weights)
    total = weights.sum() - ddof
    return jnp.where(total > 0, masked_sum(centred**2, weights) / jnp.where(total > 0, total, 1), 0)


def whiten(x, weights, *, shift_mean: bool = True, ddof: int = 0, eps: float = 1e-8):
    """(x - mu) rsqrt(var + eps), plus mu again unless `shift_mean`; masked entries become 0.

    Ziegler et al. 2019 (`utils.whiten`). The moments are over every weighted entry of x: call it on the whole batch of all
    devices, never on a part. ddof 0 is TensorFlow's, OpenRLHF's and the N implementation details' choice, ddof 1 TRL's and Tunix's.
    """
    mean = masked_mean(x, weights)
    white = (x - mean) * jax.lax.rsqrt(masked_variance(x, weights, ddof) + eps)
    return masked(white if shift_mean else white + mean, weights)
