"""How right a written answer is: functions of texts, as the benchmarks that they come from have them."""

import re
import string
from collections import Counter
from functools import cache

import numpy as np

from jaxalign.evaluation.statistics import Estimate

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
REFUSALS = re.compile(
    r"\b(i (can'?t|cannot|can not|won'?t|will not|am unable|'?m unable|am not able|'?m not able|must decline|refuse)\b"
    r"|i'?m (sorry|afraid)\b|i am (sorry|afraid)\b|i apologi[sz]e\b|as an ai\b|(it|that) is (not appropriate|illegal|unethical)\b"
    r"|(not|un)able to (help|assist)\b|can(no|'?)t (help|assist)\b)",
    re.IGNORECASE,
)


def normalised(text: str) -> str:
    """In small letters, without punctuation and articles, single spaces: SQuAD's evaluate-v2.0.py (Rajpurkar et al. 2018)."""
    return " ".join(ARTICLES.sub(" ", _plain(text)).split())


def _plain(text: str) -> str:
    """In small letters, without punctuation, single spaces."""
    return " ".join(text.lower().translate(PUNCTUATION).split())


def exact_match(prediction: str, references) -> float:
    """Whether it is any reference, both `normalised`. No reference: it should be empty."""
    return float(normalised(prediction) in _gold(references))


def same_words(prediction: str, references) -> float:
    """Whether it is any reference, in small letters, without punctuation: articles count. Super-NaturalInstructions."""
    return float(_plain(prediction) in map(_plain, references))


def token_f1(prediction: str, references) -> float:
    """The largest F1 of the words in common with any reference, both `normalised`; of an empty one, whether both are."""

    def one(reference: str) -> float:
        said, gold = normalised(prediction).split(), reference.split()
        same = sum((Counter(said) & Counter(gold)).values())
        return 2 * same / (len(said) + len(gold)) if said and gold else float(said == gold)

    return max(map(one, _gold(references)))


def _gold(references) -> list[str]:
    """References, normalised; those of which nothing is left are none, as in evaluate-v2.0.py. No reference: an empty one."""
    return [gold for gold in map(normalised, references) if gold] or [""]


def best_threshold(scores, no_answer, impossible) -> tuple[float, float]:
    """Where to abstain for the highest mean score, as SQuAD's evaluation finds it. -> (that mean, threshold of `no_answer`)

    Abstained is where no_answer > threshold; that scores 1 where there is no answer, and 0 elsewhere. Chosen on the very examples.
    Args: scores [N] of what was written; no_answer [N]: how sure the model is that there is none; impossible, bool [N].
    """
    scores, no_answer, impossible = np.asarray(scores, float), np.asarray(no_answer, float), np.asarray(impossible, bool)
    order = np.argsort(no_answer, kind="stable")
    means = (np.append(0, np.cumsum((scores - impossible)[order])) + impossible.sum()) / len(scores)  # the first k are answered
    ends = np.append(no_answer[order][1:] > no_answer[order][:-1], True)  # equal ones go together
    k = np.flatnonzero(np.append(True, ends))
    best = int(k[means[k].argmax()])
    return float(means[best]), float(no_answer[order][best - 1]) if best else -np.inf


def coverage(text: str, words) -> float:
    """The share of these words that a text has, by their Porter stems. Differs from CommonGen (Lin et al. 2020): lemmas."""
    said = {_stem(word) for word in re.findall(r"\w+", text.lower())}
    return sum(_stem(word.lower()) in said for word in words) / len(words)


def refused(text: str) -> bool:
    """Whether an answer has a phrase, in its first 200 characters, by which models decline. A heuristic: it reads no meaning."""
    return REFUSALS.search(text[:200].replace("’", "'")) is not None


def translation(predictions: list[str], references: list[list[str]], *, draws: int = 1000) -> dict[str, Estimate]:
    """BLEU (Post 2018) and chrF (Popović 2015) of a corpus, 0 to 100, by sacrebleu; errors by its bootstrap.

    Args: references: one or more of each. ImportError without the package.
    """
    most = max(map(len, references))
    streams = [[known[n] if n < len(known) else None for known in references] for n in range(most)]
    return {name: _drawn(metric, predictions, streams, draws) for name, metric in _sacrebleu().items()}


def _drawn(metric, predictions, streams, draws: int) -> Estimate:
    """As corpus_score(n_bootstrap=draws), whose mean fails where chrF of a draw is 0: a float among float32."""
    from sacrebleu.significance import _bootstrap_resample

    score = metric.corpus_score(predictions, streams)
    _, drawn = _bootstrap_resample(metric._extract_corpus_statistics(predictions, streams), metric, draws)
    for one in drawn:
        one.score = float(one.score)
    score.estimate_ci(drawn)
    return Estimate(score.score, score._ci / 1.96)


def sentence_chrf(prediction: str, references: list[str]) -> float:
    """chrF of one sentence, 0 to 100."""
    return _sacrebleu()["chrf"].sentence_score(prediction, references).score


@cache
def _sacrebleu() -> dict:
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise ImportError('BLEU and chrF want the package sacrebleu: pip install -e ".[eval]"') from error
    return {"bleu": BLEU(), "chrf": CHRF()}


@cache
def _stem(word: str) -> str:
    try:
        from nltk.stem.porter import PorterStemmer
    except ImportError as error:
        raise ImportError('stems want the package nltk: pip install -e ".[eval]"') from error
    return PorterStemmer().stem(word)
