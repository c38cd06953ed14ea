"""When to answer, when to hedge and when to say that one does not know: a reward table, and the thresholds that follow from it."""

from typing import NamedTuple

import jax.numpy as jnp


class Table(NamedTuple):
    """Rewards of five outcomes. The defaults are Schulman's ('Reinforcement learning from human feedback', talk, 2023).

    With the defaults all three choices meet at p = 0.8, so that to hedge is never strictly best.
    """

    unhedged_correct: float = 1.0
    hedged_correct: float = 0.5
    uninformative: float = 0.0
    hedged_wrong: float = -2.0
    unhedged_wrong: float = -4.0


def reward(correct, hedged, informative, table: Table):
    """The table's entry for each answer. Args: three bool [B]; of an uninformative answer the other two are not read. -> f32 [B]"""
    plain = jnp.where(correct, table.unhedged_correct, table.unhedged_wrong)
    said = jnp.where(hedged, jnp.where(correct, table.hedged_correct, table.hedged_wrong), plain)
    return jnp.where(informative, said, table.uninformative)


def expected(p, table: Table):
    """p r_correct + (1 - p) r_wrong, p = P(the answer is right). -> expected rewards (to answer, to hedge, to abstain), as p"""
    answer = p * table.unhedged_correct + (1 - p) * table.unhedged_wrong
    hedge = p * table.hedged_correct + (1 - p) * table.hedged_wrong
    return answer, hedge, jnp.full_like(p, table.uninformative)


def thresholds(table: Table):
    """(p above which to answer is best, p above which to hedge beats to abstain). Hedging is best from the second to the first.

    Raises ValueError unless the table's rewards fall from the first to the last.
    """
    if not all(a > b for a, b in zip(table, table[1:])):
        raise ValueError(f"rewards must fall from unhedged_correct to unhedged_wrong: {table}")
    slope, hedged_slope = table.unhedged_correct - table.unhedged_wrong, table.hedged_correct - table.hedged_wrong
    beats_silence = (table.uninformative - table.unhedged_wrong) / slope
    beats_hedging = (table.hedged_wrong - table.unhedged_wrong) / (slope - hedged_slope)
    return max(beats_silence, beats_hedging), (table.uninformative - table.hedged_wrong) / hedged_slope
