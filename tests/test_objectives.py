"""Objectives are sums over what has weight: nothing else can enter them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxalign import score
from jaxalign.objectives import online, reward, supervised
from jaxalign.types import Batch, Pairs, Rollout

SEGMENTS = np.array([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 2, 2, 2, 0], [0, 1, 1, 1, 1, 1, 1, 0]])
WEIGHTS = np.array([[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 1, 1, 0], [0, 0, 1, 0, 1, 0, 1, 0]])
TOKENS = np.random.default_rng(2).integers(0, 14, SEGMENTS.shape)

LOSSES = {
    "sft": partial(supervised.sft, label_smoothing=0.1, z_loss=0.01),
    "reinforce": partial(online.reinforce, temperature=0.7),
    "ppo": partial(online.ppo, temperature=0.7, entropy_weight=0.1, value_weight=0.5, dual_clip=3.0),
    "pairwise": partial(reward.pairwise, centring=0.01),
}
per_token = pytest.mark.parametrize("name", ["sft", "reinforce", "ppo"])
every = pytest.mark.parametrize("name", list(LOSSES))


def batch_of(weights=WEIGHTS, tokens=TOKENS) -> Batch:
    return Batch(jnp.asarray(tokens, jnp.int32), jnp.asarray(SEGMENTS, jnp.int32), jnp.asarray(weights, jnp.float32))


def data_of(name, batch):
    """What the objective reads, with numbers of its own wherever it has any; the same for every batch."""
    if name == "sft":
        return batch
    if name == "pairwise":
        return Pairs(batch, batch.replace(tokens=(batch.tokens + 5) % 14), jnp.array([0.0, 0.3, 0.6, 1.0]))
    draw = np.random.default_rng(3)
    logp, ref_logp, value, token_reward, advantage, target = (jnp.asarray(x, jnp.float32) for x in draw.normal(size=(6, 4, 8)))
    return Rollout(batch, logp - 2, ref_logp - 2, value, token_reward, advantage, target, value[:, 0])


@pytest.fixture(scope="module")
def graded(tiny):
    """name -> compiled (data, params) -> ((sum, sums), gradient); compiled once for all tests here."""
    made = {}

    def call(name, data, params=tiny.params):
        if name not in made:
            made[name] = jax.jit(jax.value_and_grad(partial(LOSSES[name], model=tiny.model), has_aux=True))
        return made[name](params, data)

    return call


def same(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance), a, b)


def finite(tree):
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


@per_token
def test_a_batch_without_targets_is_zero_with_zero_gradient(graded, name):
    (loss, sums), grads = graded(name, data_of(name, batch_of(np.zeros_like(WEIGHTS))))
    assert loss == 0 and sums["weight"] == 0
    assert finite((sums, grads)) and not any(np.any(x) for x in jax.tree.leaves(grads))


@per_token
def test_rows_add_up(graded, name):
    """So a row of weight 0 does not count, and micro-batches cannot change a loss."""
    one, other = WEIGHTS.copy(), WEIGHTS.copy()
    one[[1, 2]], other[[0, 3]] = 0, 0
    parts = [graded(name, data_of(name, batch_of(weights))) for weights in (one, other)]
    whole = graded(name, data_of(name, batch_of()))
    assert whole[0][1]["weight"] == WEIGHTS.sum() and finite(parts)
    same(jax.tree.map(jnp.add, *parts), whole, 1e-4)


@per_token
def test_a_weight_is_a_multiplicity(graded, name):
    (loss, sums), grads = graded(name, data_of(name, batch_of()))
    (loss_3, sums_3), grads_3 = graded(name, data_of(name, batch_of(3 * WEIGHTS)))
    same(jax.tree.map(lambda x: 3 * x, (loss, sums, grads)), (loss_3, sums_3, grads_3), 1e-4)


@per_token
def test_what_has_no_weight_cannot_matter(graded, name):
    batch = batch_of()
    want = graded(name, data_of(name, batch))
    none = np.asarray(batch.targets) == 0
    first = (SEGMENTS > 0) & (np.pad(SEGMENTS, ((0, 0), (1, 0)))[:, :-1] != SEGMENTS)  # of a document: nothing predicts it
    tokens, weights = jnp.where(SEGMENTS > 0, TOKENS, 13), jnp.where(first | (SEGMENTS == 0), 5.0, batch.weights)
    data = data_of(name, batch.replace(tokens=tokens, weights=weights))
    if name != "sft":
        fields = ("logp", "ref_logp", "value", "reward", "advantage", "target")
        data = data.replace(**{field: jnp.where(none, jnp.nan, getattr(data, field)) for field in fields})
    same(graded(name, data), want)


@every
def test_gradients_are_those_of_finite_differences(tiny, name):
    data = data_of(name, batch_of())
    if name == "ppo":  # a little off the policy that sampled, away from the corners of the clips
        said, value = score.evaluate(tiny.model, tiny.params, data.batch, temperature=0.7)
        data = data.replace(logp=said.logp + 0.05, value=value + 0.05)
    loss = jax.jit(lambda params: LOSSES[name](params, data, model=tiny.model)[0])
    check_grads(loss, (tiny.params,), order=1, modes=["rev"], eps=2e-3, atol=3e-2, rtol=3e-2)


@every
def test_jit_and_vmap_agree(tiny, graded, name):
    data = data_of(name, batch_of())
    moved = jax.tree.map(lambda x: 0.9 * x, tiny.params)
    both = jax.tree.map(lambda *x: jnp.stack(x), tiny.params, moved)
    loss = partial(LOSSES[name], model=tiny.model)
    mapped = jax.jit(jax.vmap(lambda params: loss(params, data)))(both)
    alone = [graded(name, data, params)[0] for params in (tiny.params, moved)]
    same(mapped, jax.tree.map(lambda *x: jnp.stack(x), *alone), 1e-4)


def test_the_first_ratio_is_exactly_1(tiny, graded):
    data = data_of("ppo", batch_of())
    said, value = jax.jit(lambda params, batch: score.evaluate(tiny.model, params, batch, temperature=0.7))(tiny.params, data.batch)
    data = data.replace(logp=said.logp, value=value)
    (_, sums), _ = graded("ppo", data)
    assert sums["policy/ratio"] == sums["weight"] == WEIGHTS.sum()
    for name in ("policy/approx_kl", "policy/clipped", "policy/ratio_tail", "value/clipped"):
        assert sums[name] == 0


def test_ppo_starts_as_reinforce(tiny):
    """Where the policy is still the one that sampled, the gradient of the clipped surrogate is REINFORCE's."""
    data = data_of("ppo", batch_of())

    @jax.jit
    def grads(params):
        said, value = score.evaluate(tiny.model, params, data.batch)
        first = data.replace(logp=said.logp, value=value)
        ppo = jax.grad(lambda p: online.ppo(p, first, model=tiny.model, value_weight=0.0)[0])(params)
        return ppo, jax.grad(lambda p: online.reinforce(p, first, model=tiny.model)[0])(params)

    same(*grads(tiny.params), 1e-4)


def test_ppo_does_not_learn_from_what_is_clipped(tiny, graded):
    """All ratios are far above 1 + clip and all advantages positive: only entropy and value are left to learn from."""
    data = data_of("ppo", batch_of())
    said, _ = score.evaluate(tiny.model, tiny.params, data.batch, temperature=0.7)
    data = data.replace(logp=said.logp - 2, advantage=jnp.ones_like(said.logp))
    (_, sums), grads = graded("ppo", data)
    assert sums["policy/clipped"] == sums["policy/ratio_tail"] == sums["weight"]
    same(grads, graded("ppo", data.replace(advantage=jnp.zeros_like(said.logp)))[1])


def test_pairs_know_only_differences(tiny, graded):
    data = data_of("pairwise", batch_of())
    loss = jax.jit(partial(reward.pairwise, model=tiny.model))
    plain, sums = loss(tiny.params, data)
    head = tiny.params["scalar"]
    lifted = {**tiny.params, "scalar": {**head, "bias": head["bias"] + 3}}
    moved, moved_sums = loss(lifted, data)
    same(moved, plain, 1e-4)
    same(moved_sums["reward/chosen"], sums["reward/chosen"] + 3 * 4, 1e-4)

    none = data.replace(margin=jnp.zeros(4))
    forth, back = loss(tiny.params, none), loss(tiny.params, none.replace(chosen=none.rejected, rejected=none.chosen))
    same(forth[0] - back[0], -forth[1]["reward/difference"], 1e-4)  # log sigmoid(-d) = log sigmoid(d) - d
    same(forth[1]["reward/accuracy"] + back[1]["reward/accuracy"], forth[1]["weight"])
    tie, tie_sums = loss(tiny.params, none.replace(rejected=none.chosen))
    same(tie, 4 * np.log(2))
    assert tie_sums["reward/accuracy"] == 2
    assert plain > forth[0]  # a margin asks for more


def test_a_reward_reads_no_weights_and_no_padding(graded):
    data = data_of("pairwise", batch_of())
    blind = jax.tree.map(lambda x: x, data)
    blind = blind.replace(chosen=data.chosen.replace(weights=jnp.zeros(SEGMENTS.shape), tokens=jnp.where(SEGMENTS > 0, TOKENS, 9)))
    same(graded("pairwise", blind), graded("pairwise", data))
