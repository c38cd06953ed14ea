"""Learning from one's own samples and their rewards.

What an objective reads of a Rollout: the batch, logp (of the policy that sampled) and the advantage; value and target with a
critic; ref_logp with a KL in the loss. How rewards became advantages is `rollout`'s affair, so that any goes with any.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxalign import score
from jaxalign.ops import aggregate, divergences, policy
from jaxalign.ops.masked import masked, masked_sum
from jaxalign.types import Batch, Model, Rollout


def reinforce(params, data: Rollout, *, model: Model, temperature: float = 1.0, value_weight: float = 0.0):
    """-sum_t A_t log p(token_t) + value_weight * 1/2 (V - target)^2. Weight: tokens.

    Williams 1992; the advantage is the rollout's: reward to go, less any baseline. With a value_weight above 0 the model's critic
    learns to be that baseline. Metrics: policy/entropy (nats a token); with a critic, loss/value.
    """
    said, value = score.evaluate(model, params, data.batch, temperature=temperature)
    weights = data.batch.targets
    advantage = masked(data.advantage, weights)  # before the product, whose gradient would let a NaN through a sum's mask
    loss = masked_sum(policy.reinforce(said.logp, advantage), weights)
    sums = {"weight": weights.sum(), "policy/entropy": masked_sum(said.entropy, weights)}
    if value_weight:
        sums["loss/value"] = masked_sum(0.5 * (value - masked(data.target, weights)) ** 2, weights)
        loss = loss + value_weight * sums["loss/value"]
    return loss, sums


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


# --------------------------------------------------------- without a critic

# `aggregation`, of ops.aggregate, says how much a token counts, and what the weight is: tokens or responses. Metrics, token means
# within a response where responses are counted: loss/policy; loss/kl, `kl` of policy and reference as it is in the loss, nats a
# token; policy/entropy (nats); policy/ratio; policy/ratio_tail, the share of ratios outside [1/2, 2]; policy/clipped, where the
# clip was active; policy/approx_kl = 1/2 (log p/p_old)^2 of each token.


def grpo(
    params,
    data: Rollout,
    *,
    model: Model,
    temperature: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    aggregation=aggregate.seq_mean_token_mean,
    kl=divergences.k3,
    kl_weight: float = 0.0,
    entropy_weight: float = 0.0,
):
    """Clipped surrogate of each token + kl_weight * kl(p, ref) - entropy_weight * entropy. Shao et al. 2024 (GRPO) eq. 3.

    Dr.GRPO (Liu et al. 2025): aggregate.seq_sum_const, advantages that are not divided by their std; DAPO (Yu et al. 2025 eq. 8):
    aggregate.token_mean, clip_high 0.28.
    Args: kl: of ops.divergences, k2 or k3: of tokens, with what came before held (k1 has no gradient). The ratio's logarithm is
    held within +-20.
    """

    def surrogate(logp, old_logp, advantage, weights):
        ratio = jnp.exp(jnp.clip(logp - old_logp, -20, 20))
        loss = policy.clipped_surrogate(ratio, advantage, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
        return loss, ratio, loss > -advantage * ratio

    return _of_samples(params, data, model, temperature, surrogate, aggregation, kl, kl_weight, entropy_weight)


def gspo(
    params,
    data: Rollout,
    *,
    model: Model,
    temperature: float = 1.0,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    aggregation=aggregate.seq_mean_token_mean,
    kl=divergences.k3,
    kl_weight: float = 0.0,
    entropy_weight: float = 0.0,
):
    """Clipped surrogate of the response's ratio, (p(y)/p_old(y))^(1/|y|). Zheng et al. 2025 (GSPO) eq. 5-7; clips: section 5.1."""
    surrogate = _whole(policy.gspo_ratio, clip_low, clip_high)
    return _of_samples(params, data, model, temperature, surrogate, aggregation, kl, kl_weight, entropy_weight)


def rloo(
    params,
    data: Rollout,
    *,
    model: Model,
    temperature: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    aggregation=aggregate.seq_mean_token_mean,
    kl=divergences.k3,
    kl_weight: float = 0.0,
    entropy_weight: float = 0.0,
):
    """Clipped surrogate of the response as one action, p(y)/p_old(y). Ahmadian et al. 2024, with the clip of TRL's trainer."""
    surrogate = _whole(policy.sequence_ratio, clip_low, clip_high)
    return _of_samples(params, data, model, temperature, surrogate, aggregation, kl, kl_weight, entropy_weight)


def cispo(
    params,
    data: Rollout,
    *,
    model: Model,
    temperature: float = 1.0,
    clip_low: float = 1.0,
    clip_high: float = 0.28,
    aggregation=aggregate.token_mean,
    kl=divergences.k3,
    kl_weight: float = 0.0,
    entropy_weight: float = 0.0,
):
    """-sg(clip(ratio, 1 - clip_low, 1 + clip_high)) A log p of each token. MiniMax-M1 (2025) eq. 4-5.

    A weight is clipped, so every token has a gradient. The paper gives no number for clip_high; 0.28 is DAPO's.
    """

    def surrogate(logp, old_logp, advantage, weights):
        ratio = jnp.exp(jnp.clip(logp - old_logp, -20, 20))
        loss = policy.cispo(logp, ratio, advantage, clip_low=clip_low, clip_high=clip_high)
        return loss, ratio, (ratio < 1 - clip_low) | (ratio > 1 + clip_high)

    return _of_samples(params, data, model, temperature, surrogate, aggregation, kl, kl_weight, entropy_weight)


def _whole(ratio_of, clip_low, clip_high):
    """The surrogate of a ratio of whole responses, the same for each of their tokens."""

    def surrogate(logp, old_logp, advantage, weights):
        ratio = jnp.broadcast_to(ratio_of(logp, old_logp, weights), logp.shape)
        loss = policy.clipped_surrogate(ratio, advantage, clip_low=clip_low, clip_high=clip_high)
        return loss, ratio, loss > -advantage * ratio

    return surrogate


def _of_samples(params, data, model, temperature, surrogate, aggregation, kl, kl_weight, entropy_weight):
    """sum_t w_t (surrogate + kl_weight kl - entropy_weight entropy). surrogate(...) -> (loss, ratio, clipped), each [B,T]"""
    said, _ = score.evaluate(model, params, data.batch, temperature=temperature)
    targets = data.batch.targets
    logp, old_logp, ref_logp, advantage, entropy = (
        masked(x, targets) for x in (said.logp, data.logp, data.ref_logp, data.advantage, said.entropy)
    )
    loss, ratio, clipped = surrogate(logp, old_logp, advantage, targets)
    from_ref = kl(logp, ref_logp)
    weights, count = aggregation(targets)
    rows = jax.vmap(lambda row: aggregation(row[None])[1])(targets)  # what each row adds to the count
    even = targets * (rows / jnp.maximum(targets.sum(1), 1e-9))[:, None]  # so that a metric is a mean, whatever the loss is

    def total(x):
        return masked_sum(x.astype(jnp.float32), even)

    sums = {
        "weight": count,
        "loss/policy": masked_sum(loss, weights),
        "loss/kl": total(from_ref),
        "policy/entropy": total(entropy),
        "policy/ratio": total(ratio),
        "policy/ratio_tail": total(jnp.abs(jnp.log(ratio)) > jnp.log(2.0)),
        "policy/clipped": total(clipped),
        "policy/approx_kl": total(divergences.k2(logp, old_logp)),
    }
    return masked_sum(loss + kl_weight * from_ref - entropy_weight * entropy, weights), sums


# --------------------------------------------------------- two objectives in one update


@struct.dataclass
class Mixed:
    """A rollout, and what another objective learns from in the same update, as many rows."""

    rollout: Rollout
    other: Any  # whose weights were scaled (`scaled`): both sums are divided by the weight of the rollout


def mixed(params, data: Mixed, *, model: Model, objective, other, other_weight: float):
    """objective(rollout) + other_weight * other(...): PPO-ptx is ppo and sft (Ouyang et al. 2022 eq. 2). Weight: of `objective`.

    An exact KL in the loss is distill.reverse_kl, of what the reference says of the rollout's text (distill.taught with k = V).
    Metrics: those of `objective`, and of the other under other/.
    """
    loss, sums = objective(params, data.rollout, model=model)
    more, found = other(params, data.other, model=model)
    return loss + other_weight * more, sums | {f"other/{name}": x for name, x in found.items() if name != "weight"}


def scaled(batch: Batch, weight) -> Batch:
    """The batch with weights that sum to `weight`: that of the rollout beside it, both of the whole update over all devices.

    So sum/weight is the mean of either. Scale before micro-batches are cut, never within an objective.
    """
    return batch.replace(weights=batch.targets * (weight / jnp.maximum(batch.targets.sum(), 1e-9)))
