"""Settings of online DPO (Guo et al. 2024): those of configs/ppo.py but for what is here. The price of KL is DPO's beta.

python -m experiments.online_dpo --config=configs/online_dpo.py

Results, seed 0: gold -0.05 to 1.89 after 20 iterations and 1.07 after 60, at a KL of 21.2 nats: beta = 0.1 does not hold it there.
"""

from configs import ppo

VARIANTS = {name: ppo.VARIANTS[name] for name in ("reviews", "tiny")}


def get_config(variant: str = "reviews"):
    config = ppo.get_config(variant)
    del config.advantage, config.objective, config.run.critic
    config.objective = {"beta": 0.1, "nll_weight": 0.0}
    config.kl.beta = 0.0
    config.run.group = 2
    return config
