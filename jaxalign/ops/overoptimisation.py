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
    """(a, b) of eq. 1, by least squares on R/d = a - b d. Args: d > 0 [N], reward [N], of which 0 is the reference's."""
    return _line(d, reward / d)


def fit_rl(d, reward):
    """(a, b) of eq. 2, by least squares on R/d = a - b log d. Args: as `fit_best_of_n`."""
    return _line(jnp.log(d), reward / d)


def _line(x, y):
    off = x - x.mean()
    b = -(off * y).sum() / (off**2).sum()
    return y.mean() + b * x.mean(), b
