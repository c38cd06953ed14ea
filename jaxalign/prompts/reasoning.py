"""Chains of thought: what to ask next, and what several of them say. Nothing here asks; a driver does, and tells what was said.

Demonstrations that reason (Wei et al. 2022) are a template's `rationale`.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxalign.ops.vote import Vote, vote
from jaxalign.prompts.template import Prompt

THINK = "Let's think step by step."
THEREFORE = {  # by what the answer is, for zero-shot chains of thought
    "number": "Therefore, the answer (arabic numerals) is",
    "yes or no": "Therefore, the answer (Yes or No) is",
    "choice": "Therefore, among the choices given, the answer is",
    "text": "Therefore, the answer is",
}


def think(prompt: Prompt, trigger: str = THINK) -> Prompt:
    """The first stage of a zero-shot chain of thought, which asks for the reasoning. Kojima et al. 2022."""
    *before, last = prompt.messages
    asked = last | {"content": f"{last['content']}\n{trigger}"}
    return prompt._replace(text=f"{prompt.text} {trigger}", messages=[*before, asked])


def conclude(thinking: Prompt, reasoning: str, trigger: str) -> Prompt:
    """The second stage, which asks for the answer: the first one's prompt, what was said to it, and `trigger`, as of THEREFORE."""
    turns = [{"role": "assistant", "content": reasoning.strip()}, {"role": "user", "content": trigger}]
    return thinking._replace(text=f"{thinking.text}{reasoning}\n{trigger}", messages=thinking.messages + turns)


def zero_shot(prompts: Sequence[Prompt], write: Callable, therefore: str) -> list[tuple]:
    """Both stages. -> (what was written as the answer, what as the reasoning) of each.

    Args: write: (prompts, stage 0 or 1) -> what a model writes to each, as evaluation.engine.Written.
    """
    thinking = [think(prompt) for prompt in prompts]
    thoughts = write(thinking, 0)
    asked = [conclude(prompt, thought.text, therefore) for prompt, thought in zip(thinking, thoughts, strict=True)]
    return list(zip(write(asked, 1), thoughts, strict=True))


def self_consistent(samples: Sequence[str], extract: Callable) -> Vote:
    """The answer that most sampled chains of thought arrive at. Wang et al. 2022. Args: extract: as those of `extract`."""
    return vote([extract(sample) for sample in samples])


# --------------------------------------------------------- least to most, Zhou et al. 2022

DECOMPOSE = "{question}\n\nWhich smaller questions must be answered first, from the easiest on? One a line:\n"
FINALLY = "So what is the answer to the whole question?"


class LeastToMost(NamedTuple):
    """A question that is broken down, and the parts answered one after the other, each in sight of the answers before it.

    state = LeastToMost(question)
    while (prompt := ask(state)) is not None:
        state = tell(state, generate(prompt))
    state.answers[-1]
    """

    question: str
    parts: tuple[str, ...] | None = None  # None: not broken down yet
    answers: tuple[str, ...] = ()


def ask(state: LeastToMost, *, decompose: str = DECOMPOSE) -> str | None:
    """The next prompt; None where all is answered. Args: decompose: asks for the parts, of {question}; it may show how."""
    if state.parts is None:
        return decompose.replace("{question}", state.question)
    if len(state.answers) == len(state.parts):
        return None
    answered = [f"Q: {part}\nA: {answer}" for part, answer in zip(state.parts, state.answers, strict=False)]
    return "\n\n".join([state.question, *answered, f"Q: {state.parts[len(state.answers)]}\nA:"])


def tell(state: LeastToMost, said: str, *, most: int = 8) -> LeastToMost:
    """The state once a model has said this to `ask(state)`.

    Parts are lines that end in a question mark, their bullets and numbers left out, at most so many, and FINALLY behind them.
    """
    if state.parts is not None:
        return state._replace(answers=(*state.answers, said.strip()))
    lines = (re.sub(r"^\s*(\d+[.)]|[-*])\s*", "", line).strip() for line in said.splitlines())
    return state._replace(parts=(*[line for line in lines if line.endswith("?")][:most], FINALLY))
