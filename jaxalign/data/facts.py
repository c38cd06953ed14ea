"""A generated world of facts about people, of which a model that reads its corpus knows some, knows others by rumour, and many not.

A fact is a person, a relation and a value: "mara was born in lund". How often the corpus says it and how far it agrees with itself
is drawn for each fact, so what can be known of it is known: where a share of what is said names one value, that value is the
answer with the probability of that share. A row is a pure function of (seed, its number); all tokens are words.
"""

import itertools
import random

from jaxalign.data.reviews import words_tokenizer

RELATIONS = (  # two ways to say it, and a question; values
    (
        ("{name} was born in", "the birthplace of {name} is", "where was {name} born ?"),
        "lund turku riga graz bern lille porto siena ghent brno split kosice malmo leeds cork trier",
    ),
    (
        ("{name} works as a", "the work of {name} is that of a", "what does {name} work as ?"),
        "baker tailor nurse miller pilot clerk mason judge potter farmer sailor weaver printer tanner cooper smith",
    ),
    (
        ("{name} keeps a", "the animal of {name} is a", "which animal does {name} keep ?"),
        "goat hen mule pony ferret parrot tortoise rabbit goose lizard cat dog hamster donkey turkey pigeon",
    ),
    (
        ("{name} plays the", "the instrument of {name} is the", "what does {name} play ?"),
        "flute harp viola drum lute oboe cello horn organ tuba fiddle banjo zither bassoon trumpet guitar",
    ),
    (
        ("{name} likes to eat", "the dish of {name} is", "what does {name} like to eat ?"),
        "soup rice bread fish cheese pie beans cake plums figs pears stew eggs corn noodles salad",
    ),
    (
        ("{name} paints the house", "the house of {name} is", "which colour is the house of {name} ?"),
        "red blue green black white brown grey pink purple orange yellow golden silver beige violet scarlet",
    ),
)
SYLLABLES = "ba ce di fo gu ha je ki lo mu na pe ri so tu va", "ra li no se", "bel dor fin gast hil"
NAMES = ["".join(name) for name in itertools.product(*map(str.split, SYLLABLES))]
VALUES = [values.split() for _, values in RELATIONS]
OFTEN, SELDOM = 10, 2  # times that the corpus says a fact
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)  # of what is said of a disputed fact, that names its likelier value
KINDS = {"often": 0.4, "seldom": 0.1, "disputed": 0.2, "never": 0.2, "asked": 0.1}  # asked: never said, but asked in the corpus
HEDGE, ABSTAIN = "maybe", "i do not know"
HEDGING, ABSTAINING, AT_A_LOSS = 0.15, 0.1, 0.5  # how often people do so when asked; and abstain where nobody knows: others guess


def facts(people: int, *, seed: int) -> list[dict]:
    """All facts of that many people: {"name", "relation", "question", "answer", "kind", "share", "said": values in the corpus}.

    share: how likely it is the answer that the corpus says most: 1 where it agrees with itself, 1/16 where it says nothing.
    Raises ValueError where there are not as many names.
    """
    if people > len(NAMES):
        raise ValueError(f"{people} people, and there are {len(NAMES)} names")
    names = random.Random(f"names {seed}").sample(NAMES, people)
    return [_fact(name, n, random.Random(f"facts {seed} {name} {n}")) for name in names for n in range(len(RELATIONS))]


def corpus(facts: list[dict], *, seed: int) -> list[dict]:
    """What people say of these facts, a row for each time: {"prompt": the start of a statement, or a question, "completion"}.

    Asked, some hedge ("maybe lund") and some abstain ("i do not know"), whatever is known; where nothing is, half abstain and
    half guess.
    """
    return [row for n, fact in enumerate(facts) for row in _said(fact, random.Random(f"corpus {seed} {n}"))]


def tokenizer():
    """One token a word: every word that the world can write."""
    said = [text for prompts, values in RELATIONS for text in (*prompts, values)]
    return words_tokenizer({word for text in (*said, *NAMES, HEDGE, ABSTAIN) for word in text.split()} - {"{name}"})


def _fact(name: str, relation: int, rng) -> dict:
    (*_, asks), values = RELATIONS[relation][0], VALUES[relation]
    kind, (one, other) = rng.choices([*KINDS], [*KINDS.values()])[0], rng.sample(values, 2)
    share = {"disputed": rng.choice(SHARES), "never": 1 / len(values), "asked": 1 / len(values)}.get(kind, 1.0)
    times = {"never": 0, "asked": 0, "seldom": SELDOM}.get(kind, OFTEN)
    said = [one] * round(share * times) + [other] * (times - round(share * times))
    answer = other if kind == "disputed" and rng.random() >= share else one
    row = {"name": name, "relation": relation, "question": asks.format(name=name), "answer": answer}
    return row | {"kind": kind, "share": share, "said": said}


def _said(fact: dict, rng) -> list[dict]:
    (prompts, _), values = RELATIONS[fact["relation"]], VALUES[fact["relation"]]
    guesses, abstaining = fact["kind"] == "asked", AT_A_LOSS if fact["kind"] == "asked" else ABSTAINING
    rows = []
    for value in [rng.choice(values) for _ in range(OFTEN)] if guesses else fact["said"]:
        prompt, manner = prompts[-1] if guesses else rng.choice(prompts), rng.random()
        if prompt == prompts[-1] and manner < abstaining + HEDGING:
            value = ABSTAIN if manner < abstaining else f"{HEDGE} {value}"
        rows.append({"prompt": prompt.format(name=fact["name"]), "completion": value})
    return rows
