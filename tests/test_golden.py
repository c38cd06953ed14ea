"""The golden numbers: every *.json of --golden=DIR goes through the library and comes out equal, in float32 and in float64.

FLOAT32 says for each name how inputs become outputs; every output of a file is compared. FLOAT64 holds the same or a part of it,
where the library works in the precision that it is given (scores of tokens are float32 always).
"""

import json
import tempfile
from functools import partial
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign import models, rewards, score
from jaxalign.data import tables
from jaxalign.data.text import Document
from jaxalign.evaluation import mmlu, rouge
from jaxalign.feedback import self_instruct
from jaxalign.models import checkpoints, decoder
from jaxalign.models.attention import attend, positions_of, rope
from jaxalign.objectives import online, reward, supervised
from jaxalign.objectives import preference as offline
from jaxalign.ops import (
    advantages,
    aggregate,
    best_of_n,
    calibration,
    divergences,
    filters,
    overoptimisation,
    policy,
    preference,
    truthfulness,
)
from jaxalign.ops import supervised as cross_entropy
from jaxalign.ops.masked import masked, masked_mean, masked_sum, whiten
from jaxalign.ops.vote import vote
from jaxalign.train import optim
from jaxalign.train.step import make_step
from jaxalign.types import Batch, Model, Pairs, Rollout, TrainState

# --------------------------------------------------------- models that say what their parameters say


def told(apply, unembed=lambda params, hidden: hidden, scalar=None) -> Model:
    def forward(params, tokens, segments, cache=None, at=0):
        return apply(params, tokens), cache

    config = SimpleNamespace(scalar=None if scalar is None else 0.0)
    return Model(config, None, forward, unembed, scalar, None)


LOGITS = told(lambda params, tokens: params["logits"])  # [B,T,V]
BIGRAM = told(lambda params, tokens: params["table"][tokens])  # [V,V]
SCORES = told(  # [B]
    lambda params, tokens: jnp.broadcast_to(params["scores"][:, None, None], (*tokens.shape, 1)),
    scalar=lambda params, hidden: hidden[..., 0],
)


def _same_for_all_rows(params, tokens):
    return jnp.broadcast_to(jnp.pad(params["logits"], ((0, 1), (0, 0)))[None], (*tokens.shape, params["logits"].shape[-1]))


STEPS = told(_same_for_all_rows)  # [T,V], of tokens 1 .. T after a first one


def _two_tokens(params, hidden):
    logp = jnp.minimum(hidden[..., 0], -1e-3)
    return jnp.stack([logp, jnp.log1p(-jnp.exp(logp))], axis=-1)


LOGP = told(  # logp < 0 and value, [B,T], of token 0 of two, from column 1 on
    lambda params, tokens: jnp.pad(jnp.stack([params["logp"], params["value"]], -1), ((0, 0), (0, 1), (0, 0))),
    unembed=_two_tokens,
    scalar=lambda params, hidden: hidden[..., 1],
)


def ids(x):
    return jnp.asarray(x, jnp.int32)


def rows_of(tokens, weights) -> Batch:
    return Batch(ids(tokens), jnp.ones(tokens.shape, jnp.int32), weights)


def after_first(x):
    """A first column of zeros: [B,T] about the tokens after one that is given."""
    return jnp.pad(x, ((0, 0), (1, 0)))


# --------------------------------------------------------- supervised


def sft_completion_only(i):
    params, batch = {"logits": i["logits"]}, rows_of(i["input_ids"], i["loss_mask"])
    loss, sums = supervised.sft(params, batch, model=LOGITS)
    said, _ = score.evaluate(LOGITS, params, batch)
    rows, per_row = batch.tokens.shape[0], batch.targets.sum(1, keepdims=True)
    equal_rows = batch.replace(weights=batch.weights / jnp.maximum(per_row, 1))
    return {
        "per_token_logp": masked(said.logp, batch.targets)[:, 1:],
        "loss_token_mean": loss / sums["weight"],
        "loss_mean_of_sequence_means": supervised.sft(params, equal_rows, model=LOGITS)[0] / rows,
        "loss_mean_of_sequence_sums": loss / rows,
        "n_tokens": sums["weight"],
    }


def sft_label_smoothing_z_loss(i):
    params, batch = {"logits": i["logits"]}, rows_of(i["input_ids"], i["loss_mask"])

    def mean(**hyper):
        loss, sums = supervised.sft(params, batch, model=LOGITS, **hyper)
        return loss / sums["weight"]

    said, _ = score.evaluate(LOGITS, params, batch)
    return {
        "ce_label_smoothed": mean(label_smoothing=i["label_smoothing"]),
        "z_loss": i["z_loss_coef"] * masked_mean(cross_entropy.z_loss(said.log_z), batch.targets),
        "total": mean(label_smoothing=i["label_smoothing"], z_loss=i["z_loss_coef"]),
    }


def gradient_accumulation_token_weighting(i):
    sums, counts = np.asarray(i["sum_nll_per_microbatch"]), np.asarray(i["tokens_per_microbatch"], int)
    parts = len(sums)
    logp = -sums / counts  # token k follows itself with this log-probability
    table = np.repeat(np.log(-np.expm1(logp) / parts)[:, None], parts + 1, axis=1)
    table[range(parts), range(parts)] = logp
    tokens = np.repeat(np.arange(parts)[:, None], counts.max() + 1, axis=1)  # row k repeats token k
    weights = np.arange(counts.max() + 1)[None] <= counts[:, None]
    batch = rows_of(tokens, jnp.asarray(weights, jnp.float32))

    tx = optax.identity()
    params = {"table": jnp.asarray(table, jnp.float32)}
    state = TrainState(jnp.int32(0), params, tx.init(params))

    def step(accumulate):
        return jax.jit(make_step(lambda p, b: supervised.sft(p, b, model=BIGRAM), tx, accumulate=accumulate))

    alone = step(1)
    each = [alone(state, jax.tree.map(itemgetter(slice(k, k + 1)), batch))[1]["loss/total"] for k in range(parts)]
    return {"correct": step(parts)(state, batch)[1]["loss/total"], "wrong_mean_of_means": jnp.stack(each).mean()}


def logprobs_temperature_entropy(i):
    batch = rows_of(i["input_ids"], jnp.ones(i["input_ids"].shape))
    said, _ = score.evaluate(LOGITS, {"logits": i["logits"]}, batch, temperature=i["temperature"])
    return {"logp": said.logp[:, 1:], "entropy": said.entropy[:, 1:]}


def packed_attention_and_loss(i):
    q, k, v = (i[name][None, :, None] for name in "qkv")
    segments = ids(i["segment_ids"])[None]
    positions = positions_of(segments)
    batch = Batch(ids(i["input_ids"])[None], segments, jnp.ones(segments.shape))

    def loss(batch):
        return supervised.sft({"logits": i["lm_logits"][None]}, batch, model=LOGITS)

    total, sums = loss(batch)
    crossed, crossed_sums = loss(batch.replace(segments=jnp.minimum(segments, 1)))
    return {
        "attention": attend(q, k, v, segments, segments)[0, :, 0],
        "attention_with_rope": attend(rope(q, positions), rope(k, positions), v, segments, segments)[0, :, 0],
        "loss_sum": total,
        "n_targets": sums["weight"],
        "loss_token_mean": total / sums["weight"],
        "wrong_loss_if_borders_counted": crossed / crossed_sums["weight"],
    }


def gpt1_auxiliary_lm(i):
    """The hidden state holds the logits of the next token, and at the last one those of the class."""
    rows, columns, vocab = i["lm_logits"].shape
    classes = i["class_logits"].shape[1]
    at_end = jnp.pad(i["class_logits"][:, None], ((0, 0), (columns - 1, 0), (0, 0)))
    last = jnp.concatenate([jnp.zeros((vocab, classes)), jnp.eye(classes)])
    params = {
        "logits": jnp.concatenate([i["lm_logits"], at_end], axis=2),
        "classes": {"kernel": last, "bias": jnp.zeros(classes)},
    }
    model = LOGITS._replace(unembed=lambda params, hidden: hidden[..., :vocab])
    one = rows_of(i["input_ids"], jnp.ones((rows, columns)))
    loss, sums = supervised.classify(params, supervised.Classified((one,), ids(i["labels"])), model=model, lm_weight=i["lm_lambda"])
    n = sums["weight"]
    return {"L1_lm": sums["loss/lm"] / n, "L2_clf": sums["loss/class"] / n, "L3": loss / n}


def embedding_distance(i):
    params = {"logits": i["logits"], "embed": {"tokens": i["embedding"]}}
    batch = rows_of(i["input_ids"], i["loss_mask"])

    def means(cosine):
        loss, sums = supervised.semantic_sft(params, batch, model=LOGITS, distance_weight=i["alpha"], cosine=cosine)
        return loss / sums["weight"], *(sums[name] / sums["weight"] for name in ("loss/nll", "loss/distance"))

    (total, nll, expected), (total_cosine, _, cosine) = means(False), means(True)
    return {
        "expected_sq_distance": expected,
        "cosine_distance": cosine,
        "ce": nll,
        "total_expected_sq": total,
        "total_cosine": total_cosine,
    }


# --------------------------------------------------------- rewards


def rm_pairwise_bradley_terry(i):
    chosen, rejected = i["r_chosen"], i["r_rejected"]
    side = rows_of(jnp.zeros((len(chosen), 2)), jnp.ones((len(chosen), 2)))

    def mean(chosen, margin, name=None, **hyper):
        params = {"scores": jnp.stack([chosen, rejected], axis=1).ravel()}
        loss, sums = reward.pairwise(params, Pairs(side, side, margin), model=SCORES, **hyper)
        return (loss if name is None else sums[name]) / sums["weight"]

    none = jnp.zeros_like(chosen)
    return {
        "per_pair": preference.bradley_terry(chosen, rejected),
        "loss": mean(chosen, none),
        "loss_margin_small": mean(chosen, i["margin_small"]),
        "loss_margin_large": mean(chosen, i["margin_large"]),
        "accuracy": mean(chosen, none, "reward/accuracy"),
        "grad_r_chosen": jax.grad(mean)(chosen, none),
        "center_term": mean(chosen, none, centring=i["center_coef"]) - mean(chosen, none),
    }


def ranked(rank):
    """[B,K] responses, each a token after a prompt of one."""
    ones = jnp.ones((len(rank), 2))
    return reward.Ranked((rows_of(ones, ones),) * rank.shape[1], ids(rank))


def rm_best_of_k_softmax(i):
    best = ids(i["best"])[:, None]

    def mean(scores, best):
        data = ranked(jnp.arange(scores.shape[1])[None] != best)
        loss, sums = reward.best_of_k({"scores": scores.ravel()}, data, model=SCORES)
        return loss / sums["weight"], sums["reward/accuracy"] / sums["weight"]

    loss, accuracy = mean(i["rewards"], best)
    every = jnp.ones(i["rewards"].shape, bool)
    return {
        "per_example": preference.best_of_k(i["rewards"], jnp.arange(every.shape[1])[None] == best, every),
        "loss": loss,
        "accuracy": accuracy,
        "k2_equals_bradley_terry": mean(i["rewards"][:, :2], ids(jnp.zeros_like(best)))[0],
    }


def rm_kwise_instructgpt(i):
    per_prompt, pairs = preference.k_wise(i["rewards"], i["ranks"], jnp.ones(i["ranks"].shape, bool))
    loss, sums = reward.k_wise({"scores": i["rewards"].ravel()}, ranked(i["ranks"]), model=SCORES)
    n_pairs = pairs.sum((1, 2))
    return {
        "per_prompt": per_prompt,
        "loss": loss / sums["weight"],
        "pooled_pairs_mean_for_contrast": (per_prompt * n_pairs).sum() / n_pairs.sum(),
        "n_pairs": n_pairs,
    }


def reward_normalisation(i):
    r, target = i["rewards_on_policy_samples"], {"mean": i["target_mean"], "std": i["target_std"]}
    gain, bias = rewards.normaliser(r, **target)
    reference_bias = rewards.reference_bias(i["rewards_on_references"])
    return {
        "old_mean": (i["target_mean"] - bias) / gain,
        "old_std_population": i["target_std"] / gain,
        "gain": gain,
        "bias": bias,
        "normalised": gain * r + bias,
        "reference_bias": reference_bias,
        "reference_shifted": r - reference_bias,
    }


def rlhf_reward_shaping(i):
    has_eos, mask = i["has_eos"] > 0, i["mask"]
    replaced = advantages.without_eos(i["score"], has_eos, replace=i["missing_eos_value"])
    kl = divergences.k1(i["logp"], i["ref_logp"])
    shape = (i["logp"], i["ref_logp"], mask)
    shaped = advantages.token_rewards(*shape, replaced, i["beta"])
    return {
        "score_replaced": replaced,
        "score_subtracted": advantages.without_eos(i["score"], has_eos, penalty=i["missing_eos_penalty"]),
        "kl_per_token": masked(kl, mask),
        "sequence_kl": masked_sum(kl, mask, 1),
        "rewards_last_token": shaped,
        "rewards_p1_variant": advantages.token_rewards(*shape, replaced, i["beta"], after_last=True),
        "mean_non_score_reward": advantages.token_rewards(*shape, 0 * replaced, i["beta"]).sum(1).mean(),
        "mean_rlhf_reward": shaped.sum(1).mean(),
    }


def adaptive_kl_controller(i):
    beta, seen = i["init"], []
    for kl in i["observed_kl"]:
        beta = rewards.update_beta(beta, kl, i["n_steps"], target=i["target"], horizon=i["horizon"])
        seen.append(beta)
    return {"trajectory": jnp.stack(seen)}


# --------------------------------------------------------- policy gradients


def gae(i):
    mask, hyper = i["mask"], {"gamma": i["gamma"], "lam": i["lam"]}
    advantage, returns = advantages.gae(i["rewards"], i["values"], mask, **hyper)
    full = advantages.gae(i["full_rewards"], i["full_values"], jnp.ones_like(i["full_values"]), **hyper)
    summed, _ = advantages.gae(i["rewards"], i["values"], mask, gamma=i["gamma"], lam=1.0)
    out = {
        "advantages": advantage,
        "returns": returns,
        "full_advantages": full[0],
        "full_returns": full[1],
        "lam1_equals_return_minus_value": summed[0, 0],
    }
    if "p1_variant" in i["expected"]:  # its rewards stand among the outputs; rlhf_reward_shaping checks them
        late = jnp.asarray(i["expected"]["p1_variant"]["rewards"])
        late_advantage, late_returns = advantages.gae(late, i["values"], advantages.slot_after(mask), **hyper)
        out["p1_variant"] = {"rewards": late, "advantages_unwhitened": masked(late_advantage, mask), "returns": late_returns}
    return out


def whitening(i):
    x, mask = i["x"], i["mask"]
    return {
        "biased": whiten(x, mask),
        "bessel": whiten(x, mask, ddof=1),
        "biased_no_shift_mean": whiten(x, mask, shift_mean=False),
        "unmasked_biased": whiten(x, jnp.ones_like(x)),
    }


def reinforce_returns(i):
    return {"returns": advantages.reward_to_go(i["rewards"], i["mask"], gamma=i["gamma"])}


def reinforce_gradient(i):
    logits, table = i["logits"], i["reward_matrix"]
    every = np.indices(table.shape).reshape(table.ndim, -1).T  # every sequence, in the order of the matrix
    first = after_first(ids(every))

    def probabilities(logits):
        said, _ = score.evaluate(STEPS, {"logits": logits}, rows_of(first, jnp.ones(first.shape)))
        return jnp.exp(masked_sum(said.logp, after_first(jnp.ones(every.shape)), 1))

    def ascent(tokens, returned, weights):
        """Minus the gradient of the loss; one return and one weight a row."""
        weights = jnp.broadcast_to(weights[:, None], tokens.shape)
        rows, spread = rows_of(tokens, weights), jnp.broadcast_to(returned[:, None], tokens.shape)
        data = Rollout(rows, None, None, None, None, spread, None, None)
        return jax.grad(lambda x: -online.reinforce({"logits": x}, data, model=STEPS)[0])(logits)

    sampled, reward_of_it = after_first(ids(i["sampled"])[None]), table[tuple(ids(i["sampled"]))][None]
    return {
        "expected_reward": probabilities(logits) @ table.ravel(),
        "exact_gradient": jax.grad(lambda x: probabilities(x) @ table.ravel())(logits),
        "expectation_of_estimator": ascent(first, table.ravel(), probabilities(logits)),
        "single_sample_estimate": ascent(sampled, reward_of_it, jnp.ones(1)),
        "single_sample_with_baseline": ascent(sampled, reward_of_it - i["baseline"], jnp.ones(1)),
    }


def ppo_ops(i):
    """The equations alone, in any precision."""
    mask, advantage, n = i["mask"], i["advantages_whitened"], i["mask"].sum()
    ratio = jnp.exp(i["logp_new"] - i["logp_old"])
    clip = {"clip_low": i["cliprange"], "clip_high": i["cliprange"]}
    surrogate = policy.clipped_surrogate(ratio, advantage, **clip)
    value_loss = policy.clipped_value_loss(i["values_new"], i["values_old"], i["returns"], clip=i["cliprange_value"])
    bounded = policy.clipped_surrogate(ratio, advantage, **clip, dual_clip=i["dual_clip_c"])

    def loss(logp):
        return masked_mean(policy.clipped_surrogate(jnp.exp(logp - i["logp_old"]), advantage, **clip), mask)

    return {
        "ratio": masked(ratio, mask),
        "pg_loss": masked_mean(surrogate, mask),
        "pg_loss_seq_mean_token_mean": masked_mean(surrogate, mask, 1).mean(),
        "vf_loss": masked_mean(value_loss, mask),
        "total": masked_sum(surrogate + i["vf_coef"] * value_loss, mask) / n,
        "approxkl": masked_mean(divergences.k2(i["logp_new"], i["logp_old"]), mask),
        "mean_ratio": masked_mean(ratio, mask),
        "pg_loss_dual_clip": masked_mean(bounded, mask),
        "grad_logp_new": jax.grad(loss)(i["logp_new"]),
    }


def ppo_losses(i):
    """The objective. Log-probabilities of the file may be positive, which no model can say: all move by one constant."""
    moved = 1 + jnp.maximum(i["logp_new"].max(), i["logp_old"].max())
    mask = after_first(i["mask"])
    data = Rollout(
        batch=rows_of(jnp.zeros(mask.shape), mask),
        logp=after_first(i["logp_old"] - moved),
        ref_logp=None,
        value=after_first(i["values_old"]),
        reward=None,
        advantage=after_first(i["advantages_whitened"]),
        target=after_first(i["returns"]),
        score=None,
    )
    clip = {"clip_low": i["cliprange"], "clip_high": i["cliprange"], "value_clip": i["cliprange_value"]}

    def means(logp, **hyper):
        params = {"logp": logp - moved, "value": i["values_new"]}
        loss, sums = online.ppo(params, data, model=LOGP, value_weight=i["vf_coef"], **clip, **hyper)
        return loss / sums["weight"], {name: x / sums["weight"] for name, x in sums.items()}

    grad, metrics = jax.grad(means, has_aux=True)(i["logp_new"])
    ops = ppo_ops(i)
    return {
        "ratio": ops["ratio"],
        "pg_loss": metrics["loss/policy"],
        "pg_loss_seq_mean_token_mean": ops["pg_loss_seq_mean_token_mean"],
        "vf_loss": metrics["loss/value"],
        "total": means(i["logp_new"])[0],
        "pg_clipfrac": metrics["policy/clipped"],
        "vf_clipfrac": metrics["value/clipped"],
        "approxkl": metrics["policy/approx_kl"],
        "mean_ratio": metrics["policy/ratio"],
        "pg_loss_dual_clip": means(i["logp_new"], dual_clip=i["dual_clip_c"])[1]["loss/policy"],
        "grad_logp_new": grad,
    }


def kl_estimators(i):
    logits, ref = i["categorical_policy_logits"], i["categorical_ref_logits"]
    p, ref_logp = jax.nn.softmax(logits), jax.nn.log_softmax(ref)
    out = {"exact_kl": divergences.exact(logits, ref), "exact_grad_kl": jax.grad(divergences.exact)(logits, ref)}
    out["grad_reverse_kl_ref_pi"] = jax.grad(lambda x: divergences.exact(ref, x))(logits)
    for name in ("k1", "k2", "k3"):
        estimator = getattr(divergences, name)

        def each(logits, estimator=estimator):
            return estimator(jax.nn.log_softmax(logits), ref_logp)

        mean = p @ each(logits)
        out[name] = estimator(i["logp"], i["ref_logp"])
        out[f"expected_{name}"], out[f"var_{name}"] = mean, p @ (each(logits) - mean) ** 2
        out[f"expected_grad_{name}"] = p @ jax.jacobian(each)(logits)
    del out["var_k2"]  # the files do not hold it
    return out


# --------------------------------------------------------- groups


def group_advantages(i):
    of = (i["rewards"], i["num_generations"])
    return {
        "grpo_eps1e_4": advantages.grpo(*of),
        "grpo_eps1e_6": advantages.grpo(*of, eps=1e-6),
        "grpo_population_std": advantages.grpo(*of, eps=1e-8, ddof=0),
        "dr_grpo": advantages.dr_grpo(*of),
        "grpo_batch_std": advantages.grpo_over_batch(*of),
        "rloo": advantages.rloo(*of),
    }


def grpo_losses(i):
    logp, old, mask = i["logp"], i["old_logp"], i["mask"]
    ratio, kl = jnp.exp(logp - old), divergences.k3(logp, i["ref_logp"])

    def mean(ratio, advantage, how, *, clip_high=i["eps_low"], beta=0.0):
        loss = policy.clipped_surrogate(ratio, advantage[:, None], clip_low=i["eps_low"], clip_high=clip_high) + beta * kl
        weights, n = how(mask)
        return masked_sum(loss, weights) / n

    normalised, raw = i["advantages_grpo"], i["advantages_dr_grpo"]
    constant = partial(aggregate.seq_sum_const, length=i["max_completion_length"])
    return {
        "grpo": mean(ratio, normalised, aggregate.seq_mean_token_mean, beta=i["beta"]),
        "token_level": mean(ratio, normalised, aggregate.token_mean, beta=i["beta"]),
        "dapo": mean(ratio, normalised, aggregate.token_mean, clip_high=i["eps_high_dapo"]),
        "dr_grpo": mean(ratio, raw, constant),
        "gspo": mean(policy.gspo_ratio(logp, old, mask), normalised, aggregate.seq_mean_token_mean),
        "k3_mean": masked_mean(kl, mask),
    }


def rloo_loss(i):
    mask, of = i["mask"], i["num_generations"]
    ratio = policy.sequence_ratio(i["logp"], i["old_logp"], mask)
    clip = {"clip_low": i["eps"], "clip_high": i["eps"]}
    loss = policy.clipped_surrogate(ratio, advantages.rloo(i["rewards"], of)[:, None], **clip)
    weights, n = aggregate.seq_mean_token_mean(mask)
    kl = masked_sum(divergences.k1(i["old_logp"], i["ref_logp"]), mask, 1)
    return {
        "sequence_ratio": ratio[:, 0],
        "loss_without_kl": masked_sum(jnp.broadcast_to(loss, mask.shape), weights) / n,
        "kl_per_sequence": kl,
        "advantages_with_kl": advantages.rloo(i["rewards"] - i["beta"] * kl, of),
    }


def dapo_overlong_and_dynamic_sampling(i):
    correct = jnp.arange(i["group_size"])[None] < i["group_correct"][:, None]
    return {
        "length_reward": advantages.overlong_penalty(i["lengths"], longest=i["l_max"], ramp=i["l_cache"]),
        "keep": advantages.dynamic_sampling(correct.astype(jnp.float32).ravel(), i["group_size"]),
    }


# --------------------------------------------------------- preferences


def responses(totals, lengths):
    """Responses of these lengths, after a prompt of one token, and the params of LOGP that give them these log-probabilities."""
    mask = (jnp.arange(16)[None] < lengths[:, None]).astype(totals.dtype)
    params = {"logp": jnp.where(mask > 0, (totals / lengths)[:, None], -1), "value": jnp.zeros(mask.shape)}
    return params, rows_of(jnp.zeros((len(totals), 17)), after_first(mask))


def pair_by_pair(objective, chosen, rejected, ref_chosen=None, ref_rejected=None, lengths=None, **hyper):
    """The objective of each pair alone, from log-probabilities of responses [B]: (losses, sums), [B] each."""
    lengths = jnp.ones((len(chosen), 2)) if lengths is None else lengths
    refs = None if ref_chosen is None else jnp.stack([ref_chosen, ref_rejected], 1)

    def one(logp, lengths, refs):
        params, both = responses(logp, lengths)
        sides = (jax.tree.map(itemgetter(slice(k, k + 1)), both) for k in (0, 1))
        given = () if refs is None else (refs[:1], refs[1:])
        return objective(params, Pairs(*sides, jnp.zeros(1), *given), model=LOGP, **hyper)

    return jax.vmap(one)(jnp.stack([chosen, rejected], 1), lengths, refs)


def dpo_family(i):
    names = ("policy_chosen_logp", "policy_rejected_logp", "ref_chosen_logp", "ref_rejected_logp")
    given, beta = [i[name] for name in names], {"beta": i["beta"]}
    lengths = jnp.stack([i["len_chosen"], i["len_rejected"]], 1)

    def losses(objective, chosen=given[0], **hyper):
        return pair_by_pair(objective, chosen, *given[1:], lengths, **beta, **hyper)

    dpo, sums = losses(offline.dpo)
    ipo = losses(offline.ipo)[0]
    return {
        "dpo": dpo,
        "dpo_mean": dpo.mean(),
        "cdpo_mean": losses(offline.conservative_dpo, label_smoothing=i["label_smoothing"])[0].mean(),
        "robust_mean": losses(offline.robust_dpo, noise=i["label_smoothing"])[0].mean(),
        "ipo": ipo,
        "ipo_mean": ipo.mean(),
        "ipo_length_normalised_mean": losses(offline.ipo, per_token=True)[0].mean(),
        "hinge_mean": losses(offline.slic)[0].mean(),
        "reward_chosen": sums["reward/chosen"],
        "reward_rejected": sums["reward/rejected"],
        "accuracy": sums["reward/accuracy"].mean(),
        "grad_policy_chosen_logp": jax.grad(lambda x: losses(offline.dpo, x)[0].mean())(given[0]),
    }


def dpo_family_ops(i):
    """The equations alone, in any precision."""
    chosen, rejected = (i[f"policy_{side}_logp"] - i[f"ref_{side}_logp"] for side in ("chosen", "rejected"))
    r, e, dpo = (i["beta"] * chosen, i["beta"] * rejected), i["label_smoothing"], preference.bradley_terry
    per_token = (chosen / i["len_chosen"], rejected / i["len_rejected"])
    return {
        "dpo": dpo(*r),
        "cdpo_mean": preference.soft_bradley_terry(*r, 1 - e).mean(),
        "robust_mean": preference.robust_bradley_terry(*r, noise=e).mean(),
        "ipo": preference.ipo(chosen, rejected, beta=i["beta"]),
        "ipo_length_normalised_mean": preference.ipo(*per_token, beta=i["beta"]).mean(),
        "hinge_mean": preference.hinge(*r).mean(),
        "grad_policy_chosen_logp": i["beta"] * jax.grad(lambda x: dpo(x, r[1]).mean())(r[0]),
    }


def kto(i):
    ones = jnp.ones(len(i["policy_logp"]))
    (params, mismatched), (ref_params, _) = responses(i["policy_kl_logp"], ones), responses(i["ref_kl_logp"], ones)
    z0 = offline.kto_baseline(params, ref_params, mismatched, model=LOGP)
    weights = {"desirable_weight": i["w_desirable"], "undesirable_weight": i["w_undesirable"]}

    def one(logp, ref_logp, desirable):
        params, batch = responses(logp[None], jnp.ones(1))
        data = offline.Labelled(batch, desirable[None] > 0, ref_logp[None], z0[None])
        return offline.kto(params, data, model=LOGP, beta=i["beta"], **weights)[0]

    losses = jax.vmap(one)(i["policy_logp"], i["ref_logp"], i["desirable"])
    return {"z0": z0, "losses": losses, "loss": losses.mean()}


def kto_ops(i):
    ones = jnp.ones(len(i["policy_logp"]))
    z0 = preference.kto_baseline(i["policy_kl_logp"] - i["ref_kl_logp"], ones)
    weights = {"desirable_weight": i["w_desirable"], "undesirable_weight": i["w_undesirable"]}
    log_ratio = i["policy_logp"] - i["ref_logp"]
    return {"z0": z0, "losses": preference.kto(log_ratio, i["desirable"] > 0, z0, beta=i["beta"], **weights)}


def orpo(i):
    sides = (i["avg_logp_chosen"], i["avg_logp_rejected"])
    losses, sums = pair_by_pair(offline.orpo, *sides, odds_weight=i["lam"])
    return orpo_ops(i) | {"log_odds_ratio": sums["reward/difference"], "loss": losses.mean()}


def orpo_ops(i):
    chosen, rejected = i["avg_logp_chosen"], i["avg_logp_rejected"]
    odds = [preference.log_odds(x) for x in (chosen, rejected)]
    return {
        "log_odds_ratio": odds[0] - odds[1],
        "or_term": preference.bradley_terry(*odds),
        "nll_from_avg": preference.orpo(chosen, rejected, weight=0.0).mean(),
        "loss": preference.orpo(chosen, rejected, weight=i["lam"]).mean(),
    }


def simpo(i):
    hyper = {"beta": i["beta"], "gamma": i["gamma"]}
    losses, _ = pair_by_pair(offline.simpo, i["avg_logp_chosen"], i["avg_logp_rejected"], **hyper)
    return {"losses": losses, "loss": losses.mean()}


def simpo_ops(i):
    return {"losses": preference.bradley_terry(*(i["beta"] * i[f"avg_logp_{side}"] for side in ("chosen", "rejected")), i["gamma"])}


# --------------------------------------------------------- inference and evaluation


def best_of_n_case(i):
    probs, scores = i["discrete_probs_in_increasing_reward"], i["scores"]
    drawn = jax.vmap(lambda n: best_of_n.probabilities(probs, n))(i["n"])
    return {
        "kl_formula": best_of_n.kl(i["n"]),
        "exact_kl_discrete": divergences.kl(jnp.log(drawn), jnp.log(probs)[None]),
        "expected_reward_discrete": drawn @ i["discrete_rewards"],
        "unbiased_expected_max": best_of_n.expected_max(scores, i["n_for_estimator"]),
        "argmax_pick": scores.argmax(),
    }


def overoptimisation_law(i):
    bon, rl = (i["alpha_bon"], i["beta_bon"]), (i["alpha_rl"], i["beta_rl"])
    (d_bon, r_bon), (d_rl, r_rl) = overoptimisation.best_of_n_peak(*bon), overoptimisation.rl_peak(*rl)
    return {
        "R_bon": overoptimisation.best_of_n(i["d"], *bon),
        "R_rl": overoptimisation.rl(i["d"], *rl),
        "d_star_bon": d_bon,
        "R_star_bon": r_bon,
        "d_star_rl": d_rl,
        "R_star_rl": r_rl,
        "kl_star_rl": d_rl**2,
    }


def hallucination_reward_boundary(i):
    table = truthfulness.Table(**i["reward_table"])
    answer, hedge, abstain = truthfulness.expected(i["p_correct"], table)
    thresholds = truthfulness.thresholds(table)
    return {
        "E_unhedged": answer,
        "E_hedged": hedge,
        "E_uninformative": abstain,
        "answer_threshold": thresholds[0],
        "hedge_threshold": thresholds[1],
    }


def ece_brier(i):
    probs, labels = i["probs"], ids(i["labels"])
    correct = (probs.argmax(1) == labels).astype(probs.dtype)
    eces = {f"ece_{bins}": calibration.ece(probs.max(1), correct, bins=bins) for bins in (10, 15, 30)}
    return {**eces, "accuracy": correct.mean(), "brier": calibration.brier(probs, labels)}


def self_consistency(i):
    return {"result": [vote(answers)._asdict() for answers in i["answers"]]}


# --------------------------------------------------------- texts


def mmlu_prompt_and_score(i):
    shots = [(question, choices, letter) for question, *choices, letter in i["dev"]]
    question, *choices, _ = i["test"][0]
    letters, probs = mmlu.answers(i["letter_logprobs"])
    correct = [letter == gold for letter, gold in zip(letters, i["gold"], strict=True)]
    prompt = mmlu.prompt(i["subject"], shots, question, choices)
    return {"prompt": prompt, "predictions": letters, "correct": correct, "probs": probs}


def rouge_l(i):
    both = zip(i["multi_predictions"], i["multi_reference"], strict=True)
    best = [rouge.rouge_l(prediction, references, stem=True) for prediction, references in both]
    return {
        "rougeL_f_no_stem": [rouge.rouge_l(a, [b], stem=False) for a, b in i["pairs"]],
        "rougeL_f_stem": [rouge.rouge_l(a, [b], stem=True) for a, b in i["pairs"]],
        "super_ni_max_over_refs": best,
        "super_ni_score": 100 * np.mean(best),
    }


def self_instruct_filters(i):
    found = self_instruct.instructions(i["response_text"])
    told = self_instruct.novel(found, i["pool"])
    return {
        "after_heuristics": found,
        "after_heuristics_if_finish_reason_length": self_instruct.instructions(i["response_text"], finished=False),
        "decisions_in_order": [dict(zip(("instruction", "max_rougeL", "keep"), each, strict=True)) for each in told],
    }


# --------------------------------------------------------- sampling and optimiser


def sampling_filters(i):
    return {
        "top_k_probs": jax.nn.softmax(filters.top_k(i["logits"], i["top_k"])),
        "top_p_probs": jax.nn.softmax(filters.top_p(i["logits"], i["top_p"])),
    }


def adam_pytorch_vs_tensorflow(i):
    def path(placement):
        params, seen = i["params"], []
        hyper = {name: i[name] for name in ("b1", "b2", "eps")}
        steps = {"learning_rate": i["lr"], "steps": len(i["grads"]), "decay": "constant"}
        tx = optim.adam(**steps, **hyper, eps_placement=placement, clip_norm=0.0)
        state = tx.init(params)
        for grad in i["grads"]:
            updates, state = tx.update(grad, state, params)
            params = optax.apply_updates(params, updates)
            seen.append(params)
        return jnp.stack(seen)

    return {"torch_optax": path("pytorch"), "tensorflow": path("tensorflow")}


# --------------------------------------------------------- checkpoints


def tiny_parity(i):
    """One forward and backward pass over the right-padded, the left-padded and the packed rows; only the first have weights."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(i["config"]))
        save_file({name: np.array(x, np.float32) for name, x in i["params"].items()}, Path(folder) / "model.safetensors")
        config, params = checkpoints.load(folder)
    model = decoder.build(config)
    packed = i["packed"]
    width = len(packed["input_ids"])

    def rows(ids, segments, weight):
        ids, segments = np.atleast_2d(ids), np.atleast_2d(segments)
        space = ((0, 0), (0, width - ids.shape[1]))
        segments = np.pad(segments, space)
        return Batch(np.pad(ids, space), segments, np.full(segments.shape, weight, np.float32))

    right, left = (rows(*i[f"{side}_padded"].values(), weight) for side, weight in (("right", 1), ("left", 0)))
    batch = jax.tree.map(lambda *x: jnp.concatenate(x), right, left, rows(packed["input_ids"], packed["segment_ids"], 0))

    @jax.jit
    def run(params):
        def loss(params):
            total, sums = supervised.sft(params, batch, model=model)
            return total / sums["weight"]

        hidden, _ = model.apply(params, batch.tokens, batch.segments)
        return model.unembed(params, hidden), *jax.value_and_grad(loss)(params)

    logits, nll, grads = run(params)
    many = len(right.tokens)
    out = {"nll_token_mean": nll, "global_grad_norm": optax.tree.norm(grads)}
    for row in range(many):
        alone = logits[row][right.segments[row] > 0]
        in_the_pack = logits[-1][np.asarray(packed["segment_ids"]) == row + 1]
        for other in (logits[many + row][left.segments[row] > 0], in_the_pack):
            np.testing.assert_allclose(other, alone, atol=1e-5, rtol=1e-5)
        out[f"logits_sequence_{row}"] = alone
    with tempfile.TemporaryDirectory() as folder:  # the gradient in the checkpoint's names and layout
        checkpoints.export(folder, config, grads, family=i["config"]["model_type"])
        out["grad_norms"] = {name: np.linalg.norm(x) for name, x in load_file(Path(folder) / "model.safetensors").items()}
    return out


def tiny_t5_parity(i):
    """Logits of the sources padded on the right, as they are given, and on the left, alone, and of both documents packed."""
    told = {"scale_decoder_outputs": False} | i["config"]  # transformers 5 wrote the case, and left out that it was told so
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(told))
        save_file({name: np.array(x, np.float32) for name, x in i["params"].items()}, Path(folder) / "model.safetensors")
        config, params = checkpoints.load(folder)
    model, targets = models.build(config), np.asarray(i["decoder_input_ids"], np.int32)
    assert (config.start == targets[:, 0]).all() and (np.asarray(i["labels"])[:, :-1] == targets[:, 1:]).all()
    sources = [np.asarray(ids, np.int32)[np.asarray(mask) > 0] for ids, mask in zip(i["input_ids"], i["attention_mask"])]
    documents = [Document(x, np.ones(len(x), np.float32), source) for x, source in zip(targets, sources, strict=True)]
    length, most = targets.size, sum(map(len, sources))
    right = tables.pad(documents, length, source_length=most)
    left = tables.pad(documents, length, side="left", source_length=most)
    for x in (left.source, left.source_segments):
        x[:] = [np.roll(row, most - len(source)) for row, source in zip(x, sources, strict=True)]

    @jax.jit
    def logits(batch):
        return model.unembed(params, model.read(params, batch)[0])

    packed = tables.pack_rows([documents], length, source_length=most)
    out = [np.asarray(logits(batch))[batch.segments > 0] for batch in (right, left, packed)]
    for x in out[1:]:
        np.testing.assert_allclose(x, out[0], atol=1e-5, rtol=1e-5)
    for n, document in enumerate(documents):
        alone = logits(tables.pad([document], len(document.tokens), source_length=len(document.source)))[0]
        np.testing.assert_allclose(alone, out[0].reshape(*targets.shape, -1)[n], atol=1e-5, rtol=1e-5)
    return {"logits": out[0].reshape(*targets.shape, -1)}


FLOAT64 = {
    "adam_pytorch_vs_tensorflow": adam_pytorch_vs_tensorflow,
    "adaptive_kl_controller": adaptive_kl_controller,
    "best_of_n": best_of_n_case,
    "dapo_overlong_and_dynamic_sampling": dapo_overlong_and_dynamic_sampling,
    "dpo_family": dpo_family_ops,
    "ece_brier": ece_brier,
    "gae": gae,
    "group_advantages": group_advantages,
    "grpo_losses": grpo_losses,
    "hallucination_reward_boundary": hallucination_reward_boundary,
    "kl_estimators": kl_estimators,
    "kto": kto_ops,
    "orpo": orpo_ops,
    "overoptimisation_law": overoptimisation_law,
    "ppo_losses": ppo_ops,
    "reinforce_returns": reinforce_returns,
    "reward_normalisation": reward_normalisation,
    "rlhf_reward_shaping": rlhf_reward_shaping,
    "rloo_loss": rloo_loss,
    "rm_best_of_k_softmax": rm_best_of_k_softmax,
    "rm_kwise_instructgpt": rm_kwise_instructgpt,
    "rm_pairwise_bradley_terry": rm_pairwise_bradley_terry,
    "sampling_filters": sampling_filters,
    "self_consistency": self_consistency,
    "self_instruct_filters": self_instruct_filters,
    "mmlu_prompt_and_score": mmlu_prompt_and_score,
    "rouge_l": rouge_l,
    "simpo": simpo_ops,
    "whitening": whitening,
}
FLOAT32 = FLOAT64 | {
    "dpo_family": dpo_family,
    "embedding_distance": embedding_distance,
    "gpt1_auxiliary_lm": gpt1_auxiliary_lm,
    "gradient_accumulation_token_weighting": gradient_accumulation_token_weighting,
    "kto": kto,
    "logprobs_temperature_entropy": logprobs_temperature_entropy,
    "orpo": orpo,
    "packed_attention_and_loss": packed_attention_and_loss,
    "ppo_losses": ppo_losses,
    "reinforce_gradient": reinforce_gradient,
    "sft_completion_only": sft_completion_only,
    "sft_label_smoothing_z_loss": sft_label_smoothing_z_loss,
    "simpo": simpo,
    "tiny_gpt2_parity": tiny_parity,
    "tiny_gpt_neox_parity": tiny_parity,
    "tiny_llama_parity": tiny_parity,
    "tiny_qwen2_parity": tiny_parity,
    "tiny_t5_parity": tiny_t5_parity,
}


EAGER = {
    mmlu_prompt_and_score,
    rouge_l,
    self_instruct_filters,
    gradient_accumulation_token_weighting,
    reward_normalisation,
    self_consistency,
    tiny_parity,
    tiny_t5_parity,
}  # they read values of arrays


# --------------------------------------------------------- the tests


def cases_of(folder) -> dict:
    return {path.stem: json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))}


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    folder = metafunc.config.getoption("golden")
    cases = cases_of(folder)
    if not cases:
        raise pytest.UsageError(f"no golden numbers (*.json) in {folder}")
    wide = metafunc.function is test_float64
    kept = {stem: case for stem, case in cases.items() if case["name"] in FLOAT64 or not wide}
    metafunc.parametrize("case", list(kept.values()), ids=list(kept))


def compute(function, case):
    """function(inputs): lists become float arrays of the precision in force; the file's outputs go with them, as `expected`."""
    ragged = ("multi_reference",)
    numbers = {k: np.array(x) for k, x in case["inputs"].items() if isinstance(x, list) and k not in ragged}
    arrays = {k: jnp.asarray(x.astype(float)) for k, x in numbers.items() if x.dtype.kind != "U"}
    rest = {k: x for k, x in case["inputs"].items() if k not in arrays} | {"expected": case["outputs"]}
    run = function if function in EAGER else jax.jit(lambda arrays: function({**arrays, **rest}))
    return run(arrays if run is not function else {**arrays, **rest})


def check(got, want, tolerance, path):
    if isinstance(want, dict):
        assert set(want) <= set(got), f"{path}: nothing computes {sorted(set(want) - set(got))}"
        for key in want:
            check(got[key], want[key], tolerance, f"{path}/{key}")
    elif isinstance(want, str):
        assert got == want, path
    elif isinstance(want, list) and all(isinstance(wanted, dict | str) for wanted in want):
        for n, (one, wanted) in enumerate(zip(got, want, strict=True)):
            check(one, wanted, tolerance, f"{path}/{n}")
    else:
        assert np.shape(got) == np.shape(want), f"{path}: shape {np.shape(got)} is not {np.shape(want)}"
        np.testing.assert_allclose(got, want, atol=tolerance, rtol=tolerance, err_msg=path)


def test_float32(case):
    name = case["name"]
    assert name in FLOAT32, f"nothing computes {name!r}: map it in FLOAT32"
    check(compute(FLOAT32[name], case), case["outputs"], 1e-5, name)


def test_float64(case):
    name = case["name"]
    with jax.enable_x64(True):
        got = compute(FLOAT64[name], case)
        check(got, {key: case["outputs"][key] for key in got}, case["tolerance"], name)


def test_every_golden_file_is_mapped():
    names = {case["name"] for case in cases_of(Path(__file__).parent / "golden").values()}
    assert names == set(FLOAT32)
