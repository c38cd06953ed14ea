"""Self-consistency: the answer that most chains of thought arrive at."""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple


class Vote(NamedTuple):
    majority: Hashable | None  # None where no answer could be read
    confidence: float  # its share of all samples
    selected: list[int]  # the samples that say so


def vote(answers: Sequence[Hashable | None]) -> Vote:
    """The most frequent answer, of equals the one said first. Wang et al. 2022.

    Samples whose answer could not be read are None: they have no vote, but count among the samples. Huang et al. 2022 (LMSI) train
    on the `selected` paths, and trust an answer by its confidence.
    """
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return Vote(None, 0.0, [])
    majority, votes = counts.most_common(1)[0]  # of equals, the first one counted
    return Vote(majority, votes / len(answers), [i for i, answer in enumerate(answers) if answer == majority])
