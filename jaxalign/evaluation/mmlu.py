"""MMLU to the letter: the text of its prompt, and the answer in what a model says of the next token.

Hendrycks et al. 2021, and their evaluate.py, whose subjects begin with a space, so that the first line has two.
"""

import jax

LETTERS = "ABCD"


def example(question: str, choices, answer: str = "") -> str:
    """A question and its choices, to "Answer:" or, with the letter of the right one, to the end of a demonstration."""
    lines = [question, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)), "Answer:"]
    return "\n".join(lines) + (f" {answer}\n\n" if answer else "")


def prompt(subject: str, shots, question: str, choices) -> str:
    """The header, demonstrations and the question.

    Args: subject: as in names of files, "abstract_algebra"; shots: of (question, choices, letter), in the order of the dev file.
    """
    name = subject.replace("_", " ")
    header = f"The following are multiple choice questions (with answers) about  {name}.\n\n"
    return header + "".join(example(*shot) for shot in shots) + example(question, choices)


def answers(letter_logp):
    """The answers, letters, and how probable each of the four is among them, f32 [N,4].

    Args: letter_logp [N,4]: log-probabilities of " A" to " D" as the next token.
    """
    return [LETTERS[k] for k in letter_logp.argmax(-1).tolist()], jax.nn.softmax(letter_logp)
