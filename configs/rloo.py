"""Settings of RLOO (Ahmadian et al. 2024): those of configs/grpo.py, with the other samples as baseline and the KL in the reward.

python -m experiments.rloo --config=configs/rloo.py

Results, seed 0: gold -0.05 to 2.68 ± 0.05 at a KL of 6.2 nats.
"""

from configs import grpo

VARIANTS = {name: grpo.VARIANTS[name] for name in ("reviews", "tiny")}


def get_config(variant: str = "reviews"):
    config = grpo.get_config(variant)
    del config.objective.dual_clip
    config.advantage.estimator = "rloo"
    config.objective.kl_weight = 0.0
    config.kl.beta = 0.1
    return config
