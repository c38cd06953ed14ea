"""Learning a policy from comparisons and labels, without samples of its own and without a reward model. One document a row.

The log-probability of a response is sum_t w_t log p_t over its targets. The reference's enters with the data, for a frozen model
never enters an objective: `with_reference` for pairs, `summed_logp` for labelled responses, `kto_baseline` for KTO's z0. A pair of
which a side has no target, or a response that has none, does not count.

Metrics of pairs: policy/logp_chosen and policy/logp_rejected, nats a response, for both may fall while their difference grows;
reward/chosen, reward/rejected and reward/difference, the rewards r that the loss compares; reward/accuracy, the share of pairs with
r_chosen > r_rejected (a tie counts half). `dpo` alone reads the margin.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jaxalign import score
from jaxalign.objectives.reward import stack
from jaxalign.ops import preference
from jaxalign.ops.masked import masked, masked_sum
from jaxalign.types import Array, Batch, Model, Pairs


@struct.dataclass
class Labelled:
    """Responses that somebody found good or bad, each alone."""

    responses: Batch
    desirable: Array  # bool [B]
    ref_logp: Array  # f32 [B] nats, by a frozen reference (`summed_logp`)
    z0: Array  # f32 [B] nats, `kto_baseline` of the whole global batch, the same in each row


def dpo(params, data: Pairs, *, model: Model, beta: float = 0.1, nll_weight: float = 0.0):
    """-log sigmoid(r_c - r_l - margin), r = beta log pi/ref. Rafailov et al. 2023 eq. 7; margin: Amini et al. 2024. Weight: pairs.

    Args: beta, reward per nat; nll_weight, of -mean_t log p of the chosen response, which keeps it likely (Pang et al. 2024).
    """
    pair = _of_policy(params, data, model, beta, reference=True)
    loss = preference.bradley_terry(pair.chosen, pair.rejected, masked(data.margin, pair.weight))
    return _sums(loss + nll_weight * pair.nll, pair)


def conservative_dpo(params, data: Pairs, *, model: Model, beta: float = 0.1, label_smoothing: float = 0.1):
    """DPO whose label is 1 - e, not 1: -(1 - e) log sigmoid(h) - e log sigmoid(-h). Mitchell 2023 (cDPO) eq. 3. Weight: pairs."""
    pair = _of_policy(params, data, model, beta, reference=True)
    return _sums(preference.soft_bradley_terry(pair.chosen, pair.rejected, 1 - label_smoothing), pair)


def robust_dpo(params, data: Pairs, *, model: Model, beta: float = 0.1, noise: float = 0.1):
    """DPO that is unbiased where a share `noise` < 1/2 of the labels is flipped. Chowdhury et al. 2024. Weight: pairs."""
    pair = _of_policy(params, data, model, beta, reference=True)
    return _sums(preference.robust_bradley_terry(pair.chosen, pair.rejected, noise=noise), pair)


def ipo(params, data: Pairs, *, model: Model, beta: float = 0.1, per_token: bool = False):
    """(log pi_c/ref_c - log pi_l/ref_l - 1/(2 beta))^2. Azar et al. 2023 eq. 17. Weight: pairs. r = beta log pi/ref.

    Args: per_token: divide each log-ratio by its response's tokens, as TRL does; the paper, and OpenRLHF, do not.
    """
    pair = _of_policy(params, data, model, beta, reference=True, per_token=per_token)
    return _sums(preference.ipo(pair.chosen / beta, pair.rejected / beta, beta=beta), pair)


def slic(params, data: Pairs, *, model: Model, beta: float = 0.1):
    """max(0, 1 - (r_c - r_l)). Zhao et al. 2023 (SLiC-HF) eq. 1, without its term of the SFT target. Weight: pairs.

    Differs from the paper in r = beta log pi/ref, as TRL has it; there it is log pi.
    """
    pair = _of_policy(params, data, model, beta, reference=True)
    return _sums(preference.hinge(pair.chosen, pair.rejected), pair)


def exo(params, data: Pairs, *, model: Model, beta: float = 0.1, label_smoothing: float = 1e-3):
    """KL from the policy's preference to the smoothed label. Ji et al. 2024 (EXO) on pairs. Weight: pairs. 0 < label_smoothing."""
    pair = _of_policy(params, data, model, beta, reference=True)
    return _sums(preference.exo(pair.chosen, pair.rejected, smoothing=label_smoothing), pair)


def nca(params, data: Pairs, *, model: Model, beta: float = 0.1):
    """-log s(r_c) - 1/2 log s(-r_c) - 1/2 log s(-r_l), r = beta log pi/ref. Chen et al. 2024 (NCA) on pairs. Weight: pairs."""
    pair = _of_policy(params, data, model, beta, reference=True)
    return _sums(preference.nca(pair.chosen, pair.rejected), pair)


def alpha_dpo(params, data: Pairs, *, model: Model, beta: float = 0.1, alpha: float = 0.5):
    """DPO under an alpha-divergence: r = beta (1 - (pi/ref)^-alpha)/alpha. Wang et al. 2024 (f-DPO). Weight: pairs.

    alpha = 1 is the forward KL(ref || pi), alpha = 0 is DPO.
    """
    pair = _of_policy(params, data, model, 1.0, reference=True)
    chosen, rejected = (beta * preference.alpha_link(x, alpha=alpha) for x in (pair.chosen, pair.rejected))
    return _sums(preference.bradley_terry(chosen, rejected), pair._replace(chosen=chosen, rejected=rejected))


def js_dpo(params, data: Pairs, *, model: Model, beta: float = 0.1):
    """DPO under the Jensen-Shannon divergence: r = beta log(2u/(1 + u)), u = pi/ref. Wang et al. 2024 (f-DPO). Weight: pairs."""
    pair = _of_policy(params, data, model, 1.0, reference=True)
    chosen, rejected = (beta * preference.js_link(x) for x in (pair.chosen, pair.rejected))
    return _sums(preference.bradley_terry(chosen, rejected), pair._replace(chosen=chosen, rejected=rejected))


def cpo(params, data: Pairs, *, model: Model, beta: float = 0.1, nll_weight: float = 1.0):
    """-log sigmoid(r_c - r_l) + nll_weight * nll, r = beta log pi. Xu et al. 2024 (CPO). No reference. Weight: pairs.

    Differs from the paper in nll: the mean over the chosen response's tokens, where the paper has their sum.
    """
    pair = _of_policy(params, data, model, beta)
    return _sums(preference.bradley_terry(pair.chosen, pair.rejected) + nll_weight * pair.nll, pair)


def simpo(params, data: Pairs, *, model: Model, beta: float = 2.0, gamma: float = 1.0):
    """-log sigmoid(r_c - r_l - gamma), r = beta mean_t log p. Meng et al. 2024 (SimPO) eq. 6. No reference. Weight: pairs."""
    pair = _of_policy(params, data, model, beta, per_token=True)
    return _sums(preference.bradley_terry(pair.chosen, pair.rejected, gamma), pair)


def orpo(params, data: Pairs, *, model: Model, odds_weight: float = 0.1):
    """nll - odds_weight log sigmoid(r_c - r_l), r = log odds of the mean log p. Hong et al. 2024 (ORPO) eq. 6. Weight: pairs.

    No reference. nll is the chosen response's, a token; the paper's code has the prompt's tokens in it as well.
    """
    pair = _of_policy(params, data, model, 1.0, per_token=True)
    loss = preference.orpo(pair.chosen, pair.rejected, weight=odds_weight)
    return _sums(loss, pair._replace(chosen=preference.log_odds(pair.chosen), rejected=preference.log_odds(pair.rejected)))


def kto(
    params,
    data: Labelled,
    *,
    model: Model,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
):
    """w (1 - sigmoid(+-beta (log pi/ref - z0))), + where desirable. Ethayarajh et al. 2024 (KTO) eq. 7-8. Weight: responses.

    Metrics: policy/logp, nats a response; reward/score, beta log pi/ref; reward/accuracy, the share of responses on the right side
    of z0; policy/z0, nats.
    """
    logp, tokens = summed_logp(params, data.responses, model=model)
    weight = (tokens > 0).astype(jnp.float32)
    z0, log_ratio = masked(data.z0, weight), logp - masked(data.ref_logp, weight)
    hyper = {"beta": beta, "desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    loss = preference.kto(log_ratio, data.desirable, z0, **hyper)
    sums = {
        "weight": weight.sum(),
        "policy/logp": masked_sum(logp, weight),
        "policy/z0": z0.sum(),
        "reward/score": masked_sum(beta * log_ratio, weight),
        "reward/accuracy": masked_sum((log_ratio > z0) == data.desirable, weight),
    }
    return masked_sum(loss, weight), sums


def summed_logp(params, batch: Batch, *, model: Model):
    """sum_t w_t log p_t of each row, nats, and sum_t w_t: f32 [B] both."""
    said, _ = score.evaluate(model, params, batch)
    return masked_sum(said.logp, batch.targets, 1), batch.targets.sum(1)


def _of_both(params, data: Pairs, model):
    """`summed_logp` of chosen and rejected, by one forward pass; f32 [B,2] both."""
    return tuple(x.reshape(-1, 2) for x in summed_logp(params, stack(data.chosen, data.rejected), model=model))


def with_reference(params, data: Pairs, *, model: Model) -> Pairs:
    """The pairs with the log-probabilities of this model, the reference, as the objectives compute the policy's."""
    chosen, rejected = _of_both(params, data, model)[0].T
    return data.replace(ref_chosen=chosen, ref_rejected=rejected)


def kto_baseline(params, ref_params, mismatched: Batch, *, model: Model):
    """KTO's z0 of a global batch, to be taken anew before each update and spread over `Labelled.z0`. -> f32 []

    Args: mismatched, of `mismatch`; params, the policy's.
    """
    (logp, tokens), (ref_logp, _) = (summed_logp(p, mismatched, model=model) for p in (params, ref_params))
    return preference.kto_baseline(logp - ref_logp, (tokens > 0).astype(jnp.float32))


def mismatch(batch: Batch, *, length: int) -> Batch:
    """Each row's prompt followed by the next row's response, padded on the right to `length`; what does not fit is cut off.

    The prompt is what stands before the first target, the response all from there on. Raises ValueError for a single row, whose
    response has no other prompt.
    """
    rows, columns = batch.tokens.shape
    if rows < 2:
        raise ValueError("KTO's baseline needs two rows or more: a response is scored after another row's prompt")
    column = jnp.arange(columns)[None]
    real = batch.segments > 0
    start = jnp.where(real, column, columns).min(1, keepdims=True)
    response = jnp.where(batch.targets > 0, column, columns).min(1, keepdims=True)
    end = jnp.where(real, column + 1, 0).max(1, keepdims=True)
    response = jnp.minimum(response, end)
    other, begin, stop = jax.tree.map(lambda x: jnp.roll(x, -1, axis=0), (batch, response, end))
    at = jnp.arange(length)[None]
    here = start + at  # columns of the prompt
    there = begin + at - (response - start)  # and of the other row's response, where it goes on
    mine, within = here < response, there < stop

    def take(x, columns_of):
        return jnp.take_along_axis(x, jnp.clip(columns_of, 0, columns - 1), axis=1)

    return batch.replace(
        tokens=jnp.where(mine, take(batch.tokens, here), jnp.where(within, take(other.tokens, there), 0)),
        segments=(mine | within).astype(jnp.int32),
        weights=jnp.where(within & ~mine, take(other.targets, there), 0),
        source=batch.source,
        source_segments=batch.source_segments,
    )


class _Pair(NamedTuple):
    """What an objective of pairs reads; f32 [B] each."""

    chosen: Array  # r, what the loss compares
    rejected: Array
    logp_chosen: Array  # nats a response
    logp_rejected: Array
    nll: Array  # -mean_t log p of the chosen response, nats a token
    weight: Array  # 1 where both have targets


def _of_policy(params, data, model, beta, *, reference=False, per_token=False) -> _Pair:
    """r = beta log pi, or beta log pi/ref; of sums over tokens, or of means. A pair that does not count has -1 nat a token."""
    logp, tokens = _of_both(params, data, model)
    counts = (tokens > 0).all(1, keepdims=True)
    tokens = jnp.where(counts, tokens, 1)
    r = logp = jnp.where(counts, logp, -1)
    if reference:
        if data.ref_chosen is None or data.ref_rejected is None:
            raise ValueError("this objective needs the reference's log-probabilities in the data: see preference.with_reference")
        r = logp - masked(jnp.stack([data.ref_chosen, data.ref_rejected], axis=1), counts)
    r = beta * (r / tokens if per_token else r)
    return _Pair(*r.T, *logp.T, nll=-(logp / tokens)[:, 0], weight=counts[:, 0].astype(jnp.float32))


def _sums(loss, pair: _Pair):
    difference = pair.chosen - pair.rejected
    sums = {
        "policy/logp_chosen": pair.logp_chosen,
        "policy/logp_rejected": pair.logp_rejected,
        "reward/chosen": pair.chosen,
        "reward/rejected": pair.rejected,
        "reward/difference": difference,
        "reward/accuracy": 0.5 * (1 + jnp.sign(difference)),
    }
    return masked_sum(loss, pair.weight), {"weight": pair.weight.sum()} | {k: masked_sum(x, pair.weight) for k, x in sums.items()}
