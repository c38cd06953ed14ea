"""Learning from text: next tokens, and classes."""

import jax
import jax.numpy as jnp
from flax import struct

from jaxalign import score, shard
from jaxalign.objectives.reward import stack
from jaxalign.ops import supervised
from jaxalign.ops.masked import masked_mean, masked_sum
from jaxalign.types import Array, Batch, Model


@struct.dataclass
class Classified:
    """S texts a row and their class, or the answer among them. A row without a target in any of its texts does not count."""

    texts: tuple[Batch, ...]  # S of [B,T]
    label: Array  # i32 [B], from 0


def sft(params, data: Batch, *, model: Model, label_smoothing: float = 0.0, z_loss: float = 0.0):
    """-sum_t w_t log p(token_t | before), the negative log-likelihood of the targets. GPT-1 eq. 1; InstructGPT 3.5. Weight: tokens.

    Args:
        label_smoothing: share of probability that the target gives up, evenly, to the vocabulary.
        z_loss: coefficient of (log Z)^2; PaLM uses 1e-4.
    Metrics: loss/nll and policy/entropy, nats a token.
    """
    said, _ = score.evaluate(model, params, data)
    weights = data.targets
    loss = masked_sum(supervised.label_smoothed(said.logp, said.mean_logp, smoothing=label_smoothing), weights)
    loss = loss + z_loss * masked_sum(supervised.z_loss(said.log_z), weights)
    sums = {"loss/nll": -masked_sum(said.logp, weights), "policy/entropy": masked_sum(said.entropy, weights)}
    return loss, {"weight": weights.sum(), **sums}


def semantic_sft(params, data: Batch, *, model: Model, distance_weight: float, cosine: bool = False):
    """`sft` + distance_weight * the distance in meaning between what the model would say and the target. Weight: tokens.

    The distance is E_v~p |E_v - E_y|^2, or with `cosine` 1 - cos(E_v~p E_v, E_y) (Kumar & Tsvetkov 2019), by the model's own
    embedding, params["embed"]["tokens"], to which no gradient goes from here.
    Metrics: loss/nll, nats a token, and loss/distance.
    """
    hidden, _ = model.read(params, data)
    distance = supervised.cosine_distance if cosine else supervised.expected_square_distance
    embedding = params["embed"]["tokens"].astype(jnp.float32)

    def one(head, part):
        before, tokens = part
        logp = jax.nn.log_softmax(model.unembed(head, before))
        return supervised.classification(logp, tokens), distance(logp, embedding, tokens)

    nll, off = (masked_sum(x, data.targets) for x in score.by_chunk(model, params, one, (score.shift(hidden), data.tokens)))
    return nll + distance_weight * off, {"weight": data.targets.sum(), "loss/nll": nll, "loss/distance": off}


def classify(params, data: Classified, *, model: Model, lm_weight: float = 0.5):
    """-log softmax(W h_last + b)_y + lm_weight * mean_t -log p_t of the same text. Radford et al. 2018, eq. 3-5. Weight: rows.

    W and b are params["classes"] (`class_head`). The h_last of a row's S texts are added: for similarity, the two orders of a pair.
    The mean is over each row's targets, as in the authors' code; eq. 1 has a sum.
    Metrics: loss/class, loss/lm (nats a token, of a row) and class/accuracy.
    """
    return _classified(*class_logits(params, data.texts, model=model), data, lm_weight)


def choose(params, data: Classified, *, model: Model, lm_weight: float = 0.5):
    """-log softmax_s(w h_last,s + b)_y over a row's S texts, the answers to a question, + lm_weight * the mean of -log p_t.

    GPT-1 section 3.3, multiple choice; w and b are the scalar head. A text without tokens is not there to be chosen. Weight: rows.
    Metrics: as `classify`.
    """
    return _classified(*choice_logits(params, data.texts, model=model), data, lm_weight)


def class_logits(params, texts: tuple[Batch, ...], *, model: Model):
    """W h_last + b of S texts, whose states are added, f32 [B,C]; and the mean of -log p of their targets, nats [B]."""
    last, lm = _read(params, texts, model)
    return last.sum(1) @ params["classes"]["kernel"] + params["classes"]["bias"][None], lm


def choice_logits(params, texts: tuple[Batch, ...], *, model: Model):
    """w h_last of each of S texts, f32 [B,S], -1e30 of one that is not there; and the mean as of `class_logits`."""
    last, lm = _read(params, texts, model)
    return jnp.where(_there(texts), model.scalar(params, last), -1e30), lm


def class_head(key, width: int, classes: int) -> dict:
    """What `classify` wants as params["classes"], boxed with its logical axes as `Model.init` gives them."""
    kernel = shard.declared(jax.nn.initializers.normal(0.02), "embed", None)
    bias = shard.declared(jax.nn.initializers.zeros, None)
    return {"kernel": kernel(key, (width, classes)), "bias": bias(key, (classes,))}


def _there(texts):
    """bool [B,S]"""
    return jnp.stack([(text.segments > 0).any(1) for text in texts], axis=1)


def _read(params, texts, model):
    """The state at each text's last real token, f32 [B,S,D], and the mean of -log p of the row's targets, nats [B]."""

    def by_row(x):
        return x.reshape(-1, len(texts), x.shape[-1])  # [BS,...] -> [B,S,...]

    every = stack(*texts)
    hidden, _ = model.read(params, every)
    last = by_row(score.last_of(hidden, every.segments).astype(jnp.float32))
    said = score.of_hidden(model, params, score.shift(hidden), every.tokens)
    lm = masked_mean(by_row(-said.logp), by_row(every.targets), (1, 2))
    return jnp.where(_there(texts)[:, :, None], last, 0), lm


def _classified(logits, lm, data: Classified, lm_weight):
    weight = (stack(*data.texts).targets > 0).any(1).reshape(-1, len(data.texts)).any(1).astype(jnp.float32)
    loss = supervised.classification(logits, data.label)
    sums = {
        "weight": weight.sum(),
        "loss/class": masked_sum(loss, weight),
        "loss/lm": masked_sum(lm, weight),
        "class/accuracy": masked_sum(logits.argmax(1) == data.label, weight),
    }
    return masked_sum(loss + lm_weight * lm, weight), sums
