"""Best of n samples by a score: what it costs in KL, and what it brings."""

import math

import jax.numpy as jnp
import numpy as np


def kl(n):
    """KL(best of n || policy) = log n - (n - 1)/n, nats. Stiennon et al. 2020 appendix G.3. -> f32, as n

    Exact where no two samples score the same, else an upper bound (Beirami et al. 2024).
    """
    return jnp.log(n) - (n - 1) / n


def probabilities(probs, n):
    """q(y) = F(y)^n - F(y-)^n: what best of n draws from finitely many answers, given in increasing order of score. -> f32 [V]

    Args: probs [V], of one draw; no two answers score the same.
    """
    below = jnp.cumsum(probs)
    below = below / below[-1]  # so that the last is 1 and stays 1 to any power
    return jnp.diff(below**n, prepend=0.0)


def expected_max(scores, n: int):
    """An unbiased estimate of E[max of n scores] from N >= n draws: sum_i C(i-1, n-1)/C(N, n) s_(i), the mean over all subsets.

    Nakano et al. 2021 appendix I. Args: scores [..., N]. -> f32 [...]. Raises ValueError where there are fewer than n.
    """
    many = scores.shape[-1]
    if not 1 <= n <= many:
        raise ValueError(f"the best of {n} cannot be estimated from {many} scores")
    share = np.array([math.comb(i, n - 1) / math.comb(many, n) for i in range(many)])  # that the i-th smallest is a subset's best
    return jnp.sort(scores) @ jnp.asarray(share, jnp.float32)
