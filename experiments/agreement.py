"""Whether a reward model's scores say what the rows say that it never saw."""

import jax.numpy as jnp
import numpy as np

from jaxalign import rewards
from jaxalign.ops import calibration


def ordered(ranks):
    """Which response is better than which, counted through all prompts. -> (better, worse), i64 [pairs] each

    Args: ranks: of the responses to each prompt; the least is the best, equals make no pair.
    """
    pairs, start = [], 0
    for rank in ranks:
        pairs += [(start + a, start + b) for a, best in enumerate(rank) for b, worst in enumerate(rank) if best < worst]
        start += len(rank)
    return np.array(pairs, np.int64).reshape(-1, 2).T


def right(difference):
    """1 where the better response scores higher, 1/2 where both score the same."""
    return 0.5 * (1 + np.sign(difference))


def of_scores(scores, better, worse, lengths) -> tuple[dict, dict]:
    """How the scores of responses agree with their order, and whether they go by length. -> (summary, figures)

    accuracy, with its standard error; ece, of the confidence sigmoid |difference|, in 10 bins; quarter_1_accuracy to
    quarter_4_accuracy, from the pairs with the least difference of scores to those with the largest; longer_accuracy and
    shorter_accuracy, where the better response is the longer one, or the shorter; length_correlation, of scores and lengths.
    Args: scores f32 [n] and lengths, tokens [n], of responses; better, worse: `ordered`.
    """
    summary, figures = {}, {}
    if len(better):
        difference = scores[better] - scores[worse]
        found, sure = right(difference), np.argsort(np.abs(difference), kind="stable")
        summary |= {"accuracy": found.mean(), "accuracy_stderr": found.std() / len(found) ** 0.5}
        confidence = 1 / (1 + np.exp(-np.abs(difference)))
        summary["ece"] = float(calibration.ece(jnp.asarray(confidence), jnp.asarray(found)))
        for quarter, part in enumerate(np.array_split(sure, 4) if len(sure) >= 4 else (), 1):
            summary[f"quarter_{quarter}_accuracy"] = found[part].mean()
        for name, these in (("longer", lengths[better] > lengths[worse]), ("shorter", lengths[better] < lengths[worse])):
            if these.any():
                summary[f"{name}_accuracy"] = found[these].mean()
        points = [(confidence[part].mean(), found[part].mean()) for part in np.array_split(sure, 10) if len(part)]
        diagonal = [(0.5, 0.5), (1.0, 1.0)]
        curves = {"accuracy, of tenths of the pairs": np.array(points).tolist(), "as it should be": diagonal}
        figures["Reliability: accuracy by confidence"] = {"x": "confidence", "curves": curves}
    if lengths.std() > 0:
        summary["length_correlation"] = np.corrcoef(scores, lengths)[0, 1]
    return {f"reward_model/{name}": x for name, x in summary.items()}, figures


def of_steps(logits, data, prompts) -> dict:
    """How the logits of steps agree with their labels, and which of several solutions to a prompt they pick. -> summary

    step_accuracy; step_auc, how often a right step has a higher logit than a wrong one; right, the share of solutions of which no
    step is known to be wrong; best_of_n_product, _worst, _last, the share of prompts where the one that scores highest by
    rewards.product_of_steps, worst_step or last_step is right, with standard error; best_of_n_any, where any is.
    Args: logits f32 [n,T]; data: Stepwise, n solutions; prompts: of each.
    """
    label, ends = data.label, data.solutions.weights
    right, wrong = (np.sort(logits[label > 0.5])), np.sort(logits[label < 0.5])
    summary = {"step_accuracy": ((right > 0).sum() + (wrong < 0).sum()) / (len(right) + len(wrong))}
    if len(right) and len(wrong):
        summary["step_auc"] = (np.searchsorted(wrong, right) + np.searchsorted(wrong, right, "right")).mean() / 2 / len(wrong)
    sound = ~(label < 0.5).any(1)
    groups = [np.flatnonzero(np.array(prompts) == prompt) for prompt in dict.fromkeys(prompts)]
    summary |= {"right": sound.mean(), "best_of_n_any": np.mean([sound[rows].any() for rows in groups])}
    for name, of_all in (*(("product", rewards.product_of_steps), ("worst", rewards.worst_step), ("last", rewards.last_step)),):
        scores = np.asarray(of_all(jnp.asarray(logits), jnp.asarray(ends)))
        picked = np.array([sound[rows[scores[rows].argmax()]] for rows in groups])
        summary |= {f"best_of_n_{name}": picked.mean(), f"best_of_n_{name}_stderr": picked.std() / len(picked) ** 0.5}
    return {f"reward_model/{name}": x for name, x in summary.items()}


def with_gold(rows, scores) -> dict:
    """What a simulated annotator's rows tell beside: the accuracy of a judge who knew the gold scores, and ours with them.

    Args: rows of the source; scores [2n], of the chosen and the rejected response in turn.
    """
    if not all({"ceiling", "gold_chosen", "gold_rejected"} <= row.keys() for row in rows):
        return {}
    gold = [row[side] for row in rows for side in ("gold_chosen", "gold_rejected")]
    ceiling = np.mean([row["ceiling"] for row in rows])
    return {"reward_model/accuracy_ceiling": ceiling, "reward_model/gold_correlation": np.corrcoef(gold, scores)[0, 1]}
