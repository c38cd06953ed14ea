"""Losses on comparisons: [B] to [B], nats where the loss is a negative log-probability.

The scores of a pair are a reward model's, or what a policy implies: r = beta log pi(y)/ref(y) (Rafailov et al. 2023 eq. 5), of sums
over the tokens of y. So these are also

    DPO         bradley_terry                   Rafailov et al. 2023 eq. 7
    ODPO        bradley_terry with a margin     Amini et al. 2024
    cDPO        soft_bradley_terry, p = 1 - e   Mitchell 2023 eq. 3
    robust DPO  robust_bradley_terry            Chowdhury et al. 2024
    CPO         bradley_terry, r = beta log pi  Xu et al. 2024
    SimPO       bradley_terry, r = beta mean log pi and margin gamma   Meng et al. 2024 eq. 6
"""

import jax
import jax.numpy as jnp

from jaxalign.ops.masked import masked_mean

# Llama 2 (Touvron et al. 2023) appendix: the margin for how much better annotators found the chosen response
MARGINS_SMALL = {"significantly better": 1.0, "better": 2 / 3, "slightly better": 1 / 3, "negligibly better": 0.0}
MARGINS_LARGE = {"significantly better": 3.0, "better": 2.0, "slightly better": 1.0, "negligibly better": 0.0}


# --------------------------------------------------------- scores


def bradley_terry(chosen, rejected, margin=0.0):
    """-log sigmoid(chosen - rejected - margin). Bradley & Terry 1952; Stiennon et al. 2020 eq. 1; margin: Llama 2 eq. 2.

    Args: scores [B] of the preferred and the other response, and by how much [B]. -> f32 [B] nats
    """
    return -jax.nn.log_sigmoid(chosen - rejected - margin)


def soft_bradley_terry(first, second, p):
    """-p log sigmoid(first - second) - (1 - p) log sigmoid(second - first): cross entropy with a judge's P(first is better) = p."""
    return p * bradley_terry(first, second) + (1 - p) * bradley_terry(second, first)


def robust_bradley_terry(chosen, rejected, *, noise: float):
    """((1 - e) l(chosen, rejected) - e l(rejected, chosen)) / (1 - 2e), l = bradley_terry. Chowdhury et al. 2024.

    Its expectation over labels of which a share e < 1/2 is flipped is the loss on clean labels. It may be negative.
    """
    right, wrong = bradley_terry(chosen, rejected), bradley_terry(rejected, chosen)
    return ((1 - noise) * right - noise * wrong) / (1 - 2 * noise)


def rao_kupper(first, second, won, tied, *, theta: float):
    """-won log P(first) - tied log P(tie) - (1 - won - tied) log P(second). Rao & Kupper 1967; for rewards Liu et al. 2024.

    P(first) = e^first/(e^first + theta e^second); P(tie) is what is left. The larger theta > 1, the more ties.
    """
    ahead, behind = (jax.nn.log_sigmoid(d - jnp.log(theta)) for d in (first - second, second - first))
    tie = jnp.log(theta**2 - 1) + ahead + behind
    return -won * ahead - tied * tie - (1 - won - tied) * behind


def centring(chosen, rejected):
    """(chosen + rejected)^2, which keeps scores near 0; Eisenstein et al. 2023. -> f32 [B]"""
    return (chosen + rejected) ** 2


def square(score, wanted):
    """(score - wanted)^2: a rating, or of a difference of scores a comparison in units of the reward (lm-human-preferences)."""
    return (score - wanted) ** 2


def best_of_k(score, best, there):
    """-log (sum_best e^r / sum_k e^r): softmax over k responses of which one is the best. Ziegler et al. 2019 eq. 1.

    Where several are best: any of them. 0 where there is no response.
    Args: score [B,K]; best, bool [B,K], one or more of those that are `there`, bool [B,K].
    """

    def total(which):
        return jax.nn.logsumexp(jnp.where(which, score, -1e30), axis=1)

    return total(there) - total(best & there)


def k_wise(score, rank, there):
    """mean over the pairs of one prompt of -log sigmoid(r_better - r_worse). Ouyang et al. 2022 (InstructGPT) eq. 1.

    Args: score [B,K]; rank [B,K], the least is the best, equals make no pair; there, bool [B,K]. -> (f32 [B], pairs i32 [B,K,K])
    """
    pairs = (rank[:, :, None] < rank[:, None, :]) & there[:, :, None] & there[:, None, :]
    loss = bradley_terry(score[:, :, None], score[:, None, :])
    return masked_mean(loss, pairs.astype(score.dtype), (1, 2)), pairs


# --------------------------------------------------------- policies


def ipo(chosen, rejected, *, beta: float):
    """(h - 1/(2 beta))^2, h = chosen - rejected. Azar et al. 2023 eq. 17. Args: log pi/ref [B], of sums over tokens or of means."""
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def hinge(chosen, rejected):
    """max(0, 1 - (chosen - rejected)). SLiC-HF (Zhao et al. 2023) eq. 1, on rewards in place of its log-probabilities."""
    return jax.nn.relu(1 - (chosen - rejected))


def exo(chosen, rejected, *, smoothing: float):
    """KL(softmax(chosen, rejected) || (1 - e, e)), reverse to DPO's. Ji et al. 2024 (EXO) on pairs. 0 < e < 1/2."""
    ahead, behind = jax.nn.log_sigmoid(chosen - rejected), jax.nn.log_sigmoid(rejected - chosen)
    return jnp.exp(ahead) * (ahead - jnp.log1p(-smoothing)) + jnp.exp(behind) * (behind - jnp.log(smoothing))


def nca(chosen, rejected):
    """-log sigmoid(chosen) - 1/2 (log sigmoid(-chosen) + log sigmoid(-rejected)). Chen et al. 2024 (NCA) on pairs.

    It knows each reward, not only their difference, so that the chosen response does not become less likely.
    """
    return -jax.nn.log_sigmoid(chosen) - 0.5 * (jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected))


def kto(log_ratio, desirable, z0, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0):
    """w (1 - sigmoid(+-beta (log pi/ref - z0))), + for a desirable response. Ethayarajh et al. 2024 eq. 7-8.

    Args: log_ratio, nats [B]; desirable, bool [B]; z0, `kto_baseline`, nats.
    """
    z = beta * (log_ratio - z0)
    return jnp.where(desirable, desirable_weight * jax.nn.sigmoid(-z), undesirable_weight * jax.nn.sigmoid(z))


def kto_baseline(log_ratio, weights):
    """z0 = max(0, mean log pi/ref) of responses to other prompts: an estimate of KL(pi || ref). -> f32 []

    Args: nats [B], of all rows of the global batch; weights [B], 0 for a row that is none.
    """
    return jnp.maximum(masked_mean(log_ratio, weights), 0)


def log_odds(mean_logp):
    """log(P/(1 - P)), P = exp(mean_t log p_t). Hong et al. 2024 (ORPO) eq. 4. P is held below 1 - 1e-7."""
    mean_logp = jnp.minimum(mean_logp, -1e-7)
    return mean_logp - jax.nn.log1mexp(-mean_logp)


def orpo(chosen, rejected, *, weight: float):
    """-chosen - weight log sigmoid(log_odds(chosen) - log_odds(rejected)). Hong et al. 2024 eq. 6-7. Args: mean log p, nats [B]"""
    return -chosen + weight * bradley_terry(log_odds(chosen), log_odds(rejected))


# Links of f-DPO (Wang et al. 2024): r = beta f'(pi/ref), for the divergence D_f that holds the policy near the reference.
# f' = log + constant is KL(pi || ref) and gives DPO. Constants fall out of differences.


def alpha_link(log_ratio, *, alpha: float):
    """f'(u) = (1 - u^-alpha)/alpha, u = pi/ref: the alpha-divergence; alpha = 1 is KL(ref || pi), alpha = 0 is log u, as in DPO.

    The exponent is held below 30, where u^-alpha would leave float32's range.
    """
    return log_ratio if alpha == 0 else -jnp.expm1(jnp.minimum(-alpha * log_ratio, 30)) / alpha


def js_link(log_ratio):
    """f'(u) = log(2u/(1 + u)), u = pi/ref: the Jensen-Shannon divergence. It is at most log 2."""
    return jnp.log(2.0) + jax.nn.log_sigmoid(log_ratio)
