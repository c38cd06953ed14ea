"""Settings of CISPO (MiniMax-M1, 2025): those of configs/grpo.py, with weights that are clipped in place of the loss.

python -m experiments.cispo --config=configs/cispo.py

Results, seed 0: gold -0.05 to 1.51 after 80 iterations and 1.13 after 240, at a KL of 24.8 nats: see configs/grpo.py.
"""

from configs import grpo

VARIANTS = {name: grpo.VARIANTS[name] for name in ("reviews", "tiny")}


def get_config(variant: str = "reviews"):
    config = grpo.get_config(variant)
    del config.objective.dual_clip
    config.objective.update(clip_low=1.0, clip_high=0.28, aggregation="token_mean")
    config.run.epochs = 1  # nothing holds back a policy that has moved away from its samples
    config.run.iterations *= 4
    config.evaluate.every *= 4
    return config
