"""How much each token counts: weights [B,T] to (weights of the sum [B,T], what the sum is divided by []).

An objective returns masked_sum(loss, w) and n. Both add up over micro-batches and devices, so sum / n is the mode's mean over the
whole batch, however it was cut. A row is a response; one without any weight does not count.
"""

import jax.numpy as jnp


def token_mean(weights):
    """sum l / sum m: every token counts the same. DAPO (Yu et al. 2025) eq. 8; PPO."""
    return weights, weights.sum()


def seq_mean_token_mean(weights):
    """mean_i (1/|y_i|) sum_t l: every response counts the same, a token of a long one less. GRPO (Shao et al. 2024) eq. 3."""
    size = weights.sum(1, keepdims=True)
    return weights / jnp.where(size > 0, size, 1), responses(weights)


def seq_mean_token_sum(weights):
    """mean_i sum_t l: the mean of the losses of whole responses. Williams 1992."""
    return weights, responses(weights)


def seq_sum_const(weights, *, length: int):
    """mean_i (1/L_max) sum_t l: a constant in place of the response's length. Dr.GRPO (Liu et al. 2025). Args: length: L_max."""
    return weights / length, responses(weights)


def responses(weights):
    """How many rows have a weight. -> []"""
    return (weights > 0).any(1).sum().astype(weights.dtype)
