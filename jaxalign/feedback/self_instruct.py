"""What becomes of instructions that a model wrote: the heuristics and the test of novelty of Self-Instruct (Wang et al. 2022, 3.1).

As in the authors' bootstrap_instructions.py. Nothing is random, and the order is that of the text.
"""

import re
import string

from jaxalign.evaluation.rouge import rouge_l

NOT_TEXT = ("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot", "go to")


def instructions(text: str, *, finished: bool = True) -> list[str]:
    """The instructions in a continuation of a numbered list, but for those that a language model is not for.

    Left out: those of up to 3 or over 150 words; that speak of what is no text (NOT_TEXT); that begin with "Write a program", with
    punctuation or with a letter that is not ASCII. Args: finished: whether the text ended by itself; one that was cut gives none.
    """
    if not finished:
        return []
    found = (re.sub(r"\s+", " ", part).strip().capitalize() for part in re.split(r"\n\d+\s?\. ", text))
    return [each for each in found if _fit(each)]


def _fit(instruction: str) -> bool:
    if not 3 < len(instruction.split()) <= 150 or instruction.startswith("Write a program"):
        return False
    if instruction[0] in string.punctuation or not instruction[0].isascii():
        return False
    return not any(re.search(rf"\b{word}\b", instruction, re.IGNORECASE) for word in NOT_TEXT)


def novel(candidates, pool, *, most: float = 0.7) -> list[tuple[str, float, bool]]:
    """(instruction, its largest ROUGE-L with what is there, whether it is kept) of each; those that are kept join the pool.

    Kept at exactly `most`, as in the code; the paper says less. An empty pool keeps the first. Raises as `rouge_l`.
    """
    pool, told = list(pool), []
    for candidate in candidates:
        likeness = rouge_l(candidate, pool, stem=False) if pool else 0.0
        told.append((candidate, likeness, likeness <= most))
        pool += [candidate] * (likeness <= most)
    return told
