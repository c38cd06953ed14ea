"""Policy-gradient losses, per token: [B, T] to [B, T], to be summed by weight. Lower is better."""

import jax
import jax.numpy as jnp

from jaxalign.ops.masked import masked_mean, masked_sum


def reinforce(logp, advantage):
    """-A log p, with no gradient through A; its gradient is the score-function estimator. Williams 1992."""
    return -jax.lax.stop_gradient(advantage) * logp


def clipped_surrogate(ratio, advantage, *, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None):
    """max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high)). Schulman et al. 2017 eq. 7.

    `dual_clip` c > 1 bounds the loss of a bad token by -c A (Ye et al. 2020): where A < 0, min(., -c A).
    """
    loss = jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 1 - clip_low, 1 + clip_high))
    if dual_clip is None:
        return loss
    return jnp.where(advantage < 0, jnp.minimum(loss, -dual_clip * advantage), loss)


def clipped_value_loss(value, old_value, target, *, clip: float = 0.2):
    """1/2 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2). Baselines' PPO2; Ziegler et al. 2019."""
    near = old_value + jnp.clip(value - old_value, -clip, clip)
    return 0.5 * jnp.maximum((value - target) ** 2, (near - target) ** 2)


def cispo(logp, ratio, advantage, *, clip_low: float = 1.0, clip_high: float):
    """-sg(clip(ratio, 1 - clip_low, 1 + clip_high)) A log p: the weight is clipped, so no token loses its gradient.

    MiniMax-M1 (2025) eq. 4-5, which has no lower bound: clip_low = 1.
    """
    weight = jax.lax.stop_gradient(jnp.clip(ratio, 1 - clip_low, 1 + clip_high))
    return weight * reinforce(logp, advantage)


def sequence_ratio(logp, old_logp, weights):
    """p(y)/p_old(y) = exp(sum_t (log p - log p_old)): the response as one action, as RLOO has it (Ahmadian et al. 2024). -> [B,1]

    The logarithm is held within +-20. Its clipped surrogate is the same for every token of a row: aggregate it by
    `aggregate.seq_mean_token_mean`.
    """
    return jnp.exp(jnp.clip(masked_sum(logp - old_logp, weights, 1), -20, 20))[:, None]


def gspo_ratio(logp, old_logp, weights):
    """(p(y)/p_old(y))^(1/|y|) = exp(mean_t (log p - log p_old)). Zheng et al. 2025 (GSPO) eq. 7. -> [B,1], as `sequence_ratio`"""
    return jnp.exp(jnp.clip(masked_mean(logp - old_logp, weights, 1), -20, 20))[:, None]
