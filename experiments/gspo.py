"""GSPO: python -m experiments.gspo --config=configs/gspo.py

That of experiments/grpo.py with another objective.
"""

from functools import partial

from experiments import launch, ppo
from experiments.grpo import of_groups
from jaxalign.objectives import online

if __name__ == "__main__":
    launch.main(partial(ppo.run, algorithm=of_groups(online.gspo)), "gspo")
