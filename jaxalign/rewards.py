"""Scores of whole responses: their scale, the price of KL, and rewards that need no model."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.ops.advantages import last_of
from jaxalign.ops.masked import masked_sum


def normaliser(scores, *, mean: float = 0.0, std: float = 1.0):
    """The affine map that gives `scores` this mean and (population) standard deviation. -> (gain, bias)

    gain = std/std(scores), bias = mean - gain mean(scores). Ziegler et al. 2019 section 2.1. Raises ValueError where all are equal.
    """
    scores = jnp.asarray(scores)
    if not scores.max() > scores.min():  # in float32 the deviation of equal scores need not be 0
        raise ValueError(f"{scores.size} scores, all {float(scores.mean()):g}: they cannot be normalised")
    gain = std / scores.std()
    return gain, mean - gain * scores.mean()


def reference_bias(reference_scores):
    """The mean score of reference responses; r - bias scores them 0 on average (Huang et al. 2024, N+)."""
    return jnp.asarray(reference_scores).mean()


def fold(params, gain, bias):
    """A reward model whose scores are gain r + bias, exactly: the map goes into the scalar head."""
    head = params["scalar"]
    return {**params, "scalar": {"kernel": head["kernel"] * gain, "bias": head["bias"] * gain + bias}}


# Of an ensemble: scores [M,B] by M reward models, each of mean 0 and std 1 on the same responses, to [B]. NaN where one abstained.


def mean_score(scores):
    """1/M sum_m r_m. Coste et al. 2024 (Reward Model Ensembles), mean optimisation."""
    return scores.mean(0)


def worst_score(scores):
    """min_m r_m. Coste et al. 2024, worst-case optimisation."""
    return scores.min(0)


def uncertainty_weighted(scores, *, coefficient: float):
    """mean_m r_m - coefficient var_m r_m, the variance over all M. Coste et al. 2024. Args: coefficient, per unit of reward."""
    return scores.mean(0) - coefficient * scores.var(0)


# Of a solution in steps: logits of its steps being right [B,T] at their ends, where weights > 0, to [B].


def product_of_steps(logits, weights):
    """log prod_k sigmoid(r_k): that all steps are right. Lightman et al. 2023 section 2.6. -> nats"""
    return masked_sum(jax.nn.log_sigmoid(logits), weights > 0, 1)


def worst_step(logits, weights):
    """min_k r_k. Lightman et al. 2023 appendix."""
    return jnp.where(weights > 0, logits, jnp.inf).min(1)


def last_step(logits, weights):
    """r of the last step: where the outcome is judged (Uesato et al. 2022, ORM)."""
    return masked_sum(logits, last_of(weights), 1)


def update_beta(beta, kl, episodes, *, target: float, horizon: float, limit: float = 0.2):
    """beta (1 + clip(KL/target - 1, -limit, limit) episodes/horizon). Ziegler et al. 2019 section 2.2. horizon = inf keeps beta.

    Args: kl, nats a response (the sum over its tokens, mean over the batch); episodes, how many responses the batch had.
    """
    return beta * (1 + jnp.clip(kl / target - 1, -limit, limit) * episodes / horizon)


NEGATIONS = {"not", "never", "no", "hardly"}  # and whatever ends in n't
MODIFIERS = {"very": 1.5, "really": 1.5, "truly": 1.5, "slightly": 0.5, "somewhat": 0.5}
WORD = re.compile(r"[a-z']+|[.!?,;]")


def sentiment(text: str, valences: dict[str, float]) -> float:
    """A programmatic sentiment: the sum of the valences of the text's words.

    A modifier before a word scales it and a negation turns it round (times -0.75), up to the end of the clause; a word that was
    said before adds nothing, so repetition does not pay.
    """
    total, scale, said = 0.0, 1.0, set()
    for word in WORD.findall(text.lower()):
        if word in ".!?,;":
            scale = 1.0
        elif word in NEGATIONS or word.endswith("n't"):
            scale *= -0.75
        elif word in MODIFIERS:
            scale *= MODIFIERS[word]
        elif word in valences:
            total += 0.0 if word in said else scale * valences[word]
            said.add(word)
            scale = 1.0
    return total


def score_texts(reward, texts) -> np.ndarray:
    """reward(text) of every text, f32 [B]. NaN, which means that it abstained, where it raises, or gives None or no finite number.

    A warning shows the first text that it raised at; whoever learns from the scores counts them all (`rollout.describe`).
    """
    scores = []
    for text in texts:
        try:
            given = reward(text)
            value = np.nan if given is None else float(given)
        except Exception as error:  # a reward is anybody's code
            warnings.warn(f"the reward failed, {type(error).__name__}: {error}; the first text was {text!r:.200}", stacklevel=2)
            value = np.nan
        scores.append(value if np.isfinite(value) else np.nan)
    return np.asarray(scores, np.float32)
