"""From scores and log-probabilities to rewards, returns and advantages. All arrays are [B, T] by the alignment rule."""

import jax
import jax.numpy as jnp

from jaxalign.ops.masked import masked


def last_of(weights):
    """1 at the last weighted entry of every row, else 0; a row with none stays 0."""
    later = jnp.cumsum(weights[:, ::-1] > 0, axis=1)[:, ::-1]  # weighted entries from t on
    return ((later == 1) & (weights > 0)).astype(weights.dtype)


def slot_after(weights):
    """The weights, and 1 in the slot after each row's last one where the row has such a slot."""
    after = jnp.pad(last_of(weights)[:, :-1], ((0, 0), (1, 0)))
    return jnp.maximum(weights > 0, after).astype(weights.dtype)


def token_rewards(logp, ref_logp, weights, score, beta, *, after_last: bool = False):
    """r_t = -beta (logp_t - ref_logp_t), plus the score at the last response token. -> f32 [B,T]

    Ziegler et al. 2019 eq. 2. `after_last` puts the score one slot after the last token where the row has one left, as N+ and
    TRL do; return and advantage must then use `slot_after(weights)`.
    Args: logp, ref_logp, weights [B,T] (nats; the same temperature); score [B]; beta, reward per nat.
    """
    penalty = masked(-beta * (logp - ref_logp), weights)
    where = last_of(slot_after(weights) if after_last else weights)
    return penalty + where * score[:, None]


def without_eos(score, has_eos, *, replace: float | None = None, penalty: float = 0.0):
    """The score of a response that never ended: `replace` (Ziegler, N+), or the score less `penalty` (TRL). -> f32 [B]"""
    failed = score - penalty if replace is None else jnp.full_like(score, replace)
    return jnp.where(has_eos, score, failed)


def gae(reward, value, weights, *, gamma: float = 1.0, lam: float = 0.95):
    """Generalised advantage estimates and the returns they imply, from values that are not whitened. -> (A, A + V) f32 [B,T]

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  V after the last token is 0.
    Schulman et al. 2016 eq. 11-16. Entries of weight 0 are skipped, not counted as steps: what follows them follows what came
    before, so tokens that the policy did not write may stand inside a response. Their results are 0.
    """

    def back(after, now):
        r, v, w = now
        value_after, advantage_after = after
        advantage = r + gamma * value_after - v + gamma * lam * advantage_after
        kept = (jnp.where(w, v, value_after), jnp.where(w, advantage, advantage_after))
        return kept, advantage

    start = (jnp.zeros_like(value[:, 0]), jnp.zeros_like(value[:, 0]))
    steps = (masked(reward, weights).T, masked(value, weights).T, (weights > 0).T)
    advantage = masked(jax.lax.scan(back, start, steps, reverse=True)[1].T, weights)
    return advantage, masked(advantage + value, weights)


def reward_to_go(reward, weights, *, gamma: float = 1.0):
    """G_t = r_t + gamma G_{t+1} over the entries of weight > 0, else 0. Williams 1992. -> f32 [B,T]"""
    return gae(reward, jnp.zeros_like(reward), weights, gamma=gamma, lam=1.0)[0]
