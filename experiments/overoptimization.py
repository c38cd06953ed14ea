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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import launch, study, sweep, tiny_world
from jaxalign import keys, models, rewards, score, shard
from jaxalign.objectives import reward
from jaxalign.ops import best_of_n, divergences, overoptimisation
from jaxalign.ops.masked import masked_sum
from jaxalign.train import log, optim
from jaxalign.train.step import make_step
from jaxalign.types import TrainState

SIZES = 2.0 ** np.arange(0, 12.5, 0.5)  # n of best-of-n, the first of which is the reference
TRAINED = slice(-tiny_world.HELD_OUT)  # prompts that policies learn from; on others they fall behind best-of-n, which needs none
BEST_OF_16 = 8  # its place there
OTHERS = 10**6  # the first of the comparisons that no proxy learns from, but the judge by which a policy stops
EXPECTED = {
    "width": "The paper: b falls with size, and the most gold rises",
    "comparisons": "The paper: b falls with data, and the most gold rises",
    "temperature": "Coste et al.: noisier labels make it worse",
}
LAWS = {
    "best-of-n": (overoptimisation.best_of_n, overoptimisation.fit_best_of_n),
    "PPO": (overoptimisation.rl, overoptimisation.fit_rl),
}


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


# --------------------------------------------------------- what is read off the way


class Way(NamedTuple):
    """What laws come to, [N,T] each; gold, proxy and judge are what there is more than the reference has."""

    kl: Any  # nats a response
    gold: Any
    proxy: Any
    judge: Any

    @property
    def d(self):
        return np.sqrt(np.maximum(self.kl, 0))


@jax.jit
def way(logp, ref_logp, *tables) -> Way:
    """Args: logp f32 [N,T,H,S]; ref_logp and tables, of gold, proxy and judge: [N,H,S]."""
    p, ref = jnp.exp(logp), jnp.exp(ref_logp)

    def more(table):
        return masked_sum(p, table[:, None], (2, 3)) / p.shape[2] - masked_sum(ref, table, (1, 2))[:, None] / p.shape[2]

    kl = divergences.kl(logp, ref_logp[:, None]).mean(-1)
    return Way(kl, *map(more, tables))


def at_kl(found: Way, kl):
    """Gold f32 [N] where each way first has this KL [N]; a way that never has it: at its end."""
    ways = zip(np.sqrt(kl), found.d, found.gold, strict=True)  # in d, in which gold begins as a straight line
    return np.array([np.interp(x, np.maximum.accumulate(d), gold) for x, d, gold in ways])


def most(found: Way):
    """Gold f32 [N] at the place where the other seeds have most on average: what one can choose without a look at one's own."""
    others = found.gold.sum(0)[None] - found.gold
    return np.take_along_axis(found.gold, others.argmax(1)[:, None], axis=1)[:, 0]


def stopped_by_judge(found: Way):
    """Gold f32 [N] at the place that a second proxy likes best, which was learnt from as many other comparisons."""
    return np.take_along_axis(found.gold, found.judge.argmax(1)[:, None], axis=1)[:, 0]


def fitted(law, fit, found: Way, at, *, seed: int, rounds: int) -> dict:
    """A law of over-optimisation, fitted to the means over seeds. -> {"a", "b", "a_error", "b_error", "r2", "curve", "band"}

    Args: at: d of the curve f32 [K], whose band f32 [2,K] holds 95 of 100 bootstraps of the seeds (Efron 1979).
    """

    many = len(found.gold)
    drawn = jax.random.randint(keys.key(seed, "evaluate"), (rounds, many), 0, many)
    which = jnp.concatenate([jnp.arange(many)[None], drawn])  # first the seeds as they are
    (a, b), curves, r2 = map(np.asarray, _fits(law, fit, found.d[:, 1:], found.gold[:, 1:], at, which))
    numbers = {"a": a[0], "b": b[0], "a_error": a[1:].std(), "b_error": b[1:].std(), "r2": r2[0]}
    band = np.quantile(curves[1:], [0.025, 0.975], axis=0)
    return {name: float(x) for name, x in numbers.items()} | {"curve": curves[0], "band": band}


@partial(jax.jit, static_argnums=(0, 1))
def _fits(law, fit, d, gold, at, which):
    def of_seeds(which):
        mean_d, mean_gold = d[which].mean(0), gold[which].mean(0)
        a, b = fit(mean_d, mean_gold)
        return jnp.stack([a, b]), law(at, a, b), overoptimisation.r_squared(law(mean_d, a, b), mean_gold)

    constants, curves, r2 = jax.vmap(of_seeds)(which)
    return constants.T, curves, r2


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
        return jax.tree.map(np.asarray, way(logp, ref_logp, gold, there[name], judge))

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


# --------------------------------------------------------- what came of it


def laws_of(found, varied, config) -> dict:
    """{how: {proxy: what `fitted` says of it, and "x", d of its curve}}"""

    def one(law, fit, found):
        at = np.linspace(0.02, found.d.mean(0).max(), 30)
        return fitted(law, fit, found, at, seed=config.seed, rounds=config.compared.rounds) | {"x": at}

    return {how: {name: one(*law, found[how][name]) for name in varied} for how, law in LAWS.items()}


def b_of_seeds(how, found: Way):
    """How soon the proxy fails, f32 [N]: the law's b in each world."""
    return np.array([float(LAWS[how][1](d, gold)[1]) for d, gold in zip(found.d[:, 1:], found.gold[:, 1:], strict=True)])


def families(config) -> dict:
    """{number: the names of the proxies that differ in it, the least first}"""
    base = {"width": config.proxy.width, "comparisons": config.proxy.comparisons, "temperature": config.world.temperature}
    named = {key: {base[key]: "proxy"} | {x: f"{key} {x:g}" for x in values} for key, values in config.varied.items()}
    return {key: [names[x] for x in sorted(names)] for key, names in named.items() if len(names) > 1}


def summarise(found, laws) -> dict:
    summary = {}
    for how, ways in found.items():
        for name, each in ways.items():
            numbers = {"most gold": most(each), "gold at the end": each.gold[:, -1], "KL at the end": each.kl[:, -1]}
            for what, values in numbers.items():
                summary |= study.over_seeds(f"{how}/{name}/{what}", values.tolist())
            if name in laws.get(how, ()):
                constants = ("a", "a_error", "b", "b_error", "r2")
                summary |= {f"{how}/{name}/law/{key}": laws[how][name][key] for key in constants}
    return summary


def findings(found, laws, families: dict) -> list[str]:
    """What the ways show: all comparisons are paired by seed, all numbers means over seeds."""
    said, compared = [], study.compared
    for how, ways in found.items():
        each = ways["proxy"]
        fall, best = compared(each.gold[:, -1], most(each)), most(each).mean()
        said.append(
            f"{how}: at the end, KL {each.kl[:, -1].mean():.1f}, gold is {fall} than where the other seeds have most, {best:.2f}; "
            f"the proxy's score has risen by {each.proxy[:, -1].mean():.2f}."
        )
    for how, each in laws.items():
        r2 = [law["r2"] for law in each.values()]
        said.append(
            f"{how}: the paper's law explains {each['proxy']['r2']:.2f} of the variance of mean gold under the first proxy, "
            f"{min(r2):.2f} to {max(r2):.2f} under all {len(r2)}."
        )
    for key, names in families.items():
        for how in laws:
            low, high = (found[how][names[k]] for k in (0, -1))
            soon = compared(b_of_seeds(how, high), b_of_seeds(how, low))
            said.append(
                f"{how}, {key}, from the least to the most: b is {soon}, the most gold {compared(most(high), most(low))}. "
                f"({EXPECTED[key]}.)"
            )
    ppo, bon = found["PPO"]["proxy"], found["best-of-n"]["proxy"]
    for how in [*found][1:]:
        more = compared(at_kl(found[how]["proxy"], bon.kl[:, BEST_OF_16]), bon.gold[:, BEST_OF_16])
        said.append(f"At the KL of the best of 16, gold by {how} is {more} than by best-of-n.")
    for name, each in found["PPO"].items():
        if name.startswith("KL"):
            end, same = each.gold[:, -1], at_kl(ppo, each.kl[:, -1])
            said.append(
                f"PPO, {name} a nat: gold at the end is {compared(end, ppo.gold[:, -1])} than without; {compared(end, same)} than "
                f"without at the same KL. (The paper: a price of KL does no more than stopping early.)"
            )
    for how in laws:
        for name, each in found[how].items():
            if "ensemble" in name:
                one = found[how]["proxy"]
                said.append(
                    f"{how}, {name}: the most gold is {compared(most(each), most(one))} than by one proxy, gold at the end "
                    f"{compared(each.gold[:, -1], one.gold[:, -1])}. (Coste et al.: ensembles over-optimise less.)"
                )
    for how, rule in (("where a second proxy, of other comparisons, is highest", stopped_by_judge), ("by other seeds' gold", most)):
        said.append(f"PPO, stopped {how}: gold is {compared(rule(ppo), ppo.gold[:, -1])} than at the end.")
    return said


def figures_of(found, laws, families: dict) -> dict:
    across = {"x": "sqrt(KL), nats^(1/2)"}

    def curve(each, y):
        error = y.std(0, ddof=1) / len(y) ** 0.5
        return np.stack([each.d.mean(0), y.mean(0), error], axis=1).tolist()

    first = {how: ways["proxy"] for how, ways in found.items()}
    figures = {
        "Gold, while one proxy is optimised": across | {"curves": {how: curve(each, each.gold) for how, each in first.items()}},
        "What that proxy says": across | {"curves": {how: curve(each, each.proxy) for how, each in first.items()}},
    }
    for how, each in laws.items():
        for key, names in families.items():
            seen = {f"{name}, seen": curve(found[how][name], found[how][name].gold) for name in names}
            drawn = {
                name: np.stack([each[name]["x"], each[name]["curve"], np.diff(each[name]["band"], axis=0)[0] / 2], 1).tolist()
                for name in names
            }
            title = f"Gold by {how}: the law's fit, its 95 % band, and what was seen; {key}"
            figures[title] = across | {"curves": drawn | seen, "points": [*seen]}
        helps = {name: curve(x, x.gold) for name, x in found[how].items() if name == "proxy" or "ensemble" in name or "KL" in name}
        figures[f"Gold by {how}: what is said to help"] = across | {"curves": helps}
    return figures


def run(config, workdir: Path):
    found, differ = ways_of(config), families(config)
    laws = laws_of(found, dict.fromkeys(["proxy", *(name for names in differ.values() for name in names)]), config)
    study.leave(workdir, config, summarise(found, laws), figures_of(found, laws, differ), findings(found, laws, differ))


if __name__ == "__main__":
    launch.main(run, "overoptimization")
