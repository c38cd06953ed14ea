"""Settings of REINFORCE with any of its baselines: those of configs/ppo.py but for what is here. One update a batch, on policy.

python -m experiments.reinforce --config=configs/reinforce.py            less the mean of the other responses to the prompt
python -m experiments.reinforce --config=configs/reinforce.py:remax      less the score of the likeliest one (Li et al. 2024)

Results, seed 0: gold -0.05 to 2.42 ± 0.05 at a KL of 5.5 nats; remax 2.27 ± 0.06 at 5.4.
"""

from configs import ppo


def get_config(variant: str = "reviews"):
    config = ppo.get_config("tiny" if variant == "tiny" else "reviews")
    del config.advantage, config.objective, config.run.critic
    config.objective = {"value_weight": 0.5}  # of the critic, where the baseline is learned
    config.run.update(group=4, epochs=1, minibatches=1)
    config.run.baseline = "leave_one_out"  # or none, mean, greedy, learned
    config.run.iterations *= 4
    config.evaluate.every *= 4
    return VARIANTS[variant](config)


def reviews(config):
    """The default."""
    return config


def remax(config):
    config.run.update(baseline="greedy", group=1)
    return config


def tiny(config):
    """Seconds: to see that everything runs."""
    return config


VARIANTS = {"reviews": reviews, "tiny": tiny, "remax": remax}
