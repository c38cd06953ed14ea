"""Learning from one's own samples and their rewards."""

import jax.numpy as jnp

from jaxalign import score
from jaxalign.ops import divergences, policy
from jaxalign.ops.masked import masked, masked_sum
from jaxalign.types import Model, Rollout


def reinforce(params, data: Rollout, *, model: Model, temperature: float = 1.0):
    """-sum_t A_t log p(token_t). Williams 1992; the advantage is the rollout's (reward to go, less any baseline). Weight: tokens.

    Metrics: policy/entropy (nats a token).
    """
    said, _ = score.evaluate(model, params, data.batch, temperature=temperature)
    weights = data.batch.targets
    advantage = masked(data.advantage, weights)  # before the product, whose gradient would let a NaN through a sum's mask
    loss = masked_sum(policy.reinforce(said.logp, advantage), weights)
    return loss, {"weight": weights.sum(), "policy/entropy": masked_sum(said.entropy, weights)}


def ppo(
    params,
    data: Rollout,
    *,
    model: Model,
    temperature: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    value_clip: float = 0.2,
    value_weight: float = 0.1,
    entropy_weight: float = 0.0,
):
    """Clipped surrogate + value_weight * clipped value loss - entropy_weight * entropy. Schulman et al. 2017 eq. 9. Weight: tokens.

    The ratio is p/p_old of each token at the sampling temperature; its logarithm is held within +-20.
    Metrics, token means: loss/policy; loss/value; policy/entropy (nats); policy/ratio; policy/ratio_tail, the share of ratios
    outside [1/2, 2]; policy/clipped, where the clip was active; value/clipped; policy/approx_kl = 1/2 (log ratio)^2, from the
    policy that sampled.
    """
    said, value = score.evaluate(model, params, data.batch, temperature=temperature)
    weights = data.batch.targets
    advantage, old_value, target = (masked(x, weights) for x in (data.advantage, data.value, data.target))  # as in reinforce
    log_ratio = jnp.clip(masked(said.logp - data.logp, weights), -20, 20)
    ratio = jnp.exp(log_ratio)
    surrogate = policy.clipped_surrogate(ratio, advantage, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    value_loss = policy.clipped_value_loss(value, old_value, target, clip=value_clip)
    per_token = surrogate + value_weight * value_loss - entropy_weight * said.entropy

    def total(x):
        return masked_sum(x.astype(jnp.float32), weights)

    sums = {
        "loss/policy": total(surrogate),
        "loss/value": total(value_loss),
        "policy/entropy": total(said.entropy),
        "policy/ratio": total(ratio),
        "policy/ratio_tail": total(jnp.abs(log_ratio) > jnp.log(2.0)),
        "policy/clipped": total(surrogate > -advantage * ratio),
        "policy/approx_kl": total(divergences.k2(said.logp, data.logp)),
        # within the clip both squares are equal but for rounding
        "value/clipped": total((jnp.abs(value - old_value) > value_clip) & (value_loss > 0.5 * (value - target) ** 2)),
    }
    return total(per_token), {"weight": weights.sum(), **sums}
