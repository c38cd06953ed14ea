"""The price of KL by gradient descent through training: python -m experiments.hypergradient --config=configs/hypergradient.py

What held-out prompts' gold reward comes to after K updates is a function of the objective's own numbers, and steps are pure, so it
has a derivative: forward through all K updates (`jax.jvp`), one more number beside each, whatever K is. Here it is that of beta in
DPO on a few noisy comparisons: too low a beta learns the noise, too high a beta learns nothing. All seeds are one program; log beta
follows the mean of their slopes.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import figures, launch, sweep, tiny_world
from jaxalign.train import log


def held_out_gold(log_number, world, *, config, method):
    """Gold reward of held-out prompts after `run.updates` updates, of an objective that has exp(log_number). -> f32 []"""
    setting = {"learning_rate": config.optim.learning_rate, config.tuned.name: jnp.exp(log_number)}
    return sweep.learn(world, setting, config=config, method=method)["gold/held_out"][-1]


def value_and_slope(config):
    """-> (log number, worlds) -> gold f32 [N] and its derivative by log number f32 [N], a compiled function."""
    gold = partial(held_out_gold, config=config, method=sweep.method_of(config))

    def one(log_number, world):
        return jax.jvp(partial(gold, world=world), (log_number,), (jnp.ones_like(log_number),))

    return jax.jit(jax.vmap(one, (None, 0)))


def run(config, workdir: Path):
    """Climb from each start; beside it the same curve by a sweep, which the gradient never saw."""
    figures.pyplot()
    tuned, of = config.tuned, value_and_slope(config)
    worlds = tiny_world.of_seeds(range(tuned.seeds), **config.world)
    lines = []
    with launch.replacing(workdir / "metrics.jsonl") as write:
        for start in tuned.start:
            x = np.float32(np.log(start))
            for step in range(tuned.steps + 1):
                gold, slope = (np.asarray(y) for y in of(x, worlds))
                line = {"start": start, "step": step, tuned.name: float(np.exp(x)), "gold/held_out": float(gold.mean())}
                line |= {"gold/slope": float(slope.mean()), "gold/slope_stderr": float(slope.std(ddof=1) / len(slope) ** 0.5)}
                write(line)
                lines.append(line)
                log.say(", ".join(f"{name} {value:.4g}" for name, value in line.items()))
                x = np.float32(x + np.clip(tuned.rate * slope.mean(), -tuned.most, tuned.most))
    grid = np.geomspace(*tuned.range, tuned.points)
    swept = np.array([np.asarray(of(np.float32(np.log(number)), worlds)[0]) for number in grid])  # [points,N]
    ends = [line for line in lines if line["step"] == tuned.steps]
    best = int(swept.mean(1).argmax())
    summary = {f"{tuned.name}/from_{line['start']:g}": line[tuned.name] for line in ends}
    summary |= {f"gold/from_{line['start']:g}": line["gold/held_out"] for line in ends}
    summary |= {f"{tuned.name}/of_sweep": float(grid[best]), "gold/of_sweep": float(swept[best].mean())}
    log.write_json(workdir / "config.json", log.plain(config))
    log.write_json(workdir / "summary.json", summary)

    pyplot = figures.pyplot()
    figure, axis = pyplot.subplots(figsize=(5, 3), layout="constrained")
    figures.band(axis, grid, swept.T, color="0.6", label="sweep")
    for start in tuned.start:
        path = [(line[tuned.name], line["gold/held_out"]) for line in lines if line["start"] == start]
        axis.plot(*zip(*path, strict=True), ".-", label=f"gradient, from {start:g}")
    axis.set(xscale="log", xlabel=tuned.name, ylabel="gold, held out")
    axis.legend(fontsize="small")
    figure.savefig(workdir / "curves.png", dpi=80)
    pyplot.close(figure)
    log.say(", ".join(f"{name} {x:.4g}" for name, x in summary.items()))


if __name__ == "__main__":
    launch.main(run, "hypergradient")
