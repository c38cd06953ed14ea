"""Losses on comparisons, per pair."""

import jax


def bradley_terry(chosen, rejected, margin=0.0):
    """-log sigmoid(chosen - rejected - margin). Bradley & Terry 1952; Stiennon et al. 2020 eq. 1; margin: Llama 2 eq. 2.

    Args: scores [B] of the preferred and the other response, and by how much [B]. -> f32 [B] nats
    """
    return -jax.nn.log_sigmoid(chosen - rejected - margin)


def centring(chosen, rejected):
    """(chosen + rejected)^2, which keeps scores near 0; Eisenstein et al. 2023. -> f32 [B]"""
    return (chosen + rejected) ** 2
