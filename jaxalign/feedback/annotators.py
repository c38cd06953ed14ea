"""Simulated annotators: people who see a gold score through noise."""

import numpy as np


def probability(gold_a, gold_b, *, temperature: float):
    """P(a is preferred) = sigmoid((gold_a - gold_b) / temperature). Bradley & Terry 1952. -> f64 [B]"""
    return np.exp(-np.logaddexp(0.0, (np.asarray(gold_b, float) - np.asarray(gold_a, float)) / temperature))


def prefer(gold_a, gold_b, *, temperature: float, seed: int):
    """One draw of an annotator a pair. -> (a_preferred bool [B], ceiling f64 [B])

    `ceiling` is max(P, 1 - P): how often a judge who knew the gold scores exactly would agree with this annotator.
    """
    p = probability(gold_a, gold_b, temperature=temperature)
    return np.random.default_rng([seed, 4]).random(p.shape) < p, np.maximum(p, 1 - p)
