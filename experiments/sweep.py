"""Many experiments as one compiled program: python -m experiments.sweep --config=configs/sweep.py:dpo

An experiment in the tiny world is a pure function of its setting (`learn`), so a sweep over seeds, learning rates, or any number
that an objective takes is its `vmap`:

    python -m experiments.sweep --config=configs/sweep.py:dpo --config.sweep.beta="(0.03, 0.1, 0.3)"

A method is a function of jaxalign/objectives, or an Algorithm of the online programs. For an objective of one's own: `run(config,
workdir, objective=...)`, whose data is chosen by the type that it says for them. The folder has metrics.jsonl, a line for each
setting and time; summary.json, means and spreads over seeds; curves.png.
"""

import itertools
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import figures, grpo, launch, named, online_dpo, ppo, ppo_ptx, reinforce, tiny_world
from jaxalign import keys, rollout, sample
from jaxalign.objectives import distill, online, preference, reward, supervised
from jaxalign.train import log, optim
from jaxalign.train.step import make_step
from jaxalign.types import TrainState

BETAS = np.geomspace(0.1, 30, 40, dtype=np.float32)  # prices of KL, of the best policies to compare with
MODULES = {"supervised": supervised, "distill": distill, "reward": reward, "preference": preference, "online": online}
ALGORITHMS = {
    "ppo": ppo.PPO,
    "ppo_ptx": ppo_ptx.PPO_PTX,
    "online_dpo": online_dpo.ONLINE_DPO,
    "reinforce": reinforce.REINFORCE,
    **{name: grpo.of_groups(getattr(online, name)) for name in ("grpo", "gspo", "rloo", "cispo")},
}


# --------------------------------------------------------- one experiment, a pure function of its setting


class Method(NamedTuple):
    """What tells one method from another; `world` is a tiny_world.World."""

    objective: Any  # (params, data, *, model, ...) -> (sum, sums)
    data: Any  # (world, params, i, **price of KL) -> what the next `updates` updates learn from, stacked
    updates: int
    start: Any  # (world) -> parameters
    measure: Any  # (world, params) -> {name: number}


def learn(world, setting: dict, *, config, method: Method) -> dict:
    """What a method comes to, before any update and after each of `run.looks` equal parts of them. -> {name: f32 [looks + 1]}

    What the updates themselves say is a mean over each part: f32 [looks].
    Args: setting: numbers, traced or not: learning_rate, and others of `config.sweep`.
    """
    setting = dict(setting)
    tx = optim.adam(steps=config.run.updates, **{**config.optim, "learning_rate": setting.pop("learning_rate")})
    price = {name: setting.pop(name) for name in ("kl_beta",) if name in setting}
    step = make_step(partial(method.objective, model=tiny_world.MODEL, **setting), tx)
    params = method.start(world)

    def update(state, i):
        return jax.lax.scan(step, state, method.data(world, state.params, i, **price))

    def part(state, i):
        state, metrics = jax.lax.scan(update, state, i)
        return state, (jax.tree.map(jnp.mean, metrics), method.measure(world, state.params))

    parts = jnp.arange(config.run.updates // method.updates).reshape(config.run.looks, -1)
    _, (said, seen) = jax.lax.scan(part, TrainState(jnp.int32(0), params, tx.init(params)), parts)
    before = method.measure(world, params)
    return said | {name: jnp.concatenate([x[None], seen[name]]) for name, x in before.items()}


def method_of(config, objective=None) -> Method:
    """The method that the config names, or one's own objective. Args: objective: (params, data, *, model, ...), `data` annotated.

    Raises ValueError for a method that is not known, an objective whose data the world has not, and numbers that do not divide.
    """
    if objective is None and config.method in ALGORITHMS:
        algorithm, updates = ALGORITHMS[config.method], ppo.updates_of(config.run)
        data, bound = partial(collect, config, algorithm), algorithm.objective(config, tiny_world.MODEL)
        method = Method(bound, data, updates, lambda world: world.ref, tiny_world.of_policy)
    else:
        method = _of_function(config, objective)
    if config.run.updates % (method.updates * config.run.looks):
        raise ValueError(
            f"run.updates = {config.run.updates}: it is a multiple of {method.updates} x run.looks = {config.run.looks}"
        )
    return method


def _of_function(config, own) -> Method:
    module, _, name = config.method.partition(".")
    if not name or module not in MODULES:
        raise ValueError(
            f"method = {config.method!r}: it is one of {', '.join(ALGORITHMS)}, or MODULE.FUNCTION of jaxalign/objectives"
        )
    objective, kind = named.resolve(MODULES[module], dict(config.objective, name=name), own)
    name = objective.func.__name__
    make = tiny_world.BY_NAME.get(name) or tiny_world.BY_TYPE.get(kind)
    if make is None:
        known = ", ".join(found.__name__ for found in tiny_world.BY_TYPE)
        raise ValueError(f"{name} learns from {kind}; the tiny world has {known}. Annotate `data` with one of them")

    def data(world, params, i):
        numbers = jax.random.randint(keys.key(world.seed, "shuffle", i), (config.run.batch,), 0, config.run.examples)
        return jax.tree.map(lambda x: x[None], make(world, params, numbers))

    def start(world):
        return world.ref | ({"classes": tiny_world.class_head()} if name == "classify" else {})

    return Method(objective, data, 1, start, {"policy": tiny_world.of_policy, "judge": tiny_world.of_judge}[config.learns])


def collect(config, algorithm, world, params, i, *, kl_beta=None):
    """A rollout, cut into the data of its updates, as experiments/ppo.py does it."""
    run, model = config.run, tiny_world.MODEL
    prompts_key, key, order_key = jax.random.split(keys.key(world.seed, "sample", i), 3)
    many = run.batch // run.group
    prompts = jax.random.randint(prompts_key, (many,), 0, len(tiny_world.PROMPTS) - tiny_world.HELD_OUT)
    before = jax.tree.map(lambda x: x[:, : -tiny_world.LENGTH], tiny_world.rows(prompts, 0))
    draw = partial(sample.sample, model, params, jax.random.split(key, run.batch), before, eos=tiny_world.EOS)
    batch, _, _ = draw(**config.sample)
    said = partial(rollout.said, model, batch=batch, temperature=config.sample.temperature)
    (logp, _, value), (ref_logp, _, _) = said(params), said(world.ref)
    if algorithm.greedy(config):
        likeliest, _, _ = draw(**{**config.sample, "temperature": 0.0})
        value = jnp.broadcast_to(tiny_world.reward_of(world, likeliest)[:, None], logp.shape)
    elif algorithm.critic(config) == "none":
        value = jnp.zeros_like(value)
    beta = config.kl.beta if kl_beta is None else kl_beta
    rolled = algorithm.assemble(config)(batch, logp, ref_logp, value, tiny_world.reward_of(world, batch), beta)

    def part(groups):
        rows = (groups[:, None] * run.group + jnp.arange(run.group)[None]).ravel()
        text = [tiny_world.demonstrations(world, params, i * run.batch + rows)] if "pretraining" in config else []
        return algorithm.data(config, model)(jax.tree.map(lambda x: x[rows], rolled), *text)

    orders = jax.vmap(lambda key: jax.random.permutation(key, many))(jax.random.split(order_key, run.epochs))
    return jax.vmap(part)(orders.reshape(ppo.updates_of(run), -1))


# --------------------------------------------------------- many of them


def settings_of(config) -> list[dict]:
    """Every combination of the numbers in `config.sweep`; a name without numbers keeps the config's own."""
    swept = {name: tuple(x) for name, x in config.sweep.items() if len(x)}
    swept.setdefault("learning_rate", (config.optim.learning_rate,))
    if not swept.get("seed"):
        raise ValueError("sweep.seed = (): one seed or more")
    return [dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())]


def sweep(config, objective=None) -> tuple[list[dict], dict]:
    """-> (the N settings, {name: f32 [N,...] as `learn` has it; best/...: of `frontier`, f32 [N,BETAS]})

    Two programs: one makes the worlds of all seeds, one learns all settings.
    """
    settings, method = settings_of(config), method_of(config, objective)
    seeds, of_setting = np.unique(np.array([setting["seed"] for setting in settings], np.uint32), return_inverse=True)
    numbers = {name: np.array([setting[name] for setting in settings], np.float32) for name in settings[0] if name != "seed"}
    worlds = jax.tree.map(lambda x: x[of_setting], tiny_world.of_seeds(seeds, **config.world))
    try:
        found = jax.jit(jax.vmap(partial(learn, config=config, method=method)))(worlds, numbers)
    except jax.errors.ConcretizationTypeError as error:
        raise ValueError(f"one of {', '.join(numbers)} chooses code here, so one program cannot have many of it") from error
    best = jax.jit(jax.vmap(partial(tiny_world.frontier, betas=BETAS)))(worlds)
    return settings, jax.tree.map(np.asarray, found | {f"best/{name}": x for name, x in best.items()})


def run(config, workdir: Path, objective=None):
    """A sweep, and what it leaves in its folder."""
    figures.pyplot()
    settings, found = sweep(config, objective)
    log.write_json(workdir / "config.json", log.plain(config))
    updates = np.linspace(0, config.run.updates, config.run.looks + 1).astype(int)
    with launch.replacing(workdir / "metrics.jsonl") as write:
        for n, setting in enumerate(settings):
            for k, step in enumerate(updates):
                curves = {name: x[n] for name, x in found.items() if not name.startswith("best/")}
                at = {name: x[k - (len(updates) - len(x))] for name, x in curves.items() if k >= len(updates) - len(x)}
                write(setting | {"step": int(step)} | {name: float(x) for name, x in at.items()})
    groups = group(settings)
    summary = {label or config.method: outcome(found, rows) for label, rows in groups.items()}
    log.write_json(workdir / "summary.json", summary)
    plot(workdir / "curves.png", updates, found, groups)
    for label, said in summary.items():
        log.say(f"{label}: " + ", ".join(f"{name} {x:.3f}" for name, x in said.items()))


def group(settings) -> dict:
    """{what is the same but for the seed: the rows of it}"""
    groups = {}
    varied = [name for name in settings[0] if name != "seed" and len({setting[name] for setting in settings}) > 1]
    for n, setting in enumerate(settings):
        groups.setdefault(", ".join(f"{name} {setting[name]:g}" for name in varied), []).append(n)
    return groups


def outcome(found, rows) -> dict:
    """Means over seeds at the end, and their std; gold/share: of the most gold that there can be at that KL."""
    said = {}
    for name in ("gold/held_out", "kl/held_out", "judge/accuracy"):
        if name in found:
            last = found[name][rows, -1]
            said |= {name: last.mean(), f"{name}_std": last.std(ddof=1) if len(rows) > 1 else 0.0}
    best = [
        np.interp(found["kl/held_out"][n, -1], found["best/kl/held_out"][n][::-1], found["best/gold/held_out"][n][::-1])
        for n in rows
    ]
    said["gold/share"] = said["gold/held_out"] / np.mean(best)
    return {name: float(x) for name, x in said.items()}


def plot(path: Path, updates, found, groups):
    """Gold over updates, mean and std over seeds; beside it gold over KL under the frontier, or a judge's accuracy."""
    pyplot = figures.pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(7, 2.4), layout="constrained")
    judge = "judge/accuracy" in found
    if not judge:
        kl, gold = (found[f"best/{name}/held_out"].mean(0) for name in ("kl", "gold"))
        right.plot(kl, gold, "--", color="0.6", label="best possible")
    for label, rows in groups.items():
        gold, kl = found["gold/held_out"][rows], found["kl/held_out"][rows]
        colour = figures.band(left, updates, gold, label=label or None)
        if judge:
            figures.band(right, updates, found["judge/accuracy"][rows], color=colour)
        else:
            right.plot(kl.mean(0), gold.mean(0), ".-", color=colour)
    left.set(xlabel="updates", ylabel="gold, held out")
    right.set(**({"xlabel": "updates", "ylabel": "accuracy"} if judge else {"xlabel": "KL, nats a response", "ylabel": "gold"}))
    if len(groups) > 1:
        left.legend(fontsize="small")
    if not judge:
        right.legend(fontsize="small")
        right.set_xlim(0, 1.3 * max(0.5, max(found["kl/held_out"][rows].mean(0).max() for rows in groups.values())))
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


if __name__ == "__main__":
    launch.main(run, "sweep")
