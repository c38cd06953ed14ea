"""Settings of PPO-ptx (Ouyang et al. 2022): those of configs/ppo.py, and text whose likelihood the policy is not to lose.

python -m experiments.ppo_ptx --config=configs/ppo_ptx.py

Results, seed 0: gold -0.05 to 1.33 ± 0.07 at a KL of 1.3 nats.
"""

from configs import ppo

VARIANTS = {name: ppo.VARIANTS[name] for name in ("reviews", "tiny")}


def get_config(variant: str = "reviews"):
    config = ppo.get_config(variant)
    # length: tokens a packed row, of which an update has as many as responses; weight: of nats a token (InstructGPT: 27.8)
    config.pretraining = {"source": "reviews", "count": 1024, "template": "{text}", "length": 48, "weight": 1.0}
    return config
