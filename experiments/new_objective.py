"""An objective of one's own: python -m experiments.new_objective --config=configs/new_objective.py

It is one function: no class, no registration, no flag. Copy this file and its config, change the function, run it.
"""

from functools import partial

from experiments import launch, sft
from jaxalign import score
from jaxalign.ops.masked import masked_sum


def trusting_sft(params, data, *, model, floor: float):
    """SFT that lets go of targets which the model finds absurd, for those may be noise: -sum_t w_t [log p_t > floor] log p_t.

    Weight: the targets that are kept. Metrics: loss/nll, of those. Args: floor: nats.
    """
    said, _ = score.evaluate(model, params, data)
    weights = data.targets * (said.logp > floor)
    return -masked_sum(said.logp, weights), {"weight": weights.sum(), "loss/nll": -masked_sum(said.logp, weights)}


if __name__ == "__main__":
    launch.main(partial(sft.run, objective=trusting_sft), "new_objective")
