"""Learning from a teacher's distributions over the next token, not from its tokens alone.

Each objective is temperature^2 D(teacher, student) + nll_weight * -log p, summed over targets; the square keeps gradients of one
size over temperatures (Hinton et al. 2015 section 2). The text may be the student's own: GKD on-policy. Weight: tokens.

Metrics: loss/divergence (D) and loss/nll, nats a token; teacher/agreed, how often both find the same token the likeliest.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from jaxalign import score
from jaxalign.ops import divergences
from jaxalign.ops.masked import masked_sum
from jaxalign.types import Array, Batch, Model


@struct.dataclass
class Taught:
    """Text, and the K tokens that a teacher found the likeliest at each place: they enter with the data, for it is frozen.

    With K < V all other tokens count as one, so divergences are never larger than those of the whole distributions; K = V, which
    is exact, is 8 V bytes a token.
    """

    batch: Batch
    ids: Array  # i32 [B,T,K], the likeliest first
    logp: Array  # f32 [B,T,K] nats, tempered, of all V


def forward_kl(params, data: Taught, *, model: Model, temperature: float = 1.0, nll_weight: float = 0.0):
    """D = KL(teacher || student): the student covers all that the teacher may say. Hinton et al. 2015."""
    return _distil(params, data, model, divergences.kl, temperature, nll_weight)


def reverse_kl(params, data: Taught, *, model: Model, temperature: float = 1.0, nll_weight: float = 0.0):
    """D = KL(student || teacher): the student says only what the teacher may say. Gu et al. 2024 (MiniLLM), token by token."""
    return _distil(params, data, model, lambda teacher, student: divergences.kl(student, teacher), temperature, nll_weight)


def jsd(params, data: Taught, *, model: Model, beta: float = 0.5, temperature: float = 1.0, nll_weight: float = 0.0):
    """D = beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student. Agarwal et al. 2024 (GKD)."""
    return _distil(params, data, model, partial(divergences.generalised_jsd, beta=beta), temperature, nll_weight)


def taught(params, batch: Batch, *, model: Model, k: int, temperature: float = 1.0) -> Taught:
    """The batch with this model's, the teacher's, k likeliest tokens; ids mean the same to both models."""
    hidden, _ = model.read(params, batch)

    def one(head, before):
        return jax.lax.top_k(jax.nn.log_softmax(model.unembed(head, before) / temperature), k)

    logp, ids = score.by_chunk(model, params, one, score.shift(hidden))
    return Taught(batch, ids, logp)


def _distil(params, data: Taught, model, divergence, temperature, nll_weight):
    hidden, _ = model.read(params, data.batch)
    weights = data.batch.targets
    there = weights[..., None] > 0
    ids, teacher = jnp.where(there, data.ids, 0), jnp.where(there, data.logp, -1.0)  # what has no weight may be anything

    def one(head, part):
        before, tokens, ids, teacher = part
        logits = model.unembed(head, before)
        student = jnp.take_along_axis(jax.nn.log_softmax(logits / temperature), ids, axis=-1)
        if ids.shape[-1] < logits.shape[-1]:
            teacher, student = _with_rest(teacher), _with_rest(student)
        agreed = logits.argmax(-1) == ids[..., 0]
        return divergence(teacher, student), score.of_logits(logits, tokens).logp, agreed

    found = score.by_chunk(model, params, one, (score.shift(hidden), data.batch.tokens, ids, teacher))
    apart, logp, agreed = (masked_sum(x, weights) for x in found)
    sums = {"weight": weights.sum(), "loss/divergence": apart, "loss/nll": -logp, "teacher/agreed": agreed}
    return temperature**2 * apart - nll_weight * logp, sums


def _with_rest(logp):
    """[...,K] of V to [...,K+1]: the last is all that is left, at least 1e-6."""
    total = jnp.minimum(jax.nn.logsumexp(logp, axis=-1, keepdims=True), -1e-6)
    return jnp.concatenate([logp, jax.nn.log1mexp(-total)], axis=-1)
