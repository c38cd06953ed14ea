"""Learning a reward from what people or models say of responses. A row of data without any token does not count."""

import jax
import jax.numpy as jnp
from flax import struct

from jaxalign import score
from jaxalign.ops import preference
from jaxalign.ops.masked import masked, masked_mean, masked_sum
from jaxalign.types import Array, Batch, Model, Pairs


@struct.dataclass
class Judged:
    """Two responses to the same prompts, and what judges said of them: 1 and 0, or shares of votes, or a model's probabilities."""

    first: Batch
    second: Batch
    won: Array  # f32 [B], that the first is better
    tied: Array  # f32 [B], that they are equally good; the second is better with 1 - won - tied


@struct.dataclass
class Ranked:
    """K responses to each prompt, in somebody's order."""

    responses: tuple[Batch, ...]  # K of [B,T]; a row without tokens is no response
    rank: Array  # i32 [B,K]; the least is the best, equals are a tie


@struct.dataclass
class Rated:
    """Responses, and a number that each should score."""

    responses: Batch
    rating: Array  # f32 [B], in units of the reward; NaN where nobody rated


@struct.dataclass
class Stepwise:
    """Solutions in steps, and whether each step is right."""

    solutions: Batch  # weights are 1 at the last token of each step
    label: Array  # f32 [B,T], there: 1 right, 0 wrong, or a share of votes; NaN where nobody said


def pairwise(params, data: Pairs, *, model: Model, centring: float = 0.0):
    """-log sigmoid(r_chosen - r_rejected - margin), both scored in one forward pass. Stiennon et al. 2020 eq. 1. Weight: pairs.

    Args: centring: coefficient of (r_chosen + r_rejected)^2, often 0.01 (Eisenstein et al. 2023).
    Metrics: reward/accuracy, the share of pairs with r_chosen > r_rejected (a tie counts half); reward/difference and
    reward/chosen, in units of the reward.
    """
    chosen, rejected, weight = _of_two(params, data.chosen, data.rejected, model)
    loss = preference.bradley_terry(chosen, rejected, masked(data.margin, weight))
    return _sums(loss + centring * preference.centring(chosen, rejected), chosen, rejected, weight)


def noisy_pairwise(params, data: Pairs, *, model: Model, noise: float, centring: float = 0.0):
    """`pairwise` by annotators who say the wrong one with probability `noise` < 1/2. Chowdhury et al. 2024. Weight: pairs.

    It does not read the margin. Metrics: as `pairwise`; a judge without fault has accuracy 1 - noise.
    """
    chosen, rejected, weight = _of_two(params, data.chosen, data.rejected, model)
    loss = preference.robust_bradley_terry(chosen, rejected, noise=noise)
    return _sums(loss + centring * preference.centring(chosen, rejected), chosen, rejected, weight)


def difference(params, data: Pairs, *, model: Model):
    """(r_chosen - r_rejected - margin)^2: comparisons that say by how much. lm-human-preferences, label_types.py. Weight: pairs.

    Metrics: as `pairwise`.
    """
    chosen, rejected, weight = _of_two(params, data.chosen, data.rejected, model)
    return _sums(preference.square(chosen - rejected, masked(data.margin, weight)), chosen, rejected, weight)


def soft_pairwise(params, data: Judged, *, model: Model):
    """Cross entropy of sigmoid(r_first - r_second) with won + tied/2. Bai et al. 2022 (Constitutional AI) section 4. Weight: pairs.

    Metrics: reward/difference and reward/chosen, of the first; reward/accuracy, the share of votes for the one that scores higher.
    """
    first, second, weight = _of_two(params, data.first, data.second, model)
    p = masked(data.won + 0.5 * data.tied, weight)
    return _sums(preference.soft_bradley_terry(first, second, p), first, second, weight, p)


def pairwise_with_ties(params, data: Judged, *, model: Model, theta: float):
    """Cross entropy of Rao and Kupper's win, tie and loss. Rao & Kupper 1967. Weight: pairs.

    Args: theta > 1: how close scores are called equal; two equal ones tie with probability (theta - 1)/(theta + 1).
    Metrics: as `soft_pairwise`.
    """
    first, second, weight = _of_two(params, data.first, data.second, model)
    won, tied = masked(data.won, weight), masked(data.tied, weight)
    loss = preference.rao_kupper(first, second, won, tied, theta=theta)
    return _sums(loss, first, second, weight, won + 0.5 * tied)


def best_of_k(params, data: Ranked, *, model: Model):
    """-log softmax(r_1 .. r_k)[best]. Ziegler et al. 2019 eq. 1. Weight: prompts. Of several that are best: any of them.

    Metrics: reward/accuracy, how often the best scores highest.
    """
    scores, there = _of_many(params, data.responses, model)
    rank = jnp.where(there, data.rank, jnp.iinfo(jnp.int32).max)
    best = there & (rank == rank.min(1, keepdims=True))
    weight = there.any(1).astype(jnp.float32)
    found = jnp.take_along_axis(best, jnp.where(there, scores, -jnp.inf).argmax(1)[:, None], axis=1)[:, 0]
    sums = {"weight": weight.sum(), "reward/accuracy": (found * weight).sum()}
    return masked_sum(preference.best_of_k(scores, best, there), weight), sums


def k_wise(params, data: Ranked, *, model: Model):
    """The mean of -log sigmoid(r_better - r_worse) over a prompt's ordered pairs: one prompt is one element, not its pairs.

    Ouyang et al. 2022 (InstructGPT) eq. 1; each response is scored once. Weight: prompts with a pair.
    Metrics: reward/accuracy, the share of a prompt's pairs in the right order (a tie of scores counts half).
    """
    scores, there = _of_many(params, data.responses, model)
    loss, pairs = preference.k_wise(scores, data.rank, there)
    right = 0.5 * (1 + jnp.sign(scores[:, :, None] - scores[:, None, :]))
    weight = pairs.any((1, 2)).astype(jnp.float32)
    accuracy = masked_mean(right, pairs.astype(jnp.float32), (1, 2))
    return masked_sum(loss, weight), {"weight": weight.sum(), "reward/accuracy": masked_sum(accuracy, weight)}


def rating(params, data: Rated, *, model: Model):
    """(r - rating)^2. lm-human-preferences, label_types.py. Weight: responses that have a rating.

    Metrics: reward/score and reward/rating, in units of the reward.
    """
    weight = (_there(data.responses) & jnp.isfinite(data.rating)).astype(jnp.float32)
    wanted, scores = masked(data.rating, weight), score.last_scalar(model, params, data.responses)
    loss = masked_sum(preference.square(scores, wanted), weight)
    return loss, {"weight": weight.sum(), "reward/score": masked_sum(scores, weight), "reward/rating": wanted.sum()}


def process(params, data: Stepwise, *, model: Model):
    """Cross entropy of sigmoid(r_k) with step k's label, r_k the scalar at its last token. Weight: labelled steps.

    Uesato et al. 2022; Lightman et al. 2023 section 2.6. With a label at the last step alone, the outcome's, it is their ORM.
    Metrics: reward/accuracy, the share of labelled steps (of votes) that are on the right side of 1/2.
    """
    logit, weights = score.scalars(model, params, data.solutions), data.solutions.targets
    weights = jnp.where(jnp.isfinite(data.label), weights, 0)
    p = masked(data.label, weights)
    right = 0.5 * (1 + jnp.sign(logit) * (2 * p - 1))
    sums = {"weight": weights.sum(), "reward/accuracy": masked_sum(right, weights)}
    return masked_sum(preference.soft_bradley_terry(logit, 0.0, p), weights), sums


def stack(*batches: Batch) -> Batch:
    """K batches [B,T] in one of [BK,T], for one forward pass: the first row of each, the second of each, ..."""
    return jax.tree.map(lambda *x: jnp.stack(x, axis=1).reshape(-1, *x[0].shape[1:]), *batches)


def _there(batch: Batch):
    return (batch.segments > 0).any(-1)


def _of_two(params, first, second, model):
    """The scores of both, and 1 where both are there; f32 [B] each."""
    scores, there = _of_many(params, (first, second), model)
    return *scores.T, there.all(1).astype(jnp.float32)


def _of_many(params, responses, model):
    """Each response's score and whether it is there, [B,K], by one forward pass."""
    scores = score.last_scalar(model, params, stack(*responses))
    return scores.reshape(-1, len(responses)), jnp.stack([_there(one) for one in responses], axis=1)


def _sums(loss, first, second, weight, p=1.0):
    """p: the share of votes for the first."""
    ahead = jnp.sign(first - second)
    sums = {
        "weight": weight.sum(),
        "reward/accuracy": masked_sum(0.5 * (1 + ahead * (2 * p - 1)), weight),
        "reward/difference": masked_sum(first - second, weight),
        "reward/chosen": masked_sum(first, weight),
    }
    return masked_sum(loss, weight), sums
