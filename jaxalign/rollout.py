"""From sampled responses and their scores to a Rollout: what one policy update learns from."""

import jax.numpy as jnp

from jaxalign import score
from jaxalign.ops import advantages, divergences
from jaxalign.ops.masked import masked_mean, masked_sum, masked_variance, whiten
from jaxalign.types import Batch, Model, Rollout


def said(model: Model, params, batch: Batch, *, temperature: float):
    """(logp, entropy, value), each f32 [B,T]; one compiled function of it serves policy and reference, so equal ones give KL 0."""
    scores, value = score.evaluate(model, params, batch, temperature=temperature)
    return scores.logp, scores.entropy, jnp.zeros_like(scores.logp) if value is None else value


def assemble(
    batch: Batch,
    logp,
    ref_logp,
    value,
    scores,
    beta,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten_advantages: bool = True,
) -> Rollout:
    """Rewards, advantages and value targets of a batch of responses. Ziegler et al. 2019 section 2.2; Schulman et al. 2016.

    r_t = -beta (logp - ref_logp)_t, plus the score at the last token; A = GAE(gamma, lam); target = A + V; then A is whitened over
    every response token of the batch.
    Args: logp, ref_logp (nats), value [B,T]; scores [B]; beta, reward per nat.
    """
    weights = batch.targets
    reward = advantages.token_rewards(logp, ref_logp, weights, scores, beta)
    advantage, target = advantages.gae(reward, value, weights, gamma=gamma, lam=lam)
    if whiten_advantages:
        advantage = whiten(advantage, weights)
    return Rollout(batch, logp, ref_logp, value, reward, advantage, target, scores)


def describe(rollout: Rollout, entropy, eos: int) -> dict:
    """What to log of a rollout, before any update.

    policy/kl (k1, nats a response: the sum over tokens), policy/kl_k2 and policy/kl_k3 (other estimates of it), policy/entropy
    (nats a token), policy/length (tokens), policy/eos_rate; reward/score, reward/score_std, reward/total (score less KL penalty, a
    response); value/explained, 1 - var(target - value)/var(target); advantage/std, before whitening.
    """
    weights = rollout.batch.targets
    rows = weights.shape[0]
    pair = (rollout.logp, rollout.ref_logp)
    missed = masked_variance(rollout.target - rollout.value, weights)
    spread = masked_variance(rollout.target, weights)
    return {
        "policy/kl": masked_sum(divergences.k1(*pair), weights) / rows,
        "policy/kl_k2": masked_sum(divergences.k2(*pair), weights) / rows,
        "policy/kl_k3": masked_sum(divergences.k3(*pair), weights) / rows,
        "policy/entropy": masked_mean(entropy, weights),
        "policy/length": weights.sum() / rows,
        "policy/eos_rate": ended(rollout.batch, eos).mean(),
        "reward/score": rollout.score.mean(),
        "reward/score_std": rollout.score.std(),
        "reward/total": rollout.reward.sum() / rows,
        "value/explained": 1 - missed / jnp.maximum(spread, 1e-8),
        "advantage/std": jnp.sqrt(missed),  # target - value is the advantage that was not whitened
    }


def ended(batch: Batch, eos: int):
    """Whether each response ends with EOS. -> f32 [B]"""
    last = advantages.last_of(batch.weights)
    return (last * (batch.tokens == eos)).sum(axis=1)
