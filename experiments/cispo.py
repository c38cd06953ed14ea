"""CISPO: python -m experiments.cispo --config=configs/cispo.py

That of experiments/grpo.py with another objective.
"""

from functools import partial

from experiments import launch, ppo
from experiments.grpo import of_groups
from jaxalign.objectives import online

if __name__ == "__main__":
    launch.main(partial(ppo.run, algorithm=of_groups(online.cispo)), "cispo")
