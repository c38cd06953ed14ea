"""Simulated annotators: people who see a gold score through noise."""

import numpy as np


def probability(gold_a, gold_b, *, temperature: float):
    """P(a is preferred) = sigmoid((gold_a - gold_b) / temperature). Bradley & Terry 1952. -> f64 [B]"""
    return np.exp(-np.logaddexp(0.0, (np.asarray(gold_b, float) - np.asarray(gold_a, float)) / temperature))


def prefer(gold_a, gold_b, draws, *, temperature: float):
    """What an annotator says of each pair. -> (a_preferred bool [B], ceiling f64 [B])

    `ceiling` is max(P, 1 - P): how often a judge who knew the gold scores exactly would agree with this annotator.
    Args: draws: uniform in [0, 1), one a pair [B].
    """
    p = probability(gold_a, gold_b, temperature=temperature)
    return np.asarray(draws) < p, np.maximum(p, 1 - p)
