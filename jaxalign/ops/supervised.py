"""Cross entropies and distances, per token: [B, T] to [B, T], from what `score.evaluate` or the logits say of each token."""

import jax
import jax.numpy as jnp


def label_smoothed(logp, mean_logp, *, smoothing: float):
    """(1 - e)(-log p_y) + e/V sum_v(-log p_v). Szegedy et al. 2016. `mean_logp` is the mean of log p over the vocabulary."""
    return -(1 - smoothing) * logp - smoothing * mean_logp


def z_loss(log_z):
    """(log sum_v exp z_v)^2, which keeps the logits' scale in place. PaLM section 5."""
    return log_z**2


def classification(logits, label):
    """-log softmax(z)_y. GPT-1 eq. 3-4. Args: logits [...,C]; label, i32 [...] in [0, C). -> f32 [...] nats"""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), label[..., None], axis=-1)[..., 0]


def expected_square_distance(logp, embedding, tokens):
    """sum_v p_v |E_v - E_y|^2: how far the model's token will be from the target, in meaning. -> f32 [...]

    No paper has quite this; Li et al. 2020 (D2GPo) smooth the target by embedding distance. There is no gradient through E, which
    would draw all embeddings together.
    Args: logp, nats [...,V]; embedding [V,D]; tokens, i32 [...].
    """
    embedding = jax.lax.stop_gradient(embedding)
    p, target = jnp.exp(logp), embedding[tokens]
    return p @ (embedding**2).sum(-1) - 2 * ((p @ embedding) * target).sum(-1) + (target**2).sum(-1)


def cosine_distance(logp, embedding, tokens):
    """1 - cos(sum_v p_v E_v, E_y): the expected embedding against the target's. Kumar & Tsvetkov 2019. As above. -> f32 [...]"""
    embedding = jax.lax.stop_gradient(embedding)
    mean, target = jnp.exp(logp) @ embedding, embedding[tokens]
    sizes = (mean**2).sum(-1) * (target**2).sum(-1)
    return 1 - (mean * target).sum(-1) * jax.lax.rsqrt(jnp.maximum(sizes, 1e-12))
