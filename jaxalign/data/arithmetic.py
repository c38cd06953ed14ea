"""Generated worlds of numbers, small enough to be learned in seconds: a game of guessing, and counting in steps.

A row is a pure function of (seed, its number). All tokens are words; the tokenizer has one for each.
"""

import random

from jaxalign.data.reviews import words_tokenizer

NUMBERS, TURNS = 7, 3  # of the game: 0 .. 6; three guesses can always do it
STEPS, MODULUS, SOLUTIONS, MISTAKE = 5, 20, 8, 0.2  # of counting; solutions to a prompt; how likely a step is wrong
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


def tokenizer():
    """One token a word: every word that these worlds can write."""
    return words_tokenizer(WORDS)
