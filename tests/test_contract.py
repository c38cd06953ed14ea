"""The contract catches an objective that breaks it, by the right law, and lets every honest one pass."""

import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from jaxalign import contract, score
from jaxalign.contract import BrokenLaw, check_objective
from jaxalign.objectives import distill, online, preference, reward, supervised
from jaxalign.ops.masked import masked, masked_mean, masked_sum, whiten
from jaxalign.types import Batch, Model, Pairs, Rollout

VOCAB, WIDTH = 7, 3
SEGMENTS = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [1, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], np.int32)
WEIGHTS = np.array([[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 1, 1], [0, 1, 1, 0, 0, 0]], np.float32)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, SEGMENTS.shape, np.int32)
DRAW = np.random.default_rng(1).normal(size=(8, *SEGMENTS.shape)).astype(np.float32)
TEMPERATURE = 0.7


def bigram() -> Model:
    """Each token is told from the one before it; compiles in no time."""
    return Model(
        config=SimpleNamespace(scalar=1.0),
        init=None,
        apply=lambda params, tokens, segments: (jnp.asarray(params["embed"])[tokens], None),
        unembed=lambda params, hidden: hidden @ params["head"],
        scalar=lambda params, hidden: hidden @ params["value"],
        cache=None,
    )


MODEL = bigram()
PARAMS = {
    name: np.random.default_rng(2).normal(size=shape).astype(np.float32)
    for name, shape in {"embed": (VOCAB, WIDTH), "head": (WIDTH, VOCAB), "value": (WIDTH,)}.items()
}


def batch(tokens=TOKENS) -> Batch:
    return Batch(tokens, SEGMENTS, WEIGHTS)


def rollout(model, params, tokens=TOKENS) -> Rollout:
    """log-probabilities and values by the scorer, as a rollout has them; all else at random."""
    data = batch(tokens)
    said, value = score.evaluate(model, params, jax.tree.map(jnp.asarray, data), temperature=TEMPERATURE)
    return Rollout(data, np.asarray(said.logp), DRAW[0], np.asarray(value), DRAW[1], 2 * DRAW[2], DRAW[3], DRAW[4][:, 0])


def pairs(tokens=TOKENS) -> Pairs:
    return Pairs(batch(tokens), batch((tokens + 5) % VOCAB), np.array([0, 0.3, 0.6, 1, 0], np.float32))


HONEST = {  # objective, its data by model and parameters, what else check_objective is told, what cannot be tried
    "sft": (supervised.sft, {"label_smoothing": 0.1, "z_loss": 0.01}, lambda *_: batch(), {}, {"precision", "on policy"}),
    "reinforce": (online.reinforce, {"temperature": TEMPERATURE}, rollout, {}, {"on policy"}),
    "ppo": (
        online.ppo,
        {"temperature": TEMPERATURE, "entropy_weight": 0.1, "value_weight": 0.5, "dual_clip": 3.0},
        *(rollout, {"on_policy": {"policy/ratio": 1.0, "policy/approx_kl": 0.0, "policy/clipped": 0.0}}, set()),
    ),
    "pairwise": (reward.pairwise, {"centring": 0.01}, lambda *_: pairs(), {}, {"packing", "weights", "future", "on policy"}),
}


def soft_pairs() -> reward.Judged:
    two = pairs()
    return reward.Judged(two.chosen, two.rejected, np.float32([0.7, 0, 1, 0.2, 0.5]), np.float32([0.1, 1, 0, 0, 0.5]))


def ranked() -> reward.Ranked:
    texts = tuple(batch((TOKENS + n) % VOCAB) for n in (0, 3, 5))
    return reward.Ranked(texts, np.int32([[0, 1, 2], [2, 0, 1], [1, 1, 0], [0, 0, 0], [2, 1, 0]]))


def with_reference(model, params) -> Pairs:
    return pairs().replace(ref_chosen=DRAW[5][:, 0] - 5, ref_rejected=DRAW[5][:, 1] - 5)


def labelled(model, params) -> preference.Labelled:
    return preference.Labelled(batch(), DRAW[6][:, 0] > 0, DRAW[6][:, 1] - 5, np.full(5, 0.3, np.float32))


def taught(model, params) -> distill.Taught:
    other = jax.tree.map(lambda x: 0.7 * x[::-1], params)
    return jax.device_get(distill.taught(other, jax.tree.map(jnp.asarray, batch()), model=model, k=3))


OF_ROWS = {"packing", "weights", "future", "on policy"}  # laws of what is summed over tokens
ALSO = {  # the same, of objectives over the same few ways to read a model
    **{name: (getattr(preference, name), {}, with_reference, OF_ROWS) for name in (
        *("dpo", "conservative_dpo", "robust_dpo", "ipo", "slic", "exo", "nca", "alpha_dpo", "js_dpo", "cpo", "simpo", "orpo"),
    )},
    "ipo, a token": (preference.ipo, {"per_token": True}, with_reference, OF_ROWS),
    "kto": (preference.kto, {}, labelled, OF_ROWS),
    "noisy_pairwise": (reward.noisy_pairwise, {"noise": 0.1}, lambda *_: pairs(), OF_ROWS),
    "difference": (reward.difference, {}, lambda *_: pairs(), OF_ROWS),
    "soft_pairwise": (reward.soft_pairwise, {}, lambda *_: soft_pairs(), OF_ROWS),
    "pairwise_with_ties": (reward.pairwise_with_ties, {"theta": 1.5}, lambda *_: soft_pairs(), OF_ROWS),
    "best_of_k": (reward.best_of_k, {}, lambda *_: ranked(), OF_ROWS | {"precision"}),
    "k_wise": (reward.k_wise, {}, lambda *_: ranked(), OF_ROWS | {"precision"}),
    "rating": (reward.rating, {}, lambda *_: reward.Rated(batch(), DRAW[7][:, 0]), OF_ROWS),
    "process": (reward.process, {}, lambda *_: reward.Stepwise(batch(), jax.nn.sigmoid(DRAW[7])), {"on policy"}),
    "forward_kl": (distill.forward_kl, {"nll_weight": 0.5}, taught, {"on policy"}),
    "reverse_kl": (distill.reverse_kl, {}, taught, {"on policy"}),
    "jsd": (distill.jsd, {"beta": 0.3}, taught, {"on policy"}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ALSO))
def test_every_other_objective_keeps_every_law(name):
    objective, hyper, make, not_tried = ALSO[name]
    laws = [law for law in contract.LAWS if law not in ("jit", "devices", "deterministic")]
    report = check_objective(partial(objective, model=MODEL, **hyper), PARAMS, make(MODEL, PARAMS), laws=laws, examples=6)
    assert {law for law, checked in report.items() if not checked.tried} == not_tried
    assert max(checked.deviation for law, checked in report.items() if law != "gradient") < 2e-5


def keeps_every_law(name, model, params, laws):
    objective, hyper, make, more, not_tried = HONEST[name]
    report = check_objective(partial(objective, model=model, **hyper), params, make(model, params), laws=laws, **more)
    assert list(report) == laws
    assert {law for law, checked in report.items() if not checked.tried} == not_tried
    assert all(checked.note for checked in report.values() if not checked.tried)
    assert max(checked.deviation for law, checked in report.items() if law != "gradient") < 2e-5


@pytest.mark.parametrize("name", list(HONEST))
def test_every_objective_of_the_library_keeps_every_law(name):
    keeps_every_law(name, MODEL, PARAMS, [law for law in contract.LAWS if law != "jit"])  # op by op takes seconds


@pytest.mark.slow
@pytest.mark.parametrize("name", list(HONEST))
def test_so_it_does_with_attention(tiny, name):
    keeps_every_law(name, tiny.model, tiny.params, list(contract.LAWS))


# ---------------------------------------------------------------- planted faults


def said_of(params, data: Batch, temperature=1.0):
    return score.evaluate(MODEL, params, data, temperature=temperature)[0]


def nll(params, data: Batch, weights):
    """-sum w log p."""
    return -masked_sum(said_of(params, data).logp, weights)


def counted(loss, weights, **sums):
    return loss, {"weight": weights.sum(), **sums}


def sft_with(weights_of, params, data):
    """SFT by other weights."""
    weights = weights_of(data)
    return counted(nll(params, data, weights), weights)


def global_mean(params, data):
    return masked_mean(-said_of(params, data).logp, data.targets), {"weight": jnp.float32(1)}


def mean_of_row_means(params, data):
    rows = -masked_mean(said_of(params, data).logp, data.targets, axis=1)
    return rows.sum(), {"weight": jnp.float32(len(rows))}


def mean_of_live_row_means(params, data):
    rows = -masked_mean(said_of(params, data).logp, data.targets, axis=1)
    return rows.sum(), {"weight": (data.targets.sum(1) > 0).sum().astype(jnp.float32)}


def metric_is_a_mean(params, data):
    entropy = masked_mean(said_of(params, data).entropy, data.targets)
    return counted(nll(params, data, data.targets), data.targets, **{"policy/entropy": entropy})


def all_entries(params, data):
    """Every entry of B x T is counted, and padding has a loss of 0."""
    return nll(params, data, data.targets), {"weight": jnp.float32(data.tokens.size)}


def constant_batch_size(params, data):
    return nll(params, data, data.targets), {"weight": jnp.float32(len(TOKENS))}


def no_end_token(params, data, end=3):
    """What the end token costs is masked, for pad == eos: it is never learnt."""
    weights = data.targets * (data.tokens != end)
    return counted(nll(params, data, weights), weights)


def mask_from_ids(params, data, pad=0):
    """Text is what is not the pad token; its first token is no target, and left padding is known."""
    text = (data.tokens != pad) & (jnp.cumsum(data.tokens != pad, axis=1) > 1)
    return counted(nll(params, data, text * 1.0), text * 1.0)


def one_to_the_left(params, data):
    """The weight of a token for the token after it."""
    anywhere = data.replace(weights=jnp.ones_like(data.weights)).targets
    return counted(nll(params, data, jnp.roll(data.targets, 1, axis=1) * anywhere), data.targets)


def dropped_weight(params, data):
    loss, _ = sft_with(lambda data: data.targets, params, data)
    return loss, {"tokens": data.targets.sum()}


def weight_of_ints(params, data):
    return nll(params, data, data.targets), {"weight": (data.targets > 0).sum()}


def whole_weights(params, data):
    """8 bits count the tokens: a weight of 0.3 is none, and 200 of them are fewer."""
    return counted(nll(params, data, data.targets), data.targets.astype(jnp.int8).astype(jnp.float32))


def by_column(params, data):
    """A discount by the column, and not by the position in the document."""
    weights = data.targets * 0.9 ** jnp.arange(data.tokens.shape[1])[None]
    return counted(nll(params, data, weights), data.targets)


def beside_the_next_row(params, data):
    """A baseline of the neighbour's: wrong once rows are shuffled."""
    entropy = said_of(params, data).entropy
    return counted(nll(params, data, data.targets) + masked_sum(jnp.roll(entropy, 1, axis=0), data.targets), data.targets)


def last_by_length(params, data):
    """The last token's entropy, looked for where a right-padded row has it."""
    last = (data.segments > 0).sum(1) - 1
    entropy = jnp.take_along_axis(said_of(params, data).entropy, last[:, None], axis=1)
    return nll(params, data, data.targets) + entropy.sum(), {"weight": data.targets.sum()}


def last_by_pad_token(params, data, pad=0):
    """The reward at the token before the first pad token; there is none before the text."""
    hidden, _ = MODEL.apply(params, data.chosen.tokens, data.chosen.segments)
    started = jnp.cumsum(data.chosen.segments, axis=1) > 0
    last = jnp.argmax((data.chosen.tokens == pad) & started, axis=1) - 1
    scores = MODEL.scalar(params, jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])
    return -jax.nn.log_sigmoid(scores - data.margin).sum(), {"weight": jnp.float32(len(scores))}


def first_document(params, data):
    weights = data.targets * (data.segments == 1)
    return counted(nll(params, data, weights), weights)


def stopped_gradient(params, data):
    logp = said_of(params, data).logp
    return -masked_sum(logp * jax.lax.stop_gradient(jnp.exp(logp)), data.targets), {"weight": data.targets.sum()}


CHANCE = np.random.default_rng(0)


def random_by_the_process(params, data):
    kept = data.targets * (CHANCE.random(data.tokens.shape) < 0.9)
    return counted(nll(params, data, kept), data.targets)


def reshaped(params, data):
    """Only for the batch size that it was written for."""
    weights = data.targets.reshape(contract.ROWS, -1)
    return counted(nll(params, data, weights), weights)


def by_mesh(params, data):
    """A mean over devices taken by hand."""
    mesh = jax.sharding.get_abstract_mesh()
    loss, sums = sft_with(lambda data: data.targets, params, data)
    return loss / (1 if mesh.empty else mesh.size), sums


def other_without_jit(params, data):
    loss, sums = sft_with(lambda data: data.targets, params, data)
    return loss * (1.0 if isinstance(loss, jax.core.Tracer) else 2.0), sums


def policy(params, data: Rollout, advantage=None, temperature=TEMPERATURE, weights=None, combine=masked_sum):
    """REINFORCE by a ratio, without clipping."""
    weights = data.batch.targets if weights is None else weights
    advantage = masked(data.advantage if advantage is None else advantage, weights)
    ratio = jnp.exp(masked(said_of(params, data.batch, temperature).logp - data.logp, weights))
    return counted(-combine(ratio * advantage, weights), weights, **{"policy/ratio": masked_sum(ratio, weights)})


def whitened_here(params, data):
    return policy(params, data, whiten(data.advantage, data.batch.targets))


def int_advantage(params, data):
    return policy(params, data, data.advantage.astype(jnp.int32).astype(jnp.float32))


def int_score(params, data):
    buffer = jnp.zeros_like(data.batch.tokens) + data.score.astype(jnp.int32)[:, None]
    return policy(params, data, buffer.astype(jnp.float32))


def forgotten_temperature(params, data):
    return policy(params, data, temperature=1.0)


def masked_by_a_product(params, data):
    weights = data.batch.targets
    ratio = jnp.exp(said_of(params, data.batch, TEMPERATURE).logp - data.logp)
    return counted(-(ratio * data.advantage * weights).sum(), weights)


def masked_after_the_gradient(params, data):
    """The sum is masked; the gradient of what is masked is 0 x NaN."""
    weights = data.batch.targets
    ratio = jnp.exp(said_of(params, data.batch, TEMPERATURE).logp - data.logp)
    return counted(-jnp.where(weights > 0, ratio * data.advantage, 0).sum(), weights)


def unmasked_entropy(params, data):
    loss, sums = policy(params, data)
    real = data.batch.segments > 0
    return loss - 0.1 * masked_sum(said_of(params, data.batch).entropy, real.astype(jnp.float32)), sums


SFT_FAULTS = {
    "a mean": (global_mean, "micro-batches"),
    "a mean of means": (mean_of_row_means, "packing"),
    "a mean of live rows' means": (mean_of_live_row_means, "packing"),
    "a metric that is a mean": (metric_is_a_mean, "micro-batches"),
    "B x T as the weight": (all_entries, "pad length"),
    "a batch size of elsewhere": (constant_batch_size, "micro-batches"),
    "a mask from token ids": (mask_from_ids, "pad id"),
    "an end token never learnt": (no_end_token, "token ids"),
    "no weight": (dropped_weight, "result"),
    "a weight of integers": (weight_of_ints, "result"),
    "weights cut to whole numbers": (whole_weights, "weights"),
    "weights not read": (partial(sft_with, lambda d: ((d.segments > 0) & (d.targets >= 0)) * 1.0), "pad side"),
    "weights read as a mask for the loss alone": (lambda p, d: counted(nll(p, d, (d.targets > 0) * 1.0), d.targets), "weights"),
    "prompts learnt": (lambda p, d: counted(nll(p, d, d.replace(weights=d.weights * 0 + 1).targets), d.targets), "masked rows"),
    "a first token as a target": (partial(sft_with, lambda d: d.weights), "pad side"),
    "weights for the next token": (one_to_the_left, "future"),
    "weights for the token before": (lambda p, d: counted(nll(p, d, jnp.roll(d.targets, -1, axis=1)), d.targets), "pad side"),
    "positions from the column": (by_column, "pad side"),
    "the neighbour's row": (beside_the_next_row, "row order"),
    "the last token by length": (last_by_length, "pad side"),
    "the first document of a row": (first_document, "packing"),
    "a gradient stopped": (stopped_gradient, "gradient"),
    "a draw of the process": (random_by_the_process, "deterministic"),
    "one batch size": (reshaped, "micro-batches"),
    "a mean over devices by hand": (by_mesh, "devices"),
    "another function without jit": (other_without_jit, "jit"),
}
POLICY_FAULTS = {
    "whitening of a part": (whitened_here, "micro-batches"),
    "advantages of integers": (int_advantage, "precision"),
    "advantages of one decimal": (lambda p, d: policy(p, d, jnp.round(d.advantage, 1)), "precision"),
    "scores of integers": (int_score, "precision"),
    "a forgotten temperature": (forgotten_temperature, "on policy"),
    "a mask that is a product": (masked_by_a_product, "weight 0"),
    "a mask after the gradient": (masked_after_the_gradient, "weight 0"),
    "entropy of prompts": (unmasked_entropy, "pad side"),
}


COMPILE = {"deterministic", "micro-batches", "pad length", "devices", "jit"}  # laws that compile programs of their own


def broken_by(objective, data, *, law=None, **more) -> BrokenLaw:
    """The first law that breaks; of those that compile, `law` alone is tried."""
    laws = [name for name in contract.LAWS if name not in COMPILE or name == law]
    with pytest.raises(BrokenLaw) as caught:
        check_objective(objective, PARAMS, data, laws=laws, **more)
    return caught.value


@pytest.mark.parametrize("fault", list(SFT_FAULTS))
def test_a_fault_of_a_supervised_objective_is_caught(fault):
    objective, law = SFT_FAULTS[fault]
    assert broken_by(objective, batch(), law=law).law == law


@pytest.mark.parametrize("fault", list(POLICY_FAULTS))
def test_a_fault_of_a_policy_objective_is_caught(fault):
    objective, law = POLICY_FAULTS[fault]
    assert broken_by(objective, rollout(MODEL, PARAMS), law=law, on_policy={"policy/ratio": 1.0}).law == law


def test_the_last_token_by_its_pad_id_is_caught():
    assert broken_by(last_by_pad_token, pairs(TOKENS % (VOCAB - 1) + 1)).law == "pad id"


# ---------------------------------------------------------------- sources, which an encoder reads

SOURCE_SEGMENTS = np.array([[1, 1, 0, 0], [0, 1, 1, 1], [1, 2, 2, 0], [1, 0, 0, 0], [0, 0, 1, 1]], np.int32)
SOURCES = np.random.default_rng(3).integers(0, VOCAB, SOURCE_SEGMENTS.shape, np.int32)


def with_sources(tokens=TOKENS) -> Batch:
    return batch(tokens).replace(source=SOURCES, source_segments=SOURCE_SEGMENTS)


def reader(sees=lambda segments, source, source_segments: segments[:, :, None] == source_segments[:, None, :]) -> Model:
    """The bigram, with the mean embedding of the source that a token sees. Args: sees: -> bool [B,T,S]."""

    def apply(params, tokens, segments, source, source_segments):
        embed, seen = jnp.asarray(params["embed"]), sees(segments, source, source_segments) * 1.0
        mean = seen @ embed[source] / jnp.maximum(seen.sum(-1, keepdims=True), 1)
        return embed[tokens] + mean * (segments > 0)[:, :, None], None

    return MODEL._replace(apply=apply)


SOURCE_FAULTS = {  # what of its row's source a token sees; an honest one, that of its own document
    "all columns": (lambda t, x, s: (t[:, :, None] > 0) & (s >= 0)[:, None, :], "pad length"),
    "what is no pad token": (lambda t, x, s: (t[:, :, None] > 0) & (x != 0)[:, None, :], "pad id"),
    "every document's": (lambda t, x, s: (t[:, :, None] > 0) & (s > 0)[:, None, :], "packing"),
    "the first column": (lambda t, x, s: (t[:, :, None] > 0) & (jnp.arange(s.shape[1]) == 0)[None, None], "pad side"),
}


@pytest.mark.parametrize("fault", list(SOURCE_FAULTS))
def test_a_model_that_reads_what_is_no_source_of_its_own_is_caught(fault):
    sees, law = SOURCE_FAULTS[fault]
    broken = broken_by(partial(supervised.sft, model=reader(sees)), with_sources(), law=law)
    assert broken.law == law and "source_segments [[" in str(broken)


@pytest.mark.parametrize("name", ["sft", "pairwise"])
def test_objectives_over_sources_keep_every_law(name):
    data = with_sources()
    if name == "pairwise":
        data = Pairs(data, with_sources((TOKENS + 5) % VOCAB), np.zeros(5, np.float32))
    objective = {"sft": supervised.sft, "pairwise": reward.pairwise}[name]
    laws = [law for law in contract.LAWS if law not in ("jit", "devices", "deterministic")]
    report = check_objective(partial(objective, model=reader()), PARAMS, data, laws=laws, examples=6)
    tried = {law for law, checked in report.items() if checked.tried}
    assert tried >= {"pad side", "pad length", "pad id", "weight 0", "masked rows", "token ids"}
    assert ("packing" in tried) == (name == "sft")  # that a source is read does not make rows of tokens


# ---------------------------------------------------------------- what a user sees


def test_the_message_names_law_numbers_and_the_smallest_example():
    broken = broken_by(global_mean, batch(), law="micro-batches")
    said = str(broken)
    assert isinstance(broken, AssertionError) and "\n" not in said
    assert said.startswith("micro-batches: ") and " instead of " in said and "tokens [[" in said and "rows " in said
    assert "make_step's accumulate" in said  # the law itself
    data = broken.example["data"]
    assert data.tokens.shape[0] == contract.ROWS and len(set(broken.example["rows"])) == 2  # as few rows as show it
    assert broken.example["keep"] <= 4
    parts = [global_mean(PARAMS, jax.tree.map(lambda x, i=i: jnp.asarray(x[i : i + 1]), data))[0] for i in range(contract.ROWS)]
    assert abs(sum(parts) / contract.ROWS - global_mean(PARAMS, jax.tree.map(jnp.asarray, data))[0]) > 1e-3


def test_a_report_says_how_often_and_how_far():
    report = check_objective(partial(supervised.sft, model=MODEL), PARAMS, batch(), laws=["packing", "pad side"], examples=5)
    assert list(report) == ["result", "pad side", "packing"]
    assert report["packing"].tried == 5 and 0 <= report["packing"].deviation < 1e-5


def test_what_fails_on_a_variation_is_a_broken_law():
    broken = broken_by(reshaped, batch(), law="micro-batches")
    assert broken.law == "micro-batches" and "raised TypeError" in broken.what and broken.__cause__ is not None


def test_unknown_laws_and_units_are_errors():
    with pytest.raises(ValueError, match="pad colour.*there are result"):
        check_objective(global_mean, PARAMS, batch(), laws=["pad colour"])
    with pytest.raises(ValueError, match="'token' and 'row'"):
        check_objective(global_mean, PARAMS, batch(), unit="batch")


def test_without_hypothesis_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ImportError, match=r'pip install "jaxalign\[test\]"'):
        check_objective(global_mean, PARAMS, batch())


# ---------------------------------------------------------------- other people's data


@struct.dataclass
class Judged:
    """A struct of one's own: two Batches, of each its reference's log-probabilities, and labels of rows."""

    good: Batch
    bad: Batch
    good_logp: np.ndarray  # f32 [B,T]
    bad_logp: np.ndarray
    agreed: np.ndarray  # bool [B]


def preferred(params, data: Judged):
    """DPO between two Batches; a pair counts where judges agreed and it has targets."""

    def gain(batch, ref_logp):
        return masked_sum(said_of(params, batch).logp - masked(ref_logp, batch.targets), batch.targets, axis=1)

    live = data.agreed & ((data.good.targets + data.bad.targets).sum(1) > 0)
    margin = gain(data.good, data.good_logp) - gain(data.bad, data.bad_logp)
    return -(jax.nn.log_sigmoid(margin) * live).sum(), {"weight": live.sum().astype(jnp.float32)}


def judged(**more) -> Judged:
    both = {"good": batch(), "bad": batch((TOKENS + 2) % VOCAB), "good_logp": DRAW[0] - 2, "bad_logp": DRAW[1] - 2}
    return Judged(**both, agreed=np.array([1, 0, 1, 1, 1], bool)).replace(**more)


def test_a_struct_of_ones_own_is_checked_as_rows():
    report = check_objective(preferred, PARAMS, judged(), laws=set(contract.LAWS) - COMPILE)
    assert {law for law, checked in report.items() if not checked.tried} == {"packing", "weights", "future", "on policy"}
    report = check_objective(preferred, PARAMS, jax.tree.map(jnp.asarray, judged()), laws=["row order", "masked rows"])
    assert report["masked rows"].tried


def test_an_array_of_another_alignment_is_caught():
    def moved(params, data):
        return preferred(params, data.replace(bad_logp=jnp.roll(data.bad_logp, 1, axis=1)))

    assert broken_by(moved, judged()).law in ("pad side", "weight 0")


def test_a_sequence_mean_passes_as_rows_and_not_as_tokens():
    check_objective(mean_of_live_row_means, PARAMS, batch(), unit="row", laws=["packing", "weights", "masked rows"])
    assert broken_by(mean_of_live_row_means, batch(), unit="token").law == "packing"


def test_a_per_row_array_that_nobody_reads_does_not_forbid_packing():
    data = rollout(MODEL, PARAMS)  # its score is [B]
    assert check_objective(policy, PARAMS, data, laws=["packing"])["packing"].tried

    def reads_score(params, data):
        return policy(params, data, data.advantage + data.score[:, None])

    assert not check_objective(reads_score, PARAMS, data, laws=["packing"])["packing"].tried


@pytest.mark.parametrize(
    "data, says",
    [
        ({"tokens": TOKENS}, "must hold types.Batch.*none"),
        ({"batch": batch(), "beta": np.float32(0.1)}, r"whose is data\['beta'\] of shape \(\).*functools.partial"),
        ({"batch": batch(), "group": np.zeros(3)}, r"of shape \(3,\)"),
        ({"one": batch(), "other": batch(), "logp": DRAW[0]}, "name it so"),
        ({"one": batch(), "other": jax.tree.map(lambda x: x[:2], batch())}, r"one number of rows"),
        (batch().replace(segments=0 * SEGMENTS), "no row of two tokens"),
    ],
)
def test_data_that_cannot_be_read_says_why(data, says):
    with pytest.raises(TypeError, match=says) as caught:
        check_objective(global_mean, PARAMS, data)
    assert "\n" not in str(caught.value)
