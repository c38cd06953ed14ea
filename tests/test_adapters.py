"""Adapters: nothing at first, learning where they are and nowhere else, merged the same, and PEFT's there and back.

The numbers of PEFT are tests/golden/peft/*.json; make_peft.py beside that folder made them.
"""

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from configs import ppo as ppo_config
from configs import reward as reward_config
from configs import sft as sft_config
from experiments import common, ppo, reward, sft
from jaxalign import models, sample, score, shard
from jaxalign.contract import check_objective
from jaxalign.data import reviews
from jaxalign.models import adapters, checkpoints, encdec, layout, peft
from jaxalign.models.parts import ADDED, Adapter
from jaxalign.objectives import supervised
from jaxalign.train import checkpoint, optim
from jaxalign.train.step import make_step
from jaxalign.types import Batch, join

GOLDEN = Path(__file__).parent / "golden"
SMALL = {"rank": 2, "alpha": 3.0, "length": 3, "layers": 1}
KINDS = {
    "lora": Adapter("lora", **SMALL),
    "rslora": Adapter("lora", r"attention\.[qv]$", rank_stabilised=True, **SMALL),
    "ia3": Adapter("ia3", r"attention\.[kv]$|mlp\.down$", **SMALL),
    "prefix": Adapter("prefix", **SMALL),
    "prompt": Adapter("prompt", **SMALL),
    "last": Adapter("last", **SMALL),
    "head": Adapter("head", **SMALL),
}
TOKENS = np.array(
    [[0, 0, 3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8, 9, 7], [9, 3, 2, 3, 8, 4, 6, 0], [1, 2, 3, 4, 5, 6, 7, 8]], np.int32
)
SEGMENTS = np.array([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8, [1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1, 1]], np.int32)


def batch():
    return Batch(jnp.asarray(TOKENS), jnp.asarray(SEGMENTS), jnp.ones(TOKENS.shape))


def adapted(tiny, kind):
    """Config, model, frozen and trained part, as they are at first."""
    config, params = adapters.adapt(tiny.config, tiny.params, KINDS[kind], jax.random.key(3))
    return config, models.build(config), *adapters.split(params, adapters.trained_leaves(config))


def moved(trained, by=0.3):
    draw = np.random.default_rng(4)
    return jax.tree.map(lambda x: x + by * jnp.asarray(draw.normal(size=x.shape), x.dtype), trained)


@partial(jax.jit, static_argnums=0)
def said(model, params, data):
    """Logits [B,T,V] and values [B,T]."""
    hidden, _ = model.read(params, data)
    return model.unembed(params, hidden), model.scalar(params, hidden)


def assert_near(got, want, tolerance=1e-5):
    real = SEGMENTS > 0
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(a)[real], np.asarray(b)[real], atol=tolerance, rtol=tolerance)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.mark.parametrize("kind", ["lora", "rslora", "ia3", "last", "head"])
def test_at_first_it_is_the_plain_model_bit_for_bit(tiny, kind):
    _, model, frozen, trained = adapted(tiny, kind)
    for got, want in zip(said(model, join(frozen, trained), batch()), said(tiny.model, tiny.params, batch()), strict=True):
        np.testing.assert_array_equal(got, want)


def test_nothing_is_copied_and_what_is_added_has_axes(tiny, kind):
    config, model, frozen, trained = adapted(tiny, kind)
    whole = join(frozen, trained)
    ours, plain = ({id(x) for x in jax.tree.leaves(tree)} for tree in (whole, tiny.params))
    assert {id(x) for x in jax.tree.leaves(frozen)} <= ours and (kind == "last" or plain <= ours)
    boxes = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.structure(shard.unbox(boxes)) == jax.tree.structure(whole)
    assert all(len(box.names) == box.value.ndim for box in jax.tree.leaves(boxes, is_leaf=lambda x: isinstance(x, shard.Declared)))
    assert models.config_of(json.loads(json.dumps(asdict(config)))) == config
    small, large = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (trained, tiny.params))
    assert small < large / 2 and all(name == "scalar" or kind != "head" for name in trained)


def of_values(params, data, *, model):
    """A loss of the scalar head, for the head alone: the language model's says nothing of it."""
    off = score.evaluate(model, params, data)[1] - jnp.cos(data.tokens.astype(jnp.float32))
    return (off**2 * data.targets).sum(), {"weight": data.targets.sum()}


COMPILED = {}


def learn(tiny, kind, mesh, steps, how="jit", start=None):
    """Some updates from the beginning, or from a state. -> (state, what it began with on this mesh, losses)"""
    config, model, frozen, trained = adapted(tiny, kind)
    where = shard.shardings(jax.eval_shape(model.init, jax.random.key(0)), mesh)
    loaded = common.Loaded(model, shard.put(jax.device_get(join(frozen, trained)), where), None, "", "")
    tx = optim.adam(learning_rate=0.02, steps=100, decay="constant")
    state, where = common.new_state(loaded, tx, mesh)
    if (kind, mesh, how) not in COMPILED:
        objective = partial(of_values if kind == "head" else supervised.sft, model=model)
        COMPILED[kind, mesh, how] = shard.compile_step(make_step(objective, tx), mesh, where, how)
    state, losses = state if start is None else start.replace(frozen=state.frozen), []
    for _ in range(steps):
        state, metrics = COMPILED[kind, mesh, how](state, shard.place(batch(), mesh))
        losses.append(float(metrics["loss/total"]))
    return state, loaded, losses


ONE = shard.make_mesh(devices=jax.devices()[:1])


def test_an_update_moves_what_is_trained_and_no_other(tiny, kind):
    """The policy that a run began with, its reference, is one set of arrays with it but for what is trained, and stays."""
    state, loaded, losses = learn(tiny, kind, ONE, steps=20)
    assert losses[-1] < 0.97 * losses[0]
    first = adapters.split(loaded.params, adapters.trained_leaves(loaded.model.config))
    for a, b in zip(jax.tree.leaves(state.frozen), jax.tree.leaves(first[0]), strict=True):
        assert a is b and not a.is_deleted()
    for a, b in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(join(*adapted(tiny, kind)[2:])), strict=True):
        np.testing.assert_array_equal(a, b)
    many = sum(x.size for x in jax.tree.leaves(state.params))
    assert sum(x.size for x in jax.tree.leaves(state.opt)) <= 2 * many + 2  # two moments and their counts
    still = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(first[1]), strict=True)]
    assert sum(still) == (0 if kind == "head" else 2)  # the scalar head, of which the language model's loss does not speak


@pytest.mark.parametrize("kind", ["lora", "prompt", "last"])
def test_eight_devices_are_one(tiny, kind):
    alone, _, want = learn(tiny, kind, ONE, steps=2)
    whole, _, losses = learn(tiny, kind, shard.make_mesh(data=2, fsdp=2, tensor=2), steps=2)
    np.testing.assert_allclose(losses, want, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(alone.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)  # Adam makes an update of the rounding of a gradient near 0
    if kind == "lora":
        up = whole.params["layers"]["mlp"]["up"]
        assert up["lora_a"].sharding.spec[1] == "fsdp" and up["lora_b"].sharding.spec[2] == "tensor"


@pytest.mark.parametrize("how", ["shard_map", "pmap"])
def test_every_way_to_compile_keeps_what_is_frozen(tiny, how):
    state, loaded, losses = learn(tiny, "lora", shard.make_mesh(devices=jax.devices()[:2]), steps=2, how=how)
    np.testing.assert_allclose(losses, learn(tiny, "lora", ONE, steps=2)[2], rtol=1e-5)
    kept = {id(x) for x in jax.tree.leaves(loaded.params)}
    assert {id(x) for x in jax.tree.leaves(state.frozen)} <= kept


@pytest.mark.parametrize("kind", ["lora", "rslora", "ia3", "last", "head"])
def test_merged_it_says_the_same(tiny, kind):
    config, model, frozen, trained = adapted(tiny, kind)
    params = join(frozen, moved(trained))
    want = said(model, params, batch())
    plain, merged = adapters.merge(config, params)
    assert plain == tiny.config and jax.tree.structure(merged) == jax.tree.structure(tiny.params)
    assert_near(said(tiny.model, merged, batch()), want)
    assert np.abs(want[0] - said(tiny.model, tiny.params, batch())[0]).max() > 0.1 or kind == "head"
    host = adapters.merge(config, jax.device_get(params))[1]
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(host))
    assert_near(said(tiny.model, host, batch()), want)


@pytest.mark.parametrize("kind", ["lora", "rslora", "ia3"])
def test_the_gradient_is_that_through_the_merged_weights(tiny, kind):
    config, model, frozen, trained = adapted(tiny, kind)

    def loss(model, params):
        return supervised.sft(params, batch(), model=model)[0]

    direct = jax.jit(jax.grad(lambda part: loss(model, join(frozen, part))))(moved(trained))
    through = jax.jit(jax.grad(lambda part: loss(tiny.model, adapters.merge(config, join(frozen, part))[1])))(moved(trained))
    assert any(np.abs(x).max() > 0.01 for x in jax.tree.leaves(direct))
    for a, b in zip(jax.tree.leaves(direct), jax.tree.leaves(through), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("chunk", [1, 3, 8])
@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt", "last"])
def test_a_cache_fed_in_chunks_gives_the_full_forward(tiny, kind, chunk):
    _, model, frozen, trained = adapted(tiny, kind)
    params, data, parts = join(frozen, moved(trained)), batch(), []
    apply, cache = jax.jit(model.apply), model.cache(4, 11)
    for at in range(0, 8, chunk):
        hidden, cache = apply(params, data.tokens[:, at : at + chunk], data.segments[:, at : at + chunk], cache, at)
        parts.append(hidden)
    hidden = jnp.concatenate(parts, axis=1)
    assert_near((model.unembed(params, hidden), model.scalar(params, hidden)), said(model, params, data))


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_the_sampler_is_the_scorer_behind_virtual_tokens(tiny, kind):
    _, model, frozen, trained = adapted(tiny, kind)
    params, prompts = (
        join(frozen, moved(trained)),
        Batch(jnp.asarray(TOKENS), jnp.asarray(np.sort(SEGMENTS > 0, 1).astype(np.int32)), 0),
    )
    prompts = prompts.replace(weights=jnp.zeros(TOKENS.shape))
    drawn, logp, _ = jax.jit(partial(sample.sample, model, length=5, eos=-1))(
        params, jax.random.split(jax.random.key(1), 4), prompts
    )
    scored = jax.jit(partial(score.evaluate, model))(params, drawn)[0].logp
    np.testing.assert_allclose(logp[:, 8:], scored[:, 8:], atol=1e-5)


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_virtual_tokens_that_are_words_are_those_words(tiny, positions):
    """A prompt of the embeddings of three tokens, and a prefix of what the layers make of them, are the three tokens."""
    config = replace(tiny.config, positions=positions)
    params, words = tiny.params, jnp.asarray([11, 12, 13])
    if positions == "learned":
        table = jnp.asarray(np.random.default_rng(5).normal(size=(64, 8)), jnp.float32)
        params = params | {"embed": params["embed"] | {"positions": table}}
    plain = models.build(config)
    cache = jax.jit(plain.apply)(params, words[None], jnp.ones((1, 3), jnp.int32), plain.cache(1, 3), 0)[1]
    learned = {
        "prompt": {"prompt": {"tokens": params["embed"]["tokens"][words]}},
        "prefix": {"prefix": {name: cache[name][:, 0] for name in "kv"}},
    }
    places = [(row, n) for row in range(4) for n in range(1, SEGMENTS[row].max() + 1)]
    texts = [np.concatenate([words, TOKENS[row][SEGMENTS[row] == n]]) for row, n in places]
    alone = np.stack([np.pad(text, (0, 11 - len(text))) for text in texts])
    real = np.stack([np.pad(np.ones(len(text), np.int32), (0, 11 - len(text))) for text in texts])
    want = said(plain, params, Batch(jnp.asarray(alone), jnp.asarray(real), jnp.ones(alone.shape)))
    for kind, leaves in learned.items():
        got = said(models.build(replace(config, adapter=KINDS[kind])), params | leaves, batch())
        for n, (row, document) in enumerate(places):
            here = SEGMENTS[row] == document
            for a, b in zip(got, want, strict=True):
                np.testing.assert_allclose(a[row, here], b[n, 3 : 3 + here.sum()], atol=2e-5)


def test_virtual_tokens_are_seen_from_behind_a_window(tiny):
    config = replace(tiny.config, windows=(2, 0), adapter=KINDS["prefix"])
    _, _, frozen, trained = adapted(tiny, "prefix")

    @jax.jit
    @jax.grad
    def felt(prefix):
        params = frozen | moved(trained) | {"prefix": prefix}
        return models.build(config).apply(params, jnp.asarray(TOKENS[3:]), jnp.asarray(SEGMENTS[3:]))[0][0, -1].sum()

    assert (np.abs(felt(moved(trained)["prefix"])["k"]).max(axis=(2, 3)) > 0).all()


def test_virtual_tokens_take_positions(tiny):
    config = replace(tiny.config, positions="learned", context=9, adapter=KINDS["prefix"])
    params = jax.eval_shape(lambda key: shard.unbox(models.build(config).init(key)), jax.random.key(0))
    with pytest.raises(ValueError, match="rows of 11 tokens, but this model has 9 learned positions"):
        jax.eval_shape(models.build(config).apply, params, jnp.asarray(TOKENS), jnp.asarray(SEGMENTS))


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_it_is_resumed_from_what_was_trained_alone(tiny, kind, tmp_path):
    half, _, _ = learn(tiny, kind, ONE, steps=2)
    with checkpoint.Saver(tmp_path, keep=1) as saver:
        saver.save(2, half, {}, wait=True)
    leaves = json.loads((tmp_path / "2" / "meta" / "metadata").read_text())["leaves"]
    assert {name.split("/")[1] for name in leaves if name.startswith("params/")} == set(half.params)
    assert {name for name in leaves if name.endswith("kernel")} <= {
        f"{at}/scalar/kernel" for at in ("params", "opt/1/mu", "opt/1/nu")
    }
    like = jax.tree.map(jnp.zeros_like, half.replace(frozen=())).replace(frozen=half.frozen)
    found = checkpoint.restore(tmp_path, like).state
    assert all(a is b for a, b in zip(jax.tree.leaves(found.frozen), jax.tree.leaves(half.frozen), strict=True))
    resumed, want = learn(tiny, kind, ONE, steps=2, start=found)[0], learn(tiny, kind, ONE, steps=4)[0]
    for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
def test_an_objective_keeps_the_contract_with_it(tiny, kind):
    _, model, frozen, trained = adapted(tiny, kind)
    params, laws = join(frozen, moved(trained)), ("pad side", "packing", "micro-batches")
    found = check_objective(partial(supervised.sft, model=model), params, jax.device_get(batch()), laws=laws, examples=3)
    assert all(found[law].tried for law in laws)


def test_what_fits_no_part_of_a_model_is_refused(tiny):
    config, params = tiny.config, tiny.params
    with pytest.raises(ValueError, match="adapter targets = 'q_proj' are in no name of a dense layer, such as layers.mlp.down"):
        adapters.adapt(config, params, Adapter("lora", "q_proj"), jax.random.key(0))
    adapted, whole = adapters.adapt(config, params, KINDS["lora"], jax.random.key(0))
    with pytest.raises(ValueError, match="the model has an adapter already, .*: merge it first"):
        adapters.adapt(adapted, whole, KINDS["ia3"], jax.random.key(0))
    with pytest.raises(ValueError, match="adapter layers = 2: fewer than all 2"):
        adapters.adapt(config, params, Adapter("last"), jax.random.key(0))
    headless = {name: x for name, x in params.items() if name != "scalar"}
    with pytest.raises(ValueError, match="nothing would be trained: .*such as a model without a scalar head"):
        adapters.split(headless, adapters.trained_leaves(replace(config, adapter=KINDS["head"])))
    for kind in ("prefix", "prompt"):
        with pytest.raises(ValueError, match=f"a {kind} is no weight of the model, so it cannot be merged"):
            adapters.merge(*adapters.adapt(config, params, KINDS[kind], jax.random.key(0)))
    for wrong, says in (
        ({"kind": "dora"}, "adapter kind = 'dora'; there are lora, ia3, prefix, prompt, last, head"),
        ({"kind": "lora", "targets": "("}, "adapter targets = '\\(' is no regular expression"),
        ({"kind": "lora", "rank": 0}, "are above 0"),
    ):
        with pytest.raises(ValueError, match=says):
            Adapter(**wrong)
    for kind, says in (("prefix", "adapter kind = 'prefix' is for decoders"), ("last", "adapter layers = 1: fewer than all 1 of")):
        with pytest.raises(ValueError, match=says):
            encdec.EncDecConfig(vocab=9, width=8, encoder_layers=1, layers=1, heads=2, head_dim=4, mlp=8, adapter=KINDS[kind])
    with pytest.raises(ValueError, match="no way to say adapter="):
        checkpoints.export("nowhere", adapted, whole)


# ---------------------------------------------------------------- PEFT


def plain_of(family, name):
    """The model of tiny_*_parity.json, with a scalar head of its own where the case is of a classifier."""
    inputs = json.loads((GOLDEN / f"tiny_{family}_parity.json").read_text())["inputs"]
    kind, config = layout.read_config(inputs["config"], name)
    known = layout.family_for(kind, config)
    arrays = {key: np.asarray(x, np.float32) for key, x in inputs["params"].items()}
    tensors = layout.canonical(known, {key: layout.Tensor(x.shape, lambda x=x: x) for key, x in arrays.items()}, name)
    return kind, config, layout.assemble(known.rows, config, tensors, name)


def write_theirs(folder, golden):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(golden["adapter_config"]))
    save_file({key: np.asarray(x, np.float32) for key, x in golden["tensors"].items()}, folder / "adapter_model.safetensors")
    return folder


def told(config, params, golden):
    """What PEFT was asked for: logits, or the score of the last token."""
    model, tokens = models.build(config), jnp.asarray(golden["tokens"])
    data = Batch(tokens, jnp.ones_like(tokens), jnp.ones(tokens.shape))
    if isinstance(config, encdec.EncDecConfig):
        data = data.replace(
            source=jnp.asarray(golden["source"]), source_segments=jnp.ones((1, len(golden["source"][0])), jnp.int32)
        )

    @jax.jit
    def answer(params):
        scores = config.scalar is not None
        return score.last_scalar(model, params, data)[:, None] if scores else model.unembed(params, model.read(params, data)[0])

    return np.asarray(answer(params))


@pytest.fixture(params=sorted(path.stem for path in (GOLDEN / "peft").glob("*.json")))
def case(request, tmp_path):
    golden = json.loads((GOLDEN / "peft" / f"{request.param}.json").read_text())
    return golden, plain_of(golden["family"], request.param), write_theirs(tmp_path / "theirs", golden)


def test_what_peft_wrote_says_what_it_says_there(case):
    golden, (family, config, params), folder = case
    adapted, whole = peft.load(folder, config, params, family=family)
    want = np.asarray(golden["logits"])
    np.testing.assert_allclose(told(adapted, whole, golden), want, atol=1e-5, rtol=1e-5)
    if not adapted.adapter.virtual:
        np.testing.assert_allclose(told(*adapters.merge(adapted, whole), golden), want, atol=1e-5, rtol=1e-5)
    kept = {id(x) for x in jax.tree.leaves(params)}
    assert kept <= {id(x) for x in jax.tree.leaves(whole)}


def test_what_we_write_is_what_we_read(case, tmp_path):
    """Tensor by tensor where each dense layer is one there and here; else the same numbers at a higher rank."""
    golden, (family, config, params), folder = case
    adapted, whole = peft.load(folder, config, params, family=family)
    ours = peft.export(tmp_path / "ours", adapted, whole, family=family, base="there")
    raw = json.loads((ours / "adapter_config.json").read_text())
    assert raw["peft_type"] == golden["adapter_config"]["peft_type"] and raw["base_model_name_or_path"] == "there"
    again, same = peft.load(ours, config, params, family=family)
    np.testing.assert_allclose(told(again, same, golden), np.asarray(golden["logits"]), atol=1e-5, rtol=1e-5)
    fused = again.adapter.rank != adapted.adapter.rank
    assert fused == (family in ("gpt2", "gpt_neox") and adapted.adapter.kind == "lora")
    if not fused:
        assert again == adapted
        for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(whole), strict=True):
            np.testing.assert_array_equal(a, b)
    again = peft.export(tmp_path / "ours", again, same, family=family)  # takes the place of the one before
    assert sorted(path.name for path in again.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "jaxalign.json"]


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"use_dora": True}, "use_dora = True asks for something that no adapter here computes"),
        ({"bias": "all"}, "bias = 'all' asks for something"),
        ({"new_idea": {"a": 1}}, "new_idea = {'a': 1} asks for something"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'; known are"),
        ({"modules_to_save": ["embed_tokens"]}, r"modules_to_save = \['embed_tokens'\]; known are"),
        ({"peft_type": "VERA"}, "peft_type 'VERA' is not among LORA, IA3, PREFIX_TUNING, PROMPT_TUNING"),
        ({"r": 3}, "has alpha 3 and rank 3; its tensors have rank 2"),
        ({"lora_alpha": "8"}, "has alpha '8' and rank 2"),
        (
            {"alpha_pattern": {"(a+)+$": 4}},
            r"'\(a\+\)\+\$' of rank_pattern or alpha_pattern is the name of no tensor that is there",
        ),
        (
            {"tensor": "base_model.model.lm_head.lora_A.weight"},
            "'base_model.model.lm_head.lora_A.weight', and 0 more, have no place",
        ),
        (
            {"shape": "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"},
            "q_proj have shapes .* where the model asks for",
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, dict) else "",
)
def test_what_our_adapters_do_not_compute_is_refused_by_name(tmp_path, changed, says):
    golden = json.loads((GOLDEN / "peft" / "llama_lora.json").read_text())
    name = changed.pop("tensor", None) or changed.pop("shape", None)
    if name:
        golden["tensors"][name] = [[0.0] * 5] * 2
    golden["adapter_config"] |= changed
    family, config, params = plain_of("llama", "llama")
    with pytest.raises(ValueError, match=says) as raised:
        peft.load(write_theirs(tmp_path / "theirs", golden), config, params, family=family)
    assert str(raised.value).isprintable() and str(tmp_path) in str(raised.value)


def test_an_adapter_that_is_not_as_it_was_written_is_refused(tmp_path, tiny):
    config, params = adapters.adapt(tiny.config, tiny.params, KINDS["lora"], jax.random.key(0))
    folder = peft.export(tmp_path / "adapter", config, params)
    data = bytearray((folder / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="adapter_model.safetensors is not as it was exported"):
        peft.load(folder, tiny.config, tiny.params)
    (folder / "mine.txt").write_text("")
    with pytest.raises(FileExistsError, match="holds 'mine.txt', which is no part of an adapter"):
        peft.export(folder, config, params)
    with pytest.raises(ValueError, match="PEFT has no adapter such as"):
        peft.export(tmp_path / "other", *adapters.adapt(tiny.config, tiny.params, KINDS["last"], jax.random.key(0)))
    with pytest.raises(ValueError, match="pass out of sight of a sliding window in PEFT"):
        peft.export(
            tmp_path / "other", replace(config, windows=(2, 0), scalar=None, adapter=KINDS["prefix"]), params, family="mistral"
        )


def test_a_dense_layer_that_is_one_in_peft_may_be_adapted_in_part(tmp_path):
    """q and v of GPT-2's c_attn: k's part of B is zeros, and of (IA)3's vector ones."""
    golden = json.loads((GOLDEN / "peft" / "gpt2_lora.json").read_text())
    family, config, params = plain_of("gpt2", "gpt2")
    for kind in ("rslora", "ia3"):
        adapted, whole = adapters.adapt(config, params, KINDS[kind], jax.random.key(0))
        whole = join(*(part if n == 0 else moved(part) for n, part in enumerate(adapters.split(whole, adapters.TRAINED))))
        again = peft.load(peft.export(tmp_path / kind, adapted, whole, family=family), config, params, family=family)
        np.testing.assert_allclose(told(*again, golden), told(adapted, whole, golden), atol=1e-5)
        assert "attn.c_attn" in json.loads((tmp_path / kind / "adapter_config.json").read_text())["target_modules"].replace(
            "\\", ""
        )


# ---------------------------------------------------------------- the programs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small model of the generated world, as a folder: with a scalar head it is a reward model, and a policy without."""
    tokenizer = reviews.tokenizer()
    sizes = {"width": 16, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp": 32, "context": 128}
    config = models.DecoderConfig(vocab=len(tokenizer), **sizes, tied=True, scalar=17**-0.5)
    params = jax.jit(lambda key: shard.unbox(models.build(config).init(key)))(jax.random.key(0))
    return str(checkpoints.export(tmp_path_factory.mktemp("base") / "base", config, params, tokenizer=tokenizer))


def run(driver, config, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "make_mesh", lambda **_: ONE)
        driver.run(config, folder)
    return json.loads((folder / "summary.json").read_text())


def tuned(base, kind):
    config = sft_config.get_config("tiny")
    config.update_from_flattened_dict({"model.source": base, "adapter.kind": kind, "adapter.rank": 4, "adapter.length": 4})
    config.optim.learning_rate = 0.02
    return config


def read(source, config, **settings):
    return common.load(str(source), config.model, ONE, seed=1, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_a_run_leaves_the_adapter_and_what_it_says(base, tmp_path, kind):
    config = tuned(base, kind)
    summary = run(sft, config, tmp_path / "run")
    assert summary["nll/after"] < summary["nll/before"]
    assert (tmp_path / "run" / "model").exists() == (kind == "lora")
    plain, params = checkpoints.load(base)
    params.pop("scalar")
    ours = peft.load(tmp_path / "run" / "adapter", replace(plain, scalar=None), params)
    left = read(tmp_path / "run", config)
    want = said_by(*ours)
    np.testing.assert_allclose(said_by(left.model.config, left.params), want, atol=1e-5)
    if kind == "lora":
        (tmp_path / "run" / "model").rename(tmp_path / "gone")  # as if the run had not ended: checkpoints and what is under them
        left = read(tmp_path / "run", config)
        assert left.model.config.adapter is None
        np.testing.assert_allclose(said_by(left.model.config, left.params), want, atol=1e-5)
    else:
        again = read(tmp_path / "run", config, adapter=config.adapter)
        assert again.model.config.adapter.kind == "prefix" and again.base["source"] == base
        config.adapter.kind = "lora"
        with pytest.raises(ValueError, match="has a prefix of 4; adapter.kind and length say the same"):
            read(tmp_path / "run", config, adapter=config.adapter)
    if kind == "lora":
        config.adapter.source = str(tmp_path / "run")
        again = run(sft, config, tmp_path / "more")
        assert again["nll/before"] == pytest.approx(summary["nll/after"], abs=1e-5) and again["nll/after"] < again["nll/before"]
    architecture = json.loads((tmp_path / "run" / "architecture.json").read_text())
    architecture["base"]["digest"] = "0" * 16
    (tmp_path / "run" / "architecture.json").write_text(json.dumps(architecture))
    with pytest.raises(ValueError, match="is no longer the model that the adapter in .* was trained on"):
        read(tmp_path / "run", config)


@pytest.mark.parametrize("kind", ["lora", "ia3", "prefix"])
def test_a_run_starts_from_the_folder_of_an_adapter(base, tmp_path, kind):
    """Merged into the model that it names, or into another; or trained on, held to the model below."""
    plain, params = checkpoints.load(base)
    plain, params = replace(plain, scalar=None), {name: x for name, x in params.items() if name != "scalar"}
    adapted, whole = adapters.adapt(plain, params, KINDS[kind], jax.random.key(0))
    frozen, trained = adapters.split(whole, ADDED)
    whole = join(frozen, moved(trained, by=0.1))
    folder = peft.export(tmp_path / "run" / "adapter", adapted, whole, base=base)
    config, want = tuned(base, kind), said_by(adapted, whole)
    for source in (folder, f"{folder}@{base}"):
        merged = read(source, config)
        assert (merged.model.config.adapter is None) == (kind != "prefix")
        np.testing.assert_allclose(said_by(merged.model.config, merged.params), want, atol=1e-5)
    config.adapter.source = str(tmp_path / "run")
    loaded = read(base, config, adapter=config.adapter)
    np.testing.assert_allclose(said_by(loaded.model.config, loaded.params), want, atol=1e-5)
    assert loaded.base["source"] == base
    if kind != "prefix":
        np.testing.assert_array_equal(said_by(loaded.model.config, loaded.reference), said_by(plain, params))
        held, begun = ({id(x) for x in jax.tree.leaves(tree)} for tree in (loaded.reference, loaded.params))
        assert len(held & begun) >= len(jax.tree.leaves(frozen))  # no second copy


def test_an_adapter_of_another_model_ends_in_one_line(base, tmp_path):
    plain, params = checkpoints.load(base)
    folder = peft.export(tmp_path / "adapter", *adapters.adapt(plain, params, KINDS["lora"], jax.random.key(0)))
    config = tuned(base, "lora")
    with pytest.raises(ValueError, match=f"base_model_name_or_path is None; say the model below this adapter as {folder}@MODEL"):
        read(folder, config)
    params["embed"]["tokens"][0, 0] += 1
    other = checkpoints.export(tmp_path / "other", plain, params, tokenizer=reviews.tokenizer())
    with pytest.raises(ValueError, match="this is not the model that the adapter was trained on; if it is meant, delete"):
        read(f"{folder}@{other}", config)
    (folder / "jaxalign.json").unlink()
    assert read(f"{folder}@{other}", config).model.config.adapter is None
    config.adapter.update(kind="ia3", source=str(folder))
    with pytest.raises(ValueError, match="holds an adapter of kind lora, not ia3"):
        read(base, config, adapter=config.adapter)
    narrow = replace(plain, mlp=16)
    params = shard.unbox(jax.jit(models.build(narrow).init)(jax.random.key(0)))
    other = checkpoints.export(tmp_path / "narrow", narrow, params, tokenizer=reviews.tokenizer())
    with pytest.raises(ValueError, match="the tensors of .* have shapes .* where the model asks for"):
        read(f"{folder}@{other}", config)
    with pytest.raises(OSError, match="there is no adapter in"):
        peft.load(tmp_path / "other", plain, params)


def said_by(config, params):
    tokens = jnp.asarray(TOKENS)
    return np.asarray(models.build(config).unembed(params, models.build(config).apply(params, tokens, jnp.ones_like(tokens))[0]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "last", "prompt"])
def test_ppo_trains_it_beside_the_value_head(base, tmp_path, kind):
    config = ppo_config.get_config("tiny")
    told = {
        "model.source": base,
        "reward_model.source": base,
        "adapter.kind": kind,
        "adapter.layers": 1,
        "optim.learning_rate": 0.01,
    }
    config.update_from_flattened_dict(told)
    config.stages = {}
    summary = run(ppo, config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    kl = [line["policy/kl"] for line in lines if "policy/kl" in line]  # nats, of each rollout
    assert kl[0] == 0 != kl[1] and summary["kl/final"] != 0
    assert (tmp_path / "run" / "adapter").exists() == (kind != "last")


@pytest.mark.slow
def test_a_reward_model_by_its_head_alone_is_normalised(base, tmp_path):
    config = reward_config.get_config("tiny")
    rows = [{"prompt": "the film was", "chosen": f" good {n}", "rejected": f" bad {n}"} for n in range(64)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.update_from_flattened_dict({"model.source": base, "adapter.kind": "head", "data.source": str(tmp_path / "rows.jsonl")})
    config.stages = {}
    summary = run(reward, config, tmp_path / "run")
    assert 0 <= summary["reward_model/accuracy"] <= 1
    (before, old), (after, new) = (checkpoints.load(source) for source in (base, str(tmp_path / "run")))
    assert before == after
    moved = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)]
    assert moved.count(False) == 2 and not np.array_equal(old["scalar"]["kernel"], new["scalar"]["kernel"])
