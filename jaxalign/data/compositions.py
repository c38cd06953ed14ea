"""A generated world of many small tasks, each said in words: which parts of a description to say, and in which order.

"say colour animal tree" is one of 120. Who has seen its parts in other tasks can follow it, though it was never shown: a task is
understood by its definition, or not at all. A row is a pure function of (seed, its number).
"""

import random
from itertools import permutations

from jaxalign.data.reviews import words_tokenizer

PARTS = {
    "animal": ["goat", "owl", "hen", "fox", "mule", "crab", "wolf", "toad"],
    "colour": ["red", "blue", "green", "white", "black", "brown", "pink", "grey"],
    "number": ["two", "three", "four", "five", "six", "seven", "eight", "nine"],
    "tree": ["oak", "elm", "ash", "pine", "palm", "fir", "yew", "beech"],
    "place": ["barn", "lake", "hill", "mill", "road", "wood", "town", "field"],
    "mood": ["calm", "glad", "sad", "wild", "shy", "proud", "bold", "tired"],
}
TASKS = [*permutations(PARTS, 3)]
DEFINITION = "say {} {} {}"
OTHERS = [":", ";", "=", "of"]  # of templates


def compositions(count: int, *, seed: int) -> list[dict]:
    """That many rows, as jaxalign.data.instructions has them; row n is of task n modulo 120, whose name is its category, too."""
    return [_row(n, seed) for n in range(count)]


def _row(n: int, seed: int) -> dict:
    task, rng = TASKS[n % len(TASKS)], random.Random(f"compositions {seed} {n}")
    right, other = _instance(task, rng), _instance(task, rng)
    wrong = _instance(rng.choice([x for x in TASKS if x != task]), rng)
    about = {"id": n, "task": " ".join(task), "category": " ".join(task), "definition": DEFINITION.format(*task)}
    return about | {"positive": [other], "negative": [wrong], "input": right["input"], "targets": [right["output"]]}


def _instance(task, rng) -> dict:
    """A description, whose parts come in any order, and what the task says of it."""
    described = {part: rng.choice(words) for part, words in PARTS.items()}
    told = rng.sample([*described.values()], len(described))
    return {"input": " ".join(told), "output": " ".join(described[part] for part in task)}


def tokenizer():
    """One token a word: every word that the world can write."""
    return words_tokenizer({*DEFINITION.replace("{}", "").split(), *PARTS, *sum(PARTS.values(), []), *OTHERS})
