"""The library against exact answers: every response of a small language model is enumerated, and nothing is left to chance."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import chi2

from jaxalign import oracle, rollout, score, shard
from jaxalign.feedback import annotators
from jaxalign.objectives import distill, online, preference, reward, supervised
from jaxalign.ops import advantages, aggregate, best_of_n, divergences
from jaxalign.ops.masked import masked_sum
from jaxalign.sample import sample
from jaxalign.train.step import make_step
from jaxalign.types import Batch, Pairs, TrainState

VOCAB, LENGTH, EOS, BETA = 3, 3, 2, 0.4
PROMPT = [1]
MANY = 8192  # samples


MODEL = oracle.tabular(vocab=VOCAB, context=LENGTH, scalar=0.7, std=0.7)
REINFORCE = {t: oracle.ascent(partial(online.reinforce, model=MODEL, temperature=t)) for t in (1.0, 0.7)}
PPO = {t: oracle.ascent(partial(online.ppo, model=MODEL, temperature=t, value_weight=0.0)) for t in (1.0, 0.7)}
log_probs = jax.jit(partial(oracle.log_probs, MODEL), static_argnames="temperature")
policy_gradient = jax.jit(partial(oracle.policy_gradient, MODEL), static_argnames="temperature")
find = jax.jit(oracle.find)


class World(NamedTuple):
    """A policy that is not its reference, all its responses, and what they are worth."""

    params: dict
    ref: dict
    space: Batch
    logp: jax.Array  # [S]
    ref_logp: jax.Array
    reward: jax.Array
    exact: dict  # the policy gradient


@pytest.fixture(scope="module")
def world():
    params, ref = (jax.jit(lambda key: shard.unbox(MODEL.init(key)))(jax.random.key(seed)) for seed in (4, 104))
    space = oracle.responses(PROMPT, vocab=VOCAB, length=LENGTH, eos=EOS)
    logp, ref_logp = log_probs(params, space), log_probs(ref, space)
    worth = jnp.asarray(np.random.default_rng(0).normal(0.4, 1, len(space.tokens)), jnp.float32)
    return World(params, ref, space, logp, ref_logp, worth, policy_gradient(params, space, worth, ref_logp, BETA))


@partial(jax.jit, static_argnames=("temperature", "gamma", "lam", "whiten_advantages"))
def rolled(params, ref, batch, scores, beta=BETA, *, temperature=1.0, lam=1.0, whiten_advantages=False, **settings):
    """The Rollout of a batch, as a run makes it."""
    logp, _, value = rollout.said(MODEL, params, batch, temperature=temperature)
    ref_logp, _, _ = rollout.said(MODEL, ref, batch, temperature=temperature)
    settings |= {"lam": lam, "whiten_advantages": whiten_advantages}
    return rollout.assemble(batch, logp, ref_logp, value, scores, beta, **settings)


def without_critic(params):
    return {**params, "value": 0 * params["value"]}


def one_by_one(data):
    """A row a sample."""
    return jax.tree.map(lambda x: x[:, None], data)


@partial(jax.jit, static_argnames=("many", "temperature", "top_k", "top_p"))
def draw(params, key, *, many, **settings):
    prompts = Batch(jnp.full((many, 1), PROMPT[0]), jnp.ones((many, 1), jnp.int32), jnp.zeros((many, 1)))
    return sample(MODEL, params, jax.random.split(key, many), prompts, length=LENGTH, eos=EOS, **settings)


def next_logits(params, space):
    """Of each token, the logits that it was drawn from. -> [S,T,V]"""
    return MODEL.unembed(params, score.shift(MODEL.apply(params, space.tokens, space.segments)[0]))


def close(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance, rtol=1e-4), a, b)


# --------------------------------------------------------- the model and its responses


def test_a_prediction_depends_on_the_last_tokens_of_its_document_alone(world):
    rows = [  # plain, left-padded, packed, padded on both sides
        ([0, 1, 2, 0, 1], [1, 1, 1, 1, 1]),
        ([0, 0, 1, 2, 0], [0, 1, 1, 1, 1]),
        ([2, 1, 1, 2, 0], [1, 2, 2, 2, 2]),
        ([9, 0, 1, 2, 9], [0, 1, 1, 1, 0]),
    ]
    tokens, segments = (jnp.array(x) for x in zip(*rows, strict=True))

    @jax.jit
    def said(params):
        hidden, _ = MODEL.apply(params, tokens, segments)
        return MODEL.unembed(params, hidden), MODEL.scalar(params, hidden)

    logits, values = jax.device_get(said(world.params))
    seen = {}  # prefix: the predictions made after it
    for r, (row, documents) in enumerate(rows):
        for t in range(5):
            document = [token for token, segment in zip(row[: t + 1], documents, strict=False) if segment == documents[t] > 0]
            seen.setdefault(tuple(document[-LENGTH:]), set()).add((*logits[r, t].tolist(), float(values[r, t])))
    assert len(seen) == 10 and all(len(found) == 1 for found in seen.values())
    assert len(set.union(*seen.values())) == 10  # and no two prefixes have the same
    assert world.params["logits"].shape == (1 + 3 + 9 + 27, VOCAB) and world.params["value"].shape == (40,)


def test_without_a_scalar_head_there_is_no_value(world):
    model = oracle.tabular(vocab=VOCAB, context=1)
    params = jax.eval_shape(lambda: shard.unbox(model.init(jax.random.key(0))))
    assert params.keys() == {"logits"} and jax.eval_shape(partial(score.evaluate, model), params, world.space)[1] is None
    with pytest.raises(ValueError, match="size"):
        jax.eval_shape(partial(score.last_scalar, model), params, world.space)


@pytest.mark.parametrize("vocab, length, eos, many", [(3, 3, -1, 27), (3, 3, 2, 15), (3, 3, 0, 15), (4, 2, 1, 13), (2, 1, 0, 2)])
def test_there_is_every_response_once(vocab, length, eos, many):
    space = jax.device_get(oracle.responses([1, eos], vocab=vocab, length=length, eos=eos))
    said = [tuple(row[2:][on[2:] > 0].tolist()) for row, on in zip(space.tokens, space.weights, strict=True)]
    assert len(said) == len(set(said)) == many
    for response, tokens, segments in zip(said, space.tokens, space.segments, strict=True):
        assert eos not in response[:-1] and (len(response) == length or response[-1] == eos)
        assert not tokens[2 + len(response) :].any() and segments.sum() == 2 + len(response)


@pytest.mark.parametrize("eos, temperature", [(-1, 1.0), (2, 0.6)])
def test_probabilities_of_all_responses_sum_to_1(world, tiny, eos, temperature):
    for model, params, vocab in ((MODEL, world.params, VOCAB), (tiny.model, tiny.params, 14)):
        space = oracle.responses([1], vocab=vocab, length=2, eos=eos)
        logp = jax.jit(partial(oracle.log_probs, model, temperature=temperature))(params, space)
        assert float(jnp.exp(logp).sum()) == pytest.approx(1, abs=1e-5)


def test_what_cannot_be_enumerated_is_refused():
    with pytest.raises(ValueError, match="responses are too many to enumerate"):
        oracle.responses([1], vocab=50_000, length=3)
    with pytest.raises(ValueError, match="prefixes are too many"):
        oracle.tabular(vocab=100, context=4)
    with pytest.raises(ValueError, match="groups of responses are too many"):
        oracle.groups(jnp.zeros(200), 3)
    for prompt, length in (([], 2), ([1], 0)):
        with pytest.raises(ValueError, match="both need one or more"):
            oracle.responses(prompt, vocab=3, length=length)


# --------------------------------------------------------- the sampler's law


CUTS = [{}, {"temperature": 0.7}, {"top_k": 2}, {"temperature": 1.3, "top_p": 0.75}]


@pytest.mark.parametrize("cut", CUTS, ids=["whole", "cold", "top_k", "hot top_p"])
def test_samples_come_as_often_as_enumeration_says(world, cut):
    batch, logp, drawn_logp = jax.device_get(draw(world.params, jax.random.key(5), many=MANY, **cut))
    which = np.asarray(find(world.space, batch))
    assert which.min() >= 0
    enumerated = np.asarray(log_probs(world.params, world.space, temperature=cut.get("temperature", 1.0)))
    close(logp.sum(1), enumerated[which])
    law = np.zeros(len(enumerated))
    law[which] = np.exp(drawn_logp.sum(1))  # whatever was not drawn is cut, or the sum would not be 1
    assert law.sum() == pytest.approx(1, abs=1e-4)
    if "top_k" in cut or "top_p" in cut:
        assert (law == 0).sum() > 2
    else:
        close(law, np.exp(enumerated))
    counts, mean = np.bincount(which, minlength=len(law))[law > 0], MANY * law[law > 0]
    assert mean.min() > 5
    assert chi2.sf(((counts - mean) ** 2 / mean).sum(), len(mean) - 1) > 1e-3


def test_a_row_that_is_no_response_is_not_found(world):
    other = world.space.replace(tokens=world.space.tokens.at[3, 0].set(0))
    np.testing.assert_array_equal(find(world.space, other), [0, 1, 2, -1, *range(4, len(world.logp))])


# --------------------------------------------------------- exact answers


def test_the_policy_gradient_is_the_score_function_identity(world):
    """E[(r - beta log(pi/ref)) d log pi]: Williams 1992, and the same by differentiating the sum over all responses."""
    scores = jax.jit(jax.jacobian(log_probs))(world.params, world.space)
    net = world.reward - BETA * (world.logp - world.ref_logp)
    close(world.exact, jax.tree.map(lambda d: jnp.tensordot(jnp.exp(world.logp) * net, d, 1), scores))
    assert float(optax.tree.norm(world.exact)) > 0.1


def test_nothing_beats_the_optimum(world):
    star, value = oracle.optimum(world.ref_logp, world.reward, BETA)

    def of_logits(z):
        return oracle.regularised(jax.nn.log_softmax(z), world.ref_logp, world.reward, BETA)

    assert float(jnp.exp(star).sum()) == pytest.approx(1, abs=1e-5)
    at_star, slope = jax.jit(jax.value_and_grad(of_logits))(star)
    assert float(at_star) == pytest.approx(float(value), abs=1e-5)
    close(slope, jnp.zeros_like(star))
    noise = jnp.asarray(np.random.default_rng(1).normal(0, 0.3, (50, len(star))), jnp.float32)
    others = jax.jit(jax.vmap(of_logits))(jnp.concatenate([star[None] + noise, world.logp[None]]))
    assert float(others.max()) < float(value)
    assert float(oracle.total_variation(star, star)) == 0 < float(oracle.total_variation(star, world.logp)) < 1


def test_the_entropy_and_kl_of_responses_are_sums_over_their_tokens(world):
    """The chain rule, by `score` and `ops.divergences.exact`: expectations over prefixes of what one token adds."""

    @jax.jit
    def of_tokens(params, ref, space):
        entropy = score.evaluate(MODEL, params, space)[0].entropy
        kl = divergences.exact(next_logits(params, space), next_logits(ref, space))
        return [masked_sum(x, space.targets, 1) for x in (entropy, kl)]

    entropy, kl = of_tokens(world.params, world.ref, world.space)
    close(oracle.expected(world.logp, entropy), oracle.entropy(world.logp))
    close(oracle.expected(world.logp, kl), divergences.kl(world.logp, world.ref_logp))


@pytest.mark.parametrize("ties", [False, True])
def test_the_best_of_n_is_that_of_all_groups_of_n(world, ties):
    worth = np.round(world.reward) if ties else np.asarray(world.reward)
    rows, logp = jax.device_get(oracle.groups(world.logp, 3))
    first = np.take_along_axis(rows, np.argmax(worth[rows], 1)[:, None], 1)[:, 0]  # of ties any, for order is chance
    best = jax.jit(oracle.best_of, static_argnums=2)
    law = best(world.logp, worth, 3)
    close(jnp.exp(law), np.bincount(first, np.exp(logp), len(law)))
    assert float(oracle.expected(law, worth)) > float(oracle.expected(world.logp, worth)) + 0.2
    assert 0.1 < float(divergences.kl(law, world.logp)) < float(best_of_n.kl(3))
    close(best(world.logp, worth, 1), world.logp)


# --------------------------------------------------------- estimators of the policy gradient


@pytest.mark.parametrize("baseline", ["none", "constant", "mean", "critic"])
@pytest.mark.parametrize(
    "estimators, temperature", [(REINFORCE, 1.0), (PPO, 1.0), (PPO, 0.7)], ids=["reinforce", "ppo", "cold ppo"]
)
def test_reinforce_and_the_first_step_of_ppo_are_the_policy_gradient(world, estimators, temperature, baseline):
    params, at = world.params if baseline == "critic" else without_critic(world.params), {"temperature": temperature}
    logp, ref_logp = (log_probs(p, world.space, **at) for p in (params, world.ref))
    data = rolled(params, world.ref, world.space, world.reward, **at)
    constant = {"constant": 3.0, "mean": oracle.regularised(logp, ref_logp, world.reward, BETA)}.get(baseline, 0.0)
    data = data.replace(advantage=data.advantage - constant * world.space.targets)
    mean, _ = oracle.moments(estimators[temperature], params, one_by_one(data), logp)
    close(mean, policy_gradient(params, world.space, world.reward, ref_logp, BETA, **at))


@pytest.mark.parametrize("which", ["tabular", "decoder"])
def test_weighed_by_their_probabilities_all_responses_are_one_batch_with_the_exact_gradient(world, tiny, which):
    model, params, vocab = {"tabular": (MODEL, world.params, VOCAB), "decoder": (tiny.model, tiny.params, 14)}[which]
    space = oracle.responses([1], vocab=vocab, length=2, eos=EOS)
    worth = jnp.asarray(np.random.default_rng(1).normal(0, 1, len(space.tokens)), jnp.float32)

    @jax.jit
    def both(params):
        weighed = oracle.weigh(space, oracle.log_probs(model, params, space))
        data = rollout.blank(*space.tokens.shape).replace(batch=weighed, advantage=worth[:, None] * space.targets)
        found = oracle.ascent(partial(online.reinforce, model=model))(params, data)
        exact = oracle.policy_gradient(model, params, space, worth, jnp.zeros_like(worth), 0.0)
        return jax.tree.map(lambda g: g * len(worth), found), exact

    found, exact = both(params)
    close(found, exact, 1e-4)
    assert float(optax.tree.norm(exact)) > 0.1


@pytest.fixture(scope="module")
def drawn(world):
    """(Batch, scores) of what the sampler says."""
    batch, _, _ = draw(world.params, jax.random.key(11), many=MANY)
    return batch, world.reward[find(world.space, batch)]


def row_by_row(run, batch, scores):
    return jax.tree.map(lambda x: x[:, 0], jax.vmap(run)(*one_by_one((batch, scores))))


def late(data):
    return data.replace(advantage=jnp.roll(data.advantage, 1, axis=1))


FAULTS = {
    "integer rewards": lambda run, batch, scores: run(batch, scores.astype(jnp.int32).astype(jnp.float32)),
    "no price of KL": lambda run, batch, scores: run(batch, scores, 0.0),
    "lambda below 1": lambda run, batch, scores: run(batch, scores, lam=0.5),
    "discounted": lambda run, batch, scores: run(batch, scores, gamma=0.8),
    "a token late": lambda run, batch, scores: late(run(batch, scores)),
    "whitened row by row": lambda run, batch, scores: row_by_row(partial(run, whiten_advantages=True), batch, scores),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_checker_finds_a_planted_bias(world, drawn, fault):
    data = FAULTS[fault](partial(rolled, world.params, world.ref), *drawn)
    verdict = oracle.check_unbiased(REINFORCE[1.0], world.params, one_by_one(data), world.exact)
    assert not verdict.unbiased and verdict.worst > verdict.limit + 1, verdict


@pytest.mark.parametrize("estimators", [REINFORCE, PPO], ids=["reinforce", "ppo"])
def test_the_checker_passes_what_the_sampler_draws(world, drawn, estimators):
    data = one_by_one(rolled(world.params, world.ref, *drawn))
    verdict = oracle.check_unbiased(estimators[1.0], world.params, data, world.exact)
    assert verdict.unbiased and verdict.worst > 1 and 3.5 < verdict.limit < 5, verdict
    assert jax.tree.structure(verdict.z) == jax.tree.structure(world.params)


def test_the_checker_fails_as_often_as_it_says_and_at_every_nan():
    exact = {"a": jnp.zeros(20), "never": jnp.float32(0)}

    def estimator(params, x):
        return {"a": params + x[0], "never": 0 * x[0, 0]}

    noise = jnp.asarray(np.random.default_rng(0).normal(0, 1, (40, 100, 1, 20)), jnp.float32)
    failed = [not oracle.check_unbiased(estimator, 0.0, x, exact, alpha=0.2).unbiased for x in noise]
    assert 2 <= sum(failed) <= 15  # of 40, where 8 are to be expected
    many = noise.reshape(-1, 1, 20)
    assert oracle.check_unbiased(estimator, 0.0, many, exact).unbiased
    assert not oracle.check_unbiased(estimator, 0.1, many, exact).unbiased
    assert not oracle.check_unbiased(estimator, jnp.nan, many, exact).unbiased
    assert not oracle.check_unbiased(lambda params, x: exact, 0.0, many, {**exact, "never": jnp.float32(0.1)}).unbiased


def test_a_critic_lowers_the_variance_and_samples_vary_as_enumeration_says(world, drawn):
    space, params = world.space, without_critic(world.params)
    plain = rolled(params, world.ref, space, world.reward + 3)

    same = jnp.stack([(space.tokens[:, None, :t] == space.tokens[None, :, :t]).all(-1) for t in range(1 + LENGTH)], -1)
    mass = jnp.exp(world.logp)[None, :, None] * same  # [S,S,T] of the responses that begin as each does, before token t
    value = (mass * plain.advantage[None]).sum(1) / mass.sum(1)  # the mean return after that prefix: the best critic
    critic = plain.replace(advantage=(plain.advantage - value) * space.targets)

    sizes = []
    for data in (plain, critic):
        mean, variance = oracle.moments(REINFORCE[1.0], params, one_by_one(data), world.logp)
        close(mean, world.exact)
        sizes.append(float(sum(x.sum() for x in jax.tree.leaves(variance))))
    assert sizes[1] < 0.3 * sizes[0]

    batch, scores = drawn
    seen = rolled(params, world.ref, batch, scores + 3)
    _, variance = oracle.moments(REINFORCE[1.0], params, one_by_one(seen), jnp.full(MANY, -jnp.log(MANY)))
    assert sum(float(x.sum()) for x in jax.tree.leaves(variance)) == pytest.approx(sizes[0], rel=0.05)


@pytest.mark.parametrize("own, share", [(False, 1.0), (True, 0.5)], ids=["of the others", "of all"])
def test_a_mean_of_all_samples_as_baseline_shrinks_the_gradient_and_one_of_the_others_does_not(world, own, share):
    """Where each of k = 2 samples is in its own baseline, (k - 1)/k of the gradient is left. Kool et al. 2019."""
    net, targets = world.reward - BETA * (world.logp - world.ref_logp), world.space.targets
    rows, logp = oracle.groups(world.logp, 2)
    baseline = net[rows].mean(1, keepdims=True) if own else net[rows][:, ::-1]
    data = jax.tree.map(lambda x: x[rows], rolled(world.params, world.ref, world.space, world.reward))
    data = data.replace(advantage=(net[rows] - baseline)[..., None] * targets[rows])
    mean, _ = oracle.moments(REINFORCE[1.0], world.params, data, logp)
    close(mean, jax.tree.map(lambda g: share * g, world.exact))


# --------------------------------------------------------- divergences


def test_k1_and_k3_are_unbiased_and_k2_is_off_by_what_enumeration_says(world):
    pair, targets = (world.logp, world.ref_logp), world.space.targets
    kl = float(divergences.kl(*pair))
    tokens = [jax.jit(partial(score.evaluate, MODEL))(p, world.space)[0].logp for p in (world.params, world.ref)]
    for k in (divergences.k1, divergences.k3):
        assert float(oracle.expected(world.logp, k(*pair))) == pytest.approx(kl, abs=1e-5)
        assert float(oracle.expected(world.logp, masked_sum(k(*tokens), targets, 1))) == pytest.approx(kl, abs=1e-5)
    log_ratio = np.asarray(pair[0]) - np.asarray(pair[1])
    half_square = float((np.exp(pair[0]) * log_ratio**2).sum() / 2)
    assert float(oracle.expected(world.logp, divergences.k2(*pair))) == pytest.approx(half_square, abs=1e-5)
    assert abs(half_square - kl) > 0.1


@pytest.mark.parametrize("k", ["k1", "k2", "k3"])
def test_as_losses_on_samples_k1_has_no_gradient_k2_has_that_of_kl_and_k3_that_of_the_reverse(world, k):
    def on_samples(params):
        return oracle.expected(world.logp, getattr(divergences, k)(log_probs(params, world.space), world.ref_logp))

    def wanted(params):
        logp = log_probs(params, world.space)
        return {"k1": 0.0 * logp.sum(), "k2": divergences.kl(logp, world.ref_logp), "k3": divergences.kl(world.ref_logp, logp)}[k]

    close(jax.jit(jax.grad(on_samples))(world.params), jax.jit(jax.grad(wanted))(world.params))


def test_k2_of_tokens_forgets_that_a_token_chooses_what_comes_after_it(world):
    """Summed a token at a time, its gradient is that of each token's KL with the prefixes held, which is not KL's."""
    space = world.space

    def on_samples(params):
        logp, ref_logp = (score.evaluate(MODEL, p, space)[0].logp for p in (params, world.ref))
        return oracle.expected(world.logp, masked_sum(divergences.k2(logp, ref_logp), space.targets, 1))

    def prefixes_held(params):
        by_token = divergences.exact(next_logits(params, space), next_logits(world.ref, space))
        return oracle.expected(world.logp, masked_sum(by_token, space.targets, 1))

    def whole(params):
        return divergences.kl(log_probs(params, space), world.ref_logp)

    found, held, true = jax.jit(lambda params: [jax.grad(f)(params) for f in (on_samples, prefixes_held, whole)])(world.params)
    close(found, held)
    assert float(jnp.abs(found["logits"] - true["logits"]).max()) > 0.01


# --------------------------------------------------------- what training reaches


def start(params, tx):
    return TrainState(jnp.int32(0), params, tx.init(params))


def test_ppo_on_its_samples_reaches_the_optimum(world):
    """Sampled, scored, priced and updated as in a run. At the optimum every sample has advantage 0, so it comes to rest there."""
    tx = optax.adam(optax.linear_schedule(0.1, 0.0, 600))
    update = make_step(partial(online.ppo, model=MODEL, value_clip=10.0, value_weight=0.5), tx)

    def iteration(state, key):
        batch, _, _ = draw(state.params, key, many=256)
        data = rolled(state.params, world.ref, batch, world.reward[find(world.space, batch)], lam=0.95)
        return jax.lax.scan(lambda state, _: (update(state, data)[0], None), state, None, length=4)

    keys = jax.random.split(jax.random.key(3), 150)
    state, _ = jax.jit(lambda state: jax.lax.scan(iteration, state, keys))(start(world.ref, tx))
    star, value = oracle.optimum(world.ref_logp, world.reward, BETA)
    logp = log_probs(state.params, world.space)
    assert float(oracle.total_variation(world.ref_logp, star)) > 0.3
    assert float(oracle.total_variation(logp, star)) < 0.005
    assert float(value - oracle.regularised(logp, world.ref_logp, world.reward, BETA)) < 1e-4


@partial(jax.jit, static_argnames="objective")
def descend(params, data, *, objective):
    """Parameters after 400 steps on the same data."""
    tx = optax.adam(optax.linear_schedule(0.1, 0.0, 400))
    update = make_step(objective, tx)
    return jax.lax.scan(lambda state, _: (update(state, data)[0], None), start(params, tx), None, length=400)[0].params


SFT = partial(supervised.sft, model=MODEL)


@pytest.mark.parametrize("how, limit", [("weighed", 1e-3), ("sampled", 0.03)])
def test_sft_on_the_optimum_reaches_it(world, how, limit):
    star, _ = oracle.optimum(world.ref_logp, world.reward, BETA)
    if how == "weighed":
        data = oracle.weigh(world.space, star)
    else:
        rows = jax.random.categorical(jax.random.key(2), star, shape=(4096,))
        data = jax.tree.map(lambda x: x[rows], world.space)
    logp = log_probs(descend(world.ref, data, objective=SFT), world.space)
    assert float(oracle.total_variation(logp, star)) < limit


def comparisons(world):
    """Every response against every other, both ways. -> (Pairs [P], numbers of the chosen, of the rejected)"""
    first, second = np.nonzero(~np.eye(len(world.logp), dtype=bool))
    sides = [jax.tree.map(lambda x, rows=rows: x[rows], (world.space, world.ref_logp)) for rows in (first, second)]
    (chosen, ref_chosen), (rejected, ref_rejected) = sides
    return Pairs(chosen, rejected, jnp.zeros(len(first)), ref_chosen, ref_rejected), first, second


def in_shares(objective):
    """An objective of pairs, each counted as often as somebody chose so: data are (Pairs, f32 [P])."""

    def total(params, data):
        pairs, share = data
        each = jax.vmap(lambda pair: objective(params, jax.tree.map(lambda x: x[None], pair))[0])(pairs)
        return (share * each).sum(), {"weight": share.sum()}

    return total


JUDGE = oracle.tabular(vocab=VOCAB, context=len(PROMPT) + LENGTH, scalar=0.1)  # a value for each whole response
PAIRWISE = in_shares(partial(reward.pairwise, model=JUDGE))
DPO = in_shares(partial(preference.dpo, model=MODEL, beta=BETA))


def test_bradley_terry_recovers_the_rewards_behind_noisy_labels(world):
    """Up to a constant, in units of the noise: exactly from their probabilities, and from labels within their own error."""
    gold, noise = np.asarray(world.reward, float), 1.5
    pairs, first, second = comparisons(world)
    p = annotators.probability(gold[first], gold[second], temperature=noise)
    centred = (gold - gold.mean()) / noise
    blank = jax.tree.map(jnp.zeros_like, shard.unbox(JUDGE.init(jax.random.key(0))))

    def recover(share):
        params = descend(blank, (pairs, jnp.asarray(share, jnp.float32)), objective=PAIRWISE)
        found = np.asarray(score.last_scalar(JUDGE, params, world.space))
        return found - found.mean()

    np.testing.assert_allclose(recover(p), centred, atol=2e-3)

    labels = 200  # of each pair, each way round
    draws = np.random.default_rng(4).random((labels, len(p)))
    wins = annotators.prefer(gold[first], gold[second], draws, temperature=noise)[0].sum(0)
    share, information = np.zeros((2, len(gold), len(gold)))
    share[first, second] += wins
    share[second, first] += labels - wins
    information[first, second] = -2 * labels * p * (1 - p)  # Fisher's
    information -= np.diag(information.sum(1))
    error = np.sqrt(np.diag(np.linalg.pinv(information)))
    z = (recover(share[first, second]) - centred) / error
    assert 0.4 < np.sqrt((z**2).mean()) < 1.6 and np.abs(z).max() < 4


def test_dpo_on_all_comparisons_reaches_the_optimum(world):
    star, _ = oracle.optimum(world.ref_logp, world.reward, BETA)
    pairs, first, second = comparisons(world)
    share = annotators.probability(world.reward[first], world.reward[second], temperature=1.0)
    params = descend(world.ref, (pairs, jnp.asarray(share, jnp.float32)), objective=DPO)
    assert float(oracle.total_variation(log_probs(params, world.space), star)) < 2e-3


# --------------------------------------------------------- groups of samples


ALMOST_NO_EPS = partial(advantages.grpo, eps=1e-6)
WHOLE_RESPONSES = partial(online.grpo, aggregation=aggregate.seq_mean_token_sum)


@partial(jax.jit, static_argnames=("objective", "estimator"))
def of_pairs(world, beta, *, objective, estimator):
    """The exact mean of an objective's ascent over all groups of two samples, as a run makes them."""
    rows, logp = oracle.groups(world.logp, 2)
    ref_logp = jax.tree.map(lambda x: x[rows], rollout.said(MODEL, world.ref, world.space, temperature=1.0)[0])
    here = jax.tree.map(lambda x: x[rows], (world.space, rollout.said(MODEL, world.params, world.space, temperature=1.0)[0]))

    def assemble(batch, logp, ref_logp, scores):
        return rollout.assemble_groups(batch, logp, ref_logp, 0 * logp, scores, beta, group=2, estimator=estimator)

    data = jax.vmap(assemble)(*here, ref_logp, world.reward[rows])
    return oracle.moments(oracle.ascent(partial(objective, model=MODEL)), world.params, data, logp)[0]


@pytest.mark.parametrize("objective", [online.rloo, online.reinforce, WHOLE_RESPONSES], ids=["rloo", "reinforce", "grpo"])
@pytest.mark.parametrize("estimator, share", [(advantages.rloo, 1.0), (advantages.dr_grpo, 0.5)], ids=["of the others", "of all"])
def test_groups_without_a_std_are_the_policy_gradient(world, objective, estimator, share):
    """Its price of KL included; (k - 1)/k of it where each of k = 2 samples is in its own baseline."""
    close(of_pairs(world, BETA, objective=objective, estimator=estimator), jax.tree.map(lambda g: share * g, world.exact))


def test_a_std_makes_of_two_samples_who_won_and_not_by_how_much(world):
    """Of k = 2 the advantage is +-1/sqrt(2), so what GRPO climbs is the chance to win: another gradient than the reward's."""
    mean = of_pairs(world, 0.0, objective=WHOLE_RESPONSES, estimator=ALMOST_NO_EPS)
    wins = (jnp.exp(world.logp)[None] * jnp.sign(world.reward[:, None] - world.reward[None])).sum(1)
    close(mean, policy_gradient(world.params, world.space, wins / 2**0.5, world.ref_logp, 0.0))
    plain = policy_gradient(world.params, world.space, world.reward, world.ref_logp, 0.0)["logits"].ravel()
    found = mean["logits"].ravel()
    assert float(found @ plain / jnp.linalg.norm(found) / jnp.linalg.norm(plain)) < 0.99


def test_a_kl_in_the_loss_is_that_of_tokens_with_prefixes_held_and_an_exact_one_varies_less(world):
    """By k2 of samples, and by what the reference says of every token; k3's is the reverse KL's."""
    still = rolled(world.params, world.ref, world.space, world.reward).replace(advantage=0 * world.space.weights)
    taught = jax.jit(partial(distill.taught, model=MODEL, k=VOCAB))(world.ref, world.space)
    summed = partial(online.grpo, aggregation=aggregate.seq_mean_token_sum)
    both = partial(online.mixed, objective=summed, other=distill.reverse_kl, other_weight=1.0)

    def held(params, way):
        pair = [next_logits(params, world.space), next_logits(world.ref, world.space)]
        return oracle.expected(world.logp, masked_sum(divergences.exact(*pair[::way]), world.space.targets, 1))

    forward, reverse = jax.jit(lambda params: [jax.grad(held)(params, way) for way in (1, -1)])(world.params)
    sizes = {}
    for name, objective, data, wanted in (
        ("k2", partial(summed, kl=divergences.k2, kl_weight=1.0), still, forward),
        ("exact", both, online.Mixed(still, taught), forward),
        ("k3", partial(summed, kl_weight=1.0), still, reverse),
    ):
        estimator = oracle.ascent(partial(objective, model=MODEL))
        mean, variance = oracle.moments(estimator, world.params, one_by_one(data), world.logp)
        close(mean, jax.tree.map(lambda g: -g, wanted))
        sizes[name] = float(sum(x.sum() for x in jax.tree.leaves(variance)))
    assert sizes["exact"] < 0.7 * sizes["k2"]


def test_responses_of_an_earlier_policy_are_corrected_token_by_token(world):
    """Of one token, the gradient is exact; a cap, which bounds the weights, biases it."""
    space = oracle.responses(PROMPT, vocab=VOCAB, length=1)
    worth = world.reward[:VOCAB]
    drawn_logp, logp = log_probs(world.ref, space), log_probs(world.params, space)  # the reference drew
    exact = policy_gradient(world.params, space, worth, logp, 0.0)
    plain = rolled(without_critic(world.params), world.ref, space, worth, 0.0)
    old = rollout.said(MODEL, world.ref, space, temperature=1.0)[0]
    found = []
    for data in (plain, *(rollout.corrected(plain, old, cap=cap) for cap in (1e3, 1.0))):
        found.append(oracle.moments(REINFORCE[1.0], world.params, one_by_one(data), drawn_logp)[0]["logits"])
    close(found[1], exact["logits"])
    assert min(float(jnp.abs(x - exact["logits"]).max()) for x in (found[0], found[2])) > 0.02


def test_the_greedy_baseline_of_remax_leaves_the_gradient_and_lowers_its_variance(world):
    """Li et al. 2024: as a value of every token, the likeliest response's score is a baseline."""
    params, reward = without_critic(world.params), world.reward + 3
    greedy = reward[jnp.argmax(world.logp)]
    sizes = []
    for value in (0.0, greedy):
        logp, _, _ = rollout.said(MODEL, params, world.space, temperature=1.0)
        value = jnp.full_like(logp, value)
        data = rollout.assemble(world.space, logp, logp, value, reward, 0.0, lam=1.0, whiten_advantages=False)
        mean, variance = oracle.moments(REINFORCE[1.0], params, one_by_one(data), world.logp)
        close(mean, policy_gradient(params, world.space, reward, world.logp, 0.0))
        sizes.append(float(sum(x.sum() for x in jax.tree.leaves(variance))))
    assert sizes[1] < 0.5 * sizes[0]
