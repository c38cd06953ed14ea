"""A model's own samples, turned into what it is trained on next. Data to data: nothing here asks a model.

A method is a value (METHODS). A round of it draws samples of each prompt, keeps those that it selects, and trains on them:

    drawn = [Drawn(prompt, texts, answers, scores), ...]
    rows = kept(drawn, method.select)                             and, where it rationalises, rationalised(drawn, hinted)

    Rejection sampling, RFT   all that are right (Touvron et al. 2023 3.2.2; Yuan et al. 2023)
    Best-of-n distillation    the best of n, right or not, which is forward KL to the best-of-n policy (Sessa et al. 2024)
    RAFT                      the same in rounds, each from the model of the last (Dong et al. 2023)
    Expert iteration          all that are right, in rounds, each from the base (Anthony et al. 2017; Polu et al. 2022; as ReST-EM,
                              Singh et al. 2023)
    STaR                      one sample, in rounds from the base; what failed is tried again in sight of the answer, and learnt
                              without it (Zelikman et al. 2022)
    LMSI                      all that say what most say; no answer is known (Huang et al. 2022)

Differs from the papers in that a round is of all prompts, in that the number of updates does not grow (STaR: by a fifth a round),
and in that a text that is drawn twice is learnt twice (RFT: once): texts that come to a right answer by a wrong way are rarer.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from jaxalign.data import text
from jaxalign.ops.vote import vote


class Drawn(NamedTuple):
    """What a model said to one prompt, N times."""

    prompt: str
    texts: Sequence[str]
    answers: Sequence[Hashable | None]  # read out of the texts; None where none can be read
    scores: Sequence[float]  # of the texts, by a verifier or a reward model; of verifiers 1 is right


class Method(NamedTuple):
    select: Callable  # (Drawn) -> numbers of the texts that are learnt
    repeats: bool = False  # it goes on in rounds
    goes_on: bool = False  # a round starts from the last one's model, not from the base
    one: bool = False  # it draws one sample a prompt
    rationalises: bool = False
    mixes: bool = False  # it learns the answer alone, too


def above(drawn: Drawn, *, least: float = 1.0) -> list[int]:
    """All texts that score at least so much: those that are right, of a verifier."""
    return [n for n, score in enumerate(drawn.scores) if score >= least]


def best(drawn: Drawn) -> list[int]:
    """The text that scores most, of equals the first: one of each prompt, however bad it is."""
    return [max(range(len(drawn.scores)), key=drawn.scores.__getitem__)]


def majority(drawn: Drawn, *, least: float = 0.0) -> list[int]:
    """All texts with the most frequent answer, whose share is at least so much (LMSI's confidence). It reads no score."""
    found = vote(drawn.answers)
    return found.selected if found.confidence >= least else []


METHODS = {
    "rejection": Method(above),
    "best of n": Method(best),
    "RAFT": Method(best, repeats=True, goes_on=True),
    "expert iteration": Method(above, repeats=True),
    "STaR": Method(above, repeats=True, one=True, rationalises=True),
    "LMSI": Method(majority, mixes=True),
}


def kept(drawn: Sequence[Drawn], select) -> list[dict]:
    """{"prompt", "completion", "answer"} of each text that is selected, as often as it was drawn."""
    return [{"prompt": x.prompt, "completion": x.texts[n], "answer": x.answers[n]} for x in drawn for n in select(x)]


def failed(drawn: Sequence[Drawn], select) -> list[int]:
    """Numbers of the prompts of which nothing is selected: to be asked again, with a hint."""
    return [n for n, each in enumerate(drawn) if not select(each)]


def rationalised(drawn: Sequence[Drawn], hinted: dict[int, Drawn], select) -> list[dict]:
    """`kept`, and what is selected of texts that were written in sight of a hint, behind the prompt without it.

    Args: hinted: of prompts by number, what was said to them with a hint.
    """
    again = [each._replace(prompt=drawn[n].prompt) for n, each in hinted.items()]
    return kept(drawn, select) + kept(again, select)


def in_formats(rows: Sequence[dict], formats: Sequence[tuple[str, str]]) -> list[dict]:
    """{"prompt", "completion"} of each row in every format: LMSI's mixed formats, such as a chain of thought and the answer alone.

    Args: formats: templates of prompt and completion, filled from the columns of a row.
    """
    return [
        {"prompt": text.fill(prompt, row), "completion": text.fill(completion, row)}
        for row in rows
        for prompt, completion in formats
    ]
