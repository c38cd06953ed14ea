"""Cross entropies, per token: [B, T] to [B, T], from what `score.evaluate` says of each token."""


def label_smoothed(logp, mean_logp, *, smoothing: float):
    """(1 - e)(-log p_y) + e/V sum_v(-log p_v). Szegedy et al. 2016. `mean_logp` is the mean of log p over the vocabulary."""
    return -(1 - smoothing) * logp - smoothing * mean_logp


def z_loss(log_z):
    """(log sum_v exp z_v)^2, which keeps the logits' scale in place. PaLM section 5."""
    return log_z**2
