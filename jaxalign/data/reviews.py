"""A generated world of film reviews of mixed sentiment, for experiments that need no download.

A review is three to five sentences, each about one part of a film and each good, bad or neutral. Its writer is in one of three
moods, so what was said hints at what comes: a language model of the reviews must hear their sentiment. The lexicon is small
enough for a model of 200,000 parameters to learn in seconds.
"""

import random
import re

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# valence of each word that has one, in points
VALENCES = {
    **dict.fromkeys(["brilliant", "wonderful", "superb", "moving"], 1.0),
    **dict.fromkeys(["good", "funny", "clever", "charming", "fresh", "warm"], 0.6),
    **dict.fromkeys(["fine", "pleasant"], 0.3),
    **dict.fromkeys(["plain", "uneven"], -0.3),
    **dict.fromkeys(["bad", "slow", "silly", "noisy", "stale", "cold"], -0.6),
    **dict.fromkeys(["awful", "terrible", "dreadful", "boring"], -1.0),
    "loved": 0.8,
    "liked": 0.4,
    "admired": 0.6,
    "hated": -0.8,
    "disliked": -0.4,
    "regretted": -0.6,
}
GOOD = [word for word, valence in VALENCES.items() if valence > 0 and not word.endswith("ed")]
BAD = [word for word, valence in VALENCES.items() if valence < 0 and not word.endswith("ed")]
GOOD_VERBS, BAD_VERBS = ["loved", "liked", "admired"], ["hated", "disliked", "regretted"]
PARTS = [
    "film",
    "plot",
    "cast",
    "script",
    "music",
    "ending",
    "story",
    "pace",
    "hero",
    "villain",
    "dialogue",
    "camera",
    "opening",
    "set",
]
PEOPLE = ["i", "we", "my friend", "the critics", "the children"]
NEUTRAL = [
    "{people} saw it on {day} .",
    "it runs for {number} hours .",
    "the {part} is by a new team .",
    "the {part} follows {number} people .",
]
DAYS, NUMBERS = ["monday", "friday", "sunday"], ["one", "two", "three"]
OPENINGS = ["", "{people} saw it on {day} . ", "it runs for {number} hours . ", "the {part} follows {number} people . "]
SUBJECTS = ["the {part} was", "{people} thought the {part} was", "the {part} and the {part} were"]
WORDS = {"part": PARTS, "people": PEOPLE, "day": DAYS, "number": NUMBERS}


MOODS = [0.15, 0.5, 0.85]  # how likely an opinion is to be good


def _sentence(rng: random.Random, mood: float) -> str:
    fill = {"part": rng.choice(PARTS), "people": rng.choice(PEOPLE), "day": rng.choice(DAYS), "number": rng.choice(NUMBERS)}
    kind = rng.random()
    if kind < 0.25:
        return rng.choice(NEUTRAL).format(**fill)
    words, verbs = (GOOD, GOOD_VERBS) if rng.random() < mood else (BAD, BAD_VERBS)
    if kind < 0.4:
        return f"{fill['people']} {rng.choice(verbs)} the {fill['part']} ."
    modifier = rng.choice(["", "", "", "very ", "really ", "slightly ", "not "])
    if kind < 0.8:
        start = rng.choice(["the {part} was ", "{people} thought the {part} was "]).format(**fill)
        return f"{start}{modifier}{rng.choice(words)} ."
    both = f"the {fill['part']} and the {rng.choice(PARTS)} were {modifier}{rng.choice(words)}"
    return f"{both} and {rng.choice(words)} ." if rng.random() < 0.5 else f"{both} ."


def reviews(count: int, *, seed: int) -> list[str]:
    """That many reviews."""
    rng = random.Random(f"reviews {seed}")

    def one():
        mood = rng.choice(MOODS)
        return " ".join(_sentence(rng, mood) for _ in range(rng.randint(3, 5)))

    return [one() for _ in range(count)]


def openings(count: int, *, seed: int) -> list[str]:
    """That many openings of reviews, to be continued: prompts that lean neither way."""
    rng = random.Random(f"openings {seed}")

    def one():
        return re.sub(r"{(\w+)}", lambda slot: rng.choice(WORDS[slot[1]]), rng.choice(OPENINGS) + rng.choice(SUBJECTS))

    return [one() for _ in range(count)]


def cut(text: str) -> dict:
    """A review in two, for models that read the one and write the other: {"opening": up to the first verb, "rest"}.

    Where its sentences have no "was" or "were", the opening is the first of them; an opening alone is all opening.
    """
    opening, rest = re.fullmatch(r"(.*?\b(?:was|were)\b|.*? \.|.*)(.*)", text).groups()
    return {"opening": opening, "rest": rest}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: every word that the world can write."""
    return words_tokenizer(
        {word for text in reviews(4000, seed=0) + openings(400, seed=0) for word in text.split()} | set(VALENCES)
    )


def words_tokenizer(words: set[str]) -> PreTrainedTokenizerFast:
    """One token for each of these words; texts are split at spaces."""
    vocab = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *sorted(words)])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **special)
