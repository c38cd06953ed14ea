"""The decoder: equal to transformers' numbers in every layout, causal, the same with a cache, finite where all is padding."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import sample as sampling
from jaxalign import score, shard
from jaxalign.models import checkpoints, layout, names
from jaxalign.models.decoder import REMAT, DecoderConfig, build
from jaxalign.types import Batch

FAMILIES = ("gpt2", "gpt_neox", "llama", "qwen2")  # of the others: test_families.py


def golden_of(family):
    return json.loads((Path(__file__).parent / "golden" / f"tiny_{family}_parity.json").read_text())


def from_golden(golden, **own):
    """The config and the tree of a golden file, whose tensors stand in it by name."""
    kind, config = layout.read_config(golden["inputs"]["config"], "golden", **own)
    arrays = {name: np.asarray(x, np.float32) for name, x in golden["inputs"]["params"].items()}
    tensors = {name: layout.Tensor(x.shape, lambda x=x: x) for name, x in arrays.items()}
    rows = names.FAMILIES[kind].rows
    return config, layout.assemble(rows, config, layout.canonical(names.FAMILIES[kind], tensors, "golden"), "golden")


@partial(jax.jit, static_argnums=0)
def forward(model, params, tokens, segments):
    return model.unembed(params, model.apply(params, tokens, segments)[0])


def logits_of(model, params, tokens, segments):
    return np.asarray(forward(model, params, jnp.asarray(tokens), jnp.asarray(segments)))


def documents(golden):
    padded = golden["inputs"]["right_padded"]
    lengths = np.sum(padded["attention_mask"], axis=1)
    return [row[:n] for row, n in zip(padded["input_ids"], lengths)]


@pytest.fixture(params=FAMILIES, scope="module")
def case(request):
    golden = golden_of(request.param)
    config, params = from_golden(golden)
    return golden, config, build(config), params


def test_logits_equal_transformers_alone_padded_and_packed(case):
    golden, _, model, params = case
    inputs, outputs, tol = golden["inputs"], golden["outputs"], golden["tolerance"]
    expected = [np.asarray(outputs[f"logits_sequence_{i}"]) for i in range(2)]
    for tokens, want in zip(documents(golden), expected):
        got = logits_of(model, params, [tokens], np.ones((1, len(tokens)), np.int32))
        np.testing.assert_allclose(got[0], want, atol=tol, rtol=tol)
    for side in ("right_padded", "left_padded"):
        mask = np.asarray(inputs[side]["attention_mask"])
        got = logits_of(model, params, inputs[side]["input_ids"], mask)
        for row, want in enumerate(expected):
            np.testing.assert_allclose(got[row][mask[row] > 0], want, atol=tol, rtol=tol)
    got = logits_of(model, params, [inputs["packed"]["input_ids"]], [inputs["packed"]["segment_ids"]])
    np.testing.assert_allclose(got[0], np.concatenate(expected), atol=tol, rtol=tol)


def mean_nll(model, params, batch):
    weights = batch.targets
    return -(score.evaluate(model, params, batch)[0].logp * weights).sum() / weights.sum()


def test_loss_and_gradient_norms_equal_transformers(case):
    golden, config, model, params = case
    outputs, tol = golden["outputs"], golden["tolerance"]
    family = golden["inputs"]["config"]["model_type"]
    run = jax.jit(jax.value_and_grad(lambda p, batch: mean_nll(model, p, batch)))
    for side in ("right_padded", "left_padded", "packed"):
        inputs = golden["inputs"][side]
        tokens, segments = (
            jnp.atleast_2d(jnp.asarray(inputs[k])) for k in inputs if k in ("input_ids", "attention_mask", "segment_ids")
        )
        loss, gradient = run(params, Batch(tokens, segments, jnp.ones(tokens.shape, jnp.float32)))
        np.testing.assert_allclose(loss, outputs["nll_token_mean"], atol=tol, rtol=tol)
        named = layout.disassemble(names.FAMILIES[family].rows, config, jax.device_get(gradient))  # a tree like any other
        norms = {name: np.linalg.norm(tensor.read()) for name, tensor in named.items()}
        assert norms.keys() == outputs["grad_norms"].keys()
        for name, want in outputs["grad_norms"].items():
            np.testing.assert_allclose(norms[name], want, atol=tol, rtol=tol, err_msg=name)
        np.testing.assert_allclose(np.sqrt(sum(n**2 for n in norms.values())), outputs["global_grad_norm"], atol=tol, rtol=tol)


def test_no_token_feels_a_later_one_or_another_document(case):
    _, config, _, params = case
    tokens, model = jnp.asarray([[1, 2, 3, 4, 5, 6, 7, 8]]), build(dataclasses.replace(config, vocab=8))
    segments = jnp.asarray([[0, 1, 1, 1, 2, 2, 2, 0]])

    def hidden_of(table):  # a row of the embedding for each column, so that its gradient is that of the column
        own = {**params, "embed": {**params["embed"], "tokens": table}}
        return model.apply(own, jnp.arange(8)[None], segments)[0][0]

    jacobian = jax.jit(jax.jacobian(hidden_of))(params["embed"]["tokens"][jnp.asarray(tokens[0])])  # [T, D, T, D]
    felt = np.abs(jacobian).max(axis=(1, 3))  # [T, T]: column t felt at column s
    allowed = np.zeros((8, 8), bool)
    for start, stop in ((1, 4), (4, 7)):
        allowed[start:stop, start:stop] = np.tril(np.ones((3, 3), bool))
    assert (felt[allowed] > 1e-7).all()
    allowed |= np.eye(8, dtype=bool)  # padding feels itself, and nothing else
    assert (felt[~allowed] == 0).all()


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_a_cache_fed_in_chunks_gives_the_full_forward(case, chunk):
    golden, _, model, params = case
    tokens = jnp.asarray([[1, 4, 7, 2, 9, 3, 5, 8], [0, 0, 0, 6, 2, 2, 10, 1], [3, 5, 7, 9, 1, 2, 4, 0]])
    segments = jnp.asarray([[1] * 8, [0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2, 2, 0]])
    want = logits_of(model, params, tokens, segments)
    apply = jax.jit(model.apply)
    cache, parts = model.cache(3, 11), []  # longer than the rows: the columns not yet written must not count
    for at in range(0, 8, chunk):
        hidden, cache = apply(params, tokens[:, at : at + chunk], segments[:, at : at + chunk], cache, at)
        parts.append(model.unembed(params, hidden))
    got, real = np.asarray(jnp.concatenate(parts, axis=1)), np.asarray(segments) > 0
    np.testing.assert_allclose(got[real], want[real], atol=1e-5, rtol=1e-5)


def test_greedy_decoding_takes_the_best_token_of_the_full_forward(case):
    _, _, model, params = case
    prompts = Batch(jnp.asarray([[0, 3, 10], [1, 2, 4]]), jnp.asarray([[0, 1, 1], [1, 1, 1]]), jnp.zeros((2, 3)))
    keys = jax.random.split(jax.random.key(0), 2)
    decode = jax.jit(partial(sampling.sample, model, length=5, eos=-1, temperature=0))
    batch, logp, _ = decode(params, keys, prompts)
    full = logits_of(model, params, batch.tokens, batch.segments)
    assert (full[:, 2:-1].argmax(-1) == batch.tokens[:, 3:]).all()
    want = score.evaluate(model, params, batch)[0].logp
    np.testing.assert_allclose(logp[:, 3:], want[:, 3:], atol=1e-5)


def test_rows_of_padding_are_finite_and_move_nothing(case):
    _, _, model, params = case
    row, real, none = [1, 2, 3, 4], [1] * 4, [0] * 4

    def total(p, batch):
        return (score.evaluate(model, p, batch)[0].logp * batch.targets).sum()

    run = jax.jit(jax.value_and_grad(total))

    def of(rows, segments):
        return run(params, Batch(jnp.asarray(rows), jnp.asarray(segments), jnp.ones((2, 4), jnp.float32)))

    value, gradient = of([none, none], [none, none])
    assert value == 0 and all((g == 0).all() for g in jax.tree.leaves(gradient))
    assert np.isfinite(logits_of(model, params, [none, none], [none, none])).all()
    (a, da), (b, db) = of([row, row], [real, real]), of([row, none], [real, none])
    np.testing.assert_allclose(a, 2 * b, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, 2 * y, atol=1e-5, rtol=1e-5), da, db)


def test_remat_changes_no_gradient(case):
    _, config, _, params = case
    batch = Batch(jnp.asarray([[1, 2, 3, 4, 5]]), jnp.ones((1, 5), jnp.int32), jnp.ones((1, 5), jnp.float32))
    models = [build(dataclasses.replace(config, remat=remat)) for remat in REMAT]
    first, *others = (jax.jit(jax.grad(lambda p, m=m: mean_nll(m, p, batch)))(params) for m in models)
    for other in others:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6, rtol=1e-5), first, other)


@pytest.mark.parametrize("attention", ["xla", "blocks"])
def test_what_is_computed_again_is_not_held(attention):
    def held(remat):
        shape = {"width": 16, "layers": 8, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp": 64, "vocab": 32}
        model, tokens = build(DecoderConfig(**shape, context=256, remat=remat, attention=attention)), jnp.ones((1, 256), jnp.int32)
        params = jax.eval_shape(lambda key: shard.unbox(model.init(key)), jax.random.key(0))
        gradient = jax.jit(jax.grad(lambda params: model.apply(params, tokens, tokens)[0].sum()))
        return gradient.lower(params).compile().memory_analysis().temp_size_in_bytes

    none, dots, full = map(held, ("none", "dots", "full"))
    assert 1.5 * full < 1.5 * dots < none


def test_bfloat16_computes_in_bfloat16_and_stays_close():
    golden = golden_of("llama")
    config, params = from_golden(golden, dtype="bfloat16")
    model, tokens = build(config), jnp.asarray([documents(golden)[0]])
    hidden, _ = jax.jit(model.apply)(params, tokens, jnp.ones_like(tokens))
    assert hidden.dtype == jnp.bfloat16 and params["layers"]["mlp"]["up"]["kernel"].dtype == np.float32
    logits = model.unembed(params, hidden)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits[0], golden["outputs"]["logits_sequence_0"], atol=0.1)


def test_more_tokens_than_learned_positions_are_refused():
    config, params = from_golden(golden_of("gpt2"))
    tokens = jnp.ones((1, config.context + 1), jnp.int32)
    with pytest.raises(ValueError, match=f"rows of {config.context + 1} tokens.* {config.context} learned"):
        build(config).apply(params, tokens, tokens)


def test_a_scalar_head_is_a_linear_function_of_the_hidden_state():
    config = DecoderConfig(vocab=7, width=8, layers=1, heads=2, kv_heads=1, head_dim=4, mlp=8, context=8, scalar=0.5)
    model = build(config)
    draw = np.random.default_rng(0)
    params = layout.nest({k: draw.normal(0, 0.5, shape).astype(np.float32) for k, shape in layout.leaves_of(config).items()})
    params["scalar"]["bias"] = np.float32(0.25)
    batch = Batch(jnp.asarray([[0, 3, 2, 1], [5, 6, 0, 0]]), jnp.asarray([[0, 1, 1, 1], [1, 1, 0, 0]]), jnp.ones((2, 4)))
    hidden, _ = jax.jit(model.apply)(params, batch.tokens, batch.segments)
    last = np.asarray(hidden)[[0, 1], [3, 1]]
    np.testing.assert_allclose(score.last_scalar(model, params, batch), last @ params["scalar"]["kernel"] + 0.25, rtol=1e-5)


def test_stories260k_continues_as_transformers_does(shared):
    folder = shared / "data" / "models" / "stories260k"
    config, params = checkpoints.load(folder)
    model, words = build(config), checkpoints.tokenizer(folder)
    for one in json.loads((folder / "reference.json").read_text())["cases"]:
        ids, new = one["prompt_ids"], one["greedy_new_ids"]
        assert words(one["prompt"]).input_ids == ids
        tokens = jnp.asarray([ids])
        logits = logits_of(model, params, tokens, jnp.ones_like(tokens))[0, -1]
        np.testing.assert_allclose(logits, one["last_position_logits"], atol=1e-4)
        prompts = Batch(tokens, jnp.ones_like(tokens), jnp.zeros(tokens.shape, jnp.float32))
        key = jax.random.key(0)[None]
        decode = jax.jit(partial(sampling.sample, model, length=len(new), eos=1, temperature=0))
        batch, logp, _ = decode(params, key, prompts)
        assert batch.tokens[0, len(ids) :].tolist() == new
        np.testing.assert_allclose(logp[0, len(ids) :], one["greedy_token_logprobs"], atol=1e-4)
        assert words.decode(ids + new, skip_special_tokens=True) == one["greedy_text"]
