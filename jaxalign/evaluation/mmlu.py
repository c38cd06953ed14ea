"""MMLU to the letter: the text of its prompt, and the answer in what a model says of the next token.

Hendrycks et al. 2021, and their evaluate.py, whose subjects begin with a space, so that the first line has two.
"""

from string import ascii_uppercase

import jax

from jaxalign.prompts.template import Template, render

LETTERS = "ABCD"
TEMPLATE = Template(
    instruction="The following are multiple choice questions (with answers) about  {topic}.",
    text="{question}\n{choices}\nAnswer:[Z]",
    slots={"choices": "{letter}. {entry}", "answer": {str(n): letter for n, letter in enumerate(ascii_uppercase)}},
)


def topic(subject: str) -> str:
    """As the prompt names a subject that is spelt as in names of files, "abstract_algebra"."""
    return subject.replace("_", " ")


def prompt(subject: str, shots, question: str, choices) -> str:
    """The header, demonstrations and the question.

    Args: subject: as of `topic`; shots: of (question, choices, letter), in the order of the dev file.
    """
    shown = [{"question": asked, "choices": of, "answer": ascii_uppercase.index(letter)} for asked, of, letter in shots]
    return render(TEMPLATE, {"topic": topic(subject), "question": question, "choices": choices}, shown).text


def answers(letter_logp):
    """The answers, letters, and how probable each of the four is among them, f32 [N,4].

    Args: letter_logp [N,4]: log-probabilities of " A" to " D" as the next token.
    """
    return [LETTERS[k] for k in letter_logp.argmax(-1).tolist()], jax.nn.softmax(letter_logp)
