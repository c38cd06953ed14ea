"""Demonstrations (Brown et al. 2020): which rows of a pool stand in front of a question, in which order, and how many have room.

A ranking is a function (number of the question, indices of the pool that may be shown) -> these indices, the best first. It depends
on nothing else, so it does not matter in which order, or beside which others, questions are asked.
"""

from collections import Counter

import numpy as np

from jaxalign.prompts import retrieval
from jaxalign.prompts.template import Prompt, Template, each, question, render, target


def few_shot(
    template: Template, rows: list[dict], pool: list[dict], ranking, *, k: int, best_last: bool = False, fits=None
) -> list[Prompt]:
    """Each row's prompt, behind the k best of the pool; never behind itself, which is what has the same text.

    Args:
        best_last: show the best next to the question; else first.
        fits: (Prompt) -> bool, such as `within`. While it says no, the worst demonstration is dropped (`Prompt.dropped`).
    Raises ValueError, naming the row, where the ranking has fewer than k (k - 1 others, where the row is one of them, will do),
    where a row does not fit without demonstrations, and for a missing column.
    """

    def shown(row):
        return question(template, row)[0], target(template, row)

    known = np.array([asked for asked, _ in each(shown, pool, "row of the pool")], object)

    def one(asked):
        number, row = asked
        others = np.flatnonzero(known != question(template, row)[0])
        best = [pool[i] for i in ranking(number, others)[:k]]
        if len(best) < k and len(ranking(number, np.arange(len(pool)))) < k:
            raise ValueError(f"{len(best)} others to show, where k = {k}")
        for count in range(len(best), -1, -1):
            shots = best[:count]
            prompt = render(template, row, shots[::-1] if best_last else shots)._replace(dropped=k - count)
            if fits is None or fits(prompt):
                return prompt
        raise ValueError("too long even without demonstrations: allow more tokens, or leave it out")

    return each(one, enumerate(rows))


def within(count, *, length: int, answer: int):
    """(Prompt) -> whether it leaves room for an answer, both in tokens. Args: count: (Prompt) -> how many tokens it has."""
    return lambda prompt: count(prompt) + answer <= length


# --------------------------------------------------------- rankings


def by_name(name: str, template: Template, rows: list[dict], pool: list[dict], *, seed: int, anew: bool = True):
    """The ranking of a config: in_order, random, balanced (by answer) or nearest (by BM25).

    Args: anew: random ones are drawn for each question; else once, for all.
    """
    if name == "nearest":
        asked, known = ([" ".join(question(template, row)) for row in some] for some in (rows, pool))
        return nearest(retrieval.bm25(known)(asked))
    drawn = at_random(seed) if name in ("random", "balanced") else in_order
    ranking = drawn if anew else lambda number, others: drawn(0, others)
    return balanced([target(template, row) for row in pool], ranking) if name == "balanced" else ranking


def in_order(number, others):
    """The first ones of the pool."""
    return others


def at_random(seed: int):
    """Drawn anew for each question, keyed by (seed, its number)."""
    return lambda number, others: np.random.default_rng(np.random.SeedSequence((seed, number))).permutation(others)


def balanced(labels: list, ranking):
    """As `ranking` has it, but one of each label, then the next of each. Args: labels: of the pool."""

    def ranked(number, others):
        order, seen = ranking(number, others), Counter()
        turn = []
        for i in order:
            turn.append(seen[labels[i]])
            seen[labels[i]] += 1
        return order[np.argsort(turn, kind="stable")]

    return ranked


def nearest(scores):
    """The highest scores first, of equals the first of the pool. Args: scores [questions, pool], as of `retrieval`."""
    return lambda number, others: others[np.argsort(-scores[number][others], kind="stable")]


def alike(of_rows: list, of_pool: list, ranking):
    """As `ranking` has it, among those that are alike in something, such as the subject of MMLU.

    Args: of_rows, of_pool: that, of each question and of each row of the pool.
    """
    same = np.array(of_pool, object)
    return lambda number, others: ranking(number, others[same[others] == of_rows[number]])
