"""Generated worlds of numbers, small enough to be learned in seconds: a game of guessing, counting in steps, and sums.

A row is a pure function of (seed, its number). All tokens are words; the tokenizer has one for each.
"""

import random
from itertools import accumulate

from jaxalign.data.reviews import words_tokenizer

NUMBERS, TURNS = 7, 3  # of the game: 0 .. 6; three guesses can always do it
STEPS, MODULUS, SOLUTIONS, MISTAKE = 5, 20, 8, 0.2  # of counting; solutions to a prompt; how likely a step is wrong
TERMS, LARGEST = 3, 4  # of a sum: numbers from 1 to 4 that are added to the first
SLIP, HABIT, TOLD = 0.15, 0.6, 3  # who writes sums: how likely a number is any, and a common mistake; one in 3 knows the answer
WORDS = {*map(str, range(MODULUS)), "guess", "higher", "lower", "what", "up", "down", ":", ";"}


def hint(secret: int, said: str) -> str:
    """What is told of a guess: "higher", "lower", "" where it is right, or "what" where it is no number."""
    if not said.strip().isdecimal():
        return "what"
    return "" if int(said) == secret else "higher" if int(said) < secret else "lower"


def secrets(count: int, *, seed: int) -> list[dict]:
    """That many states of the game: {"text": "guess", "secret", "game": the row's number}."""
    return [{"text": "guess", "secret": random.Random(f"secrets {seed} {n}").randrange(NUMBERS), "game": n} for n in range(count)]


def games(count: int, *, seed: int) -> list[dict]:
    """That many games, {"text"}, by players half of whom listen to the hints and half of whom guess on."""
    return [{"text": _game(random.Random(f"games {seed} {n}"))} for n in range(count)]


def solutions(count: int, *, seed: int) -> list[dict]:
    """That many ways to count STEPS on, up or down modulo MODULUS, SOLUTIONS of each prompt in a row, with mistakes.

    {"prompt", "answer", "steps": texts, "labels": 1 for each step up to the first mistake, then 0, "outcome": null for each
    step but the last, which has its label, "text": all of it}. A solution with a mistake has a wrong answer.
    """
    return [
        _solution(random.Random(f"prompts {seed} {n // SOLUTIONS}"), random.Random(f"solutions {seed} {n}")) for n in range(count)
    ]


def sums(count: int, *, seed: int) -> list[dict]:
    """That many sums modulo MODULUS, with their right solutions: what comes of each number that is added.

    {"prompt": "what 16 3 2 1 :", "hint": the same with its answer, "2 16 3 2 1 :", "solution": "19 1 2", "answer": 2,
    "kind": "carry" where it goes past the end, on from 0, else "plain"}
    """
    return [_sum(random.Random(f"sums {seed} {n}"), held_out=False) for n in range(count)]


def held_out_sums(count: int, *, seed: int) -> list[dict]:
    """Likewise, of the fifth of all sums that is in no other list."""
    return [_sum(random.Random(f"held-out sums {seed} {n}"), held_out=True) for n in range(count)]


def told_sums(count: int, *, seed: int) -> list[dict]:
    """{"prompt", "completion"}: that many of `sums`, as people solve them, with mistakes that they go on from.

    Past the end they are one short with probability HABIT, so most are wrong where there is a carry, and alike. Any number may be a
    SLIP, and about such sums most are right. One in TOLD was told the answer, has the "hint" for a prompt, and makes no mistake.
    """
    return [_told(row, n % TOLD == 0, random.Random(f"told {seed} {n}")) for n, row in enumerate(sums(count, seed=seed))]


def _game(rng) -> str:
    secret, low, high = rng.randrange(NUMBERS), 0, NUMBERS - 1
    listens, said = rng.random() < 0.5, ["guess"]
    for _ in range(TURNS):
        guess = rng.randint(low, high)
        told = hint(secret, str(guess))
        said += [str(guess), "</s>", told]
        if not told:
            break
        if listens:
            low, high = (guess + 1, high) if told == "higher" else (low, guess - 1)
    return " ".join(said[:-2])  # whoever makes a document of it puts its end


def _solution(problem, rng) -> dict:
    true = value = problem.randrange(MODULUS)
    by = problem.choice((1, -1))
    prompt = f"{value} {'up' if by > 0 else 'down'} :"
    steps, labels = [], []
    for _ in range(STEPS):
        true, value = (true + by) % MODULUS, (value + by) % MODULUS
        if rng.random() < MISTAKE:
            value = rng.choice([x for x in range(MODULUS) if x not in (true, value)])
        steps.append(f"{value} ;")
        labels.append(int(value == true))
    told = {"steps": steps, "labels": labels, "outcome": [None] * (STEPS - 1) + labels[-1:]}
    return {"prompt": prompt, "answer": true} | told | {"text": " ".join([prompt, *steps])}


def _sum(rng, held_out: bool) -> dict:
    while True:
        terms = [rng.randrange(MODULUS), *(rng.randint(1, LARGEST) for _ in range(TERMS))]
        prompt = " ".join(["what", *map(str, terms), ":"])
        if (random.Random(prompt).random() < 0.2) == held_out:
            break
    so_far = [total % MODULUS for total in accumulate(terms)][1:]
    told = {"prompt": prompt, "hint": prompt.replace("what", str(so_far[-1])), "solution": " ".join(map(str, so_far))}
    return told | {"answer": so_far[-1], "kind": "carry" if sum(terms) >= MODULUS else "plain"}


def _told(row: dict, knows: bool, rng) -> dict:
    if knows:
        return {"prompt": row["hint"], "completion": row["solution"]}
    total, *terms = map(int, row["prompt"].split()[1:-1])
    said = []
    for term in terms:
        short = total + term >= MODULUS and rng.random() < HABIT
        total = rng.randrange(MODULUS) if rng.random() < SLIP else (total + term - short) % MODULUS
        said.append(str(total))
    return {"prompt": row["prompt"], "completion": " ".join(said)}


def tokenizer():
    """One token a word: every word that these worlds can write."""
    return words_tokenizer(WORDS)
