"""Simulated annotators: people who see a gold score through noise.

`prefer` is the plainest. The functions below it are an annotator with faults, step by step: what he likes, his opinion on the day,
whether he looked at all, and what he is asked for: a comparison, by how much, or a rating. Draws are arguments, so that the same
people can be asked another way. All is in the unit of gold.
"""

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


def liking(gold, *, taste=0.0, disagreement: float = 0.0, length=0.0, bias: float = 0.0):
    """gold + disagreement * taste + bias * length: what somebody likes who has a taste of his own, or minds length. -> f64 [...]

    Args: taste: of this annotator, of std 1 as gold; length: tokens; bias: what a token more is worth to him.
    """
    return np.asarray(gold, float) + disagreement * np.asarray(taste) + bias * np.asarray(length)


def opinions(liking, draws, *, temperature: float):
    """liking + temperature * Gumbel noise of mean 0: of two, the higher is as `probability` has it (Luce 1959). -> f64 [...]

    Args: draws: uniform in [0, 1), one a response and annotator [...].
    """
    draws = np.clip(draws, 1e-12, 1 - 1e-12)
    return liking + temperature * (-np.log(-np.log(draws)) - np.euler_gamma)


def careless(opinions, draws, *, sloppiness: float):
    """Where nobody looked, an opinion of other responses: those of the row before. -> f64 [N,A,...]

    Args: sloppiness: the share of answers that are given without looking; draws: uniform in [0, 1), one an answer [N,A].
    """
    looked = np.asarray(draws) >= sloppiness
    return np.where(looked.reshape(looked.shape + (1,) * (opinions.ndim - looked.ndim)), opinions, np.roll(opinions, 1, axis=0))


def compare(opinions, *, within: float = 0.0):
    """Which of two is better, or neither. -> (the first won, they are tied), bool [...]

    A tie is a difference of at most `within`. Of `opinions` at a temperature that is Rao and Kupper's law of 1967, with theta =
    exp(within / temperature). Args: opinions [...,2].
    """
    ahead = opinions[..., 0] - opinions[..., 1]
    return ahead > within, np.abs(ahead) <= within


def how_much(opinions, *, cuts):
    """How many of the cuts the difference of two opinions is above: 0, hardly better, to len(cuts). -> i64 [...]"""
    return np.searchsorted(cuts, np.abs(opinions[..., 0] - opinions[..., 1]))


def zero_points(first, steps, *, spread: float):
    """Where the middle of an annotator's scale is while he rates: spread * (first + his walk of one step a label). -> f64 [N,A]

    Args: first: of each annotator, of std 1 [A]; steps: of std 0.1, so that a hundred labels move it by 1 [N,A].
    """
    return spread * (first + np.cumsum(steps, axis=0))


def rate(opinions, zero=0.0, *, levels: int):
    """An opinion on a scale from 1 to `levels`, whose middle is the opinion -zero, and a unit a level. -> f64 [...]"""
    return np.clip(np.round((levels + 1) / 2 + opinions + zero), 1, levels)
