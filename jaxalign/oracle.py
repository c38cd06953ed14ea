"""Language models small enough to enumerate, and what is exactly true of them: the judge of a new estimator or objective.

    model = oracle.tabular(vocab=3, context=3)                  any Model will do
    space = oracle.responses([1], vocab=3, length=3, eos=2)     S responses, as `sample.sample` gives them
    logp, ref_logp = (oracle.log_probs(model, p, space) for p in (params, ref))
    exact = oracle.policy_gradient(model, params, space, reward, ref_logp, beta)
    samples = jax.tree.map(lambda x: x[:, None], rollout)       of `space`: S samples of one row each
    mean, variance = oracle.moments(oracle.ascent(objective), params, samples, logp)

No chance is in it: mean is exact, or the estimator is biased. `check_unbiased` asks the same of rows that were really drawn.
S is the number of responses, and what speaks of each of them is f32 [S]: logp, ref_logp (nats), reward.
"""

from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import score, shard
from jaxalign.ops import divergences
from jaxalign.ops.masked import masked_sum
from jaxalign.types import Batch, Model

MOST = 10**6  # rows of a table, or responses


# --------------------------------------------------------- a model without constraints


@dataclass(frozen=True)
class TabularConfig:
    vocab: int
    context: int  # how many tokens of its document a prediction depends on, the last ones
    scalar: float | None  # std of the value table; None: no scalar head
    std: float  # of the logits


def tabular(*, vocab: int, context: int, scalar: float | None = None, std: float = 1.0) -> Model:
    """A model whose every prediction is a parameter of its own, so that it can be any distribution.

    params = {"logits": [N,V], "value": [N]}: a row for each of the N = sum_{k <= context} V^k prefixes of up to `context` tokens; a
    longer one has the row of its last tokens. Raises ValueError where there are too many. "value" is there with `scalar` only.
    """
    config = TabularConfig(vocab, context, scalar, std)
    prefixes = _few(sum(vocab**k for k in range(context + 1)), "prefixes")

    def init(key):
        (key, value_key), normal = jax.random.split(key), jax.nn.initializers.normal
        params = {"logits": shard.declared(normal(std), None, None)(key, (prefixes, vocab))}
        if scalar is not None:
            params["value"] = shard.declared(normal(scalar), None)(value_key, (prefixes,))
        return params

    def apply(params, tokens, segments, cache=None, at=0):
        new = {"tokens": tokens, "segments": segments}
        if cache is not None:
            cache = {name: jax.lax.dynamic_update_slice_in_dim(cache[name], x, at, 1) for name, x in new.items()}
        numbers = _prefix(**(new if cache is None else cache), vocab=vocab, context=context)
        numbers = jax.lax.dynamic_slice_in_dim(numbers, at, tokens.shape[1], 1)
        hidden = jnp.asarray(params["logits"])[numbers]  # a state is a row of the table, and its value: [B,T,V + 1]
        if scalar is not None:
            hidden = jnp.concatenate([hidden, jnp.asarray(params["value"])[numbers][..., None]], axis=-1)
        return hidden, cache

    def cache(rows, length):
        return {name: jnp.zeros((rows, length), jnp.int32) for name in ("tokens", "segments")}

    return Model(config, init, apply, lambda params, h: h[..., :vocab], lambda params, h: jnp.squeeze(h[..., vocab:], -1), cache)


def _prefix(tokens, segments, *, vocab, context):
    """The number of what each token ends, among the prefixes in order of length. -> i32 [B,T]; 0, the empty one, at padding"""
    length, number = tokens.shape[1], jnp.zeros_like(tokens)
    for lag in reversed(range(context)):
        token, segment = (jnp.pad(x, ((0, 0), (lag, 0)))[:, :length] for x in (tokens, segments))
        number = jnp.where((segments > 0) & (segment == segments), number * vocab + token + 1, number)
    return number


def _few(many: int, what: str) -> int:
    if many > MOST:
        raise ValueError(f"{many} {what} are too many to enumerate: {MOST} at most")
    return many


# --------------------------------------------------------- all responses


def responses(prompt, *, vocab: int, length: int, eos: int = -1) -> Batch:
    """Every response to one prompt (token ids), up to and including EOS or of `length` tokens: rows as `sample.sample` gives them.

    -> Batch [S, P + length]; without an EOS (-1), S = V^length. Raises ValueError where there are too many, or no prompt.
    """
    if not len(prompt) or length < 1:
        raise ValueError(f"a prompt of {len(prompt)} tokens and responses of {length}: both need one or more")
    _few(vocab**length, "responses")
    tokens = np.indices((vocab,) * length).reshape(length, -1).T
    live = np.cumsum(tokens == eos, axis=1) - (tokens == eos) == 0  # up to and including the first EOS
    kept = (live | (tokens == 0)).all(axis=1)  # of those that differ after EOS alone, one
    before = ((0, 0), (len(prompt), 0))
    tokens, weights, segments = (np.pad(x[kept], before, constant_values=fill) for x, fill in ((tokens, 0), (live, 0), (live, 1)))
    tokens[:, : len(prompt)] = prompt
    return Batch(jnp.asarray(tokens, jnp.int32), jnp.asarray(segments, jnp.int32), jnp.asarray(weights, jnp.float32))


def log_probs(model: Model, params, space: Batch, *, temperature: float = 1.0):
    """log p(y) of each response: the sum over its tokens, as scoring and training have them. -> f32 [S] nats"""
    said, _ = score.evaluate(model, params, space, temperature=temperature)
    return masked_sum(said.logp, space.targets, 1)


def find(space: Batch, drawn: Batch):
    """Which response each row is, by its tokens in the same columns; -1 for none of them. -> i32 [B]"""

    def marked(batch):
        return jnp.where(batch.segments > 0, batch.tokens, -1)

    same = (marked(drawn)[:, None] == marked(space)[None]).all(-1)
    return jnp.where(same.any(1), jnp.argmax(same, 1), -1)


def weigh(space: Batch, logp) -> Batch:
    """The responses with weights p(y): the sum of an objective over them is its expectation over samples, a response."""
    return space.replace(weights=space.weights * jnp.exp(logp)[:, None])


# --------------------------------------------------------- exact answers


def expected(logp, x):
    """E[x(y)] = sum_y p(y) x(y), of x [S, ...]."""
    return jnp.tensordot(jnp.exp(logp), x, 1)


def entropy(logp):
    """-sum_y p(y) log p(y), nats a response. (KL of two such laws is `ops.divergences.kl`.)"""
    return -divergences.kl(logp, jnp.zeros_like(logp))


def total_variation(logp, other):
    """1/2 sum_y |p(y) - q(y)|: 0 for equals, at most 1."""
    return 0.5 * jnp.abs(jnp.exp(logp) - jnp.exp(other)).sum()


def regularised(logp, ref_logp, reward, beta):
    """E[r] - beta KL(pi || ref), which RLHF maximises. Ziegler et al. 2019 eq. 2; Rafailov et al. 2023 eq. 3."""
    return expected(logp, reward) - beta * divergences.kl(logp, ref_logp)


def optimum(ref_logp, reward, beta):
    """p*(y) = ref(y) exp(r(y)/beta)/Z, which maximises `regularised`, and its value beta log Z. Rafailov et al. 2023 eq. 4.

    -> (log p* f32 [S], f32 []). Args: beta > 0, reward per nat.
    """
    z = ref_logp + reward / beta
    return jax.nn.log_softmax(z), beta * jax.nn.logsumexp(z)


def policy_gradient(model: Model, params, space: Batch, reward, ref_logp, beta, *, temperature: float = 1.0):
    """The gradient of `regularised` by the parameters, whose sign is that of ascent. -> a tree like params"""

    def value(params):
        return regularised(log_probs(model, params, space, temperature=temperature), ref_logp, reward, beta)

    return jax.grad(value)(params)


def best_of(logp, reward, n: int):
    """The law of the best of n samples, ties by chance: q(y) = p(y) (F(r)^n - F(r-)^n)/P(r), r = r(y), F the law of r.

    -> log q f32 [S] nats; -inf where float32 has nothing left.
    """
    p = jnp.exp(logp)
    below = (p[None] * (reward[None] < reward[:, None])).sum(1)
    level = (p[None] * (reward[None] == reward[:, None])).sum(1)
    return logp - jnp.log(level) + jnp.log((below + level) ** n - below**n)


# --------------------------------------------------------- estimators

# An estimator is (params, rows) -> tree like params; rows, leaves [k, ...], are what it is told of k samples: a Batch, a Rollout,
# anything. `samples` are N such: leaves [N, k, ...].


def ascent(objective):
    """The estimator that an objective (params, data) -> (sum, sums) makes: minus the gradient of its sum, a row.

    A step divides by tokens where this divides by rows: that is another length, and for samples of other lengths another estimator.
    """

    def estimator(params, rows):
        many = len(jax.tree.leaves(rows)[0])
        return jax.tree.map(lambda g: -g / many, jax.grad(objective, has_aux=True)(params, rows)[0])

    return estimator


def groups(logp, size: int):
    """All ways to draw `size` responses. -> (numbers of responses i32 [N, size], log-probability f32 [N]), N = S^size"""
    _few(len(logp) ** size, "groups of responses")
    rows = jnp.indices((len(logp),) * size).reshape(size, -1).T
    return rows, logp[rows].sum(1)


@partial(jax.jit, static_argnums=0)
def _each(estimator, params, samples):
    return jax.vmap(estimator, (None, 0))(params, samples)


def moments(estimator, params, samples, logp):
    """The exact mean and variance, by enumeration, of an estimator's every coordinate. -> (tree, tree) like params

    Args: samples, all there are: leaves [N, k, ...]; logp, their log-probabilities f32 [N] (both by `groups`).
    """
    each = _each(estimator, params, samples)
    mean = jax.tree.map(lambda x: expected(logp, x), each)
    return mean, jax.tree.map(lambda x, m: expected(logp, (x - m[None]) ** 2), each, mean)


class Verdict(NamedTuple):
    unbiased: bool  # no |z| above the limit
    worst: float  # the largest |z|
    limit: float
    z: Any  # (mean - exact)/(standard error), a tree like params


def check_unbiased(estimator, params, samples, exact, *, alpha: float = 1e-3) -> Verdict:
    """Whether the mean of an estimator over independent samples is `exact`, up to their noise.

    Each of d coordinates is held to |z| <= Phi^-1(1 - alpha/2d) (Bonferroni): an unbiased estimator fails with probability alpha,
    as far as N makes means normal. A standard error is never below the largest |entry| of all/N, which is one sample not seen, for
    a coordinate may be of a prefix that no sample has. A bias is found once N makes it some standard errors. Holds N gradients.
    Args: samples, independent and equally distributed: leaves [N, k, ...]; exact, a tree like params.
    """
    each, exact = jax.tree.map(lambda x: np.asarray(x, np.float64), (_each(estimator, params, samples), exact))
    many = len((leaves := jax.tree.leaves(each))[0])
    unseen = np.max([np.abs(x).max() for x in leaves + jax.tree.leaves(exact)]) / many

    def z(x, e):
        return (x.mean(0) - e) / np.maximum(np.hypot(x.std(0, ddof=1) / many**0.5, unseen), np.finfo(float).tiny)

    zs = jax.tree.map(z, each, exact)
    worst = np.max([np.abs(x).max() for x in jax.tree.leaves(zs)])  # a NaN stays one, and is no pass
    limit = -NormalDist().inv_cdf(alpha / 2 / sum(x[0].size for x in leaves))
    return Verdict(bool(worst <= limit), float(worst), limit, zs)
