"""Learning a reward from comparisons."""

import jax
import jax.numpy as jnp

from jaxalign import score
from jaxalign.ops import preference
from jaxalign.types import Model, Pairs


def pairwise(params, data: Pairs, *, model: Model, centring: float = 0.0):
    """-log sigmoid(r_chosen - r_rejected - margin), both scored in one forward pass. Stiennon et al. 2020 eq. 1. Weight: pairs.

    Args: centring: coefficient of (r_chosen + r_rejected)^2, often 0.01 (Eisenstein et al. 2023).
    Metrics: reward/accuracy, the share of pairs with r_chosen > r_rejected (a tie counts half); reward/difference and
    reward/chosen, in units of the reward.
    """
    both = jax.tree.map(lambda c, r: jnp.concatenate([c, r]), data.chosen, data.rejected)
    chosen, rejected = jnp.split(score.last_scalar(model, params, both), 2)
    loss = preference.bradley_terry(chosen, rejected, data.margin) + centring * preference.centring(chosen, rejected)
    difference = chosen - rejected
    sums = {
        "reward/accuracy": 0.5 * (1 + jnp.sign(difference)).sum(),
        "reward/difference": difference.sum(),
        "reward/chosen": chosen.sum(),
    }
    return loss.sum(), {"weight": jnp.float32(chosen.shape[0]), **sums}
