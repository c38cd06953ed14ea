"""Estimates of KL(pi || ref) from samples of pi, in nats a token (Schulman, 'Approximating KL divergence', 2020)."""

import jax
import jax.numpy as jnp


def k1(logp, ref_logp):
    """log pi - log ref. Unbiased; as a differentiable loss its expected gradient is 0, so use it in a reward."""
    return logp - ref_logp


def k2(logp, ref_logp):
    """(log pi - log ref)^2 / 2. Biased; as a loss on samples of pi its expected gradient is that of KL(pi || ref)."""
    return 0.5 * (logp - ref_logp) ** 2


def k3(logp, ref_logp):
    """ref/pi - 1 - log(ref/pi). Unbiased, never negative; as a loss its expected gradient is that of KL(ref || pi)."""
    return jnp.expm1(ref_logp - logp) - (ref_logp - logp)


def exact(logits, ref_logits):
    """sum_v p_v (log p_v - log q_v) over the last axis."""
    logp, logq = jax.nn.log_softmax(logits), jax.nn.log_softmax(ref_logits)
    return (jnp.exp(logp) * (logp - logq)).sum(-1)
