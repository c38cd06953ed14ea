"""Families whose configs go beyond Llama's: equal to transformers' numbers in every layout, with a cache, and there and back again.

The numbers are tests/golden/families/*.json; make_families.py beside them made them. Windows there are shorter than the documents.
"""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign import sample as sampling
from jaxalign import score, shard
from jaxalign.models import checkpoints, layout, names
from jaxalign.models.attention import attend, frequencies
from jaxalign.models.decoder import DecoderConfig, build
from jaxalign.types import Batch

GOLDEN = {path.stem: json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "golden/families").glob("*.json"))}


def read(raw):
    return layout.read_config(raw, "config.json")[1]


def loaded(name):
    inputs = GOLDEN[name]["inputs"]
    family = names.FAMILIES[inputs["config"]["model_type"]]
    arrays = {tensor: np.asarray(x, np.float32) for tensor, x in inputs["params"].items()}
    tensors = layout.canonical(family, {k: layout.Tensor(x.shape, lambda x=x: x) for k, x in arrays.items()}, name)
    config = read(inputs["config"])
    return config, layout.assemble(family.rows, config, tensors, name)


def rows_of(name):
    """Both documents right-padded, left-padded and packed: tokens and segments i32 [5,17]."""
    inputs, many = GOLDEN[name]["inputs"], len(GOLDEN[name]["inputs"]["packed"]["input_ids"])
    tokens, segments = (
        np.concatenate(
            [
                np.pad(np.atleast_2d(inputs[side][key]), ((0, 0), (0, many - np.atleast_2d(inputs[side][key]).shape[1])))
                for side, key in (("right_padded", padded), ("left_padded", padded), ("packed", packed))
            ]
        )
        for padded, packed in (("input_ids", "input_ids"), ("attention_mask", "segment_ids"))
    )
    return jnp.asarray(tokens), jnp.asarray(segments)


@pytest.fixture(params=GOLDEN, scope="module")
def case(request):
    config, params = loaded(request.param)
    return request.param, config, build(config), params


def logits_of(model, params, tokens, segments):
    return model.unembed(params, model.apply(params, tokens, segments)[0])


def check(name, logits):
    """Logits [5,17,V] of `rows_of` against those of each document alone."""
    (_, segments), want, tol = rows_of(name), GOLDEN[name]["outputs"], GOLDEN[name]["tolerance"]
    for i, document in enumerate(want[f"logits_sequence_{i}"] for i in range(2)):
        for row, here in ((i, segments[i] > 0), (2 + i, segments[2 + i] > 0), (4, segments[4] == i + 1)):
            np.testing.assert_allclose(logits[row][here], document, atol=tol, rtol=tol, err_msg=f"row {row}")


def test_logits_loss_and_gradient_equal_transformers_in_every_layout(case):
    name, config, model, params = case
    (tokens, segments), want, tol = rows_of(name), GOLDEN[name]["outputs"], GOLDEN[name]["tolerance"]

    @jax.jit
    def run(params):
        def nll(params):
            batch = Batch(tokens, segments, jnp.ones(tokens.shape))
            return -(score.evaluate(model, params, batch)[0].logp * batch.targets).sum() / batch.targets.sum()

        return logits_of(model, params, tokens, segments), *jax.value_and_grad(nll)(params)

    logits, loss, gradient = run(params)
    check(name, logits)
    np.testing.assert_allclose(loss, want["nll_token_mean"], atol=tol, rtol=tol)  # thrice the same documents
    rows = names.FAMILIES[GOLDEN[name]["inputs"]["config"]["model_type"]].rows
    for tensor, norm in layout.disassemble(rows, config, jax.device_get(gradient)).items():
        np.testing.assert_allclose(np.linalg.norm(norm.read()), want["grad_norms"][tensor], atol=tol, rtol=tol, err_msg=tensor)


def test_decoding_with_a_cache_gives_the_same_logits(case):
    name, _, model, params = case
    tokens, segments = rows_of(name)

    @jax.jit
    def run(params, tokens, segments, cache, at):
        hidden, cache = model.apply(params, tokens, segments, cache, at)
        return model.unembed(params, hidden), cache

    cache, parts = model.cache(5, 20), []  # longer than the rows: columns not yet written must not count
    for start, stop in [(0, 5), *((t, t + 1) for t in range(5, 17))]:
        logits, cache = run(params, tokens[:, start:stop], segments[:, start:stop], cache, start)
        parts.append(logits)
    check(name, np.concatenate(parts, axis=1))


def test_export_gives_back_the_tensors_and_the_config(tmp_path, case):
    name, config, _, params = case
    inputs = GOLDEN[name]["inputs"]
    theirs = {tensor: np.asarray(x, np.float32) for tensor, x in inputs["params"].items()}
    (tmp_path / "theirs").mkdir()
    save_file(theirs, tmp_path / "theirs" / "model.safetensors")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(inputs["config"]))
    ours = checkpoints.export(tmp_path / "ours", *checkpoints.load(tmp_path / "theirs"), family=inputs["config"]["model_type"])
    written = load_file(ours / "model.safetensors")
    assert written.keys() == theirs.keys() and all(np.array_equal(written[k], theirs[k]) for k in theirs)
    again, tree = checkpoints.load(ours)
    assert again == config and all(map(np.array_equal, jax.tree.leaves(tree), jax.tree.leaves(params)))


@pytest.mark.parametrize("name", GOLDEN)
def test_a_config_survives_json(name):
    config = loaded(name)[0]
    assert DecoderConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_sampling_beyond_the_window_takes_the_best_tokens_of_the_full_forward():
    config, params = loaded("gemma3")
    model = build(config)
    prompts = Batch(jnp.asarray([[0, 0, 3, 10], [1, 2, 4, 12]]), jnp.asarray([[0, 0, 1, 1], [1, 1, 1, 1]]), jnp.zeros((2, 4)))
    decode = jax.jit(partial(sampling.sample, model, length=9, eos=-1, temperature=0))
    batch, logp, _ = decode(params, jax.random.split(jax.random.key(0), 2), prompts)
    full = np.asarray(jax.jit(partial(logits_of, model))(params, batch.tokens, batch.segments))
    assert (full[:, 3:-1].argmax(-1) == batch.tokens[:, 4:]).all()
    want = jax.nn.log_softmax(full[:, 3:-1]).max(-1)
    np.testing.assert_allclose(logp[:, 4:], want, atol=1e-5)


def test_heads_that_are_normalised_together_may_be_split_over_a_mesh():
    config, params = loaded("olmo2")
    model, (tokens, segments) = build(config), (x[:4] for x in rows_of("olmo2"))
    run = partial(logits_of, model)
    mesh = shard.make_mesh(data=2, fsdp=2, tensor=2)
    there = shard.put(params, shard.shardings(jax.eval_shape(model.init, jax.random.key(0)), mesh))
    assert len(there["layers"]["attention"]["q_norm"]["scale"].sharding.device_set) == 8
    got = shard.on_mesh(jax.jit(run), mesh)(there, *shard.place((np.asarray(tokens), np.asarray(segments)), mesh))
    np.testing.assert_allclose(shard.fetch(got), jax.jit(run)(params, tokens, segments), atol=1e-5)


def test_a_window_counts_tokens_of_the_document_wherever_it_stands():
    segments = jnp.asarray([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 2, 2]])
    q, k = jnp.zeros((3, 6, 1, 6)), jnp.zeros((3, 6, 1, 6))
    v = jnp.broadcast_to(jnp.eye(6)[None, :, None], (3, 6, 1, 6))  # what comes out is the weight of each column
    windowed = jax.jit(partial(attend, window=3))
    seen = np.asarray(windowed(q, k, v, segments, segments))[:, :, 0] > 0
    for row, document in enumerate(np.asarray(segments)):
        for t in range(6):
            own = [s for s in range(t + 1) if document[s] == document[t] > 0]
            assert np.flatnonzero(seen[row, t]).tolist() == own[-3:]
    late = windowed(q[:, 4:], k, v, segments[:, 4:], segments, at=4)[:, :, 0] > 0
    assert (late == seen[:, 4:]).all()


def test_a_capped_score_is_never_beyond_the_cap():
    segments = jnp.ones((1, 2), jnp.int32)
    q, k = jnp.full((1, 2, 1, 2), 100.0), jnp.asarray([[-100.0] * 2, [100.0] * 2])[None, :, None]
    weights = jax.jit(partial(attend, cap=1.5))(q, k, jnp.eye(2)[None, :, None], segments, segments)[0, 1, 0]
    np.testing.assert_allclose(weights, jax.nn.softmax(jnp.asarray([-1.5, 1.5])), atol=1e-6)


def test_scaled_frequencies_are_left_divided_or_between():
    plain, turns = frequencies(16), np.asarray(64 * frequencies(16) / (2 * np.pi))
    linear, banded = frequencies(16, scaling=(4.0,)), frequencies(16, scaling=(4.0, 0.5, 3.0, 64))
    np.testing.assert_allclose(linear, plain / 4)
    np.testing.assert_allclose(banded[turns > 3], plain[turns > 3])
    np.testing.assert_allclose(banded[turns < 0.5], plain[turns < 0.5] / 4)
    between = (turns > 0.5) & (turns < 3)
    assert between.any() and (plain[between] / 4 < banded[between]).all() and (banded[between] < plain[between]).all()


# ------------------------------------------------------------------------------------------ config.json

RAW = {name: golden["inputs"]["config"] for name, golden in GOLDEN.items()}
FULL, SLIDING = "full_attention", "sliding_attention"


def without(raw, *keys):
    return {k: v for k, v in raw.items() if k not in keys}


def test_old_and_new_spellings_mean_the_same():
    old = RAW["llama3"]
    new = without(old, "rope_theta", "rope_scaling") | {"rope_parameters": old["rope_scaling"] | {"rope_theta": 100.0}}
    assert read(new) == read(old) and read(old).rope_scaling == (4.0, 1.0, 4.0, 32)
    old = RAW["gemma3"]
    kinds = {
        FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
        SLIDING: {"rope_type": "default", "rope_theta": 50.0},
    }
    new = without(old, "rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern") | {"rope_parameters": kinds}
    new["layer_types"] = [SLIDING, SLIDING, FULL, SLIDING]
    assert read(new) == read(old) and read(old).windows == (4, 4, 0, 4)
    assert (read(old).rope_scaling, read(old).rope_theta, read(old).local_theta) == ((8.0,), 1000.0, 50.0)


def test_null_is_not_an_absent_key():
    assert read(RAW["mistral"] | {"sliding_window": None}).windows == ()
    assert read(without(RAW["mistral"], "sliding_window")).windows == (4096, 4096)
    assert read(without(RAW["phi3"], "sliding_window")).windows == ()
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    nulls, absent = read(RAW["gemma2"] | dict.fromkeys(caps)), read(without(RAW["gemma2"], *caps))
    assert (nulls.score_cap, nulls.logit_cap, absent.score_cap, absent.logit_cap) == (None, None, 50.0, 30.0)


def test_windows_come_where_they_are_in_use():
    assert read(RAW["qwen3"]).windows == (0, 4)
    assert read(RAW["qwen3"] | {"use_sliding_window": False}).windows == ()
    assert read(RAW["qwen3"] | {"max_window_layers": 2}).windows == ()
    assert read(RAW["qwen3"] | {"layer_types": [SLIDING, FULL]}).windows == (4, 0)
    assert read(RAW["llama3"] | {"use_sliding_window": False, "sliding_window": 4}).windows == ()
    qwen2 = without(RAW["qwen3"], "head_dim") | {"model_type": "qwen2"}
    assert read(qwen2).windows == (0, 4)


@pytest.mark.parametrize(
    "name, windows",
    [("qwen3", (4, 0)), ("qwen3", ()), ("gemma2", (0, 4)), ("gemma3", (4, 4, 4, 4)), ("mistral", ()), ("phi3", (7, 7))],
    ids=lambda x: str(x).replace(" ", ""),
)
def test_windows_are_written_as_they_are_read(name, windows):
    config = dataclasses.replace(loaded(name)[0], windows=windows)
    assert read(layout.write_config(RAW[name]["model_type"], config)) == config


def test_windows_that_a_family_cannot_say_are_refused():
    for name, windows in (("olmo2", (4, 4)), ("llama3", (4, 4)), ("mistral", (4, 0)), ("qwen3", (4, 8))):
        config = dataclasses.replace(loaded(name)[0], windows=windows)
        with pytest.raises(ValueError, match="windows|layer_types"):
            layout.write_config(RAW[name]["model_type"], config)


YARN, DYNAMIC = {"rope_type": "yarn", "factor": 4.0}, {"type": "dynamic", "factor": 4.0}
LONG = {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
NESTED = {FULL: {"rope_type": "default"}, SLIDING: {"rope_type": "linear", "factor": 2.0}}
REFUSED = [
    ("llama3", {"rope_scaling": YARN}, "rope_scaling = .*yarn"),
    ("llama3", {"rope_scaling": DYNAMIC}, "rope_scaling = .*dynamic"),
    ("phi3", {"rope_scaling": LONG}, "rope_scaling = .*longrope"),
    ("llama3", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling = .*llama3"),
    ("llama3", {"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}, "rope_scaling = .*nan"),
    ("llama3", {"rope_scaling": RAW["llama3"]["rope_scaling"] | {"high_freq_factor": 1.0}}, "rope_scaling = .*high_freq_factor"),
    ("llama3", {"sliding_window": 4}, "sliding_window = 4"),
    ("gemma3", {"rope_parameters": NESTED}, "rope_parameters = .*sliding_attention"),
    ("gemma3", {"rope_parameters": {SLIDING: {"partial_rotary_factor": 0.5}}}, "rope_parameters = .*partial_rotary_factor"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
    ("gemma3", {"sliding_window_pattern": 0}, "sliding_window = 4"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    ("gemma2", {"sliding_window": None, "layer_types": [SLIDING, FULL]}, "sliding_window = None"),
    ("gemma2", {"layer_types": ["linear_attention", FULL]}, "layer_types = .*linear_attention"),
    ("mistral", {"layer_types": [SLIDING, FULL]}, "layer_types = .*full_attention"),
    ("mistral", {"sliding_window": -4}, "sliding_window = -4"),
    ("mistral", {"sliding_window": 2**31}, "sliding_window = 2147483648"),
    ("mistral", {"num_hidden_layers": 2**30}, "num_hidden_layers = 1073741824"),
    ("qwen3", {"max_window_layers": None}, "sliding_window = 4"),
    ("olmo2", {"layer_types": [SLIDING, SLIDING]}, "layer_types = .*sliding_attention"),
]


@pytest.mark.parametrize("name, change, message", REFUSED, ids=[f"{i}-{row[0]}" for i, row in enumerate(REFUSED)])
def test_what_the_decoder_does_not_compute_is_refused_by_its_key(name, change, message):
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        read(RAW[name] | change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"windows": (4,)}, r"windows = \(4,\); give each of 2 layers"),
        ({"windows": (0, 0)}, r"windows = \(0, 0\)"),
        ({"windows": (4, -1)}, r"windows = \(4, -1\)"),
        ({"rope_scaling": (2.0, 1.0)}, r"rope_scaling = \(2.0, 1.0\)"),
        ({"local_theta": 100.0}, "local_theta = 100.0 is for layers that have a window"),
        ({"norm_place": "mid"}, "norm_place = 'mid'; there are pre, post, both"),
        ({"qk_norm": "all"}, "qk_norm = 'all'; there are none, head, width"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_an_architecture_that_makes_no_sense_is_refused(change, message):
    sizes = {"vocab": 14, "width": 8, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 4, "mlp": 8, "context": 16}
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**sizes, **change)
