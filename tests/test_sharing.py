"""A prompt that several rows begin with is read once, and that changes nothing that is said or learned."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import rollout, score, shard
from jaxalign.data import tables
from jaxalign.data.text import Document
from jaxalign.models import build, decoder, encdec
from jaxalign.models.parts import Adapter
from jaxalign.objectives import online, preference, reward
from jaxalign.train import optim
from jaxalign.train.step import make_step
from jaxalign.types import Batch, Rollout, TrainState

LLAMA = decoder.DecoderConfig(vocab=14, width=8, layers=2, heads=4, kv_heads=2, head_dim=4, mlp=12, context=64, scalar=0.02)
MODELS = {
    "llama": LLAMA,
    "learned positions": replace(LLAMA, positions="learned", norm="layer"),
    "windows": replace(LLAMA, windows=(3, 0), local_theta=100.0),
    "last": replace(LLAMA, adapter=Adapter("last", layers=1)),
    "prefix": replace(LLAMA, adapter=Adapter("prefix", length=2)),
    "prompt": replace(LLAMA, adapter=Adapter("prompt", length=2)),
    "blocks": replace(LLAMA, attention="blocks"),
    "remat": replace(LLAMA, remat="full"),
    "t5": encdec.EncDecConfig(
        vocab=14, width=8, encoder_layers=2, layers=2, heads=2, head_dim=4, mlp=12, buckets=8, furthest=12, gated=True, scalar=0.02
    ),
}
GROUP, PROMPT, LENGTH = 3, 5, 11


def drawn(config):
    model, random = build(config), np.random.default_rng(0)
    shapes = shard.unbox(jax.eval_shape(model.init, jax.random.key(0)))
    return model, jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.6, x.shape), x.dtype), shapes)


def rows(prompts: int = 2, source: bool = False) -> Batch:
    """`prompts` prompts, the second padded on the left, GROUP responses each, the last padded on the right."""
    random, many = np.random.default_rng(1), prompts * GROUP
    tokens = random.integers(1, 14, (many, LENGTH)).astype(np.int32)
    segments, read = np.ones_like(tokens), np.repeat(random.integers(1, 14, (prompts, 7)), GROUP, 0).astype(np.int32)
    if source:
        tokens[:, 0] = 0
        weights, more = np.arange(LENGTH)[None] > 0, (jnp.asarray(read), jnp.ones_like(read))
    else:
        tokens[:, :PROMPT] = tokens[::GROUP, :PROMPT].repeat(GROUP, 0)
        segments[GROUP : 2 * GROUP, :2] = 0
        weights, more = np.arange(LENGTH)[None] >= PROMPT, ()
    segments[-1, -3:] = 0
    return Batch(jnp.asarray(tokens), jnp.asarray(segments), jnp.asarray(weights * (segments > 0), jnp.float32), *more)


def learned(model, params, batch):
    """All that is said of the targets, and the gradient of a sum of it."""

    def total(params):
        said, value = score.evaluate(model, params, batch, temperature=0.8)
        kept = batch.targets > 0
        found = [jnp.where(kept, x, 0) for x in (*said, value, score.scalars(model, params, batch))]
        return sum((n + 1) * x.sum() for n, x in enumerate(found)), found

    return jax.jit(jax.grad(total, has_aux=True))(params)


def close(one, other, tolerance=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), one, other)


@pytest.mark.parametrize("name", MODELS)
def test_scores_values_and_gradients_are_those_of_rows_read_one_by_one(name):
    model, params = drawn(MODELS[name])
    batch = rows(source=name == "t5")
    columns = 1 if name == "t5" else PROMPT
    close(learned(model.sharing(GROUP, columns), params, batch), learned(model, params, batch), 1e-4)


def test_a_critic_of_its_own_shares_too():
    (model, params), (_, other) = drawn(LLAMA), drawn(LLAMA)
    both, batch = rollout.with_critic(model, model), rows()
    params = {"policy": params, "critic": jax.tree.map(lambda x: 0.5 * x, other)}
    said = jax.jit(partial(rollout.said, temperature=1.0), static_argnums=0)
    one, shared = (said(of, params, batch) for of in (both, both.sharing(GROUP, PROMPT)))
    close([x * batch.targets for x in one], [x * batch.targets for x in shared])


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_of_rows_that_differ_before_their_responses_nothing_is_learned(name):
    model, params = drawn(MODELS[name])
    batch, columns = rows(source=name == "t5"), 1 if name == "t5" else PROMPT
    wrong = (
        batch.replace(source=batch.source.at[1, 2].add(1)) if name == "t5" else batch.replace(tokens=batch.tokens.at[1, 2].add(1))
    )
    _, found = learned(model.sharing(GROUP, columns), params, wrong)
    assert np.isnan(found[0]).any(1).tolist() == [False, True, False, False, False, False]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_update_of_grpo_is_the_same_with_and_without(accumulate):
    """Micro-batches have a third of each group. On several CPU devices such a program may hang (shard.crowded)."""
    model, _ = drawn(LLAMA)
    batch, random = rows(8), np.random.default_rng(2)
    floats = [jnp.asarray(random.normal(size=batch.tokens.shape), jnp.float32) for _ in range(6)]
    data = Rollout(batch, *floats, score=jnp.zeros(len(batch.tokens)))
    tx = optim.adam(learning_rate=1e-2, steps=10)

    def updated(model):
        mesh = shard.make_mesh(devices=jax.devices()[:1])

        def make(key):
            params = model.init(key)
            return TrainState(jnp.int32(0), params, tx.init(params))

        state, where = shard.create(make, mesh, jax.random.key(0))
        step = make_step(partial(online.grpo, model=model, kl_weight=0.1), tx, accumulate=accumulate)
        state, metrics = shard.compile_step(step, mesh, where)(state, shard.place(jax.tree.map(np.asarray, data), mesh))
        return shard.fetch((state.params, metrics))

    close(updated(model.sharing(GROUP // accumulate, PROMPT)), updated(model), 1e-4)


def document(prompt, response, source=None):
    weights = np.r_[np.zeros(len(prompt)), np.ones(len(response))].astype(np.float32)
    return Document(np.array([*prompt, *response], np.int32), weights, source)


PAIRS = [  # long prompts, of different lengths, and short responses
    (document(range(1, 10), [3, 4, 2]), document(range(1, 10), [5, 2])),
    (document(range(2, 13), [7, 2]), document(range(2, 13), [8, 9, 1, 2])),
    (document(range(5, 13), [2]), document(range(5, 13), [6, 2])),
]


@pytest.mark.parametrize("name", ["dpo", "pairwise"])
def test_a_pair_that_shares_its_prompt_is_that_pair(name):
    model, params = drawn(LLAMA)
    prompt, length = tables.in_common(PAIRS, 16)
    assert (prompt, length) == (11, 15)

    def of(model, length, prompt=0):
        pairs = tables.pairs(*zip(*PAIRS, strict=True), np.zeros(3), length, prompt=prompt)
        if name == "dpo":
            pairs = pairs.replace(ref_chosen=np.float32([-3, -1, -2]), ref_rejected=np.float32([-2, -2, -2]))
        objective = {"dpo": preference.dpo, "pairwise": reward.pairwise}[name]
        return jax.jit(jax.value_and_grad(partial(objective, model=model), has_aux=True))(params, pairs)

    close(of(model.sharing(2, prompt), length, prompt), of(model, 16), 1e-4)


def test_prompts_are_shared_where_it_saves_a_quarter_and_they_are_the_same():
    assert tables.in_common(PAIRS, 15) == (11, 15)
    long = (document([1, 2], range(1, 12)), document([1, 2], [3]))
    assert tables.in_common([*PAIRS, long], 16) == (0, 16)
    other = (document([1, 2, 3, 4, 5, 6, 7], [3]), document([1, 2, 3, 4, 5, 6, 8], [3]))
    assert tables.in_common([*PAIRS, other], 16) == (0, 16)
    read = np.arange(5, dtype=np.int32)
    of_source = (document([0], [3, 1], read), document([0], [4, 1], read))
    assert tables.in_common([of_source], 8) == (1, 8)
    assert tables.in_common([of_source, (of_source[0], document([0], [4, 1], read + 1))], 8) == (0, 8)


def test_a_prompt_too_long_for_its_columns_names_its_row():
    with pytest.raises(ValueError, match="row 1: 11 of 13 tokens before column 9 of 16"):
        tables.pad([pair[0] for pair in PAIRS], 16, prompt=9)
