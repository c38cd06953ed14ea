"""Learning from text: next tokens."""

from jaxalign import score
from jaxalign.ops import supervised
from jaxalign.ops.masked import masked_sum
from jaxalign.types import Batch, Model


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
