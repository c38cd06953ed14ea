"""Every implementation of attention gives what xla's gives: values and derivatives, for any layout, window and mesh."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import shard
from jaxalign.contract.measure import cheap
from jaxalign.models import decoder, encdec
from jaxalign.models.attention import attend
from jaxalign.objectives import supervised
from jaxalign.score import shift
from jaxalign.train.step import make_step
from jaxalign.types import Batch, TrainState

T = 300  # three blocks, the last one not full
ROWS = [  # segments and how many tokens each: padded left, right, packed, full, nothing
    [(0, 140), (1, 160)],
    [(1, 130), (0, 170)],
    [(1, 100), (2, 50), (3, 129), (0, 21)],
    [(1, T)],
    [(0, T)],
]


def segments_of(rows):
    return jnp.asarray([[segment for segment, count in row for _ in range(count)] for row in rows], jnp.int32)


def arrays(seed, length=T, before=0, dtype=jnp.float32):
    """q [B,T,4,8]; k, v [B,before+T,2,8]"""
    draw = np.random.default_rng(seed)
    shapes = [(len(ROWS), columns, heads, 8) for columns, heads in ((length, 4), (before + length, 2), (before + length, 2))]
    return tuple(jnp.asarray(draw.normal(size=shape), dtype) for shape in shapes)


def said(segments, given, tangents, forward=True, **how):
    """Value, gradient and, with forward, change along the tangents; and the program's text."""

    def value(q, k, v):
        return attend(q, k, v, segments, segments, **how).astype(jnp.float32)

    def run(given, tangents):
        out, back = jax.vjp(value, *given)
        change = jax.jvp(value, given, tangents)[1] if forward else 0.0
        return out, back(shift(out) + 1.0), change

    run = jax.jit(run, compiler_options=cheap())
    return run(given, tangents), run.lower(given, tangents).as_text()


def close(got, want, atol=2e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=atol, rtol=atol)


@pytest.mark.parametrize(
    "dtype, how",
    [(jnp.float32, {}), (jnp.float32, {"before": 5, "window": 77, "cap": 2.0, "scale": 0.5}), (jnp.bfloat16, {"window": 140})],
    ids=["plain", "all", "bfloat16"],
)
def test_blocks_give_the_same_and_hold_no_square(dtype, how):
    segments, before = segments_of(ROWS), how.get("before", 0)
    given, tangents = arrays(0, before=before, dtype=dtype), arrays(1, before=before, dtype=dtype)
    want, held = said(segments, given, tangents, **how)
    got, text = said(segments, given, tangents, **how, implementation="blocks")
    square = f"{T}x{before + T}x"
    assert square in held and square not in text
    assert all((np.asarray(x)[-1] == 0).all() for x in jax.tree.leaves(got) if len(x) == len(ROWS))  # of a row of padding
    close(got, want, 2e-5 if dtype == jnp.float32 else 0.1)


def test_blocks_that_no_query_sees_are_not_read():
    """A NaN times 0 is a NaN: it would show."""
    segments = segments_of([[(1, 128), (2, 128), (0, 44)]] * len(ROWS))
    q, k, v = arrays(0)
    k, v = (x.at[:, 128:].set(jnp.nan) for x in (k, v))
    out = jax.jit(partial(attend, implementation="blocks"))(q, k, v, segments, segments)
    assert np.isfinite(out[:, :128]).all() and np.isnan(out[:, 128:256]).all() and (out[:, 256:] == 0).all()


def test_several_queries_of_a_cache_are_read_in_blocks():
    (_, k, v), (q, _, _) = arrays(0), arrays(1, length=9)
    segments, at = segments_of(ROWS), jnp.int32(135)
    asked = jax.lax.dynamic_slice_in_dim(segments, at, 9, 1)
    ways = ("xla", "blocks", "splash", "ring")
    want, *got = (jax.jit(partial(attend, window=50, implementation=way))(q, k, v, asked, segments, at=at) for way in ways)
    for one in got:
        close(one, want)


def test_splash_gives_the_same():
    """Interpreted, for no TPU is here. The window is one of two that it has kernels for."""
    segments, length = segments_of(ROWS)[:, 100:230], 130
    given, how = arrays(0, length), {"window": jnp.int32(40), "cap": 2.0, "forward": False}
    want, _ = said(segments, given, (), **how)
    got, _ = said(segments, given, (), **how, windows=(decoder.EVERYTHING, 40), implementation="splash")
    close(got, want)


def test_what_cudnn_is_asked_is_the_same(monkeypatch):
    """By the call to it, which xla answers in its place."""
    asked, xla = [], jax.nn.dot_product_attention

    def answer(*args, **how):
        asked.append((how.pop("implementation", None), how.get("is_causal"), args[0].shape[1]))
        return xla(*args, **how)

    monkeypatch.setattr(jax.nn, "dot_product_attention", answer)
    segments = segments_of(ROWS)[:, 7:]
    for before in (0, 4):
        given, how = arrays(0, T - 7, before), {"before": before, "window": jnp.int32(40)}
        ways = (partial(attend, **how, implementation=way) for way in ("xla", "cudnn"))
        want, got = (jax.jit(way, compiler_options=cheap())(*given, segments, segments) for way in ways)
        close(got, want)
    assert [one for one in asked if one[0]] == [("cudnn", True, 294), ("cudnn", False, 294)]
    with pytest.raises(ValueError, match=r"cuDNN has no soft cap of scores; cap = 2.0"):
        attend(*arrays(0), segments_of(ROWS), segments_of(ROWS), cap=2.0, implementation="cudnn")


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN wants a GPU")
def test_cudnn_gives_the_same():
    given, segments = arrays(0, dtype=jnp.bfloat16), segments_of(ROWS)
    want, got = (said(segments, given, (), window=140, forward=False, implementation=way)[0] for way in ("xla", "cudnn"))
    close(got, want, 0.1)


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"attention": "cudnn"}, "attention = cudnn computes in bfloat16 or float16, .* here dtype = float32, score_cap = None"),
        ({"attention": "cudnn", "dtype": "bfloat16", "score_cap": 50.0}, "without a cap of the scores; .* score_cap = 50.0"),
        ({"attention": "splash", "adapter": {"kind": "prompt"}}, "splash has no virtual tokens, of adapter kind prompt"),
        ({"attention": "ring", "adapter": {"kind": "prefix"}}, "take xla, blocks or cudnn"),
    ],
)
def test_what_an_implementation_cannot_do_is_refused_by_name(tiny, changed, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(tiny.config, **changed)


def test_an_encoder_decoder_has_xla_alone():
    sizes = {"vocab": 9, "width": 8, "encoder_layers": 1, "layers": 1, "heads": 2, "head_dim": 4, "mlp": 8}
    with pytest.raises(ValueError, match="attention = 'blocks'; there are xla"):
        encdec.EncDecConfig(**sizes, attention="blocks")


def test_a_step_on_split_columns_is_the_step_of_one_device(tiny):
    """Packed and padded rows, over 2 x 4 devices: the loss, the gradients (all of SGD's step), and that none holds all scores."""
    rows = [[(0, 7), (1, 17)], [(1, 9), (0, 15)], [(1, 5), (2, 8), (3, 10), (0, 1)], [(1, 24)]]
    segments = np.asarray(segments_of(rows))
    tokens = np.random.default_rng(0).integers(0, tiny.config.vocab, segments.shape).astype(np.int32)
    batch, found, tx = Batch(tokens, segments, np.ones(segments.shape, np.float32)), [], optax.sgd(1.0)
    before = TrainState(jnp.int32(0), tiny.params, tx.init(tiny.params))
    for way, sizes in (("xla", {}), ("ring", {"sequence": 4, "data": 2})):
        model = decoder.build(dataclasses.replace(tiny.config, attention=way, windows=(0, 6)))
        mesh = shard.make_mesh(**sizes, devices=jax.devices()[: 8 if sizes else 1])
        where = shard.shardings(before, mesh)
        step = shard.compile_step(make_step(partial(supervised.sft, model=model), tx), mesh, where)
        state, data = shard.put(before, where), shard.place(batch, mesh)
        compiled = step.lower(state, data).compile(cheap())
        state, metrics = compiled(state.replace(frozen=()), (), data)
        found.append((shard.fetch(state.params), float(metrics["loss/total"])))
    assert {x.data.shape for x in data.tokens.addressable_shards} == {(2, 6)}
    assert "collective-permute" in compiled.as_text() and not re.search(r"\[[\d,]*24,24\]", compiled.as_text())
    close(*found, 1e-5)
