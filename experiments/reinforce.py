"""REINFORCE and its baselines, ReMax's among them: python -m experiments.reinforce --config=configs/reinforce.py

The run is that of experiments/ppo.py; `run.baseline` says what is taken from the return:

    none            nothing
    mean            the mean of the batch, each response's own return included
    leave_one_out   the mean of the other responses to the prompt
    greedy          the score of the likeliest response to the prompt (ReMax, Li et al. 2024)
    learned         the value of a critic on the policy's trunk
"""

from functools import partial

from experiments import launch, ppo
from jaxalign import rollout
from jaxalign.objectives import online
from jaxalign.ops import advantages


def objective(config, model):
    if config.run.stop_kl is not None:
        raise ValueError(f"run.stop_kl = {config.run.stop_kl:g}: REINFORCE has no approx_kl to be held by; None for none")
    hyper = {**config.objective} if config.run.baseline == "learned" else {"value_weight": 0.0}
    return partial(online.reinforce, model=model, temperature=config.sample.temperature, **hyper)


def assemble(config):
    if config.run.baseline == "mean":
        return partial(rollout.assemble_groups, group=config.run.batch, estimator=advantages.dr_grpo)
    if config.run.baseline == "leave_one_out":
        return partial(rollout.assemble_groups, group=config.run.group, estimator=advantages.rloo)
    return partial(rollout.assemble, lam=1.0, whiten_advantages=False)


REINFORCE = ppo.Algorithm(
    objective,
    assemble,
    critic=lambda config: "shared" if config.run.baseline == "learned" else "none",
    greedy=lambda config: config.run.baseline == "greedy",
)

if __name__ == "__main__":
    launch.main(partial(ppo.run, algorithm=REINFORCE), "reinforce")
