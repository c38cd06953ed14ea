"""From scores and log-probabilities to rewards, returns and advantages. All arrays are [B, T] by the alignment rule."""

import jax
import jax.numpy as jnp

from jaxalign.ops.masked import masked, masked_mean, masked_variance


def last_of(weights):
    """1 at the last weighted entry of every row, else 0; a row with none stays 0."""
    later = jnp.cumsum(weights[:, ::-1] > 0, axis=1)[:, ::-1]  # weighted entries from t on
    return ((later == 1) & (weights > 0)).astype(weights.dtype)


def slot_after(weights):
    """The weights, and 1 in the slot after each row's last one where the row has such a slot."""
    after = jnp.pad(last_of(weights)[:, :-1], ((0, 0), (1, 0)))
    return jnp.maximum(weights > 0, after).astype(weights.dtype)


def token_rewards(logp, ref_logp, weights, score, beta, earned=None, *, after_last: bool = False):
    """r_t = -beta (logp_t - ref_logp_t), plus the score at the last response token. -> f32 [B,T]

    Ziegler et al. 2019 eq. 2. `after_last` puts the score one slot after the last token where the row has one left, as N+ and
    TRL do; return and advantage must then use `slot_after(weights)`.
    Args: logp, ref_logp, weights [B,T] (nats; the same temperature); score [B]; beta, reward per nat; earned [B,T], how much of the
    score each token has earned, such as the last one of a step that was judged (Uesato et al. 2022): the last has what is left.
    """
    penalty = masked(-beta * (logp - ref_logp), weights)
    earned = masked(jnp.zeros_like(penalty) if earned is None else earned, weights)
    where = last_of(slot_after(weights) if after_last else weights)
    return penalty + earned + where * (score - earned.sum(1))[:, None]


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


# --------------------------------------------------------- of groups
# The `group` samples of each prompt stand together (prompt-major) in score [N]. A score that is not finite abstained: it is in no
# baseline, and its advantage is 0, as are those of a group whose scores are all equal.


def dr_grpo(score, group: int):
    """A_i = r_i - mean_g r. Liu et al. 2025 (Dr.GRPO). With group = N: REINFORCE less the mean of the batch. -> f32 [N]

    Raises ValueError where the scores do not make groups of two or more.
    """
    return _centred(score, group)[0].ravel()


def rloo(score, group: int):
    """A_i = r_i - mean_{j != i} r_j = n/(n - 1) (r_i - mean_g r), n = scores given. Ahmadian et al. 2024 eq. 8. -> f32 [N]

    Raises as `dr_grpo` does.
    """
    off, given = _centred(score, group)
    n = given.sum(1, keepdims=True)
    return (off * n / jnp.maximum(n - 1, 1)).ravel()


def grpo(score, group: int, *, eps: float = 1e-4, ddof: int = 1):
    """A_i = (r_i - mean_g r) / (std_g r + eps). Shao et al. 2024 section 4.1. -> f32 [N]

    ddof 1 is TRL's (eps 1e-4), Tunix's and verl's (eps 1e-6) choice; the paper says neither. Raises as `dr_grpo` does.
    """
    off, given = _centred(score, group)
    left = given.sum(1, keepdims=True) - ddof
    variance = (off**2).sum(1, keepdims=True) / jnp.maximum(left, 1)
    return (off / (jnp.sqrt(variance) + eps)).ravel()


def grpo_over_batch(score, group: int, *, eps: float = 1e-4, ddof: int = 1):
    """A_i = (r_i - mean_g r) / (std r + eps), std over all scores: call it on those of all devices. TRL's scale_rewards="batch".

    -> f32 [N]. Raises as `dr_grpo` does.
    """
    off, given = _centred(score, group)
    return off.ravel() / (jnp.sqrt(masked_variance(score, given.ravel(), ddof)) + eps)


def dynamic_sampling(score, group: int):
    """Whether a group's scores differ, so that it teaches something: with 0 or 1, 0 < correct < G. DAPO eq. 11. -> bool [N/G]

    Raises as `dr_grpo` does.
    """
    score = _groups(score, group)
    given = jnp.isfinite(score)
    return jnp.where(given, score, -jnp.inf).max(1) > jnp.where(given, score, jnp.inf).min(1)


def overlong_penalty(length, *, longest: int, ramp: int):
    """0 up to longest - ramp tokens, then falling in a straight line to -1 at `longest`, and -1 beyond. DAPO eq. 13. -> f32 [B]"""
    return jnp.clip((longest - ramp - length) / ramp, -1, 0)


def _groups(score, group):
    if group < 2 or score.shape[0] % group:
        raise ValueError(f"{score.shape[0]} scores do not make groups of {group}: a group is two or more samples of one prompt")
    return score.reshape(-1, group)


def _centred(score, group):
    """(r - mean_g r, 1 where r is given), each [N/G,G]. Equal scores give 0, not what rounding leaves of it."""
    differ, score = dynamic_sampling(score, group)[:, None], _groups(score, group)
    given = jnp.isfinite(score).astype(score.dtype)
    return masked(score - masked_mean(score, given, 1)[:, None], given * differ), given
