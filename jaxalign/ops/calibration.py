"""Whether probabilities mean what they say."""

import jax
import jax.numpy as jnp


def ece(confidence, correct, *, bins: int = 10):
    """Expected calibration error sum_b (n_b/N) |accuracy_b - confidence_b| over even bins of [0,1]. Naeini et al. 2015. -> f32 []

    Args: confidence [N] in [0,1], of what was answered: the largest probability, or sigmoid |r_a - r_b|; correct, 0 or 1 [N].
    """
    where = jnp.clip((confidence * bins).astype(jnp.int32), 0, bins - 1)
    off = jnp.zeros(bins, confidence.dtype).at[where].add(correct - confidence)  # n_b (accuracy_b - confidence_b)
    return jnp.abs(off).sum() / confidence.shape[0]


def brier(probs, labels):
    """mean_i sum_c (p_ic - [y_i = c])^2, of all classes: from 0 to 2. Brier 1950. Args: probs [N,C]; labels, i32 [N]. -> f32 []"""
    return ((probs - jax.nn.one_hot(labels, probs.shape[1], dtype=probs.dtype)) ** 2).sum(1).mean()
