"""Losses of comparisons and of labels: what they say of each pair, and what they have in common."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.objectives import preference as objectives
from jaxalign.ops import preference
from jaxalign.types import Batch, Model, Pairs

draw = np.random.default_rng(11)
CHOSEN, REJECTED, OTHER = (jnp.asarray(x, jnp.float32) for x in draw.normal(0, 1.5, (3, 6)))


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


# --------------------------------------------------------- equations


def test_preferences_of_a_pair_sum_to_1():
    one, other = preference.bradley_terry(CHOSEN, REJECTED, OTHER), preference.bradley_terry(REJECTED, CHOSEN, -OTHER)
    close(jnp.exp(-one) + jnp.exp(-other), 1)
    close(preference.bradley_terry(CHOSEN + 7, REJECTED + 7), preference.bradley_terry(CHOSEN, REJECTED))
    assert np.isfinite(preference.bradley_terry(jnp.array([-1e4]), jnp.array([1e4]))).all()
    close(preference.centring(CHOSEN, -CHOSEN), 0)


def test_win_tie_and_loss_sum_to_1():
    def chance(won, tied):
        return jnp.exp(-preference.rao_kupper(CHOSEN, REJECTED, won, tied, theta=1.7))

    win, tie, loss = chance(1.0, 0.0), chance(0.0, 1.0), chance(0.0, 0.0)
    close(win + tie + loss, 1)
    close(win, jnp.exp(CHOSEN) / (jnp.exp(CHOSEN) + 1.7 * jnp.exp(REJECTED)))
    few = preference.rao_kupper(CHOSEN, REJECTED, 1.0, 0.0, theta=1 + 1e-6)
    close(few, preference.bradley_terry(CHOSEN, REJECTED))


def test_margins_of_llama_2_fall_with_how_much_better():
    for margins in (preference.MARGINS_SMALL, preference.MARGINS_LARGE):
        assert list(margins) == ["significantly better", "better", "slightly better", "negligibly better"]
        assert list(margins.values()) == sorted(margins.values(), reverse=True) and margins["negligibly better"] == 0


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.4])
def test_the_robust_loss_is_right_on_average_over_flipped_labels(noise):
    loss = partial(preference.robust_bradley_terry, noise=noise)
    average = (1 - noise) * loss(CHOSEN, REJECTED) + noise * loss(REJECTED, CHOSEN)
    close(average, preference.bradley_terry(CHOSEN, REJECTED))


def test_soft_labels_lie_between_the_hard_ones():
    close(preference.soft_bradley_terry(CHOSEN, REJECTED, 1.0), preference.bradley_terry(CHOSEN, REJECTED))
    close(preference.soft_bradley_terry(CHOSEN, REJECTED, 0.3), preference.soft_bradley_terry(REJECTED, CHOSEN, 0.7))
    best = jnp.log(0.8 / 0.2)  # the difference at which P(first is better) = 0.8
    close(jax.grad(preference.soft_bradley_terry)(best, 0.0, 0.8), 0)


def test_a_target_that_is_met_costs_nothing():
    close(preference.ipo(CHOSEN + 1 / 0.6, CHOSEN, beta=0.3), 0)
    close(preference.hinge(CHOSEN + 1, CHOSEN), 0, 1e-6)
    assert (preference.hinge(CHOSEN + 0.5, CHOSEN) > 0.49).all()
    close(preference.exo(jnp.log(9.0), 0.0, smoothing=0.1), 0, 1e-6)
    assert (preference.exo(CHOSEN, REJECTED, smoothing=0.1) > 0).all()


def test_nca_stops_at_a_reward_and_does_not_trade_it_for_a_difference():
    """Its gradient does not vanish where both rewards fall together, as that of DPO does."""
    slope = jax.vmap(jax.grad(preference.nca, (0, 1)))
    falls = slope(jnp.array([-20.0]), jnp.array([-40.0]))
    close(falls, ([-1.0], [0.0]))
    close(jax.grad(preference.nca)(jnp.log(2.0), 0.0), 0)  # 1 - s(r) = s(r)/2


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_links_are_derivatives_of_their_divergences(alpha):
    """f'(u) at u = pi/ref, up to a constant; f of Wang et al. 2024."""

    def f(u):
        ends = {0.0: u * jnp.log(u) - u, 1.0: u - jnp.log(u)}  # KL(pi || ref) and KL(ref || pi)
        return ends[alpha] if alpha in ends else (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1))

    u = jnp.exp(CHOSEN / 2)
    close(preference.alpha_link(CHOSEN / 2, alpha=alpha), jax.vmap(jax.grad(f))(u), 1e-4)
    js = jax.vmap(jax.grad(lambda u: u * jnp.log(u) - (u + 1) * jnp.log((u + 1) / 2)))
    close(preference.js_link(CHOSEN / 2), js(u), 1e-4)


def test_links_stay_finite_far_from_the_reference():
    far = jnp.array([-1e4, 1e4])
    for link in (partial(preference.alpha_link, alpha=1.0), preference.js_link):
        assert np.isfinite(link(far)).all()
        assert np.isfinite(jax.vmap(jax.grad(link))(far)).all()


def test_odds_are_those_of_the_probability_and_finite_where_it_is_1():
    p = jnp.array([0.01, 0.4, 0.5, 0.99])
    close(preference.log_odds(jnp.log(p)), jnp.log(p / (1 - p)), 1e-4)
    sure = jnp.array([0.0, -1e-12, -1e-7, -1e3])
    assert np.isfinite(preference.log_odds(sure)).all()
    assert np.isfinite(jax.vmap(jax.grad(preference.log_odds))(sure)).all()


def test_kto_pushes_each_label_its_own_way():
    slope = jax.vmap(jax.grad(partial(preference.kto, beta=0.5, undesirable_weight=3.0)), (0, 0, None))
    good, bad = (slope(CHOSEN, jnp.full(6, label), 0.2) for label in (True, False))
    assert (good < 0).all() and (bad > 0).all()
    close(bad, -3 * good)
    close(preference.kto(jnp.array([1e3, -1e3]), jnp.array([True, False]), 0.0, beta=1.0), 0)


def test_ktos_baseline_is_never_negative_and_leaves_out_what_is_no_row():
    ones = jnp.ones(3)
    assert preference.kto_baseline(jnp.array([-1.0, -2.0, 0.5]), ones) == 0
    close(preference.kto_baseline(jnp.array([1.0, jnp.nan, 3.0]), jnp.array([1.0, 0.0, 1.0])), 2)


# --------------------------------------------------------- objectives, on a model that says log p of each column


def _apply(params, tokens, segments, cache=None, at=0):
    params = params.reshape(2, -1, 5).swapaxes(0, 1).reshape(-1, 5)  # the two of a pair stand together
    return jnp.pad(params, ((0, 0), (0, 1)), constant_values=-1)[..., None], cache


def _two_tokens(params, hidden):
    return jnp.concatenate([hidden, jnp.log1p(-jnp.exp(hidden))], axis=-1)


TOLD = Model(
    SimpleNamespace(scalar=None), None, _apply, _two_tokens, None, None
)  # params [2B,T-1]: log p of tokens 1, 2, ..., of all chosen
PROMPT, RESPONSES = 2, np.array([[3, 1], [2, 2], [1, 4]])  # tokens, of each pair's two responses
LOGP = jnp.asarray(-draw.uniform(0.1, 2, (6, 5)), jnp.float32)


def pairs_of(lengths=RESPONSES, **fields) -> Pairs:
    def side(k):
        column = np.arange(6)[None]
        real = column < PROMPT + lengths[:, k, None]
        weights = jnp.asarray(real & (column >= PROMPT), jnp.float32)
        return Batch(jnp.zeros(real.shape, jnp.int32), jnp.asarray(real, jnp.int32), weights)

    return Pairs(side(0), side(1), **({"margin": jnp.zeros(len(lengths))} | fields))


def said(data, logp=LOGP):
    """The pairs with these log-probabilities as the reference's."""
    return objectives.with_reference(logp, data, model=TOLD)


REFERRED = {
    "dpo": objectives.dpo,
    "conservative_dpo": objectives.conservative_dpo,
    "robust_dpo": objectives.robust_dpo,
    "ipo": objectives.ipo,
    "slic": objectives.slic,
    "exo": objectives.exo,
    "nca": objectives.nca,
    "alpha_dpo": objectives.alpha_dpo,
    "js_dpo": objectives.js_dpo,
}


@pytest.mark.parametrize("name", REFERRED)
def test_at_the_reference_only_the_difference_is_learned(name):
    """There every reward is 0, all pairs pull the same, and exchanged responses turn the gradient round."""
    learn = jax.jit(jax.value_and_grad(partial(REFERRED[name], model=TOLD), has_aux=True))
    data = said(pairs_of())
    (loss, sums), grads = learn(LOGP, data)
    close([sums[f"reward/{key}"] for key in ("chosen", "rejected", "difference")], 0)
    close(sums["reward/accuracy"], 0.5 * 3)
    if name == "nca":
        close(loss, 3 * 2 * np.log(2))
    else:
        swapped = data.replace(
            chosen=data.rejected, rejected=data.chosen, ref_chosen=data.ref_rejected, ref_rejected=data.ref_chosen
        )
        (other_loss, _), other = learn(jnp.roll(LOGP, 3, axis=0), swapped)
        close(other_loss, loss)
        close(jnp.roll(other, 3, axis=0), -grads)
    if name in ("dpo", "alpha_dpo", "js_dpo"):
        close(loss, 3 * np.log(2))
        on = np.array([[PROMPT <= t + 1 < PROMPT + n for t in range(5)] for n in RESPONSES.T.ravel()])
        slope = 0.05 * (0.5 if name == "js_dpo" else 1)  # beta/2; f''(1) of Jensen and Shannon is 1/2
        close(grads, np.where(np.arange(6)[:, None] < 3, -slope, slope) * on)


@pytest.mark.parametrize("name", REFERRED)
def test_what_the_reference_said_is_asked_for(name):
    with pytest.raises(ValueError, match="with_reference"):
        REFERRED[name](LOGP, pairs_of(), model=TOLD)


def test_the_slope_of_dpo_is_the_chance_of_being_wrong():
    data = pairs_of(ref_chosen=jnp.array([-3.0, -1.0, -2.0]), ref_rejected=jnp.array([-2.0, -4.0, -1.0]))
    (_, sums), grads = jax.value_and_grad(partial(objectives.dpo, model=TOLD, beta=0.7), has_aux=True)(LOGP, data)
    logp, n = objectives.summed_logp(LOGP, objectives.stack(data.chosen, data.rejected), model=TOLD)
    close(n, RESPONSES.ravel())
    h = (logp[::2] - logp[1::2]) - (data.ref_chosen - data.ref_rejected)
    close(grads[:3, 1], -0.7 * jax.nn.sigmoid(-0.7 * h))
    close(sums["reward/difference"], 0.7 * h.sum())
    close((sums["policy/logp_chosen"], sums["policy/logp_rejected"]), (logp[::2].sum(), logp[1::2].sum()))


def run(objective, data, logp=LOGP, **hyper):
    return objective(logp, data, model=TOLD, **hyper)


def test_the_family_of_dpo_meets_in_dpo():
    data = said(pairs_of(), 0.7 * LOGP)
    want = run(objectives.dpo, data)
    close(run(objectives.conservative_dpo, data, label_smoothing=0.0)[0], want[0])
    close(run(objectives.robust_dpo, data, noise=0.0)[0], want[0])
    close(run(objectives.alpha_dpo, data, alpha=0.0)[0], want[0])
    close(run(objectives.alpha_dpo, data, alpha=1e-4)[0], want[0], 1e-3)
    none = data.replace(ref_chosen=jnp.zeros(3), ref_rejected=jnp.zeros(3))
    close(run(objectives.cpo, data, nll_weight=0.0)[0], run(objectives.dpo, none)[0])


def test_a_margin_asks_dpo_for_more_and_an_anchor_for_likely_text():
    data = said(pairs_of())
    plain, sums = run(objectives.dpo, data)
    more, _ = run(objectives.dpo, data.replace(margin=jnp.array([0.5, 0.0, 0.0])))
    close(more - plain, -jax.nn.log_sigmoid(-0.5) - np.log(2))
    anchored, _ = run(objectives.dpo, data, nll_weight=2.0)
    per_token = [-LOGP[row, 1 : 1 + n].mean() for row, n in enumerate(RESPONSES[:, 0])]
    close(anchored - plain, 2 * np.sum(per_token))


def test_length_counts_in_sums_and_not_in_means():
    """Responses twice as long, of tokens as likely."""
    flat = jnp.repeat(LOGP[:, :1], 5, axis=1)
    short, long = pairs_of(np.ones((3, 2), int)), pairs_of(np.full((3, 2), 2))
    refs = {"ref_chosen": jnp.zeros(3), "ref_rejected": jnp.zeros(3)}
    for objective in (objectives.simpo, objectives.orpo, partial(objectives.ipo, per_token=True)):
        close(run(objective, long.replace(**refs), flat)[0], run(objective, short.replace(**refs), flat)[0])
    for objective in (objectives.ipo, objectives.cpo):
        assert abs(run(objective, long.replace(**refs), flat)[0] - run(objective, short.replace(**refs), flat)[0]) > 1e-3


def test_simpo_asks_for_gamma():
    close(run(objectives.simpo, pairs_of(), jnp.full((6, 5), -1.0), gamma=0.5)[0], -3 * jax.nn.log_sigmoid(-0.5))


def test_orpo_is_likelihood_and_a_push_apart():
    data = pairs_of()
    nll, _ = run(objectives.orpo, data, odds_weight=0.0)
    close(nll, -sum(LOGP[row, 1 : 1 + n].mean() for row, n in enumerate(RESPONSES[:, 0])))
    slope = jax.grad(lambda logp: run(objectives.orpo, data, logp)[0])(LOGP)
    assert (slope[:3].sum(1) < 0).all() and (slope[3:].sum(1) > 0).all()


def test_a_pair_without_a_target_on_one_side_is_no_pair():
    lengths = RESPONSES.copy()
    lengths[1, 0] = 0
    for objective in (objectives.dpo, objectives.orpo, objectives.simpo):
        data = said(pairs_of(lengths))
        loss, sums = run(objective, data)
        assert sums["weight"] == 2 and np.isfinite(loss)
        slope = jax.grad(lambda logp, f=objective, data=data: run(f, data, logp)[0])(LOGP)
        assert not slope[1].any() and not slope[4].any() and slope[0].any()


# --------------------------------------------------------- KTO's other prompts


def rows_of(prompts, responses, columns, left) -> Batch:
    rows = []
    for prompt, response in zip(prompts, responses, strict=True):
        text, weights = [*prompt, *response], [0] * len(prompt) + [1] * len(response)
        pad = [0] * (columns - len(text))
        rows.append([pad + x if left else x + pad for x in (text, [1] * len(text), weights)])
    tokens, segments, weights = np.array(rows).transpose(1, 0, 2)
    return Batch(jnp.asarray(tokens, jnp.int32), jnp.asarray(segments, jnp.int32), jnp.asarray(weights, jnp.float32))


@pytest.mark.parametrize("left", [False, True])
def test_each_prompt_gets_the_next_rows_response(left):
    prompts, responses = [[11, 12], [21], [31, 32, 33], [41]], [[13], [22, 23, 24], [34, 35], []]
    batch = rows_of(prompts, responses, 7, left)
    want = rows_of(prompts, responses[1:] + responses[:1], 8, False)
    jax.tree.map(np.testing.assert_array_equal, objectives.mismatch(batch, length=8), want)
    cut = objectives.mismatch(batch, length=3)
    np.testing.assert_array_equal(cut.tokens, want.tokens[:, :3])


def test_a_response_needs_another_prompt():
    with pytest.raises(ValueError, match="two rows"):
        objectives.mismatch(rows_of([[1]], [[2]], 3, False), length=4)


def test_ktos_baseline_is_0_at_the_reference_and_not_learned(tiny):
    batch = rows_of([[1, 2], [3]], [[4, 5], [6, 7, 8]], 6, True)
    baseline = jax.jit(partial(objectives.kto_baseline, model=tiny.model))
    mismatched = objectives.mismatch(batch, length=6)
    assert baseline(tiny.params, tiny.params, mismatched) == 0
    moved = jax.tree.map(lambda x: 0.5 * x, tiny.params)
    forth, back = baseline(tiny.params, moved, mismatched), baseline(moved, tiny.params, mismatched)
    assert min(forth, back) == 0 < max(forth, back)  # never negative
    logp, _ = objectives.summed_logp(tiny.params, batch, model=tiny.model)
    data = objectives.Labelled(batch, jnp.array([True, False]), logp, jnp.zeros(2))
    loss, sums = jax.jit(partial(objectives.kto, model=tiny.model))(tiny.params, data)
    close(loss, 2 * 0.5)
    close(sums["reward/score"], 0)
    above = data.replace(z0=jnp.full(2, 3.0))
    _, sums = jax.jit(partial(objectives.kto, model=tiny.model))(tiny.params, above)
    assert sums["reward/accuracy"] == 1  # both are below z0, where the undesirable one belongs
