"""ROUGE-L, by the package rouge-score (pip install -e ".[eval]"). Lin 2004."""

from functools import cache


@cache
def _scorer(stem: bool):
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise ImportError('ROUGE wants the package rouge-score: pip install -e ".[eval]"') from error
    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=stem)


def rouge_l(prediction: str, references, *, stem: bool) -> float:
    """The largest F1 of the longest common subsequence with any reference, from 0 to 1.

    Self-Instruct (Wang et al. 2022) has no stemmer; Super-NaturalInstructions (Wang et al. 2022) has one, and reports the mean
    over instances x 100. Raises ValueError without a reference, ImportError without the package.
    """
    if not references:
        raise ValueError("ROUGE-L wants one reference or more")
    return max(_scorer(stem).score(reference, prediction)["rougeL"].fmeasure for reference in references)
