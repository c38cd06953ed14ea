"""Objectives are sums over what has weight: nothing else can enter them."""

import inspect
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxalign import score
from jaxalign.contract import check_objective
from jaxalign.objectives import distill, online, preference, reward, supervised
from jaxalign.ops import aggregate, divergences
from jaxalign.types import Batch, Model, Pairs, Rollout

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


# --------------------------------------------------------- objectives of whole responses, on a model that is quick to compile

VOCAB, WIDTH, CLASSES, ROWS, LENGTH = 7, 5, 3, 4, 8
COUNTS = np.random.default_rng(4).integers(1, 5, (ROWS, 3, 2))  # tokens of prompt and response, of up to three texts of a row
TEXTS = np.random.default_rng(5).integers(0, VOCAB, (ROWS, 3, LENGTH))


def _read(params, tokens, segments, cache=None, at=0):
    """Each token sees the mean of its document up to itself, of which padding is no part."""
    seen = jnp.tril(segments[:, :, None] == segments[:, None]) * (segments > 0)[:, None]
    seen = seen / jnp.maximum(seen.sum(-1, keepdims=True), 1)
    return jnp.tanh(seen @ params["embed"]["tokens"][tokens]), cache


TOY = Model(
    config=SimpleNamespace(scalar=0.0),
    init=None,
    apply=_read,
    unembed=lambda params, hidden: hidden @ params["head"],
    scalar=lambda params, hidden: hidden @ params["scalar"],
    cache=None,
)


def toy_params(seed):
    draw = np.random.default_rng(seed)
    shapes = {"embed": {"tokens": (VOCAB, WIDTH)}, "head": (WIDTH, VOCAB), "scalar": (WIDTH,)}
    shapes["classes"] = {"kernel": (WIDTH, CLASSES), "bias": (CLASSES,)}
    is_shape = {"is_leaf": lambda x: isinstance(x, tuple)}
    return jax.tree.map(lambda shape: jnp.asarray(draw.normal(size=shape), jnp.float32), shapes, **is_shape)


PARAMS, OTHERS = toy_params(0), toy_params(1)


def texts(which, side, alive):
    """A text a row, at this side of it; a row that is not alive has none, but junk."""
    tokens, segments = np.full((ROWS, 3, LENGTH), 0 if side == "left" else VOCAB - 1), np.zeros((ROWS, 3, LENGTH), int)
    weights = np.full(tokens.shape, np.nan)
    for row, k in np.argwhere(np.ones((ROWS, 3), bool) & alive[:, None]):
        prompt, size = COUNTS[row, k, 0], COUNTS[row, k].sum()
        at = slice(0, size) if side == "left" else slice(LENGTH - size, LENGTH)
        tokens[row, k, at], segments[row, k, at] = TEXTS[row, k, :size], 1
        weights[row, k, at] = np.arange(size) >= prompt
    return Batch(*(jnp.asarray(x[:, which], t) for x, t in ((tokens, jnp.int32), (segments, jnp.int32), (weights, jnp.float32))))


def three(side, alive):
    return tuple(texts(which, side, alive) for which in range(3))


def of_rows(name, alive):
    x = np.random.default_rng(sum(map(ord, name))).uniform(0, 0.5, ROWS)
    return jnp.asarray(np.where(alive, x, np.nan), jnp.float32)


def pairs(side, alive):
    refs = (of_rows(name, alive) - 5 for name in ("ref_chosen", "ref_rejected"))
    return Pairs(texts(0, side, alive), texts(1, side, alive), of_rows("margin", alive), *refs)


def judged(side, alive):
    return reward.Judged(texts(0, side, alive), texts(1, side, alive), of_rows("won", alive), of_rows("tied", alive))


def ranked(side, alive):
    return reward.Ranked(three(side, alive), jnp.array([[1, 2, 3], [2, 1, 2], [1, 1, 2], [3, 2, 1]], jnp.int32))


def rated(side, alive):
    return reward.Rated(texts(0, side, alive), of_rows("rating", alive))


def labelled(side, alive):
    z0 = jnp.where(alive, 0.3, jnp.nan)
    return preference.Labelled(texts(0, side, alive), jnp.array([True, False, True, False]), of_rows("ref", alive) - 5, z0)


def classified(side, alive):
    return supervised.Classified(three(side, alive), jnp.array([0, 2, 1, 1], jnp.int32))


def taught(side, alive):
    data = TEACH(OTHERS, texts(0, side, alive), k=3)
    none = data.batch.targets[..., None] == 0
    return data.replace(logp=jnp.where(none, jnp.nan, data.logp), ids=jnp.where(none, 99, data.ids))


def rolled(side, alive):
    """Per-token numbers follow their tokens; where no target stands there is none."""
    batch = texts(0, side, alive)
    numbers = np.random.default_rng(6).normal(size=(6, ROWS, LENGTH))
    at = (slice(None), *np.nonzero(np.asarray(batch.segments) > 0))
    arrays = np.full(numbers.shape, np.nan)
    arrays[at] = numbers[:, *np.nonzero(np.arange(LENGTH) < COUNTS[:, 0].sum(1)[:, None] * alive[:, None])]
    arrays = jnp.asarray(np.where(np.asarray(batch.targets) > 0, arrays, np.nan), jnp.float32)
    return Rollout(batch, arrays[0] - 2, arrays[1] - 2, *arrays[2:], score=of_rows("score", alive))


def stepwise(side, alive):
    data = rolled(side, alive)
    return reward.Stepwise(data.batch, jax.nn.sigmoid(data.advantage))


def beside_text(side, alive):
    return online.Mixed(rolled(side, alive), texts(1, side, alive))


TEACH = jax.jit(partial(distill.taught, model=TOY), static_argnames=("k", "temperature"))
WHOLE = {
    "dpo": (partial(preference.dpo, nll_weight=0.3), pairs),
    "conservative_dpo": (preference.conservative_dpo, pairs),
    "robust_dpo": (preference.robust_dpo, pairs),
    "ipo": (preference.ipo, pairs),
    "ipo_per_token": (partial(preference.ipo, per_token=True), pairs),
    "slic": (preference.slic, pairs),
    "exo": (preference.exo, pairs),
    "nca": (preference.nca, pairs),
    "alpha_dpo": (preference.alpha_dpo, pairs),
    "js_dpo": (preference.js_dpo, pairs),
    "cpo": (preference.cpo, pairs),
    "simpo": (preference.simpo, pairs),
    "orpo": (preference.orpo, pairs),
    "kto": (partial(preference.kto, undesirable_weight=1.5), labelled),
    "pairwise": (partial(reward.pairwise, centring=0.01), pairs),
    "noisy_pairwise": (partial(reward.noisy_pairwise, noise=0.1, centring=0.01), pairs),
    "difference": (reward.difference, pairs),
    "soft_pairwise": (reward.soft_pairwise, judged),
    "pairwise_with_ties": (partial(reward.pairwise_with_ties, theta=1.5), judged),
    "best_of_k": (reward.best_of_k, ranked),
    "k_wise": (reward.k_wise, ranked),
    "rating": (reward.rating, rated),
    "process": (reward.process, stepwise),
    "classify": (supervised.classify, classified),
    "choose": (supervised.choose, classified),
    "semantic_sft": (partial(supervised.semantic_sft, distance_weight=0.5), lambda side, alive: texts(0, side, alive)),
    "cosine_sft": (partial(supervised.semantic_sft, distance_weight=0.5, cosine=True), lambda side, alive: texts(0, side, alive)),
    "forward_kl": (partial(distill.forward_kl, nll_weight=0.5, temperature=2.0), taught),
    "reverse_kl": (distill.reverse_kl, taught),
    "jsd": (distill.jsd, taught),
    "reinforce_critic": (partial(online.reinforce, value_weight=0.5), rolled),
    "grpo": (partial(online.grpo, kl_weight=0.1, entropy_weight=0.1, dual_clip=3.0), rolled),
    "dr_grpo": (partial(online.grpo, aggregation=partial(aggregate.seq_sum_const, length=9)), rolled),
    "dapo": (partial(online.grpo, aggregation=aggregate.token_mean, clip_high=0.28), rolled),
    "gspo": (partial(online.gspo, clip_low=0.2, clip_high=0.2), rolled),
    "cispo": (partial(online.cispo, kl_weight=0.1, kl=divergences.k2), rolled),
    "rloo": (partial(online.rloo, aggregation=aggregate.seq_mean_token_sum), rolled),
    "ppo_ptx": (partial(online.mixed, objective=online.ppo, other=supervised.sft, other_weight=0.3), beside_text),
}
GROUPED = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo")
ALL = np.ones(ROWS, bool)


@pytest.mark.parametrize("name", WHOLE)
def test_rows_and_nothing_else_make_the_sum(name):
    """Unchanged by where padding is and what it holds, by the order of rows, by cutting the batch, and by rows that hold nothing
    but NaN; a batch of such rows is 0, with gradient 0."""
    objective, data_of = WHOLE[name]
    graded = jax.jit(jax.value_and_grad(partial(objective, model=TOY), has_aux=True))
    whole = graded(PARAMS, data_of("right", ALL))
    assert finite(whole) and whole[0][0] != 0 and whole[0][1]["weight"] > 0
    assert any(np.any(x) for x in jax.tree.leaves(whole[1]))

    same(graded(PARAMS, data_of("left", ALL)), whole, 1e-4)
    same(graded(PARAMS, jax.tree.map(lambda x: x[jnp.array([2, 0, 3, 1])], data_of("right", ALL))), whole, 1e-4)
    some = np.array([True, False, False, True])
    parts = [graded(PARAMS, data_of("right", alive)) for alive in (some, ~some)]
    same(jax.tree.map(jnp.add, *parts), whole, 1e-4)
    nothing = graded(PARAMS, data_of("right", 0 * ALL > 0))
    assert not any(np.any(x) for x in jax.tree.leaves(nothing))  # NaN would be something


def test_every_objective_is_held_to_the_laws():
    """A public function of (params, data, *, model, ...) is in a table of this file."""
    held = {getattr(f, "func", f) for f in [*LOSSES.values(), *(f for f, _ in WHOLE.values())]}
    for module in (distill, online, preference, reward, supervised):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and {"data", "model"} <= inspect.signature(function).parameters.keys():
                assert function in held or name.startswith("_") or name == "with_reference", f"no test holds {name} to the laws"


# --------------------------------------------------------- rewards


@cache
def compiled(objective, **hyper):
    return jax.jit(partial(objective, model=TOY, **hyper))


def run(objective, data, **hyper):
    return compiled(objective, **hyper)(PARAMS, data)


def loss_of(objective, data, **hyper):
    return run(objective, data, **hyper)[0]


def test_comparisons_of_two_agree():
    """Best of two, a ranking of two, a judge who is sure and an annotator who never errs are Bradley and Terry."""
    data = pairs("right", ALL).replace(margin=jnp.zeros(ROWS))
    want = loss_of(reward.pairwise, data)
    two = reward.Ranked((data.chosen, data.rejected), jnp.array([[1, 2]] * ROWS))
    same(loss_of(reward.best_of_k, two), want)
    same(loss_of(reward.k_wise, two), want)
    ones, zeros = jnp.ones(ROWS), jnp.zeros(ROWS)
    same(loss_of(reward.soft_pairwise, reward.Judged(data.chosen, data.rejected, ones, zeros)), want)
    same(loss_of(reward.noisy_pairwise, data, noise=0.0), want)
    swapped = data.replace(chosen=data.rejected, rejected=data.chosen)
    same(0.9 * loss_of(reward.noisy_pairwise, data, noise=0.1) + 0.1 * loss_of(reward.noisy_pairwise, swapped, noise=0.1), want)


def test_a_judge_may_have_no_preference():
    data = pairs("right", ALL)
    tie = reward.Judged(data.chosen, data.rejected, jnp.zeros(ROWS), jnp.ones(ROWS))
    swapped = tie.replace(first=tie.second, second=tie.first)
    for objective in (reward.soft_pairwise, partial(reward.pairwise_with_ties, theta=2.0)):
        same(loss_of(objective, tie), loss_of(objective, swapped))
        equal = loss_of(objective, tie.replace(second=tie.first))
        assert equal < loss_of(objective, tie)
    same(equal, -ROWS * np.log(1 / 3))  # (theta - 1)/(theta + 1)
    _, sums = run(reward.soft_pairwise, tie)
    same(sums["reward/accuracy"], 0.5 * ROWS)


def test_a_difference_and_a_rating_are_met_exactly_at_no_loss():
    data = pairs("right", ALL)
    chosen, rejected = (score.last_scalar(TOY, PARAMS, side) for side in (data.chosen, data.rejected))
    same(loss_of(reward.difference, data.replace(margin=chosen - rejected)), 0)
    same(loss_of(reward.difference, data.replace(margin=chosen - rejected + 2)), 4 * ROWS)
    same(loss_of(reward.rating, reward.Rated(data.chosen, chosen)), 0)
    some = jnp.array([1.0, jnp.nan, 1.0, jnp.nan])
    loss, sums = run(reward.rating, reward.Rated(data.chosen, chosen + some))
    same((loss, sums["weight"]), (2, 2))


def test_a_response_that_is_not_there_is_in_no_comparison():
    first, second, third = three("right", ALL)
    gone = third.replace(segments=0 * third.segments)
    rank, label = jnp.array([[1, 2, 3], [2, 1, 2], [1, 1, 2], [3, 2, 1]]), jnp.array([0, 1, 1, 0])
    for objective in (reward.best_of_k, reward.k_wise):
        with_it = reward.Ranked((first, second, gone), rank)
        same(run(objective, with_it), run(objective, reward.Ranked((first, second), rank[:, :2])))
    choose = partial(supervised.choose, lm_weight=0.0)
    with_it, without = (supervised.Classified(answers, label) for answers in ((first, second, gone), (first, second)))
    same(run(choose, with_it), run(choose, without))


def test_ties_of_a_ranking_make_no_pair():
    data = ranked("right", ALL)
    _, sums = run(reward.k_wise, data.replace(rank=jnp.ones((ROWS, 3), jnp.int32)))
    assert sums["weight"] == 0
    every = data.replace(rank=jnp.array([[1, 1, 1]] * ROWS))
    same(loss_of(reward.best_of_k, every), 0)  # any of them is the best


# --------------------------------------------------------- classes


def test_classes_and_answers_come_in_no_order():
    """Similarity is the same for both orders of a pair; answers may be shuffled (GPT-1 section 3.3)."""
    data = classified("right", ALL)
    first, second, third = data.texts
    turned = data.replace(texts=(third, first, second))
    same(loss_of(supervised.classify, turned), loss_of(supervised.classify, data))
    same(loss_of(supervised.choose, turned.replace(label=(data.label + 1) % 3)), loss_of(supervised.choose, data))


def test_the_language_model_is_an_auxiliary():
    data = classified("right", ALL)
    loss, sums = run(supervised.classify, data, lm_weight=0.5)
    same(loss, sums["loss/class"] + 0.5 * sums["loss/lm"])
    grads = jax.jit(jax.grad(lambda params: supervised.classify(params, data, model=TOY, lm_weight=0.0)[0]))(PARAMS)
    assert not grads["head"].any() and grads["classes"]["kernel"].any()


def test_a_class_head_can_be_placed(tiny):
    made = supervised.class_head(jax.random.key(0), tiny.config.width, CLASSES)
    assert made["kernel"].names == ("embed", None)
    params = {**tiny.params, "classes": jax.tree.map(jnp.asarray, {name: box.value for name, box in made.items()})}
    tokens = jnp.ones((2, 4), jnp.int32)
    data = supervised.Classified((Batch(tokens, tokens, jnp.ones((2, 4))),), jnp.array([0, 2]))
    loss, sums = jax.jit(partial(supervised.classify, model=tiny.model, lm_weight=0.0))(params, data)
    assert sums["weight"] == 2
    same(loss / 2, np.log(CLASSES), 0.2)  # a new head knows nothing


# --------------------------------------------------------- teachers


@pytest.mark.parametrize("objective", [distill.forward_kl, distill.reverse_kl, distill.jsd], ids=lambda f: f.__name__)
@pytest.mark.parametrize("k", [3, VOCAB])
def test_a_student_learns_nothing_from_itself(objective, k):
    data = TEACH(PARAMS, texts(0, "right", ALL), k=k, temperature=2.0)
    learn = jax.value_and_grad(partial(objective, model=TOY, temperature=2.0), has_aux=True)
    (loss, sums), grads = jax.jit(learn)(PARAMS, data)
    same(loss, 0, 1e-5)
    assert all(np.abs(x).max() < 1e-4 for x in jax.tree.leaves(grads))
    assert sums["teacher/agreed"] == sums["weight"]


def test_a_teacher_of_the_whole_vocabulary_is_exact_and_a_shorter_one_a_lower_bound():
    batch = texts(0, "right", ALL)
    logits = [TOY.unembed(params, score.shift(TOY.apply(params, batch.tokens, batch.segments)[0])) for params in (OTHERS, PARAMS)]
    weights = batch.targets
    for objective, exact in (
        (distill.forward_kl, divergences.exact(*logits)),
        (distill.reverse_kl, divergences.exact(*logits[::-1])),
        (distill.jsd, divergences.generalised_jsd(*map(jax.nn.log_softmax, logits), beta=0.5)),
    ):
        got = [loss_of(objective, TEACH(OTHERS, batch, k=k)) for k in (1, 3, VOCAB - 1, VOCAB)]
        want = (exact * jnp.where(weights > 0, weights, 0)).sum()
        same(got[-1], want, 1e-4)
        assert 0 < got[0] < got[1] < want and got[2] <= want + 1e-4


# --------------------------------------------------------- samples without a critic


@pytest.mark.parametrize("name", [*GROUPED, "reinforce_critic", "ppo_ptx"])
def test_an_objective_of_samples_keeps_the_contract(name):
    """Whatever it divides by, padding, order, micro-batches and devices change nothing."""
    objective, data_of = WHOLE[name]
    data = jax.tree.map(lambda x: np.nan_to_num(np.asarray(x)), data_of("right", ALL))
    laws = ("row order", "micro-batches", "pad length", "weight 0", "masked rows", "masked batch", "gradient", "devices")
    laws = laws if name != "cispo" else tuple(law for law in laws if law != "gradient")  # it stops that of its weights
    check_objective(partial(objective, model=TOY), PARAMS, data, laws=laws, unit="row", examples=4)


@pytest.mark.parametrize("name", [*GROUPED, "ppo_ptx"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_at_the_policy_that_sampled_every_ratio_is_1(name, temperature):
    objective, data_of = WHOLE[name]
    data = data_of("left", ALL)
    inner = partial(online.ppo if name == "ppo_ptx" else objective, temperature=temperature)
    objective = partial(objective, objective=inner) if name == "ppo_ptx" else inner
    first = data.rollout if name == "ppo_ptx" else data

    @jax.jit
    def loss(params, data):
        said, value = score.evaluate(TOY, params, first.batch, temperature=temperature)
        here = first.replace(logp=said.logp, ref_logp=said.logp, value=value)
        return objective(params, data.replace(rollout=here) if name == "ppo_ptx" else here, model=TOY)[1]

    sums = loss(PARAMS, data)
    same(sums["policy/ratio"], sums["weight"])
    known = ["policy/clipped", "policy/approx_kl", "policy/ratio_tail"] + (["loss/kl"] if name != "ppo_ptx" else [])
    assert [float(sums[key]) for key in known] == [0] * len(known)


def on_policy(**changed):
    data = rolled("right", ALL)
    said, _ = score.evaluate(TOY, PARAMS, data.batch)
    rows = jnp.asarray(np.random.default_rng(7).normal(size=ROWS), jnp.float32)
    return data.replace(logp=said.logp, advantage=jnp.where(data.batch.targets > 0, rows[:, None], jnp.nan), **changed)


def gradient_of(objective, data, **hyper):
    return jax.jit(jax.grad(lambda params: objective(params, data, model=TOY, **hyper)[0]))(PARAMS)


@pytest.mark.parametrize(
    "objective, aggregation",
    [
        (online.gspo, aggregate.seq_mean_token_mean),
        (online.cispo, aggregate.token_mean),
        (online.rloo, aggregate.seq_mean_token_sum),
    ],
    ids=["gspo", "cispo", "rloo"],
)
def test_the_first_update_of_all_is_the_policy_gradient(objective, aggregation):
    """RLOO's loss is the same for all tokens of a response, so that its mean over them is the sum of GRPO's."""
    data = on_policy()
    own = aggregate.seq_mean_token_mean if objective is online.rloo else aggregation
    same(gradient_of(objective, data, aggregation=own), gradient_of(online.grpo, data, aggregation=aggregation), 1e-4)


def test_reinforce_is_the_sum_of_the_first_update_of_grpo():
    data = on_policy()
    same(gradient_of(online.reinforce, data), gradient_of(online.grpo, data, aggregation=aggregate.seq_mean_token_sum), 1e-4)


def test_what_ratios_do_to_a_loss_is_said():
    """A good token above 1 + clip_high teaches GRPO nothing and CISPO as much as clip_high allows; GSPO sees whole responses."""
    data = on_policy(ref_logp=jnp.zeros((ROWS, LENGTH)))
    good = data.replace(logp=data.logp - 2, advantage=jnp.ones((ROWS, LENGTH)))  # ratio e^2 everywhere
    for objective in (online.grpo, online.gspo, online.rloo):
        _, sums = run(objective, good, clip_high=0.28)
        same(sums["policy/clipped"], sums["weight"])
        assert not any(np.any(x) for x in jax.tree.leaves(gradient_of(objective, good, clip_high=0.28)))
    kept = gradient_of(online.cispo, good, clip_high=0.28)
    plain = gradient_of(online.cispo, good.replace(logp=data.logp), clip_high=0.28)
    same(kept, jax.tree.map(lambda g: 1.28 * g, plain), 1e-4)
    sizes = data.batch.targets.sum(1)
    long = jnp.argmax(sizes)
    one = data.replace(logp=data.logp.at[long].add(-0.1))
    _, sums = run(online.gspo, one, clip_low=0.2, clip_high=0.2)
    same(sums["policy/ratio"], ROWS - 1 + np.exp(0.1))
    _, sums = run(online.rloo, one)
    same(sums["policy/ratio"], ROWS - 1 + np.exp(0.1 * float(sizes[long])), 1e-4)


def test_weights_of_text_beside_a_rollout_make_its_mean_count_as_said():
    data = beside_text("right", ALL)
    data = data.replace(other=online.scaled(data.other, data.rollout.batch.targets.sum()))
    both = partial(online.mixed, objective=online.ppo, other=supervised.sft, other_weight=2.0)
    loss, sums = jax.jit(partial(both, model=TOY))(PARAMS, data)
    nll = run(supervised.sft, texts(1, "right", ALL))
    alone, _ = run(online.ppo, data.rollout)
    same(loss / sums["weight"], alone / sums["weight"] + 2 * nll[0] / nll[1]["weight"])
    same(sums["other/loss/nll"] / sums["weight"], nll[0] / nll[1]["weight"])
