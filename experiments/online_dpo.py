"""Online DPO: python -m experiments.online_dpo --config=configs/online_dpo.py

Of the policy's own samples of each prompt, the reward model prefers the best to the worst (Guo et al. 2024). The run is that of
experiments/ppo.py, the objective that of experiments/preference.py.
"""

from functools import partial

from experiments import launch, ppo
from jaxalign import rollout
from jaxalign.objectives.preference import dpo
from jaxalign.ops import advantages


def objective(config, model):
    """DPO of the tempered policy, which is the one that sampled."""
    if config.run.stop_kl is not None:
        raise ValueError(f"run.stop_kl = {config.run.stop_kl:g}: DPO has no approx_kl to be held by; None for none")

    def unembed(params, hidden):
        return model.unembed(params, hidden) / config.sample.temperature

    return partial(dpo, model=model._replace(unembed=unembed), **config.objective)


ONLINE_DPO = ppo.Algorithm(
    objective,
    assemble=lambda config: partial(rollout.assemble_groups, group=config.run.group, estimator=advantages.dr_grpo),
    data=lambda config, model: lambda rolled: rollout.best_and_worst(rolled, config.run.group),
    together=lambda config: 2,
)

if __name__ == "__main__":
    launch.main(partial(ppo.run, algorithm=ONLINE_DPO), "online_dpo")
