"""The sampler is the scorer, and a row's draw is its own."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import sample as sample_config
from experiments import sample as program
from jaxalign import sample as sampling
from jaxalign import score, shard
from jaxalign.models import decoder, encdec
from jaxalign.models.parts import Adapter
from jaxalign.ops import filters
from jaxalign.sample import choose, sample
from jaxalign.train import log
from jaxalign.types import Batch

LENGTH, EOS = 8, 2
PROMPTS = [[3, 1, 4, 1], [9], [2, 6], [5, 3, 5], [8, 9, 7, 9], [1, 2]]  # two hold EOS: it ends nothing in a prompt


def left_padded(prompts, length=4, pad=0):
    tokens, segments = np.full((len(prompts), length), pad), np.zeros((len(prompts), length))
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :], segments[row, length - len(prompt) :] = prompt, 1
    return Batch(jnp.asarray(tokens, jnp.int32), jnp.asarray(segments, jnp.int32), jnp.zeros(tokens.shape, jnp.float32))


@pytest.fixture(scope="module")
def draw(tiny):
    """(prompts, keys, **settings) -> what `sample` returns, compiled."""
    run = jax.jit(
        lambda params, keys, prompts, eos, settings: sample(
            tiny.model, params, keys, prompts, length=LENGTH, eos=eos, **dict(settings)
        ),
        static_argnums=(3, 4),
    )

    def call(prompts, keys, *, eos=EOS, **settings):
        return run(tiny.params, keys, prompts, eos, tuple(settings.items()))

    return call


def keys_of(*numbers):
    return jnp.stack([jax.random.key(number) for number in numbers])


@pytest.mark.parametrize("temperature, cut", [(0.5, {"top_k": 3}), (1.0, {}), (1.3, {"top_k": 6, "top_p": 0.8})])
def test_the_sampler_says_what_the_scorer_says(tiny, draw, temperature, cut):
    batch, logp, drawn = draw(
        left_padded(PROMPTS), keys_of(*range(6)), **({} if temperature == 1 else {"temperature": temperature}), **cut
    )

    @jax.jit
    def check(params):
        said, _ = score.evaluate(tiny.model, params, batch, temperature=temperature)
        logits = tiny.model.unembed(params, score.shift(tiny.model.apply(params, batch.tokens, batch.segments)[0]))
        kept = filters.top_p(filters.top_k(logits / temperature, cut.get("top_k", 0)), cut.get("top_p", 1.0))
        return said.logp, jnp.take_along_axis(jax.nn.log_softmax(kept), batch.tokens[..., None], -1)[..., 0]

    scored, cut_logp = check(tiny.params)
    on = np.asarray(batch.weights) > 0
    assert on.sum() > 20
    np.testing.assert_array_equal(on, np.asarray(batch.targets) > 0)
    np.testing.assert_allclose(np.asarray(logp)[on], np.asarray(scored)[on], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(drawn)[on], np.asarray(cut_logp)[on], atol=1e-5, rtol=1e-5)
    assert np.isfinite(drawn).all() and not np.any(np.asarray(logp)[~on]) and not np.any(np.asarray(drawn)[~on])
    if cut:
        assert (np.asarray(drawn)[on] > np.asarray(logp)[on] + 0.01).any()  # something was cut
    else:
        np.testing.assert_array_equal(drawn, logp)


def test_a_row_depends_on_no_other_row_nor_on_the_padding(draw):
    keys = keys_of(*range(6))
    whole = draw(left_padded(PROMPTS), keys)[0]
    order = np.array([4, 0, 5])
    some = draw(left_padded([PROMPTS[row] for row in order], length=6, pad=7), keys[order])[0]
    assert len({tuple(row) for row in np.asarray(whole.tokens)[:, 4:]}) > 3
    np.testing.assert_array_equal(some.tokens[:, 6:], whole.tokens[order, 4:])
    np.testing.assert_array_equal(some.weights[:, 6:], whole.weights[order, 4:])


def test_equal_prompts_differ_by_their_keys_alone(draw):
    twins = left_padded([PROMPTS[0]] * 6)
    tokens = np.asarray(draw(twins, keys_of(5, 5, 6, 7, 8, 9))[0].tokens)
    np.testing.assert_array_equal(tokens[0], tokens[1])
    assert len({tuple(row) for row in tokens}) > 2


def of_kind(kind, tiny):
    """A model, and its prompts."""
    shape, prompts = {"vocab": 14, "width": 8, "layers": 2, "heads": 4, "head_dim": 4, "mlp": 12}, left_padded(PROMPTS[:3])
    if kind == "decoder":
        return tiny.model, tiny.params, prompts
    if kind == "virtual tokens":
        model = decoder.build(decoder.DecoderConfig(**shape, kv_heads=2, context=64, adapter=Adapter("prompt", length=3)))
    else:
        model = encdec.build(encdec.EncDecConfig(**shape, encoder_layers=1))
        start = jnp.zeros((3, 1), jnp.int32)
        prompts = Batch(start, start + 1, start.astype(jnp.float32), prompts.tokens, prompts.segments)
    values, shapes = np.random.default_rng(1), shard.unbox(jax.eval_shape(model.init, jax.random.key(0)))
    return model, jax.tree.map(lambda leaf: jnp.asarray(values.normal(0, 0.6, leaf.shape), leaf.dtype), shapes), prompts


@pytest.mark.parametrize(
    "kind, slots", [("decoder", 0), ("decoder", 1), ("decoder", 4), ("virtual tokens", 4), ("encoder-decoder", 4)]
)
def test_samples_do_not_depend_on_how_prompts_are_read_nor_on_slots_nor_on_the_cache(kind, slots, tiny, monkeypatch):
    """Each prompt is read once for three samples; caches grow, or slide."""
    (model, params, prompts), keys = of_kind(kind, tiny), keys_of(*range(9))
    want = sample_jit(model, params, keys, jax.tree.map(lambda x: jnp.repeat(x, 3, axis=0), prompts), slots=0)
    assert len({tuple(row) for row in np.asarray(want[0].tokens)}) > 6 and 0 < (want[0].weights.sum(1) < LENGTH).sum() < 9
    monkeypatch.setattr(sampling, "FIRST", 2)
    batch, *said = sample_jit(model, params, keys, prompts, slots=slots)
    jax.tree.map(np.testing.assert_array_equal, batch, want[0])
    np.testing.assert_allclose(said, want[1:], atol=1e-5)


def sample_jit(model, params, keys, prompts, **settings):
    return jax.jit(lambda *args: sample(model, *args, length=LENGTH, eos=EOS, top_p=0.95, **settings))(params, keys, prompts)


LANGUAGE = [(3, 5), (3, 5, 7), (4,), (6, 6, 6, 1)]


def only(language, vocab=14):
    """A table of these texts, as jaxalign.prompts.constrain makes them."""
    states = sorted({text[:n] for text in language for n in range(len(text) + 1)}, key=len)
    table = np.full((len(states), vocab), -1, np.int32)
    for said in states[1:]:
        table[states.index(said[:-1]), said[-1]] = states.index(said)
    for text in language:
        table[states.index(text), EOS] = 0
    return table


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 2, "slots": 4}, {"temperature": 0.0}], ids=str)
def test_what_is_allowed_alone_is_drawn_and_logp_is_that_of_the_whole_vocabulary(settings, tiny):
    prompts, table, temperature = left_padded(PROMPTS * 3), only(LANGUAGE), settings.get("temperature", 1.0) or 1.0

    @jax.jit
    def constrained(params, table):
        batch, logp, drawn = sample(
            tiny.model, params, keys_of(*range(18)), prompts, length=LENGTH, eos=EOS, allowed=table, **settings
        )
        hidden, _ = tiny.model.apply(params, batch.tokens, batch.segments)
        return batch, logp, drawn, tiny.model.unembed(params, score.shift(hidden)) / temperature

    batch, *said, logits = jax.device_get(constrained(tiny.params, table))
    found = set()
    for tokens, wrote, logp, drawn, z in zip(batch.tokens, batch.weights > 0, *said, logits):
        state, text = 0, tokens[wrote].tolist()
        found.add(tuple(text[:-1]))
        for token, whole, left, of_all in zip(text, logp[wrote], drawn[wrote], z[wrote]):
            rest = np.where(table[state] >= 0, of_all, -np.inf)
            rest[rest < np.sort(rest)[-settings.get("top_k", 14)]] = -np.inf
            assert whole == pytest.approx(of_all[token] - np.logaddexp.reduce(of_all), abs=1e-4)
            assert left == pytest.approx(rest[token] - np.logaddexp.reduce(rest), abs=1e-4)
            assert settings.get("temperature") != 0 or token == rest.argmax()
            state = table[state, token]
        assert text[-1] == EOS
    assert found <= set(LANGUAGE) and len(found) > 1
    if "slots" in settings:
        at_once = partial(sample, tiny.model, length=LENGTH, eos=EOS, allowed=table, **settings | {"slots": 0})
        np.testing.assert_array_equal(jax.jit(at_once)(tiny.params, keys_of(*range(18)), prompts)[0].tokens, batch.tokens)
    with pytest.raises(ValueError, match="allowed is of a vocabulary of 13, and the model's has 14"):
        sample(tiny.model, tiny.params, keys_of(*range(18)), prompts, length=1, eos=EOS, allowed=table[:, :13])


@pytest.mark.parametrize("slots", [0, 4])
def test_a_response_ends_where_a_table_says_so_and_is_no_other_before(slots, tiny):
    """Behind any two tokens of the upper half in a row."""
    upper = np.arange(14) >= 7
    table = np.stack([np.where(upper, 1, 0), np.where(upper, -1, 0)]).astype(np.int32)
    prompts, keys = left_padded(PROMPTS * 3), keys_of(*range(18))
    free, until = (sample_jit(tiny.model, tiny.params, keys, prompts, slots=slots, until=t)[0] for t in (None, table))
    shorter = 0
    for (before, wrote), (tokens, kept) in zip(zip(free.tokens, free.weights > 0), zip(until.tokens, until.weights > 0)):
        before = before[wrote].tolist()
        end = next((k for k in range(1, len(before)) if min(before[k - 1 : k + 1]) >= 7), LENGTH) + 1
        assert tokens[kept].tolist() == before[:end]
        shorter += end < len(before)
    assert 3 < shorter < 18


def test_the_program_holds_what_it_samples_to_an_expression_or_to_answers(shared, tmp_path):
    config = sample_config.get_config()
    config.model.source = str(shared / "data" / "models" / "stories260k")
    config.update(prompt="Once upon a time", output=str(tmp_path / "out.jsonl"), draws=8)
    config.mesh.data = 8

    def lines(**sampled):
        config.sample.update(length=16, **sampled)
        program.run(config)
        return log.read_lines(config.output)

    config.constraint.regex = " ?(the|a) [a-z]{2,3}(, [a-z]{2})?"
    found = lines(temperature=1.0)
    assert all(re.fullmatch(config.constraint.regex, line["text"]) for line in found) and len({x["text"] for x in found}) > 4
    assert all(line["drawn_logp"] != line["logp"] and line["total"] == sum(line["logp"]) for line in found)
    config.constraint.update(regex="", answers=(" there was", " nobody"))
    (best,) = {line["text"] for line in lines(temperature=0.0)}
    assert best.strip() == "there was"
    config.constraint.regex = "a"
    with pytest.raises(ValueError, match="constraint.regex and constraint.answers are both given"):
        lines()


def test_each_prompt_has_as_many_samples(tiny):
    with pytest.raises(ValueError, match="4 keys for 3 prompts"):
        sample(tiny.model, tiny.params, keys_of(*range(4)), left_padded(PROMPTS[:3]), length=1, eos=EOS)


def test_prompts_that_are_padded_on_the_right_are_refused(tiny):
    right = jax.tree.map(lambda x: np.asarray(x)[:, ::-1], left_padded(PROMPTS))
    with pytest.raises(ValueError, match="a prompt ends before the last column"):
        sample(tiny.model, tiny.params, keys_of(*range(len(PROMPTS))), right, length=1, eos=EOS)


def test_a_response_ends_with_its_first_eos(draw):
    prompts = left_padded(PROMPTS)
    batch = jax.device_get(draw(prompts, keys_of(*range(10, 16)))[0])
    ends = 0
    for tokens, segments, weights in zip(batch.tokens[:, 4:], batch.segments[:, 4:], batch.weights[:, 4:]):
        length = int(weights.sum())
        np.testing.assert_array_equal(weights, np.arange(LENGTH) < length)
        np.testing.assert_array_equal(segments, weights)
        assert not tokens[length:].any() and EOS not in tokens[: length - 1]
        assert length == LENGTH or tokens[length - 1] == EOS
        ends += tokens[length - 1] == EOS
    assert 0 < ends < len(PROMPTS)  # both kinds are there
    np.testing.assert_array_equal(batch.tokens[:, :4], prompts.tokens)
    np.testing.assert_array_equal(batch.segments[:, :4], prompts.segments)
    assert not batch.weights[:, :4].any()


def test_without_an_eos_every_row_is_full_and_an_empty_prompt_says_nothing(draw):
    batch, logp, _ = draw(left_padded([*PROMPTS[:5], []]), keys_of(*range(6)), eos=-1, temperature=0.0)
    np.testing.assert_array_equal(np.asarray(batch.weights).sum(1), [LENGTH] * 5 + [0])
    assert not np.any(batch.segments[5]) and np.isfinite(logp).all()


def test_temperature_0_is_the_argmax_of_the_full_forward_pass(tiny, draw):
    batch, logp, drawn = draw(left_padded(PROMPTS), keys_of(*range(6)), eos=-1, temperature=0.0)
    again = draw(left_padded(PROMPTS), keys_of(*range(20, 26)), eos=-1, temperature=0.0)[0]
    np.testing.assert_array_equal(batch.tokens, again.tokens)

    @jax.jit
    def forward(params):
        hidden, _ = tiny.model.apply(params, batch.tokens, batch.segments)
        return tiny.model.unembed(params, hidden), score.evaluate(tiny.model, params, batch)[0].logp

    logits, scored = forward(tiny.params)
    np.testing.assert_array_equal(batch.tokens[:, 4:], jnp.argmax(logits, -1)[:, 3:-1])
    np.testing.assert_allclose(logp[:, 4:], scored[:, 4:], atol=1e-5)
    np.testing.assert_array_equal(logp, drawn)


@pytest.mark.parametrize("cut", [{}, {"top_k": 4, "top_p": 0.75}])
def test_tokens_come_as_often_as_their_probabilities_say(cut):
    many, temperature = 20_000, 1.3
    logits = jnp.array([1.5, 0.3, -0.4, 2.0, -3.0, 0.9])
    spread = jnp.broadcast_to(logits, (many, 6))
    tokens, logp, drawn = jax.jit(lambda u: choose(u, spread, temperature=temperature, **cut))(
        jax.random.uniform(jax.random.key(3), (many, 2))
    )
    p = jax.nn.softmax(filters.top_p(filters.top_k(logits / temperature, cut.get("top_k", 0)), cut.get("top_p", 1.0)))
    seen = np.bincount(tokens, minlength=6) / many
    np.testing.assert_array_less(np.abs(seen - p), 4 * np.sqrt(np.asarray(p * (1 - p)) / many) + 1e-9)
    np.testing.assert_allclose(jnp.exp(drawn), p[tokens], rtol=1e-5)
    np.testing.assert_allclose(logp, jax.nn.log_softmax(logits / temperature)[tokens], atol=1e-5)


@pytest.mark.parametrize("wrong", [{"temperature": -0.5}, {"top_k": -1}, {"top_p": -0.1}])
def test_settings_below_0_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} = {value}.*: none may be below 0"):
        choose(jnp.zeros((1, 2)), jnp.zeros((1, 6)), **wrong)
