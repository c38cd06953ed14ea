"""Over-optimisation laboratory: how gold reward rises and falls while a proxy of it is optimised, in the tiny world.

python -m experiments.overoptimization --config=configs/overoptimization.py
python -m experiments.overoptimization --config=configs/overoptimization.py:fast      a minute, PPO and best-of-n alone

Results, seed 0, 8 worlds, 6.5 minutes of CPU time (23 minutes on 2 cores that were busy with much else), gold in std of the
reference's: by best-of-n gold rises to 0.40 (d = sqrt(KL) about 1.4) and has lost 0.32 ± 0.06 of that at a KL of 5.5 nats,
while the proxy's score rises to 0.90. PPO and GRPO turn over at about the same d and lose 0.19 ± 0.10 and 0.18 ± 0.10, which 8
worlds do not tell from chance; DPO, to 2.2 nats, has not turned. The law of best-of-n explains 0.87 to 0.97 of the variance of
mean gold, that of RL 0.60 to 0.85. More comparisons (100 to 3000) and larger proxies (4 to 32) bring best-of-n 0.38 ± 0.06 and
0.17 ± 0.04 more gold, as in the paper, but b rises a little (by 0.07 ± 0.03 and 0.05 ± 0.02) where the paper has it fall.
Ensembles of 4 bring best-of-n 0.10 to 0.11 ± 0.04 more at most. A price of KL of 0.1 or 0.3 ends 0.23 ± 0.08 or 0.24 ± 0.10
above none, and 0.08 or 0.09 above none at the same KL, where the paper found no gain; with seed 1, 8 other worlds, there is
none either, b does not change (0.04 and 0.05 ± 0.04), and the rest comes again: 0.43, 0.28 ± 0.04 lost.
"""

from ml_collections import ConfigDict

from configs import sweep

ADAM = {"learning_rate": 3e-3, "warmup": 0, "decay": "linear", "b1": 0.9, "b2": 0.99, "eps": 1e-8, "eps_placement": "pytorch"}


def get_config(variant: str = "full") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # of the first world
    config.seeds = 8  # worlds
    # temperature: of the annotators, in std of gold; beta: of demonstrators, whom nobody asks here; habit, fluency: a language of
    # strong habits, and a gold reward that minds what is hardly ever said (experiments/tiny_world.py)
    config.world = {"temperature": 0.5, "beta": 0.5, "habit": 1.5, "fluency": 0.5}
    config.proxy = {"width": 16, "comparisons": 1000, "layers": 2, "updates": 400, "batch": 64}  # a reward model
    config.optim = {**ADAM, "weight_decay": 0.0, "clip_norm": 1.0}  # of proxies
    # other proxies, each of which differs from `proxy` in one number; temperature: of their annotators
    config.varied = {"width": (4, 8, 32), "comparisons": (100, 300, 3000), "temperature": (1.0, 2.0)}
    # members: reward models of an ensemble, that differ in their beginning and the order of their data; doubt: the price of their
    # variance; penalties: prices of a nat to the policy; rounds: of the bootstrap
    config.compared = {"members": 4, "doubt": 1.0, "penalties": (0.1, 0.3, 1.0), "rounds": 500}
    config.stages = {name: sweep.get_config(name) for name in ("ppo", "grpo", "dpo")}  # how policies learn
    for stage in config.stages.values():
        del stage.sweep, stage.world
        stage.optim.update(learning_rate=1.2e-3, decay="constant")
        stage.run.update(updates=400, looks=25)
    config.stages.ppo.kl.beta = 0.0  # but for `compared.penalties`
    config.stages.grpo.objective.kl_weight = 0.0
    config.stages.dpo.run.examples = config.proxy.get_oneway_ref("comparisons")  # the proxy's own
    config.stages.dpo.objective.beta = 0.03
    config.stages.dpo.optim.learning_rate = 4e-4
    return VARIANTS[variant](config)


def full(config):
    """The default."""
    return config


def fast(config):
    """Less of everything, PPO and best-of-n alone."""
    del config.stages.grpo, config.stages.dpo
    config.seeds = 3
    config.varied = {"width": (), "comparisons": (100,), "temperature": ()}
    config.proxy.update(width=8, updates=200, batch=32)
    config.compared.update(members=2, penalties=(0.3,), rounds=50)
    for stage in config.stages.values():
        stage.optim.learning_rate = 3e-3
        stage.run.update(updates=96, looks=4)
    return config


VARIANTS = {"full": full, "fast": fast}
