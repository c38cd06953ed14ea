"""Settings of the worked example experiments/new_objective.py: those of supervised fine-tuning, with the objective's own."""

from configs import sft

VARIANTS = sft.VARIANTS


def get_config(variant: str = "reviews"):
    config = sft.get_config(variant)
    config.objective = {"floor": -8.0}  # nats
    return config
