"""What is said of a token depends on the tokens before it in its document, and on nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import score
from jaxalign.types import Batch

DOCUMENTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8], [9, 7]]


def padded(documents, length, side="right", pad=0):
    """One document a row; every token a target, padding too, which `Batch.targets` must see through."""
    tokens, segments = np.full((len(documents), length), pad), np.zeros((len(documents), length))
    for row, document in enumerate(documents):
        place = slice(length - len(document), None) if side == "left" else slice(len(document))
        tokens[row, place], segments[row, place] = document, 1
    return Batch(jnp.asarray(tokens, jnp.int32), jnp.asarray(segments, jnp.int32), jnp.ones(tokens.shape, jnp.float32))


def packed(documents, length):
    """All documents in one row."""
    tokens, segments = np.zeros((1, length)), np.zeros((1, length))
    at = 0
    for number, document in enumerate(documents, 1):
        tokens[0, at : at + len(document)], segments[0, at : at + len(document)] = document, number
        at += len(document)
    return Batch(jnp.asarray(tokens, jnp.int32), jnp.asarray(segments, jnp.int32), jnp.ones(tokens.shape, jnp.float32))


def of_targets(said, value, batch):
    """{name: one number a target, in the order of the documents}."""
    kept = np.asarray(batch.targets) > 0
    return {name: np.asarray(x)[kept] for name, x in {**said._asdict(), "value": value}.items()}


@pytest.fixture(scope="module")
def evaluate(tiny):
    """batch -> (what is said of its targets, gradient of a sum that weighs every kind of it differently)."""

    @jax.jit
    def run(params, batch):
        def total(params):
            said, value = score.evaluate(tiny.model, params, batch, temperature=0.8)
            kept = batch.targets > 0
            parts = said.logp + 0.3 * said.entropy + 0.1 * said.log_z + 0.2 * said.mean_logp + value**2
            return jnp.where(kept, parts, 0).sum(), (said, value)

        (_, said), grads = jax.value_and_grad(total, has_aux=True)(params)
        return said, grads

    def call(batch):
        said, grads = run(tiny.params, batch)
        return of_targets(*said, batch), grads

    return call


def same(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance), a, b)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(padded(DOCUMENTS, 5, "left"), id="left"),
        pytest.param(padded(DOCUMENTS, 5, pad=9), id="padding is a word"),
        pytest.param(padded(DOCUMENTS, 9, "left", pad=3), id="longer, left"),
        pytest.param(padded(DOCUMENTS, 9, pad=1), id="longer, right"),
        pytest.param(packed(DOCUMENTS, 16), id="packed"),
    ],
)
def test_layout_changes_neither_scores_nor_gradients(evaluate, other):
    scores, grads = evaluate(padded(DOCUMENTS, 5))
    assert len(scores["logp"]) == sum(len(document) - 1 for document in DOCUMENTS)
    assert np.ptp(scores["logp"]) > 1  # a model that says the same of every token would pass
    others, other_grads = evaluate(other)
    same(others, scores)
    same(other_grads, grads, 1e-4)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.3])
def test_scores_are_of_the_tempered_softmax(tiny, temperature):
    batch = padded(DOCUMENTS, 5)

    @jax.jit
    def run(params, temperature):
        hidden, _ = tiny.model.apply(params, batch.tokens, batch.segments)
        logits, scalar = tiny.model.unembed(params, hidden), tiny.model.scalar(params, hidden)
        return logits, scalar, score.evaluate(tiny.model, params, batch, temperature=temperature)

    logits, scalar, (said, value) = run(tiny.params, temperature)
    logits = np.asarray(logits, np.float64)[:, :-1] / temperature
    log_z = np.log(np.exp(logits).sum(-1))
    logp = logits - log_z[..., None]
    kept = np.asarray(batch.targets[:, 1:]) > 0
    said = score.Scores(*(np.asarray(x)[:, 1:][kept] for x in said))
    want = np.take_along_axis(logp, np.asarray(batch.tokens)[:, 1:, None], -1)[..., 0]
    same(said, score.Scores(want[kept], -(np.exp(logp) * logp).sum(-1)[kept], log_z[kept], logp.mean(-1)[kept]))
    same(np.asarray(value)[:, 1:], scalar[:, :-1])


def states(tiny):
    """What 2 rows of 10 tokens are predicted from, and the tokens."""
    draw = np.random.default_rng(1)
    hidden = jnp.asarray(draw.normal(size=(2, 10, tiny.config.width)), jnp.float32)
    return hidden, jnp.asarray(draw.integers(0, tiny.config.vocab, (2, 10)), jnp.int32)


@pytest.mark.parametrize("chunk", [4, 5, 128])  # 10 columns: with a last chunk that is not full, without, and in one
def test_chunks_change_neither_scores_nor_gradients(tiny, chunk):
    hidden, tokens = states(tiny)

    def plain(params, hidden, temperature):
        return score.of_logits(tiny.model.unembed(params, hidden), tokens, temperature=temperature)

    def chunked(params, hidden, temperature):
        return score.of_hidden(tiny.model, params, hidden, tokens, temperature=temperature, chunk=chunk)

    def run(say):
        def total(*args):
            said = say(*args)
            return (said.logp + 0.3 * said.entropy).sum() + said.log_z.mean() + said.mean_logp[0, -1], said

        return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(tiny.params, hidden, 0.7)

    same(run(chunked), run(plain))


def test_chunks_in_which_nothing_is_wanted_are_passed_over(tiny):
    hidden, tokens = states(tiny)
    wanted = jnp.ones((2, 1), bool) & (jnp.arange(10) >= 5)[None]

    def total(params, hidden, tokens, wanted=None):
        return score.of_hidden(tiny.model, params, hidden, tokens, wanted, chunk=5).logp.sum()

    run = jax.jit(jax.value_and_grad(total))
    same(run(tiny.params, hidden.at[:, :5].set(jnp.nan), tokens, wanted), run(tiny.params, hidden[:, 5:], tokens[:, 5:]))


def test_later_tokens_say_nothing_of_earlier_ones(evaluate):
    first, _ = evaluate(padded([[3, 1, 4, 1, 5], *DOCUMENTS[1:]], 9))
    second, _ = evaluate(padded([[3, 1, 4, 7, 7], *DOCUMENTS[1:]], 9))
    same({k: x[:2] for k, x in first.items()}, {k: x[:2] for k, x in second.items()})
    assert abs(first["logp"][2] - second["logp"][2]) > 1e-3


def test_the_last_scalar_is_the_last_real_tokens(tiny):
    run = jax.jit(lambda params, batch: score.last_scalar(tiny.model, params, batch))
    want = run(tiny.params, padded(DOCUMENTS, 9))
    for other in (padded(DOCUMENTS, 9, "left", pad=3), padded(DOCUMENTS, 9, pad=9)):
        same(run(tiny.params, other), want)
    hidden, _ = jax.jit(tiny.model.apply)(tiny.params, *jax.tree.leaves(padded(DOCUMENTS, 9))[:2])
    ends = hidden[jnp.arange(len(DOCUMENTS)), jnp.array([len(document) - 1 for document in DOCUMENTS])]
    same(want, tiny.model.scalar(tiny.params, ends))
