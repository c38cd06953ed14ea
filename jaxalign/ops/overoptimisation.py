"""The gold reward as a function of how far a proxy was optimised: d = sqrt(KL(pi || ref)), nats^(1/2). Gao, Schulman & Hilton 2022.

alpha (`a`, gold reward a unit of d at the beginning) and beta (`b`, how soon the proxy fails) are the two constants of each law.
"""

import jax.numpy as jnp


def best_of_n(d, a, b):
    """R(d) = d (a - b d), of best-of-n. Eq. 1."""
    return d * (a - b * d)


def rl(d, a, b):
    """R(d) = d (a - b log d), of reinforcement learning. Eq. 2. R(0) = 0."""
    return d * (a - b * jnp.log(jnp.where(d > 0, d, 1)))


def best_of_n_peak(a, b):
    """Where eq. 1 is largest, and how large: (a/2b, a^2/4b)."""
    return a / (2 * b), a**2 / (4 * b)


def rl_peak(a, b):
    """Where eq. 2 is largest, and how large: (exp(a/b - 1), b exp(a/b - 1))."""
    d = jnp.exp(a / b - 1)
    return d, b * d


def fit_best_of_n(d, reward):
    """(a, b) of eq. 1, by least squares. Args: d > 0 [N], reward [N], of which 0 is the reference's."""
    return _fit(d, d, reward)


def fit_rl(d, reward):
    """(a, b) of eq. 2, by least squares. Args: as `fit_best_of_n`."""
    return _fit(d, jnp.log(d), reward)


def _fit(d, fall, reward):
    a, b = jnp.linalg.lstsq(jnp.stack([d, -d * fall], axis=1), reward)[0]
    return a, b


def r_squared(fitted, reward):
    """1 - sum (R - fitted)^2 / sum (R - mean R)^2: the share of the rewards' variance [N] that a law explains."""
    return 1 - ((reward - fitted) ** 2).sum() / ((reward - reward.mean()) ** 2).sum()
