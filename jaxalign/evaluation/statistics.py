"""How sure a figure is: errors of means, intervals, win rates, calibration. NumPy, float64, on the host.

Miller 2024, "Adding Error Bars to Evals", is behind the first four.
"""

from collections import defaultdict
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    value: float
    error: float  # standard error; nan where one number alone says nothing of it


def mean(x) -> Estimate:
    """Of independent examples, x [N]. The error is std / sqrt(N), ddof 1: of zeros and ones, sqrt(p (1 - p) / (N - 1))."""
    x = np.asarray(x, np.float64)
    return Estimate(float(x.mean()), float(x.std(ddof=1) / len(x) ** 0.5) if len(x) > 1 else float("nan"))


def clustered(x, clusters) -> Estimate:
    """Of examples x [N] that hang together in clusters (tasks, passages): error^2 = sum_c (sum_{i in c} (x_i - mean))^2 / N^2."""
    x = np.asarray(x, np.float64)
    off = [part.sum() for part in _apart(x - x.mean(), clusters)]
    return Estimate(float(x.mean()), float(np.sqrt(np.square(off).sum()) / len(x)) if len(off) > 1 else float("nan"))


def ratio(x, counts) -> Estimate:
    """sum x / sum counts over independent examples, such as nats a token; the error by the delta method."""
    x, counts = np.asarray(x, np.float64), np.asarray(counts, np.float64)
    value = x.sum() / counts.sum()
    return Estimate(float(value), mean(x - value * counts).error / float(counts.mean()))


def macro(x, clusters, *, seed: int, draws: int = 1000) -> Estimate:
    """The mean over clusters of their means; the error is that of a bootstrap of the examples within each (Efron 1979), and NaN
    where a cluster has but one, which says nothing of its own error."""
    parts = _apart(np.asarray(x, np.float64), clusters)
    random = np.random.Generator(np.random.Philox(seed))
    drawn = [part[random.integers(len(part), size=(draws, len(part)))].mean(1) for part in parts]
    error = float(np.mean(drawn, axis=0).std(ddof=1)) if min(map(len, parts)) > 1 else float("nan")
    return Estimate(float(np.mean([part.mean() for part in parts])), error)


def wilson(rate: float, count: int, *, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share of `count` independent examples. Wilson 1927. z = 1.96: 95 %."""
    middle = (rate + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2))
    return float(middle - half), float(middle + half)


def win_rate(outcomes) -> dict:
    """Of answers judged in both orders, outcomes [N,2]: 1 our answer won, 0.5 a tie, 0 it lost; shown first, and shown second.

    -> {"rate", its Wilson interval "low" and "high", "count", "consistent": share of examples judged alike in both orders, "first":
    share that went to the answer shown first, 0.5 for a judge who does not mind}. An example counts as the mean of its two orders.
    Wilson's interval takes examples for won or lost, so it is too wide where there are ties.
    """
    outcomes = np.asarray(outcomes, np.float64)
    rate = float(outcomes.mean())
    low, high = wilson(rate, len(outcomes))
    alike = float((outcomes[:, 0] == outcomes[:, 1]).mean())
    first = float((outcomes[:, 0] + 1 - outcomes[:, 1]).mean() / 2)
    return {"rate": rate, "low": low, "high": high, "count": len(outcomes), "consistent": alike, "first": first}


def length_controlled(won, longer, *, prior: float = 10.0) -> Estimate:
    """The win rate that there would be were the answers of equal length. Dubois et al. 2024, equation 1.

    P(win) = sigmoid(bias + slope tanh(longer / std longer)), fitted to `won` by Newton's method; its value is sigmoid(bias).
    Differs from the paper in that there is no term for how hard an instruction is, which AlpacaEval has from other models; and in
    that bias and slope have a normal prior of std `prior`, which is little, but keeps them finite where length says all.
    Args: won [N], from 0 to 1, the mean of both orders; longer [N]: length of our answer less that of the other, in any unit.
    """
    won, longer = np.asarray(won, np.float64), np.asarray(longer, np.float64)
    weights, curvature = logistic(np.tanh(longer / (longer.std() or 1.0)), won, prior=prior)
    rate = 1 / (1 + np.exp(-weights[0]))
    return Estimate(float(rate), float(rate * (1 - rate) * np.sqrt(np.linalg.inv(curvature)[0, 0])))


def logistic(x, y, *, prior: float = 10.0):
    """P(y) = sigmoid(a + b x), by Newton's method; a and b have a normal prior of std `prior`. x [N]; y [N], from 0 to 1.

    -> ((a, b), the curvature of the posterior's negative logarithm there, [2,2])
    """
    inputs = np.stack([np.ones(len(y)), x], axis=1)
    weights, ridge = np.zeros(2), np.eye(2) / prior**2
    for _ in range(50):
        p = 1 / (1 + np.exp(-inputs @ weights))
        curvature = (inputs * (p * (1 - p))[:, None]).T @ inputs + ridge
        weights = weights + np.linalg.solve(curvature, inputs.T @ (y - p) - ridge @ weights)
    return weights, curvature


def reliability(confidence, correct, *, bins: int = 10) -> dict:
    """What a reliability plot shows, of even bins of [0,1] as ops.calibration.ece has them: arrays [bins] "confidence" and
    "accuracy", nan where a bin is empty, and "count". Niculescu-Mizil and Caruana 2005."""
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    where = np.clip((confidence * bins).astype(int), 0, bins - 1)
    count = np.bincount(where, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = {"confidence": confidence, "accuracy": correct}
        return {name: np.bincount(where, x, bins) / count for name, x in means.items()} | {"count": count}


def _apart(x, clusters) -> list:
    found = defaultdict(list)
    for value, cluster in zip(x, clusters, strict=True):
        found[cluster].append(value)
    return [np.array(part) for part in found.values()]
