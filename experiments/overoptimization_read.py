"""What the over-optimisation laboratory reads off its ways: gold, proxy and KL, laws with bands, and what they show in words.

N seeds, T places on a way (n of best-of-n, or updates), H prompts, S responses.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import study
from jaxalign import keys
from jaxalign.ops import divergences, overoptimisation
from jaxalign.ops.masked import masked_sum

BEST_OF_16 = 8  # its place among the sizes of best-of-n
EXPECTED = {
    "width": "The paper: b falls with size, and the most gold rises",
    "comparisons": "The paper: b falls with data, and the most gold rises",
    "temperature": "Coste et al.: noisier labels make it worse",
}
LAWS = {
    "best-of-n": (overoptimisation.best_of_n, overoptimisation.fit_best_of_n),
    "PPO": (overoptimisation.rl, overoptimisation.fit_rl),
}


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
