"""Over-optimisation laboratory: python -m experiments.overoptimization --config=configs/overoptimization.py

Gao, Schulman & Hilton 2022 in the tiny world (experiments/tiny_world.py), where gold reward and KL are sums over all responses.
Proxies are reward models of several sizes, that learn from several numbers of comparisons, by annotators of several temperatures.
Each is optimised by best-of-n, exactly, and by PPO; one also by GRPO, and its comparisons by DPO. Whatever optimises leaves laws,
log p of every response, and all else is read off those: gold, proxy and KL along the way.

Then what is said to help: ensembles (Coste et al. 2024), a price of KL, and stopping early.

Leaves report.html, figures.json, summary.json and findings.txt. N seeds, T places on a way (n of best-of-n, or updates).
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import launch, study, sweep, tiny_world
from experiments import overoptimization_read as read
from jaxalign import keys, models, rewards, score, shard
from jaxalign.objectives import reward
from jaxalign.ops import best_of_n
from jaxalign.train import log, optim
from jaxalign.train.step import make_step
from jaxalign.types import TrainState

SIZES = 2.0 ** np.arange(0, 12.5, 0.5)  # n of best-of-n, the first of which is the reference
TRAINED = slice(-tiny_world.HELD_OUT)  # prompts that policies learn from; on others they fall behind best-of-n, which needs none
OTHERS = 10**6  # the first of the comparisons that no proxy learns from, but the judge by which a policy stops


# --------------------------------------------------------- proxies


class Proxy(NamedTuple):
    """What tells a reward model from another."""

    width: int
    comparisons: int
    temperature: float  # of the annotators
    member: int = 0  # its beginning, and the order of its data
    first: int = 0  # of its comparisons


def proxies_of(config) -> dict:
    """{name: Proxy}: "proxy", those that differ from it in one number, "member K" of its ensemble, and the "judge"."""
    base = Proxy(config.proxy.width, config.proxy.comparisons, config.world.temperature)
    varied = {f"{key} {x:g}": base._replace(**{key: x}) for key, values in config.varied.items() for x in values}
    members = {f"member {k}": base._replace(member=k) for k in range(1, config.compared.members)}
    return {"proxy": base, **varied, **members, "judge": base._replace(first=OTHERS)}


def learned(world, proxy: Proxy, *, model, config):
    """The scores of all responses by a new reward model, of which the reference's have mean 0 and std 1. -> f32 [P,S]

    Args: proxy: whose numbers may be traced; its width is the model's.
    """
    world, settings = world._replace(temperature=proxy.temperature), config.proxy
    tx = optim.adam(steps=settings.updates, **config.optim)
    step = make_step(partial(reward.pairwise, model=model), tx)
    params = shard.unbox(model.init(keys.key(world.seed, "init", 3, proxy.member)))

    def learn(state, i):
        key = keys.key(world.seed, "shuffle", proxy.member, i)
        numbers = proxy.first + jax.random.randint(key, (settings.batch,), 0, proxy.comparisons)
        return step(state, tiny_world.pairs(world, None, numbers))[0], None

    state, _ = jax.lax.scan(learn, TrainState(jnp.int32(0), params, tx.init(params)), jnp.arange(settings.updates))
    rows = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), tiny_world.all_rows())
    scores = score.last_scalar(model, state.params, rows).reshape(world.gold.shape)
    return tiny_world.standard(scores, jnp.exp(world.ref_logp) / len(scores))


def in_turn(of_worlds, worlds, each):
    """of_worlds(worlds, part) for every part of a tree, all worlds at once and one part after the other: one program."""
    return jax.jit(lambda worlds, each: jax.lax.map(partial(of_worlds, worlds), each))(worlds, each)


def all_learned(worlds, proxies: dict, config) -> dict:
    """{name: scores f32 [N,P,S]}: one program for each width."""
    found = {}
    for width in {proxy.width: None for proxy in proxies.values()}:
        names = [name for name, proxy in proxies.items() if proxy.width == width]
        sizes = {"width": width, "head_dim": width // 2, "mlp": 2 * width, "layers": config.proxy.layers}
        model = models.build(replace(tiny_world.MODEL.config, **sizes))
        numbers = Proxy(*(np.array(x) for x in zip(*(proxies[name] for name in names), strict=True)))
        learn = partial(learned, model=model, config=config)
        scores = in_turn(jax.vmap(learn, (0, None)), worlds, numbers)
        found |= dict(zip(names, np.asarray(scores), strict=True))
        log.say(f"{len(names)} proxies of width {width}")
    return {name: found[name] for name in proxies}


def ensembles(members, *, doubt: float) -> dict:
    """{name: scores f32 [N,P,S]} of those of the members [M,N,P,S]."""
    return {
        "mean of ensemble": rewards.mean_score(members),
        "worst of ensemble": rewards.worst_score(members),
        "ensemble less variance": rewards.uncertainty_weighted(members, coefficient=doubt),
    }


# --------------------------------------------------------- what optimises them


@jax.jit
def best_of(ref_logp, scores, sizes):
    """The laws of best-of-n, log p f32 [N,T,H,S]. Args: ref_logp, scores [N,H,S]; sizes: n [T]."""

    def one(ref_logp, scores, n):
        order = jnp.argsort(scores)
        return jnp.zeros_like(ref_logp).at[order].set(best_of_n.probabilities(jnp.exp(ref_logp[order]), n))

    of_prompts = jax.vmap(one, (0, 0, None))
    of_sizes = jax.vmap(of_prompts, (None, None, 0))
    return jnp.log(jnp.maximum(jax.vmap(of_sizes, (0, 0, None))(ref_logp, scores, sizes), 1e-30))


def trained(worlds, scores, betas, stage):
    """The laws of policies at the looks of their training, log p f32 [R,N,T,H,S], by one program: all worlds at once.

    Args: scores [R,N,P,S], what they are rewarded by; betas [R], their price of a nat; stage: their settings (configs/sweep.py).
    """

    def law(world, params):
        rows = jax.tree.map(lambda x: x[TRAINED], tiny_world.all_rows())
        return {"logp": tiny_world.log_probs(params, rows)}

    method = sweep.method_of(stage)._replace(measure=law)

    def one(world, scores, beta):
        setting = {"learning_rate": stage.optim.learning_rate} | ({"kl_beta": beta} if "kl" in stage else {})
        return sweep.learn(world._replace(reward=scores), setting, config=stage, method=method)["logp"]

    def of_worlds(worlds, each):
        return jax.vmap(one, (0, 0, None))(worlds, *each)

    return in_turn(of_worlds, worlds, (jnp.asarray(scores), jnp.float32(betas)))


def ways_of(config):
    """-> {how: {what is optimised: Way}}, all that the study looks at."""
    worlds = tiny_world.of_seeds(config.seed * config.seeds + np.arange(config.seeds), **config.world)
    tables = all_learned(worlds, proxies_of(config), config)
    judge, members = tables.pop("judge"), [tables.pop(f"member {k}") for k in range(1, config.compared.members)]
    together = ensembles(jnp.stack([tables["proxy"], *members]), doubt=config.compared.doubt)
    tables |= {name: np.asarray(x) for name, x in together.items()}
    ref_logp, gold, judge = (x[:, TRAINED] for x in (worlds.ref_logp, worlds.gold, judge))
    there = {name: x[:, TRAINED] for name, x in tables.items()}

    def seen(name, logp):
        return jax.tree.map(np.asarray, read.way(logp, ref_logp, gold, there[name], judge))

    found = {"best-of-n": {name: seen(name, best_of(ref_logp, x, SIZES)) for name, x in there.items()}}
    runs = [(name, name, 0.0) for name in tables] + [(f"KL at {x:g}", "proxy", x) for x in config.compared.penalties]
    for how, plans in (("PPO", runs), ("GRPO", runs[:1]), ("DPO", runs[:1])):
        if how.lower() not in config.stages:
            continue
        _, names, betas = zip(*plans, strict=True)
        laws = trained(worlds, np.stack([tables[name] for name in names]), betas, config.stages[how.lower()])
        found[how] = {plan: seen(name, logp) for (plan, name, _), logp in zip(plans, laws, strict=True)}
        log.say(f"{len(plans) * config.seeds} policies by {how}")
    return found


def run(config, workdir: Path):
    found, differ = ways_of(config), read.families(config)
    laws = read.laws_of(found, dict.fromkeys(["proxy", *(name for names in differ.values() for name in names)]), config)
    study.leave(
        workdir, config, read.summarise(found, laws), read.figures_of(found, laws, differ), read.findings(found, laws, differ)
    )


if __name__ == "__main__":
    launch.main(run, "overoptimization")
