"""T5: the numbers of transformers, no leak, the cache, every stage of a run from data to PPO."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import ppo as ppo_config
from configs import sample as sample_config
from experiments import common, ppo, reward, sample, sft
from jaxalign import models, rollout, score, shard
from jaxalign.data import reviews, tables, text
from jaxalign.data.text import Document
from jaxalign.models import adapters, checkpoints, layout
from jaxalign.models.decoder import DecoderConfig
from jaxalign.models.encdec import EncDecConfig, bucket, build
from jaxalign.models.parts import Adapter
from jaxalign.objectives import online, preference, supervised
from jaxalign.objectives import reward as reward_objectives
from jaxalign.ops import filters
from jaxalign.sample import sample as draw
from jaxalign.train import log, optim
from jaxalign.train.step import make_step
from jaxalign.types import Batch, TrainState, join

GOLDEN = {path.stem: json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "golden" / "t5").glob("*.json"))}
CONFIG = EncDecConfig(
    vocab=14, width=8, encoder_layers=3, layers=2, heads=2, head_dim=4, mlp=12, buckets=8, furthest=12, gated=True, scalar=0.02
)
VARIANTS = {
    "first": {"gated": False, "activation": "relu"},
    "flan": {"activation": "gelu_tanh", "tied": False, "head_scaled": False},
    "retied": {"activation": "gelu_tanh", "head_scaled": False},
    "silu": {"activation": "silu", "tied": False, "encoder_layers": 1, "start": 3},
}
SOURCES, TARGETS = [[5, 6, 7, 8, 9, 2, 1], [4, 1], [8, 8, 3, 1]], [[0, 9, 4, 7, 5, 1], [0, 3, 1], [0, 6, 6, 2, 1]]
DOCUMENTS = [
    Document(np.array(y, np.int32), np.r_[0, np.ones(len(y) - 1)].astype(np.float32), np.array(x, np.int32))
    for x, y in zip(SOURCES, TARGETS, strict=True)
]


def drawn(config, spread=0.6):
    """A model and large random parameters, so that its logits differ by nats."""
    model, random = build(config), np.random.default_rng(0)
    shapes = shard.unbox(jax.eval_shape(model.init, jax.random.key(0)))
    return model, jax.tree.map(lambda x: jnp.asarray(random.normal(0, spread, x.shape), x.dtype), shapes)


@pytest.fixture(scope="module")
def small():
    return drawn(CONFIG)


@partial(jax.jit, static_argnums=0)
def logits_of(model, params, batch):
    return model.unembed(params, model.read(params, batch)[0])


def on_device(batch):
    return jax.tree.map(jnp.asarray, batch)


def rolled(batch, side):
    """The rows of a Batch padded on the right, with the source padded on this side."""
    if side == "left":
        for row, segments in enumerate(batch.source_segments):
            for x in (batch.source, batch.source_segments):
                x[row] = np.roll(x[row], (segments == 0).sum())
    return batch


def layouts():
    """The same three documents. Yields (name, Batch of 3 rows, the row and the segment of each document)"""
    for side in ("right", "left"):
        for source in ("right", "left"):
            batch = rolled(tables.pad(DOCUMENTS, 16, side=side, pad_id=2, source_length=15), source)
            yield f"{side} {source}", batch, [(row, 1) for row in range(3)]
    yield "packed", tables.pack_rows([DOCUMENTS, DOCUMENTS[::-1], DOCUMENTS[:1]], 16, 2, 15), [(0, 1), (0, 2), (0, 3)]


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize(
    "both_ways, firsts",
    [
        (False, [*range(17), 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]),
        (True, [*range(9), 12, 16, 23, 32, 46, 64, 91]),
    ],
)
def test_distances_fall_into_the_buckets_of_transformers(both_ways, firsts):
    """firsts: the least distance in each bucket, as transformers 5.23 has them."""
    distances = np.arange(400)
    want = np.searchsorted(firsts, distances, side="right") - 1
    np.testing.assert_array_equal(bucket(-distances, 32, 128, both_ways=both_ways), want)
    after = np.where(distances > 0, want + 16, 0) if both_ways else 0 * want
    np.testing.assert_array_equal(bucket(distances, 32, 128, both_ways=both_ways), after)


@pytest.mark.parametrize("name", GOLDEN)  # ByT5 says what flan does, Flan-UL2 what ul2 does
def test_logits_are_those_of_transformers_and_export_is_the_inverse_of_loading(tmp_path, name):
    inputs, outputs = GOLDEN[name]["inputs"], GOLDEN[name]["outputs"]
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    tensors = {key: np.array(x, np.float32) for key, x in inputs["params"].items()}
    copies = {f"{side}.embed_tokens.weight": tensors["shared.weight"] for side in ("encoder", "decoder")}
    unused = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": np.ones((8, 2), np.float32)}
    save_file(tensors | copies | unused, theirs / "model.safetensors")  # as old files have it
    (theirs / "config.json").write_text(json.dumps(inputs["config"]))
    config, params = checkpoints.load(theirs)
    model = models.build(config)
    pairs = zip(inputs["sources"], inputs["decoder_input_ids"], strict=True)
    documents = [Document(np.array(y), np.ones(len(y), np.float32), np.array(x)) for x, y in pairs]
    for batch in (tables.pad(documents, 18, source_length=20), tables.pack_rows([documents], 22, source_length=25)):
        got = np.asarray(logits_of(model, params, batch))[batch.segments > 0]
        np.testing.assert_allclose(got, np.concatenate(list(outputs.values())), atol=1e-5, rtol=1e-5)

    family = inputs["config"]["model_type"]
    checkpoints.export(ours, config, params, family=family)
    written = load_file(ours / "model.safetensors")
    assert written.keys() == tensors.keys()
    for key in tensors:
        np.testing.assert_array_equal(written[key], tensors[key])
    told = json.loads((ours / "config.json").read_text())
    assert inputs["config"].items() <= told.items() and told["architectures"] == [f"{family.upper()}ForConditionalGeneration"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scalar", [None, 0.5], ids=["", "scalar"])
def test_what_is_exported_comes_back(tmp_path, variant, scalar):
    config = replace(CONFIG, **VARIANTS[variant], scalar=scalar)
    _, params = drawn(config)
    checkpoints.export(tmp_path / "m", config, params)
    again, loaded = checkpoints.load(tmp_path / "m", scalar=scalar)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, loaded, jax.device_get(params))


def test_a_head_of_its_own_is_kept_where_transformers_5_calls_the_model_tied(tmp_path):
    """transformers 5 writes tie_word_embeddings = true into every T5's config; what the file holds tells."""
    config = replace(CONFIG, **VARIANTS["flan"], scalar=None)
    checkpoints.export(tmp_path / "m", config, drawn(config)[1])
    (tmp_path / "m" / "jaxalign.json").unlink()
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    assert checkpoints.load(tmp_path / "m")[0] == config
    raw |= {"tie_word_embeddings": True, "scale_decoder_outputs": True}
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="'lm_head.weight' is not the embedding, as tie_word_embeddings"):
        checkpoints.load(tmp_path / "m")


def test_an_embedding_of_one_side_is_refused(tmp_path):
    config = replace(CONFIG, scalar=None)
    checkpoints.export(tmp_path, config, drawn(config)[1])
    (tmp_path / "jaxalign.json").unlink()
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="'encoder.embed_tokens.weight' is not the embedding 'shared.weight'"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"feed_forward_proj": "gated-mish"}, "dense_act_fn = 'mish' asks for something"),
        ({"feed_forward_proj": 3}, "dense_act_fn = 3 asks for something"),
        ({"decoder_start_token_id": 14}, "start = 14 is no token of a vocabulary of 14"),
        ({"decoder_start_token_id": -1}, "decoder_start_token_id = -1 should be of type int above -1"),
        ({"relative_attention_num_buckets": 7}, "buckets = 7.* are even"),
        ({"relative_attention_max_distance": 4}, "furthest = 4"),
        ({"num_layers": 10**6}, "the config asks for"),
        ({"d_kv": None}, "d_kv is missing"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_a_config_asks_in_vain_is_refused_by_its_key(tmp_path, changed, says):
    config = replace(CONFIG, scalar=None)
    checkpoints.export(tmp_path, config, drawn(config)[1])
    (tmp_path / "jaxalign.json").unlink()
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | changed))
    with pytest.raises(ValueError, match=says):
        checkpoints.load(tmp_path)


def test_a_family_says_configs_of_its_kind_alone():
    assert layout.family_of(CONFIG) == "t5"
    with pytest.raises(ValueError, match="the family llama is of DecoderConfig"):
        layout.write_config("llama", CONFIG)
    with pytest.raises(ValueError, match="no way to say .*activation='gelu'"):  # gated-gelu means the other one
        layout.write_config("t5", replace(CONFIG, activation="gelu"))


def test_what_a_row_reads_and_how_it_is_padded_or_packed_changes_nothing(small):
    (model, params), want = small, None
    for name, batch, where in layouts():
        logits = np.asarray(logits_of(model, params, batch))
        got = np.concatenate([logits[row][batch.segments[row] == k] for row, k in where])
        want = got if want is None else want
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5, err_msg=name)
    alone = logits_of(model, params, tables.pad(DOCUMENTS[:1], 6, source_length=7))[0]
    np.testing.assert_allclose(alone, want[:6], atol=1e-5, rtol=1e-5)
    other = DOCUMENTS[0]._replace(source=DOCUMENTS[0].source[::-1].copy())
    swapped = logits_of(model, params, tables.pad([other], 6, source_length=7))[0]
    assert np.abs(swapped - alone).max() > 0.1  # the source is read, and its order


def test_no_token_feels_a_later_one_or_another_document(small):
    """Row of three documents, the last without a source, and padding; a row of the embedding for each column of both sides."""
    model, params = drawn(replace(CONFIG, vocab=18, tied=False))
    segments, sources = np.array([[0, 1, 1, 1, 2, 2, 2, 3, 3]]), np.array([[1, 1, 0, 2, 2, 2, 2, 0, 0]])

    def hidden_of(table):
        own = {**params, "embed": {"tokens": table}}
        return model.apply(own, jnp.arange(9)[None], segments, source=9 + jnp.arange(9)[None], source_segments=sources)[0][0]

    jacobian = jax.jit(jax.jacobian(hidden_of))(params["embed"]["tokens"])  # [T, D, T + S, D]
    felt = np.abs(jacobian).max(axis=(1, 3))
    same = segments[0][:, None] == np.concatenate([segments[0], sources[0]])[None]
    causal = np.arange(9)[:, None] >= np.concatenate([np.arange(9), np.zeros(9)])[None]
    allowed = same & causal & (segments[0] > 0)[:, None]
    assert (felt[allowed] > 1e-7).all()
    allowed[:, :9] |= np.eye(9, dtype=bool)  # padding feels itself, and nothing else
    assert (felt[~allowed] == 0).all()


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_a_cache_fed_in_chunks_gives_the_full_forward(small, chunk):
    """The source is read with the first chunk alone."""
    model, params = small

    @jax.jit
    def apply(params, tokens, segments, cache, at, **source):
        hidden, cache = model.apply(params, tokens, segments, cache, at, **source)
        return model.unembed(params, hidden), cache

    for name, batch, _ in layouts():
        rows, length = batch.tokens.shape
        want, cache, parts = logits_of(model, params, batch), model.cache(rows, length + 2), []
        source = {"source": batch.source, "source_segments": batch.source_segments}
        for at in range(0, length, chunk):
            part = slice(at, at + chunk)
            logits, cache = apply(params, batch.tokens[:, part], batch.segments[:, part], cache, at, **source)
            parts, source = [*parts, logits], {}
        real = np.asarray(batch.segments) > 0
        np.testing.assert_allclose(np.concatenate(parts, 1)[real], np.asarray(want)[real], atol=1e-5, rtol=1e-5, err_msg=name)


def test_the_last_layers_of_the_decoder_may_be_trained_alone(small):
    """Cut off, they give the same numbers, by the cache too; merged, they are the model."""
    model, params = small
    batch = on_device(next(layouts())[1])
    config, cut = adapters.adapt(CONFIG, params, Adapter("last", layers=1), jax.random.key(0))
    adapted = build(config)
    np.testing.assert_array_equal(logits_of(adapted, cut, batch), logits_of(model, params, batch))
    jax.tree.map(np.testing.assert_array_equal, adapters.merge(config, cut)[1], params)
    frozen, trained = adapters.split(cut, adapters.trained_leaves(config))
    assert trained.keys() == {"decoder", "scalar"} and trained["decoder"].keys() == {"last"}
    loss = jax.jit(jax.grad(lambda part: supervised.sft(join(frozen, part), batch, model=adapted)[0]))
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(loss(trained)["decoder"]))
    asked = keys_of(0, 1, 2), prompts_of(SOURCES)
    said = [jax.jit(partial(draw, m, length=6, eos=-1))(p, *asked) for m, p in ((model, params), (adapted, cut))]
    jax.tree.map(np.testing.assert_array_equal, *said)


@pytest.mark.parametrize("remat", ["full", "none"])
def test_what_is_computed_anew_is_the_same(small, remat):
    model, params = small
    batch = on_device(next(layouts())[1])

    def gradient(config):
        return jax.jit(jax.grad(lambda params: supervised.sft(params, batch, model=build(config))[0]))(params)

    jax.tree.map(
        partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4), gradient(replace(CONFIG, remat=remat)), gradient(CONFIG)
    )


def test_bfloat16_is_near(small):
    model, params = small
    batch = next(layouts())[1]
    want = logits_of(model, params, batch)
    got = logits_of(build(replace(CONFIG, dtype="bfloat16")), params, batch)
    assert got.dtype == jnp.float32
    real = batch.segments > 0
    assert np.abs(np.asarray(got - want))[real].mean() < 0.05 < np.asarray(want)[real].std()


@pytest.mark.parametrize("variant", ["first", "flan"])
def test_the_first_loss_is_that_of_knowing_nothing(variant):
    """T5's own first values: attention is not scaled, so they have to be small."""
    model = build(replace(CONFIG, vocab=50, width=64, head_dim=16, heads=4, mlp=128, **VARIANTS[variant]))
    tokens = np.random.default_rng(0).integers(0, 50, (4, 20))
    batch = Batch(tokens, np.ones_like(tokens), np.ones(tokens.shape, np.float32), tokens[:, ::-1], np.ones_like(tokens))
    total, sums = jax.jit(lambda key: supervised.sft(shard.unbox(model.init(key)), batch, model=model))(jax.random.key(0))
    assert total / sums["weight"] == pytest.approx(np.log(50), abs=1.2)  # a tied head expects the last token again


def test_a_model_is_told_what_it_lacks(small, tiny):
    model, params = small
    batch = on_device(next(layouts())[1])
    with pytest.raises(ValueError, match="the rows have no source, which an encoder-decoder needs"):
        model.apply(params, batch.tokens, batch.segments)
    with pytest.raises(ValueError, match="a decoder alone has no encoder"):
        score.evaluate(tiny.model, tiny.params, batch)
    for changes, says in [
        ({"activation": "swish"}, "activation = 'swish'; there are silu"),
        ({"remat": "some"}, "remat = 'some'"),
        ({"start": 14}, "start = 14 is no token"),
        ({"buckets": 2}, "buckets = 2"),
    ]:
        with pytest.raises(ValueError, match=says):
            replace(CONFIG, **changes)


def test_an_architecture_comes_back_from_json():
    decoder = DecoderConfig(vocab=14, width=8, layers=2, heads=4, kv_heads=2, head_dim=4, mlp=12, context=64)
    for config in (CONFIG, decoder):
        assert models.config_of(json.loads(json.dumps(vars(config)))) == config


# ---------------------------------------------------------------- sampling


def prompts_of(sources, length=8):
    documents = [Document(np.array([0]), np.zeros(1, np.float32), np.array(source)) for source in sources]
    return on_device(tables.pad(documents, 1, side="left", source_length=length))


def keys_of(*numbers):
    return jnp.stack([jax.random.key(number) for number in numbers])


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.6, "top_k": 4, "top_p": 0.9}, {"temperature": 0.0}], ids=str)
def test_the_sampler_says_what_the_scorer_says(small, settings):
    model, params = small
    prompts = prompts_of([*SOURCES, [3, 1], [9, 9, 9, 1]])
    run = jax.jit(partial(draw, model, length=9, eos=1, **settings))
    batch, logp, drawn_logp = run(params, keys_of(*range(5)), prompts)
    np.testing.assert_array_equal(batch.source, prompts.source)
    on = np.asarray(batch.weights) > 0
    np.testing.assert_array_equal(on, np.asarray(batch.targets) > 0)
    temperature = settings.get("temperature") or 1.0
    said, value = jax.jit(partial(score.evaluate, model, temperature=temperature))(params, batch)
    np.testing.assert_allclose(np.asarray(logp)[on], np.asarray(said.logp)[on], atol=1e-5, rtol=1e-5)
    assert np.isfinite(value).all() and on.sum() > 10 and not on.all()  # some end early
    logits = score.shift(logits_of(model, params, batch))
    if settings.get("temperature") == 0:
        assert (np.asarray(logits.argmax(-1)) == np.asarray(batch.tokens))[on].all()
    else:
        kept = filters.top_p(filters.top_k(logits / temperature, settings.get("top_k", 0)), settings.get("top_p", 1.0))
        cut = jnp.take_along_axis(jax.nn.log_softmax(kept), batch.tokens[..., None], -1)[..., 0]
        np.testing.assert_allclose(np.asarray(drawn_logp)[on], np.asarray(cut)[on], atol=1e-5, rtol=1e-5)


def test_a_response_depends_on_its_own_source_alone(small):
    model, params = small
    run = jax.jit(partial(draw, model, length=6, eos=-1))
    whole = run(params, keys_of(0, 1, 2), prompts_of(SOURCES))[0]
    for row in range(3):
        alone = run(params, keys_of(row), prompts_of([SOURCES[row]], length=12))[0]
        np.testing.assert_array_equal(alone.tokens[0], whole.tokens[row])
    (_, was, _), (_, other, _) = (run(params, keys_of(0, 1, 2), prompts_of([x, *SOURCES[1:]])) for x in (SOURCES[0], [9, 1]))
    assert (other[0] != was[0]).any() and (other[1:] == was[1:]).all()


# ---------------------------------------------------------------- objectives


def rolled_out(model, params):
    batch = on_device(tables.pad(DOCUMENTS, 7, source_length=8))
    logp, _, value = jax.jit(partial(rollout.said, model, temperature=1.0))(params, batch)
    return rollout.assemble(batch, logp, logp - 0.1, value, jnp.arange(3.0), 0.1)


def data_of(name, model, params):
    chosen = tables.pad(DOCUMENTS, 7, source_length=8)
    targets = [Document(x.tokens[:1].repeat(3) + np.arange(3, dtype=np.int32), x.weights[:3], x.source) for x in DOCUMENTS]
    pairs = tables.pairs(DOCUMENTS, targets, [0.0] * 3, 7, source_length=8)
    if name == "sft":
        return on_device(chosen)
    if name == "ppo":
        return rolled_out(model, params)
    pairs = on_device(pairs)
    return jax.jit(partial(preference.with_reference, model=model))(params, pairs) if name == "dpo" else pairs


OBJECTIVES = {
    "sft": supervised.sft,
    "semantic_sft": partial(supervised.semantic_sft, distance_weight=0.5),
    "pairwise": reward_objectives.pairwise,
    "dpo": preference.dpo,
    "ppo": partial(online.ppo, value_weight=0.5),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_part_learns_from_every_objective(small, name):
    model, params = small
    data = data_of("sft" if name == "semantic_sft" else name, model, params)
    loss = jax.jit(jax.value_and_grad(lambda params: OBJECTIVES[name](params, data, model=model), has_aux=True))
    (total, sums), gradient = loss(params)
    assert np.isfinite(total) and sums["weight"] > 0 and all(np.isfinite(x) for x in sums.values())
    norms = {path: np.linalg.norm(x) for path, x in layout.flatten(gradient).items()}
    assert all(np.isfinite(norm) for norm in norms.values())
    still = {path for path, norm in norms.items() if norm < 1e-9} - {"scalar.bias"}  # which differences of scores do not have
    assert still == ({"scalar.kernel"} if name in ("sft", "semantic_sft", "dpo") else set())


def test_ktos_other_responses_are_to_the_own_source(small):
    model, params = small
    batch = on_device(tables.pad(DOCUMENTS, 7, source_length=8))
    mixed = preference.mismatch(batch, length=8)
    np.testing.assert_array_equal(mixed.source, batch.source)
    want = [x._replace(source=y.source) for x, y in zip([*DOCUMENTS[1:], DOCUMENTS[0]], DOCUMENTS, strict=True)]
    jax.tree.map(np.testing.assert_array_equal, mixed, on_device(tables.pad(want, 8)))


def test_packing_changes_no_loss_and_no_gradient(small):
    model, params = small

    def gradient(batch):
        def loss(params):
            total, sums = supervised.sft(params, batch, model=model)
            return total / sums["weight"]

        return jax.jit(jax.value_and_grad(loss))(params)

    padded, packed = gradient(tables.pad(DOCUMENTS, 16, source_length=15)), gradient(tables.pack_rows([DOCUMENTS], 16, 2, 15))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4), packed, padded)


def test_a_step_over_eight_devices_is_that_of_one():
    config = replace(CONFIG, vocab=16, scalar=None)
    model, tx = build(config), optim.adam(learning_rate=0.01, steps=10)
    documents = [DOCUMENTS[n % 3] for n in range(8)]
    batch = tables.pad(documents, 7, source_length=8)
    step = make_step(partial(supervised.sft, model=model), tx)

    def start(key):
        params = model.init(key)
        return TrainState(jnp.int32(0), params, tx.init(params))

    found = []
    for sizes in ({"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1}):
        mesh = shard.make_mesh(**sizes, devices=jax.devices()[: np.prod(list(sizes.values()))])
        state, where = shard.create(start, mesh, jax.random.key(0))
        if len(sizes) == 3:
            kernel = state.params["decoder"]["layers"]["cross"]["q"]["kernel"]  # [L,D,H,K]
            assert kernel.sharding.shard_shape(kernel.shape) == (2, 4, 1, 4)
        run = shard.compile_step(step, mesh, where)
        for _ in range(2):
            state, metrics = run(state, shard.place(batch, mesh))
        found.append(shard.fetch((state.params, metrics["loss/total"])))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4), *found)


@pytest.mark.slow
def test_it_learns_to_write_its_source_backwards():
    """Which a decoder that did not read the source, or a bag of its words, could not."""
    random, steps = np.random.default_rng(0), 250

    def one():
        source = random.integers(2, 8, random.integers(3, 6))
        target = np.r_[0, source[::-1], 1].astype(np.int32)
        return Document(target, np.r_[0, np.ones(len(target) - 1)].astype(np.float32), np.r_[source, 1].astype(np.int32))

    found = [one() for _ in range(2080)]
    train, held_out = found[:-32], found[-32:]
    model = build(EncDecConfig(vocab=8, width=32, encoder_layers=2, layers=2, heads=4, head_dim=8, mlp=64))
    tx, rows = optim.adam(learning_rate=0.01, steps=steps, warmup=20), tables.pack(train, 20)
    params = shard.unbox(jax.jit(model.init)(jax.random.key(0)))
    state = TrainState(jnp.int32(0), params, tx.init(params))
    step = jax.jit(make_step(partial(supervised.sft, model=model), tx), donate_argnums=0)
    for i in range(steps):
        batch = tables.pack_rows([rows[n] for n in tables.order(len(rows), 32, seed=0, step=i)], 20)
        state, _ = step(state, tables.check(batch, 8))
    prompts = prompts_of([x.source for x in held_out])
    said, _, _ = jax.jit(partial(draw, model, length=8, eos=1, temperature=0.0))(state.params, keys_of(*range(32)), prompts)
    right = [written == x.tokens[1:].tolist() for (_, written), x in zip(common.ids(said), held_out, strict=True)]
    assert np.mean(right) > 0.85


# ---------------------------------------------------------------- data


WORDS = reviews.tokenizer()
END = WORDS.eos_token_id


def ids_of(words):
    return WORDS(words)["input_ids"]


def test_the_prompt_is_the_source_and_the_rest_stands_behind_the_start():
    made = text.source_target(WORDS, "the film was", "very good .", start=5)
    assert made.source.tolist() == [*ids_of("the film was"), END]
    assert made.tokens.tolist() == [5, *ids_of("very good ."), END] and made.weights.tolist() == [0, 1, 1, 1, 1]
    prompt = text.source_target(WORDS, "the film was", "", start=5, eos=False)
    assert prompt.tokens.tolist() == [5] and prompt.weights.tolist() == [0] and (prompt.source == made.source).all()
    given = text.of_ids(made.source.tolist(), made.tokens.tolist()[1:], vocab=len(WORDS), start=5)
    jax.tree.map(np.testing.assert_array_equal, given, made)
    assert made.ids != made._replace(source=made.source[1:]).ids


def test_fit_keeps_the_start_of_the_target_and_the_end_of_the_source():
    made = Document(np.arange(6), np.r_[0, np.ones(5)], np.arange(10, 17))
    start, end = (text.fit(made, 4, keep=keep, source_length=3) for keep in ("start", "end"))
    assert start.tokens.tolist() == end.tokens.tolist() == [0, 1, 2, 3]
    assert start.source.tolist() == [10, 11, 16] and end.source.tolist() == [14, 15, 16]  # the last is its EOS
    assert len(text.fit(made, 4).source) == 4
    jax.tree.map(np.testing.assert_array_equal, text.fit(made, 7), made)


def test_packing_fills_neither_side_beyond_its_length():
    random = np.random.default_rng(0)

    def one(n):
        size, source = random.integers(1, 9, 2)
        return Document(np.full(size, n, np.int32), np.ones(size, np.float32), np.full(source, n, np.int32))

    documents = [one(n) for n in range(300)]
    rows = tables.pack(documents, 16, source_length=20)
    assert sorted(x.tokens[0] for row in rows for x in row) == list(range(300))
    batch = tables.check(tables.pack_rows(rows, 16, source_length=20), 300, targets=False)
    assert batch.tokens.shape == (len(rows), 16) and batch.source.shape == (len(rows), 20)
    for row in range(len(rows)):
        for k in range(1, batch.segments[row].max() + 1):
            assert set(batch.tokens[row][batch.segments[row] == k]) == set(batch.source[row][batch.source_segments[row] == k])
    filled = max((batch.segments > 0).mean(), (batch.source_segments > 0).mean())
    assert filled > 0.85


def test_what_is_wrong_with_sources_is_said():
    good = tables.pad(DOCUMENTS, 7, source_length=8)
    assert tables.check(good, 14) is good
    with pytest.raises(ValueError, match="row 0, source: a document of 7 tokens, where 1 to 6 fit"):
        tables.pad(DOCUMENTS, 6, source_length=6)
    with pytest.raises(ValueError, match="document 0, source: a document of 7 tokens, where 1 to 6 fit"):
        tables.pack(DOCUMENTS, 6)
    with pytest.raises(ValueError, match="some of these documents have a source, and some have none"):
        tables.pad([DOCUMENTS[0], DOCUMENTS[1]._replace(source=None)], 7)
    with pytest.raises(ValueError, match="row 1: 1 documents and 2 sources"):
        segments = good.source_segments.copy()
        segments[1, 1] = 2
        tables.check(good.replace(source_segments=segments), 14)
    with pytest.raises(ValueError, match="source: row 2, column 0: token id 99"):
        source = good.source.copy()
        source[2, 0] = 99
        tables.check(good.replace(source=source), 14)
    with pytest.raises(ValueError, match="source_length = 4, but these documents have no source"):
        tables.collect([0], lambda _: DOCUMENTS[0]._replace(source=None), length=9, source="x", source_length=4)


def test_equal_responses_prefer_nothing_and_other_sources_are_other_documents():
    pair = (DOCUMENTS[0], DOCUMENTS[0])
    table = tables.collect([pair, (DOCUMENTS[0], DOCUMENTS[1])], lambda row: row, length=9, source="x")
    assert table.counts["equal"] == 1 and table.counts["kept"] == 1


def test_a_preview_shows_the_source():
    made = text.source_target(WORDS, "the film was", "very good .", start=0)
    shown = tables.preview(WORDS, tables.pad([made], 8))
    assert "its source, 4 tokens: the film was </s>" in shown and "<pad>⟦ very good . </s>⟧" in shown


def test_a_review_is_cut_in_two():
    for review in reviews.reviews(300, seed=0):
        cut = reviews.cut(review)
        assert cut["opening"] + cut["rest"] == review and cut["rest"] and cut["opening"].split()[-1] in ("was", "were", ".")
    assert reviews.cut("the film was") == {"opening": "the film was", "rest": ""}


# ---------------------------------------------------------------- runs


def test_an_encoder_decoder_takes_no_chat():
    with pytest.raises(ValueError, match="chat = True is for decoders"):
        common.document(WORDS, "a", "b", chat=True, start=0)


def test_comparisons_are_read_as_ids_and_as_text_alike(tmp_path):
    row = {"prompt": "the film was", "chosen": "very good .", "rejected": "bad ."}
    ids = {"prompt_ids": [*ids_of(row["prompt"]), END]}
    ids |= {f"{side}_ids": [*ids_of(row[side]), END] for side in ("chosen", "rejected")}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(x) + "\n" for x in (row, row | ids)))
    data = ppo_config.get_config("t5").stages.reward.data.to_dict() | {"source": str(tmp_path / "rows.jsonl"), "held_out": 1}
    (as_text,), (as_ids,) = reward.comparisons(WORDS, len(WORDS), start=0, **data)
    for one, other in zip(as_text[:2], as_ids[:2], strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    assert as_text[0].source.tolist() == ids["prompt_ids"]
    with pytest.raises(ValueError, match="source_length = 16, but these documents have no source"):
        reward.comparisons(WORDS, len(WORDS), **data)


def test_documents_of_a_run_have_the_opening_as_their_source():
    settings = ppo_config.get_config("t5").stages.sft.data.to_dict() | {"count": 20, "held_out": 5}
    train, held_out = sft.documents(WORDS, seed=0, start=0, **settings)
    assert len(train) == 15 and len(held_out) == 5
    for document, review in zip(train, reviews.reviews(20, seed=0)):
        assert WORDS.decode([*document.source[:-1], *document.tokens[1:-1]]) == review


TINY = {
    "stages.sft.scratch.architecture": {**ppo_config.get_config("t5").stages.sft.scratch.architecture, "width": 16, "mlp": 32},
    "stages.sft.data.count": 128,
    "stages.sft.data.held_out": 32,
    "stages.sft.run.steps": 4,
    "stages.sft.run.batch": 16,
    "stages.compare.prompts.count": 64,
    "stages.compare.run.batch": 32,
    "stages.reward.data.held_out": 16,
    "stages.reward.run.steps": 2,
    "stages.reward.run.batch": 16,
    "prompts.count": 48,
    "run.iterations": 2,
    "run.batch": 16,
    "evaluate.prompts": 16,
    "evaluate.every": 1,
    "loop.save_every": 8,
}


@pytest.mark.slow
def test_all_stages_of_ppo_run_on_an_encoder_decoder(tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "make_mesh", partial(shard.make_mesh, devices=jax.devices()[:1]))
    config = ppo_config.get_config("t5")
    for name, value in TINY.items():
        config.update_from_flattened_dict({name: value} if not isinstance(value, dict) else log.flat({name: value}))
    ppo.run(config, tmp_path / "run")
    start, first, *_ = log.read_lines(tmp_path / "run" / "metrics.jsonl")
    assert start["kl/held_out"] == 0 and [first[f"policy/{name}"] for name in ("kl", "kl_k2", "kl_k3")] == [0, 0, 0]
    rows = log.read_lines(tmp_path / "run" / "compare" / "comparisons.jsonl")
    assert all(WORDS.decode(row["prompt_ids"], skip_special_tokens=True) == row["prompt"] for row in rows)
    assert set(row["prompt"] for row in rows) <= set(reviews.openings(64, seed=0))

    asked = sample_config.get_config()
    asked.update_from_flattened_dict(
        {"model.source": str(tmp_path / "run"), "prompt": "the film was", "output": str(tmp_path / "said.jsonl"), "batch": 1}
    )
    sample.run(asked)
    (said,) = log.read_lines(tmp_path / "said.jsonl")
    asked.update_from_flattened_dict({"completion": said["text"]})
    sample.run(asked)
    (again,) = log.read_lines(tmp_path / "said.jsonl")
    count = len(again["tokens"])  # without EOS
    assert again["tokens"] == said["tokens"][:count] and count > 0
    np.testing.assert_allclose(again["logp"], said["logp"][:count], atol=1e-4)
