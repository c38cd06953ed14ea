"""An ensemble of reward models, as experiments.reward leaves it: where its members are, and one score of them all."""

import math
from functools import partial
from pathlib import Path

import jax.numpy as jnp

from experiments import common
from jaxalign import rewards, score
from jaxalign.train import log

MEMBERS = "members"  # the folder of all models but the first


def folders(source) -> list[str]:
    """The source of each member: the first is the source itself, and the only one where this is no ensemble's folder."""
    count = log.read_json(Path(source) / "config.json").get("run", {}).get("members", 1)
    return [str(source), *(str(Path(source) / MEMBERS / str(member)) for member in range(1, count))]


def score_of_all(params, batch, *, model, doubt: float):
    """Scores by all members, less the price of their disagreement. -> f32 [B]

    Args:
        params: of each member, a list.
        doubt: mean - doubt * variance over members (rewards.uncertainty_weighted): 0 is their mean; inf is the least score of any
            (rewards.worst_score).
    """
    scores = jnp.stack([score.last_scalar(model, one, batch) for one in params])
    return rewards.worst_score(scores) if doubt == math.inf else rewards.uncertainty_weighted(scores, coefficient=doubt)


def load(source, settings, mesh, *, seed: int, doubt: float):
    """-> (the first member as common.Loaded, with the digests of all; the params of all, a list; scores(params, batch) -> f32 [B])

    Args: settings, seed: as of common.load. Raises ValueError where a member's architecture or tokenizer is another.
    """
    members = [common.load(one, settings, mesh, seed=seed, head="reward", draw_head=False) for one in folders(source)]
    first = members[0]
    for one, name in zip(members, folders(source), strict=True):
        if (one.model.config, one.tokenizer_digest) != (first.model.config, first.tokenizer_digest):
            raise ValueError(f"{name} and {source} are of different architectures or tokenizers: they are no ensemble")
    first = first._replace(digest="+".join(one.digest for one in members))
    return first, [one.params for one in members], partial(score_of_all, model=first.model, doubt=doubt)
