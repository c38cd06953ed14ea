"""When to answer: how sure a model is, how sure it may be, and how right it is where it is surest. NumPy, on the host."""

import numpy as np

from jaxalign.evaluation import statistics


def confidence(value, informative):
    """Of draws [F,D]: the answer that most of them give, among those that give one, and its share of these. -> (i64 [F], f64 [F])

    Of equal ones the first; share 0 where none gives any.
    """
    best, share = [], []
    for row, given in zip(value, informative, strict=True):
        found, counts = np.unique(row[given], return_counts=True)
        best.append(int(found[counts.argmax()]) if len(found) else -1)
        share.append(counts.max() / counts.sum() if len(found) else 0.0)
    return np.array(best), np.array(share)


def calibrated(share, right):
    """-> (share) -> P(right), `statistics.logistic` of shares [N] and whether each was right [N]. Platt 1999."""
    (a, b), _ = statistics.logistic(share, right)
    return lambda share: 1 / (1 + np.exp(-(a + b * share)))


def accuracies(sure, right):
    """Accuracy of the share of questions that are answered first, the surest; equal ones go together. El-Yaniv and Wiener 2010.

    -> (coverage, accuracy), each [K], of the K different degrees `sure` of [N].
    """
    order = np.argsort(-sure, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(sure[order])), len(sure) - 1)
    return (ends + 1) / len(sure), np.cumsum(right[order])[ends] / (ends + 1)


def cut(sure, chosen) -> float:
    """The degree above which something is chosen: that with the fewest exceptions. Args: sure [N], from 0 to 1; chosen, bool [N].

    Of several as good their mean. 0 where all are chosen, 1 where none is.
    """
    levels = np.unique(sure)
    between = np.concatenate([[0], (levels[1:] + levels[:-1]) / 2, [1]])
    wrong = np.array([((sure > at) != chosen).sum() for at in between])
    return float(between[wrong == wrong.min()].mean())
