"""GRPO, Dr.GRPO and DAPO: python -m experiments.grpo --config=configs/grpo.py

The samples of a prompt are compared with each other, so there is no critic; the run is that of experiments/ppo.py. Some settings
name a function of jaxalign.ops: `estimator` one of advantages, `aggregation` of aggregate, `kl` of divergences.
"""

from functools import partial

from experiments import launch, ppo
from jaxalign import rollout
from jaxalign.objectives import distill, online
from jaxalign.ops import advantages, aggregate, divergences

ESTIMATORS = {f.__name__: f for f in (advantages.grpo, advantages.dr_grpo, advantages.rloo, advantages.grpo_over_batch)}
AGGREGATIONS = {
    f.__name__: f
    for f in (aggregate.token_mean, aggregate.seq_mean_token_mean, aggregate.seq_mean_token_sum, aggregate.seq_sum_const)
}
KLS = {"k2": divergences.k2, "k3": divergences.k3, "exact": divergences.k3}  # k3 is logged; in a loss k1 has no gradient


def aggregation_of(config):
    chosen = AGGREGATIONS[config.objective.aggregation]
    return partial(chosen, length=config.sample.length) if chosen is aggregate.seq_sum_const else chosen


def of_groups(objective) -> ppo.Algorithm:
    """The algorithm of an objective of jaxalign.objectives.online, on groups of samples."""

    def exact(config):
        return config.objective.kl == "exact" and config.objective.kl_weight > 0

    def bound(config, model):
        temperature = config.sample.temperature
        hyper = {**config.objective, "aggregation": aggregation_of(config), "kl": KLS[config.objective.kl]}
        if not exact(config):
            return partial(objective, model=model, temperature=temperature, **hyper)
        one = partial(objective, temperature=temperature, **hyper | {"kl_weight": 0.0})
        other = partial(distill.reverse_kl, temperature=temperature)  # is multiplied by the square of it
        return partial(online.mixed, model=model, objective=one, other=other, other_weight=hyper["kl_weight"] / temperature**2)

    def assemble(config):
        given = {"group": config.run.group, "longest": config.sample.length}
        hyper = {**config.advantage, "estimator": ESTIMATORS[config.advantage.estimator]}
        return partial(rollout.assemble_groups, **given | hyper)

    def data(config, model):
        def kept(rolled, *reference):
            if config.run.dynamic_sampling:
                rolled = rollout.without_equals(rolled, config.run.group)
            if not reference:
                return rolled
            weights, _ = aggregation_of(config)(rolled.batch.targets)
            batch, k = rolled.batch.replace(weights=weights), model.config.vocab
            taught = distill.taught(*reference, batch, model=model, k=k, temperature=config.sample.temperature)
            return online.Mixed(rolled, taught)

        return kept

    def beside(config, policy, mesh):
        return (lambda i: policy.reference) if exact(config) else None

    return ppo.Algorithm(bound, assemble, data=data, beside=beside)


if __name__ == "__main__":
    launch.main(partial(ppo.run, algorithm=of_groups(online.grpo)), "grpo")
