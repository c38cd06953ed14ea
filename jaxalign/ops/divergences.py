"""Divergences, in nats: k1, k2, k3 estimate KL(pi || ref) from samples of pi (Schulman, 'Approximating KL divergence', 2020)."""

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


def kl(logp, logq):
    """KL(p || q) = sum_i p_i (log p_i - log q_i) over the last axis, of log-probabilities; 0 log 0 = 0."""
    p = jnp.exp(logp)
    return (p * jnp.where(p > 0, logp - logq, 0)).sum(-1)


def exact(logits, ref_logits):
    """sum_v p_v (log p_v - log q_v) over the last axis, of logits."""
    return kl(jax.nn.log_softmax(logits), jax.nn.log_softmax(ref_logits))


def generalised_jsd(logp, logq, *, beta: float):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, over the last axis. Agarwal et al. 2024 (GKD) section 2.

    0 < beta < 1. 1/2 is the Jensen-Shannon divergence; near 0 it is beta KL(p || q), near 1 (1 - beta) KL(q || p).
    """
    mixed = jnp.logaddexp(logp + jnp.log(beta), logq + jnp.log1p(-beta))
    return beta * kl(logp, mixed) + (1 - beta) * kl(logq, mixed)
