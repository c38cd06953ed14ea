"""The gradient of held-out gold by DPO's beta, through all updates, in the tiny world.

python -m experiments.hypergradient --config=configs/hypergradient.py

Results, 8 seeds, a minute and a half on 2 CPU cores beside other work: from 0.02 beta climbs to 0.19 in 8 steps, from 3 it falls to
0.24; of the sweep, which the gradient never saw, 0.22 is the best (gold 0.55, 0.56; 0.56).
"""

from ml_collections import ConfigDict

from configs import sweep


def get_config(variant: str = "dpo") -> ConfigDict:
    config = sweep.get_config(variant)
    del config.sweep
    config.world.temperature = 2.0
    config.optim.update(
        learning_rate=1e-2, decay="constant", eps=3e-2
    )  # with a small eps, Adam is nearly a sign: no slope to follow
    config.run.update(updates=64, looks=1, examples=256)
    # name: the number that is tuned, an argument of the objective, from each of `start`; rate: of log(number) by the slope of gold,
    # at most `most` a step; seeds: whose mean it is; range, points: of the sweep beside it
    config.tuned = {
        "name": "beta",
        "start": (0.02, 3.0),
        "steps": 8,
        "rate": 4.0,
        "most": 0.7,
        "seeds": 8,
        "range": (0.01, 5.0),
        "points": 9,
    }
    return VARIANTS[variant](config)


def dpo(config):
    return config


VARIANTS = {"dpo": dpo}
