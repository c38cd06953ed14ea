"""A crowd of annotators with faults, in the tiny world, and a judge that learns from what they say (experiments/annotators.py).

E examples, each of a prompt and two of the reference's responses; A annotators; N worlds, a seed each.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import tiny_world
from jaxalign import keys
from jaxalign.feedback import annotators
from jaxalign.objectives import reward
from jaxalign.ops.preference import MARGINS_SMALL
from jaxalign.train import optim
from jaxalign.train.step import make_step
from jaxalign.types import Array, Pairs, TrainState

MEASURES = ("judge/accuracy", "gold/held_out", "length/held_out")
HELD_OUT = jax.tree.map(lambda x: x[-tiny_world.HELD_OUT :], tiny_world.ROWS)  # Batch of [P,S,T]


class Drawn(NamedTuple):
    """What is asked about, and what chance has for the annotators, in an order of each example's own."""

    prompts: Array  # i32 [E]
    responses: Array  # i32 [E,2]
    gold: Array  # f32 [E,2]
    length: Array  # f32 [E,2] words
    who: Array  # i32 [E,A]
    taste: Array  # f32 [E,A,2], of std 1 under the reference
    noise: Array  # f32 [E,A,2] uniform
    look: Array  # f32 [E,A] uniform
    first: Array  # f32 [A] normal, and
    steps: Array  # f32 [E,A] of std 0.1: zero points of scales, of annotators in the order of the crowd


class Told(NamedTuple):
    """What a judge may learn from, [E]: which objective does says what of it is read."""

    prompts: Array
    responses: Array  # i32 [E,2]
    won: Array  # shares of the annotators
    tied: Array
    margin: Array
    rating: Array  # of the first response


class Lab(NamedTuple):
    config: Any
    worlds: tiny_world.World  # of leaves [N,...], a seed each
    drawn: list[Drawn]  # of each seed
    learn: dict  # of each objective: (worlds, told, count) -> parameters
    scores: Any  # (parameters, batch [P,S,T]) -> f32 [N,P,S]
    measure: Any  # (worlds, scores of held-out rows) -> {name: f32 [N]}


# --------------------------------------------------------- the crowd


def lengths():
    """Words of every response. -> f32 [P,S]"""
    everything = tiny_world.all_rows()
    return (everything.weights * (everything.tokens != tiny_world.EOS)).sum(-1)


def draw(world, *, examples: int, crowd: int) -> Drawn:
    everything = tiny_world.all_rows()
    tables_key, first_key = jax.random.split(keys.key(world.seed, "init", 3))
    words = everything.weights * (everything.tokens != tiny_world.EOS)
    tables = jax.random.normal(tables_key, (crowd, tiny_world.VOCAB, tiny_world.VOCAB))
    tastes = (words[None] * tables[:, everything.tokens[..., :1], everything.tokens]).sum(-1)  # [A,P,S]
    p = jnp.exp(world.ref_logp) / len(tiny_world.PROMPTS)
    tastes = jax.vmap(tiny_world.standard, (0, None))(tastes, p)

    def chance(number):
        order, noise, look, step = jax.random.split(keys.key(world.seed, "annotate", number, 1), 4)
        who = jax.random.permutation(order, crowd)
        noise, look = jax.random.uniform(noise, (crowd, 2)), jax.random.uniform(look, (crowd,))
        return who, noise, look, 0.1 * jax.random.normal(step, (crowd,))

    numbers = jnp.arange(examples)
    found, (who, noise, look, steps) = tiny_world.examples(world, numbers, 2), jax.vmap(chance)(numbers)
    at = (found.prompts[:, None], found.responses)
    taste = tastes[who[:, :, None], at[0][:, None], at[1][:, None]]
    first = jax.random.normal(first_key, (crowd,))
    return Drawn(*found[:2], world.gold[at], lengths()[at], who, taste, noise, look, first, steps)


def opinions(drawn: Drawn, *, temperature, sloppiness=0.0, disagreement=0.0, bias=0.0):
    """f64 [E,A,2]"""
    gold, length = drawn.gold[:, None], drawn.length[:, None]
    liked = annotators.liking(gold, taste=drawn.taste, disagreement=disagreement, length=length, bias=bias)
    felt = annotators.opinions(liked, drawn.noise, temperature=temperature)
    return annotators.careless(felt, drawn.look, sloppiness=sloppiness)


def comparisons(drawn: Drawn, felt, *, several=1, within=0.0, cuts=(), smoothing=0.0) -> Told:
    """What the first annotators of each example say who are asked to compare, as shares; cuts: by how much, in Llama 2's words."""
    felt = felt[:, :several]
    won, tied = annotators.compare(felt, within=within)
    won = smoothing + (1 - 2 * smoothing) * won.mean(1)
    degree = annotators.how_much(felt, cuts=cuts).mean(1) if cuts else np.zeros(len(won))
    margin = np.interp(degree, range(4), sorted(MARGINS_SMALL.values()))
    return Told(drawn.prompts, drawn.responses, won, tied.mean(1), margin, np.zeros(len(won)))


def by_one(drawn: Drawn, felt) -> Told:
    """The comparisons of one and the same annotator."""
    return comparisons(drawn, felt[drawn.who == 0][:, None])


def ratings(drawn: Drawn, felt, *, spread: float, levels: int, count: int, centred: bool) -> Told:
    """What the first annotator of each example says who is asked to rate the first response.

    centred: less the mean of his ratings, of the first `count`.
    """
    who, nothing = drawn.who[:, 0], np.zeros(len(felt))
    zero = annotators.zero_points(drawn.first, drawn.steps, spread=spread)[np.arange(len(who)), who]
    said = annotators.rate(felt[:, 0, 0], zero, levels=levels) - (levels + 1) / 2
    if centred:
        totals, times = (np.bincount(who[:count], x, len(drawn.first)) for x in (said[:count], None))
        said = said - (totals / np.maximum(times, 1))[who]
    return Told(drawn.prompts, drawn.responses, nothing, nothing, nothing, said)


# --------------------------------------------------------- a judge


def pairs(told: Told) -> Pairs:
    chosen, rejected = (jnp.where((told.won > 0.5) == first, *told.responses.T) for first in (True, False))
    return Pairs(tiny_world.rows(told.prompts, chosen), tiny_world.rows(told.prompts, rejected), told.margin)


def judged(told: Told) -> reward.Judged:
    return reward.Judged(*(tiny_world.rows(told.prompts, side) for side in told.responses.T), told.won, told.tied)


def rated(told: Told) -> reward.Rated:
    return reward.Rated(tiny_world.rows(told.prompts, told.responses[:, 0]), told.rating)


def learn(world, told: Told, count, *, objective, data, config):
    """The parameters of a judge that has learnt from the first `count` of these."""
    tx = optim.adam(steps=config.run.updates, **config.optim)
    step = make_step(partial(objective, model=tiny_world.MODEL), tx)

    def update(state, i):
        numbers = jax.random.randint(keys.key(world.seed, "shuffle", i), (config.run.batch,), 0, count)
        return step(state, data(jax.tree.map(lambda x: x[numbers], told)))[0], None

    state = TrainState(jnp.int32(0), world.ref, tx.init(world.ref))
    return jax.lax.scan(update, state, jnp.arange(config.run.updates))[0].params


def outcome(world, scores) -> dict:
    """tiny_world.of_scores, and words a response of the policy that is best by them."""
    best = jnp.exp(tiny_world.best_by(world, scores))
    return tiny_world.of_scores(world, scores) | {"length/held_out": (best * lengths()[-tiny_world.HELD_OUT :]).sum(-1).mean()}


def lab_of(config) -> Lab:
    seeds, crowd = range(config.seed, config.seed + config.run.seeds), config.crowd.annotators
    worlds = tiny_world.of_seeds(seeds, **config.world)
    drawn = jax.device_get(jax.jit(jax.vmap(partial(draw, examples=config.run.examples, crowd=crowd)))(worlds))
    objectives = {
        "pairwise": (reward.pairwise, pairs),
        "soft_pairwise": (reward.soft_pairwise, judged),
        "pairwise_with_ties": (partial(reward.pairwise_with_ties, theta=config.help.theta), judged),
        "rating": (reward.rating, rated),
    }
    made = {
        name: jax.jit(jax.vmap(partial(learn, objective=objective, data=data, config=config), (0, 0, None)))
        for name, (objective, data) in objectives.items()
    }
    scores = jax.jit(jax.vmap(tiny_world.scores_of, (0, None)))
    drawn = [jax.tree.map(lambda x, n=n: x[n], drawn) for n in range(len(seeds))]
    return Lab(config, worlds, drawn, made, scores, jax.jit(jax.vmap(outcome)))


def ask(lab: Lab, say, about: dict, **how) -> Told:
    """say(drawn, opinions, **how) of every seed. -> Told of leaves [N,E]. Args: about: the annotators, arguments of `opinions`."""
    said = [say(drawn, opinions(drawn, **about), **how) for drawn in lab.drawn]
    return jax.tree.map(lambda *x: np.stack(x).astype(np.int32 if x[0].dtype == np.int32 else np.float32), *said)


def held_out_scores(lab: Lab, told: Told, count: int, objective: str = "soft_pairwise"):
    return lab.scores(lab.learn[objective](lab.worlds, told, count), HELD_OUT)


def judge(lab: Lab, told: Told, count: int, objective="soft_pairwise") -> dict:
    """What a judge comes to that learns from the first `count`. -> {measure: f64 [N]}"""
    return measured(lab, held_out_scores(lab, told, count, objective))


def measured(lab: Lab, scores) -> dict:
    return {name: np.asarray(x, float) for name, x in lab.measure(lab.worlds, scores).items() if name in MEASURES}
