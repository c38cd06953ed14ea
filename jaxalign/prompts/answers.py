"""Answers by likelihood: pairs of texts to be scored by any engine, the best of them, and the label that it means.

Of log-probabilities, in nats, the last axis is over the answers to one question.
"""

import numpy as np

from jaxalign.prompts.template import Prompt

CONTENT_FREE = ("N/A", "", "[MASK]")


def candidates(prompt: Prompt, answers) -> list[tuple[str, str]]:
    """(what is given, what is to be scored) for each answer; of a cloze what follows the answer is scored with it."""
    return [(prompt.text, answer + prompt.after) for answer in answers]


def search(logp, *, lengths=1, unconditional=0):
    """argmax over answers z of (log P(z | x) - log P(z | domain)) / length; of equals the first.

    -> (best i64 [...], scores f64 [...,A]). As it stands, summed: the multiple choice of BIG-bench. ValueError where a score is
    not finite.
    Args:
        lengths: of each answer, which the sum is divided by: tokens; or characters, as `characters` counts: acc_norm of
            lm-evaluation-harness.
        unconditional: log P(z | a prompt that only says the domain), such as "Answer:". PMI_DC, Holtzman et al. 2021.
    """
    scores = (np.asarray(logp, float) - unconditional) / lengths
    if not np.isfinite(scores).all():
        raise ValueError(f"the score of answer {np.argwhere(~np.isfinite(scores))[0].tolist()} is not finite")
    return scores.argmax(-1), scores


def characters(answers) -> np.ndarray:
    """How long answers are, without the space before them; characters, not bytes."""
    return np.array([len(answer.removeprefix(" ")) for answer in answers])


def by_word(verbaliser: dict) -> tuple[list[str], np.ndarray]:
    """The words of {label: words}, and the number of each one's label. ValueError where a label has none or a word has two."""
    words = [word for of_label in verbaliser.values() for word in of_label]
    if len(set(words)) < len(words) or not all(verbaliser.values()):
        raise ValueError(f"each label has words of its own, and one or more: {verbaliser}")
    return words, np.repeat(np.arange(len(verbaliser)), [len(of_label) for of_label in verbaliser.values()])


def of_labels(logp, owner, *, combine: str = "mean"):
    """log P of labels from those of words, normalised over labels. logp [...,W] -> f64 [...,L]

    A label has the mean of its words' probabilities (Hu et al. 2022), their sum or their max; with a word each, all three
    are the verbaliser of PET (Schick & Schuetze 2021). Args: owner [W]: the label's number of each word.
    """
    logp, owner = np.asarray(logp, float), np.asarray(owner)
    parts = [logp[..., owner == label] for label in range(owner.max() + 1)]
    if combine == "max":
        return _normal(np.stack([part.max(-1) for part in parts], -1))
    if combine not in ("mean", "sum"):
        raise ValueError(f"combine = {combine!r}; there are 'mean', 'sum' and 'max'")
    sums = [np.logaddexp.reduce(part, -1) - np.log(part.shape[-1] if combine == "mean" else 1) for part in parts]
    return _normal(np.stack(sums, -1))


def content_free(row: dict, columns) -> list[dict]:
    """The row with nothing in these columns, said in three ways, to be asked as any row: what a prompt is biased to."""
    return [row | dict.fromkeys(columns, nothing) for nothing in CONTENT_FREE]


def calibrated(logp, logp_free):
    """log of p / p_cf, normalised: contextual calibration, Zhao et al. 2021, W = diag(p_cf)^-1, b = 0. logp [...,L] -> f64 [...,L]

    p_cf is the mean of what is said to content-free inputs, logp_free [C,L]. Differs from the paper, which takes the softmax of
    p / p_cf: the same order, and here numbers that are probabilities.
    """
    return _normal(np.asarray(logp, float) - np.logaddexp.reduce(np.asarray(logp_free, float), 0))


def _normal(logp):
    return logp - np.logaddexp.reduce(logp, -1, keepdims=True)
