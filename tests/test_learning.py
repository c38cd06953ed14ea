"""What is optimised gets better: each objective on a task small enough to see it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import keys, rollout, score, shard
from jaxalign.data import tables
from jaxalign.data.text import Document
from jaxalign.models import decoder
from jaxalign.objectives import online, reward, supervised
from jaxalign.ops import advantages
from jaxalign.sample import sample
from jaxalign.train import optim
from jaxalign.train.step import make_step
from jaxalign.types import TrainState

pytestmark = pytest.mark.slow

SEEDS, ROWS, LENGTH, EOS, WANTED = 3, 64, 8, 1, 3
SMALL = {"vocab": 12, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 8, "width": 16, "mlp": 32, "context": 32, "tied": True}


def learner(objective, *, steps, learning_rate, scalar=None, **architecture):
    """-> (Model, (key) -> TrainState, step)"""
    model = decoder.build(decoder.DecoderConfig(**SMALL | architecture, scalar=scalar))
    tx = optim.adam(learning_rate=learning_rate, steps=steps, decay="constant")

    def start(key):
        params = shard.unbox(model.init(key))
        return TrainState(jnp.int32(0), params, tx.init(params))

    return model, start, make_step(partial(objective, model=model), tx)


PPO = partial(online.ppo, value_clip=8.0, value_weight=0.5)  # values are of the size of the reward, 0 to 8
GROUP = 4
NORMALISED, LEFT_OUT = (partial(rollout.assemble_groups, group=GROUP, estimator=f) for f in (advantages.grpo, advantages.rloo))
LEARNERS = {  # objective, from rewards to advantages, samples of a prompt, updates of a rollout, learning rate
    "ppo": (PPO, rollout.assemble, 1, 4, 1e-2),
    "reinforce": (online.reinforce, rollout.assemble, 1, 1, 2e-2),
    "reinforce_leave_one_out": (online.reinforce, LEFT_OUT, GROUP, 1, 2e-2),
    "grpo": (online.grpo, NORMALISED, GROUP, 4, 1e-2),
    "gspo": (partial(online.gspo, clip_low=0.1, clip_high=0.1), NORMALISED, GROUP, 4, 1e-2),
    "cispo": (online.cispo, NORMALISED, GROUP, 4, 1e-2),
    "rloo": (online.rloo, LEFT_OUT, GROUP, 4, 1e-2),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_a_reward_rises_for_every_seed_and_a_price_of_kl_holds_it_down(name):
    """The reward of a response is how many of its 8 tokens are the wanted one. All seeds are one compiled program."""
    objective, assemble, group, updates, learning_rate = LEARNERS[name]
    model, start, step = learner(objective, steps=100, learning_rate=learning_rate, scalar=0.0)
    prompts = tables.pad([Document(np.array([2, n // group % 9 + 3]), np.zeros(2)) for n in range(ROWS)], 2, side="left")
    said = partial(rollout.said, model, temperature=1.0)

    def iteration(state, reference, row_keys, orders, beta):
        batch, _, _ = sample(model, state.params, row_keys, prompts, length=LENGTH, eos=EOS)
        scores = ((batch.tokens == WANTED) * batch.weights).sum(axis=1)
        logp, entropy, value = said(state.params, batch)
        data = assemble(batch, logp, said(reference, batch)[0], value, scores, beta)

        def update(state, rows):
            return step(state, jax.tree.map(lambda x: x[rows], data))[0], None

        return jax.lax.scan(update, state, orders)[0], rollout.describe(data, entropy, EOS)

    compiled = jax.jit(jax.vmap(iteration, (0, 0, 0, 0, None)))

    def learn(beta):
        state = jax.jit(jax.vmap(start))(jnp.stack([keys.key(seed, "init") for seed in range(SEEDS)]))
        reference, found = state.params, []
        for i in range(15):
            row_keys = jnp.stack([keys.of_rows(keys.key(seed, "sample", i), np.arange(ROWS)) for seed in range(SEEDS)])
            orders = np.stack([tables.order(ROWS, ROWS, seed=seed, step=i).reshape(updates, -1) for seed in range(SEEDS)])
            state, metrics = compiled(state, reference, row_keys, orders, jnp.float32(beta))
            found.append(jax.device_get(metrics))
        return {name: np.stack([metrics[name] for metrics in found]) for name in found[0]}  # [iterations, seeds]

    free, held = learn(0.0), learn(2.0)
    assert (free["reward/score"][0] < 1.2).all()  # of 8, for a policy that has learnt nothing
    assert (free["reward/score"][-3:].mean(axis=0) > 4).all(), free["reward/score"]
    assert (free["policy/kl"][0] == 0).all() and (free["policy/kl"][-1] > 2).all()
    assert (held["policy/kl"][-3:].mean(axis=0) < 0.5 * free["policy/kl"][-3:].mean(axis=0)).all(), held["policy/kl"]
    assert (held["reward/total"][-3:].mean(axis=0) > held["reward/total"][0] - 0.5).all(), held["reward/total"]
    if objective is PPO:  # the critic learns too
        assert held["value/explained"][-3:].mean() > 0.1, held["value/explained"]  # over seeds: its std is 0.1


def test_a_reward_model_recovers_a_hidden_preference():
    """Of two texts the one is preferred whose tokens are worth more on average; the worths are seen only through comparisons."""
    draw = np.random.default_rng(0)
    worth = draw.normal(0, 1, 12)

    def pairs(many):
        texts = [[draw.integers(0, 12, draw.integers(3, 9)) for _ in range(many)] for _ in range(2)]
        first = np.array([worth[a].mean() > worth[b].mean() for a, b in zip(*texts, strict=True)])
        documents = [[Document(x.astype(np.int32), np.ones(len(x), np.float32)) for x in side] for side in texts]
        ordered = [(a, b) if kept else (b, a) for a, b, kept in zip(*documents, first, strict=True)]
        return tables.pairs(*zip(*ordered, strict=True), np.zeros(many), 8)

    _, start, step = learner(reward.pairwise, steps=150, learning_rate=1e-2, scalar=0.1)
    train, held_out = pairs(512), pairs(400)
    orders = np.stack([tables.order(512, 64, seed=0, step=i) for i in range(150)])

    @jax.jit
    def fit(state, train, held_out):
        state, _ = jax.lax.scan(lambda state, rows: step(state, jax.tree.map(lambda x: x[rows], train)), state, orders)
        return step(state, held_out)[1]  # metrics are of the parameters before the update

    metrics = fit(start(jax.random.key(0)), *jax.tree.map(jnp.asarray, (train, held_out)))
    assert metrics["reward/accuracy"] > 0.85 and metrics["loss/total"] < 0.4


def test_supervised_training_memorises_a_small_corpus():
    draw = np.random.default_rng(0)
    texts = [np.concatenate([[n], draw.integers(0, 12, 9)]).astype(np.int32) for n in range(12)]  # the first token tells them apart
    rows = tables.pack([Document(x, np.ones(len(x), np.float32)) for x in texts], 24)  # two of them a row, and padding
    batch = tables.check(tables.pack_rows(rows, 24), 12)
    model, start, step = learner(supervised.sft, steps=200, learning_rate=1e-2, layers=2, width=32)

    @jax.jit
    def fit(state, batch):
        state, metrics = jax.lax.scan(lambda state, _: step(state, batch), state, None, length=200)
        return score.evaluate(model, state.params, batch)[0].logp, metrics

    logp, metrics = fit(start(jax.random.key(0)), jax.tree.map(jnp.asarray, batch))
    assert metrics["train/weight"][0] == 12 * 9 and metrics["loss/nll"][0] > 2
    assert metrics["loss/nll"][-1] < 0.2
    targets = np.asarray(batch.targets) > 0
    assert (np.asarray(logp)[targets] > np.log(0.5)).mean() > 0.95
