"""From sampled responses and their scores to a Rollout: what one policy update learns from.

`assemble` is PPO's, with a critic; REINFORCE's with lam = 1. `assemble_groups` compares the samples of a prompt with each other;
they stand together (prompt-major).
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from jaxalign import score
from jaxalign.ops import advantages, divergences
from jaxalign.ops.masked import masked_mean, masked_sum, masked_variance, whiten
from jaxalign.types import Batch, Model, Pairs, Rollout


def said(model: Model, params, batch: Batch, *, temperature: float):
    """(logp, entropy, value), each f32 [B,T]; one compiled function of it serves policy and reference, so equal ones give KL 0."""
    scores, value = score.evaluate(model, params, batch, temperature=temperature)
    return scores.logp, scores.entropy, jnp.zeros_like(scores.logp) if value is None else value


def blank(rows: int, length: int, source_length: int = 0) -> Rollout:
    """Where a rollout will be: [B,T] of zeros, and [B,S] where an encoder reads a source."""
    ints, floats = jnp.zeros((rows, length), jnp.int32), jnp.zeros((rows, length), jnp.float32)
    source = [jnp.zeros((rows, source_length), jnp.int32)] * 2 if source_length else []
    return Rollout(Batch(ints, ints, floats, *source), *[floats] * 6, score=jnp.zeros(rows, jnp.float32))


def assemble(
    batch: Batch,
    logp,
    ref_logp,
    value,
    scores,
    beta,
    earned=None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten_advantages: bool = True,
) -> Rollout:
    """Rewards, advantages and value targets of a batch of responses. Ziegler et al. 2019 section 2.2; Schulman et al. 2016.

    r_t = -beta (logp - ref_logp)_t, plus the score at the last token; A = GAE(gamma, lam); target = A + V; then A is whitened over
    every response token of the batch.
    Args: logp, ref_logp (nats), value [B,T]; scores [B], NaN where the reward abstained: nothing is learned from that response, and
    no weight of it is left; beta, reward per nat; earned [B,T], of advantages.token_rewards: when the score was.
    """
    batch, scores, _ = _given(batch, scores)
    weights = batch.targets
    reward = advantages.token_rewards(logp, ref_logp, weights, scores, beta, earned)
    advantage, target = advantages.gae(reward, value, weights, gamma=gamma, lam=lam)
    if whiten_advantages:
        advantage = whiten(advantage, weights)
    return Rollout(batch, logp, ref_logp, value, reward, advantage, target, scores)


def _given(batch: Batch, scores):
    """Without the weights of responses that have no score: (batch, scores f32 [B], 0 there, bool [B] of those that have one)."""
    given = jnp.isfinite(scores) & (batch.targets > 0).any(axis=1)
    batch = batch.replace(weights=jnp.where(given[:, None], batch.weights, 0))
    return batch, jnp.where(given, scores, 0), given


def describe(rollout: Rollout, entropy, eos: int, group: int = 1) -> dict:
    """What to log of a rollout, before any update.

    policy/kl (k1, nats a response: the sum over tokens), policy/kl_k2 and policy/kl_k3 (other estimates of it), policy/entropy
    (nats a token; none without), policy/length (tokens), policy/eos_rate; reward/score, reward/score_std, reward/total (score
    less KL penalty, a response); reward/abstained, the share of responses that have no score, of which nothing else here speaks;
    value/explained, 1 - var(target - value)/var(target); advantage/std, before whitening. With groups, reward/equal, the share of
    those whose scores are all equal, so that nothing can be learned from them.
    """
    weights = rollout.batch.targets
    given = weights.any(axis=1).astype(jnp.float32)
    rows = jnp.maximum(given.sum(), 1)
    pair = (rollout.logp, rollout.ref_logp)
    missed = masked_variance(rollout.target - rollout.value, weights)
    spread = masked_variance(rollout.target, weights)
    equal = {"reward/equal": 1 - differs(rollout, group).mean()} if group > 1 else {}
    known = equal if entropy is None else equal | {"policy/entropy": masked_mean(entropy, weights)}
    return known | {
        "policy/kl": masked_sum(divergences.k1(*pair), weights) / rows,
        "policy/kl_k2": masked_sum(divergences.k2(*pair), weights) / rows,
        "policy/kl_k3": masked_sum(divergences.k3(*pair), weights) / rows,
        "policy/length": weights.sum() / rows,
        "policy/eos_rate": masked_mean(ended(rollout.batch, eos), given),
        "reward/score": masked_mean(rollout.score, given),
        "reward/score_std": jnp.sqrt(masked_variance(rollout.score, given)),
        "reward/total": rollout.reward.sum() / rows,
        "reward/abstained": 1 - given.mean(),
        "value/explained": 1 - missed / jnp.maximum(spread, 1e-8),
        "advantage/std": jnp.sqrt(missed),  # target - value is the advantage that was not whitened
    }


def ended(batch: Batch, eos: int):
    """Whether each response ends with EOS. -> f32 [B]"""
    last = advantages.last_of(batch.weights)
    return (last * (batch.tokens == eos)).sum(axis=1)


# --------------------------------------------------------- of groups, without a critic


def assemble_groups(
    batch: Batch,
    logp,
    ref_logp,
    value,
    scores,
    beta,
    *,
    group: int,
    estimator=advantages.rloo,
    longest: int = 0,
    overlong: int = 0,
) -> Rollout:
    """Rewards and advantages of `group` samples of each prompt: every token of a response has the advantage of the whole.

    R_i = score_i - beta sum_t (logp - ref_logp)_t + advantages.overlong_penalty(|y_i|); A = estimator(R, group).
    Args: as `assemble`; estimator: of ops.advantages, `rloo`, `grpo`, `dr_grpo` (which with group = B takes the batch's mean from
    each) or `grpo_over_batch`; overlong: over how many tokens up to `longest` the penalty of length grows; 0: none. A response that
    the reward abstained from is in no baseline. Of value only the difference from the target, A, is kept. Raises as `estimator`.
    """
    batch, scores, given = _given(batch, scores)
    weights = batch.targets
    worth = scores
    if overlong:
        worth += advantages.overlong_penalty((weights > 0).sum(1), longest=longest, ramp=overlong)
    reward = advantages.token_rewards(logp, ref_logp, weights, worth, beta)
    of_rows = estimator(jnp.where(given, reward.sum(1), jnp.nan), group)
    of_tokens = jnp.where(weights > 0, of_rows[:, None], 0)
    return Rollout(batch, logp, ref_logp, value, reward, of_tokens, value + of_tokens, scores)


def differs(rollout: Rollout, group: int):
    """Whether the scores of each prompt's responses differ; those without one do not count. -> bool [B/group]"""
    given = (rollout.batch.targets > 0).any(axis=1)
    return advantages.dynamic_sampling(jnp.where(given, rollout.score, jnp.nan), group)


def without_equals(rollout: Rollout, group: int) -> Rollout:
    """The rollout, of which groups with equal scores have no weight left. DAPO (Yu et al. 2025) eq. 11.

    There prompts are drawn until a batch is full of groups that differ; here a batch is as large as it is.
    """
    keep = jnp.repeat(differs(rollout, group), group)[:, None]
    return rollout.replace(batch=rollout.batch.replace(weights=jnp.where(keep, rollout.batch.weights, 0)))


def best_and_worst(rollout: Rollout, group: int) -> Pairs:
    """Of each prompt's responses that with the highest score and that with the lowest, for online DPO. -> Pairs of B/group rows

    Guo et al. 2024, with group = 2. A group with equal scores has no weight left.
    """
    rollout = without_equals(rollout, group)
    given = (rollout.batch.targets > 0).any(axis=1)
    start = jnp.arange(0, len(given), group)
    ref_logp = masked_sum(rollout.ref_logp, rollout.batch.targets, 1)

    def side(sign):
        ranked = jnp.where(given, sign * rollout.score, -jnp.inf).reshape(-1, group)
        rows = start + ranked.argmax(axis=1)
        return jax.tree.map(lambda x: x[rows], (rollout.batch, ref_logp))

    (chosen, ref_chosen), (rejected, ref_rejected) = side(1), side(-1)
    return Pairs(chosen, rejected, jnp.zeros_like(ref_chosen), ref_chosen, ref_rejected)


# --------------------------------------------------------- a critic of its own, and responses of an earlier policy


def with_critic(policy: Model, critic: Model) -> Model:
    """A policy whose values are another model's: params = {"policy": ..., "critic": ...}. No trunk is shared.

    The critic, a Model with a scalar head, may start from the reward model (Huang et al. 2024, N+). Decoding, with a cache, runs
    the policy alone; there are no values then.
    """
    width = policy.config.width

    def init(key):
        one, other = jax.random.split(key)
        return {"policy": policy.init(one), "critic": critic.init(other)}

    def apply(params, tokens, segments, cache=None, at=0, **how):
        hidden, cache_after = policy.apply(params["policy"], tokens, segments, cache, at, **how)
        if cache is None:
            hidden = jnp.concatenate([hidden, critic.apply(params["critic"], tokens, segments, **how)[0]], axis=-1)
        return hidden, cache_after

    def unembed(params, hidden):
        return policy.unembed(params["policy"], hidden[..., :width])

    def scalar(params, hidden):
        return critic.scalar(params["critic"], hidden[..., width:])

    def head(params):
        return {"policy": policy.head(params["policy"])}

    return Model(replace(policy.config, scalar=critic.config.scalar), init, apply, unembed, scalar, policy.cache, head)


def corrected(rollout: Rollout, drawn_logp, *, cap: float) -> Rollout:
    """For responses that an earlier policy drew: each advantage times min(p/p_drawn, cap), p the rollout's logp.

    Truncated importance weights (Ionides 2008), token by token, beside which the objective's ratio is to p: decoupled PPO (Hilton
    et al. 2021). What came before a token is as the earlier policy wrote it, which is not corrected, nor are value targets.
    Args: drawn_logp: nats [B,T], of the policy that drew. cap: at least 1.
    """
    log_ratio = jnp.where(rollout.batch.targets > 0, rollout.logp - drawn_logp, 0)
    return rollout.replace(advantage=rollout.advantage * jnp.exp(jnp.minimum(log_ratio, jnp.log(cap))))
