"""A generated world of questions about films whose right answers are known, in the words of `reviews`: one for each task of
`transformations`. A review is a few opinions, each good or bad, of parts of a film.
"""

import random

from jaxalign.data.reviews import BAD, BAD_VERBS, DAYS, GOOD, GOOD_VERBS, PARTS, PEOPLE, VALENCES, reviews
from jaxalign.rewards import sentiment as valence_of

GOODWILL = 0.75  # how likely a review is good: evenly, pairs that agree or not would take longer to learn


def sentiment(count: int, *, seed: int) -> list[dict]:
    """Reviews of `reviews`, and whether the sum of their valences is above 0: {"text", "label": 0 or 1}; none has a sum of 0."""
    texts = reviews(2 * count + 8, seed=-1 - seed)  # a seed of no run: no language model was trained on these
    rows = [{"text": text, "label": int(valence > 0)} for text in texts if abs(valence := valence_of(text, VALENCES)) > 1e-6]
    return rows[:count]


def entailment(count: int, *, seed: int) -> list[dict]:
    """{"premise": a review, all good or all bad, "hypothesis", "label"}: 2, entailment, that somebody liked the film as much; 0,
    contradiction, that they did not; 1, neither, when they saw it."""

    def one(rng):
        good, label, people = rng.random() < GOODWILL, rng.randrange(3), rng.choice(PEOPLE)
        verb = rng.choice(GOOD_VERBS if good == (label == 2) else BAD_VERBS)
        hypothesis = f"{people} saw it on {rng.choice(DAYS)} ." if label == 1 else f"{people} {verb} the film ."
        return {"premise": _review(rng, [good] * 2), "hypothesis": hypothesis, "label": label}

    return _rows("entailment", one, count, seed)


def similarity(count: int, *, seed: int) -> list[dict]:
    """{"first", "second": two reviews, each all good or all bad, "label": 1 where both are one of these, else 0}"""

    def one(rng):
        first, second = (rng.random() < GOODWILL for _ in range(2))
        return {"first": _review(rng, [first] * 2), "second": _review(rng, [second] * 2), "label": int(first == second)}

    return _rows("similarity", one, count, seed)


def choice(count: int, *, seed: int) -> list[dict]:
    """{"context": a review, all good or all bad, "answers": four opinions, one of which goes on like that, "label": its number}"""

    def one(rng):
        good, label = rng.random() < GOODWILL, rng.randrange(4)
        answers = [_review(rng, [good == (k == label)]) for k in range(4)]
        return {"context": _review(rng, [good] * 2), "answers": answers, "label": label}

    return _rows("choice", one, count, seed)


def _rows(kind, one, count, seed):
    return [one(random.Random(f"{kind} {seed} {n}")) for n in range(count)]


def _review(rng, goods) -> str:
    """An opinion for each of `goods`, of different parts, but not of the film as a whole."""
    said = []
    for part, good in zip(rng.sample(PARTS[1:], len(goods)), goods, strict=True):
        people, words, verbs = rng.choice(PEOPLE), *((GOOD, GOOD_VERBS) if good else (BAD, BAD_VERBS))
        word, verb = rng.choice(words), rng.choice(verbs)
        forms = [f"the {part} was {word} .", f"{people} thought the {part} was {word} .", f"{people} {verb} the {part} ."]
        said.append(rng.choice(forms))
    return " ".join(said)
