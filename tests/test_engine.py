"""An answer to a request is what the model says of it alone, whatever else is asked, in which order and on which mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxalign import shard
from jaxalign.data import text
from jaxalign.evaluation import engine

LENGTH = 40
WORDS = ("<s>", "</s>", "<end>", *"abcdefghijk")


def pair(context, continuation):
    return text.of_ids(context, continuation, vocab=14)


def drawn(seed, *sizes):
    return np.random.default_rng(seed).integers(0, 14, sizes).tolist()


REQUESTS = [  # one token, some, more than SHORT; ten that differ in the last token alone; one that is too long
    pair([3, 1, 4], [1]),
    pair([3], [5, 9, 2]),
    pair([3, 1], drawn(0, 36)),
    *(pair([2, 7, 1, 8], [2, last]) for last in range(10)),
    pair(drawn(1, 60), [6, 7]),
    text.Document(np.array([5, 3, 9, 9], np.int32), np.array([0, 1, 0, 0], np.float32)),  # what follows its target is not read
]


@pytest.fixture(scope="module")
def words():
    known = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="a"))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=known,
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=["<end>"],
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="module")
def on_rows(tiny):
    """-> mesh over rows, and the parameters on it"""
    return placed(tiny, data=8)


def placed(tiny, **axes):
    mesh = shard.make_mesh(**axes)
    return mesh, shard.put(tiny.params, shard.shardings(jax.eval_shape(tiny.model.init, jax.random.key(0)), mesh))


@pytest.fixture(scope="module")
def score(tiny, on_rows):
    return engine.scorer(tiny.model, on_rows[0], batch=8, length=LENGTH)


@pytest.fixture(scope="module")
def after(tiny):
    """tokens -> logits after each, without padding on the left or other rows."""
    rows = jax.jit(lambda params, tokens: tiny.model.unembed(params, tiny.model.apply(params, tokens, jnp.ones_like(tokens))[0]))

    def call(tokens):
        return rows(tiny.params, jnp.asarray([[*tokens, *[0] * (64 - len(tokens))]], jnp.int32))[0, : len(tokens)]

    return call


@pytest.fixture(scope="module")
def alone(after):
    """document -> of each token but the first, its log-probability, and whether it is the most likely one."""

    def call(document):
        logits, following = after(document.tokens[:-1]), document.tokens[1:]
        return np.asarray(jax.nn.log_softmax(logits))[np.arange(len(following)), following], np.asarray(
            logits.argmax(-1)
        ) == following

    return call


def test_a_log_likelihood_is_that_of_the_document_alone(score, on_rows, alone):
    found = score(on_rows[1], REQUESTS)
    for document, said in zip(REQUESTS, found, strict=True):
        document = text.fit(document, LENGTH + 1, keep="end")
        logp, best = alone(document)
        wanted = document.weights[1:] > 0
        np.testing.assert_allclose(said.logp, logp[wanted].sum(), rtol=1e-5)
        assert (said.greedy, said.tokens) == (best[wanted].all(), wanted.sum())
    assert [n for n, said in enumerate(found) if said.cut] == [13]
    assert sum(said.greedy for said in found[3:13]) <= 1


def test_the_most_likely_continuation_is_greedy(score, on_rows, after):
    tokens = [3, 1, 4]
    for _ in range(3):
        tokens.append(int(after(tokens)[-1].argmax()))
    said, other = score(on_rows[1], [pair(tokens[:3], tokens[3:]), pair(tokens[:3], [tokens[3], (tokens[4] + 1) % 14, tokens[5]])])
    assert said.greedy and not other.greedy


def test_what_else_is_asked_and_in_which_order_changes_no_bit(score, on_rows):
    whole = score(on_rows[1], REQUESTS)
    order = [13, 5, 2, 0, 14, 7]
    heard = {}
    assert score(on_rows[1], [REQUESTS[n] for n in order], heard.__setitem__) == [whole[n] for n in order]
    assert [heard[k] for k in range(len(order))] == [whole[n] for n in order]


def test_a_split_model_says_the_same(score, on_rows, tiny):
    mesh, params = placed(tiny, data=2, fsdp=2, tensor=2)
    split = engine.scorer(tiny.model, mesh, batch=8, length=LENGTH)(params, REQUESTS[:2])
    for one, other in zip(split, score(on_rows[1], REQUESTS[:2]), strict=True):
        np.testing.assert_allclose(one.logp, other.logp, rtol=1e-5)
        assert one[1:] == other[1:]


@pytest.mark.parametrize(
    "document, says",
    [
        (pair([3], []), "document 1 has no target"),
        (pair([3], drawn(0, LENGTH + 1)), f"document 1 has {LENGTH + 1} targets, and the model reads {LENGTH} tokens"),
    ],
    ids=["empty", "long"],
)
def test_a_continuation_of_which_the_sum_would_lack_tokens_is_refused(score, on_rows, document, says):
    with pytest.raises(ValueError, match=says):
        score(on_rows[1], [REQUESTS[0], document])


@pytest.mark.parametrize("size", [1, 7, 8, 21])
def test_windows_predict_each_token_once_and_read_as_far_as_they_may(size):
    tokens = drawn(2, size)
    seen = []
    for window in engine.windows(tokens, length=7, prefix=0):
        before = int((window.weights == 0).sum())
        seen += window.tokens[before:].tolist()
        at = len(seen) + 1
        assert window.tokens.tolist() == [0, *tokens][at - len(window.tokens) : at]
        assert len(window.tokens) == (min(len(seen) + 1, 8) if len(seen) in (size, 7) else 8)
    assert seen == tokens


def test_a_rolling_sum_is_that_of_its_windows(score, on_rows, alone):
    texts = [drawn(3, 95), drawn(4, 5), drawn(5, LENGTH)]
    found = engine.rolling(score, on_rows[1], texts, length=LENGTH, prefix=0)
    for tokens, said in zip(texts, found, strict=True):
        parts = engine.windows(tokens, length=LENGTH, prefix=0)
        logp = sum(alone(part)[0][part.weights[1:] > 0].sum() for part in parts)
        np.testing.assert_allclose(said.logp, logp, rtol=1e-5)
        assert said.tokens == len(tokens)
    per_token = engine.perplexity([said.logp for said in found], [said.tokens for said in found])
    np.testing.assert_allclose(np.log(per_token), -sum(said.logp for said in found) / 140)


PROMPTS = [pair(context, []) for context in ([3, 1], [4, 9, 9], [0, 5, 6, 7], drawn(6, 50))]


def keys_of(*numbers):
    return jax.vmap(jax.random.key)(jnp.array(numbers, jnp.uint32))


@pytest.fixture(scope="module")
def generate(words, tiny, on_rows):
    return engine.generator(tiny.model, on_rows[0], words, batch=8, context=40, length=12, temperature=1.0)


def test_a_continuation_is_its_own(generate, words, on_rows):
    found = generate(on_rows[1], keys_of(0, 1, 2, 3), PROMPTS)
    assert [written.cut for written in found] == [False, False, False, True]
    for written in found:
        assert words.decode(written.tokens, skip_special_tokens=True) == written.text
        assert written.ended == (written.tokens[-1] == 1) and (written.ended or len(written.tokens) == 12)
    assert generate(on_rows[1], keys_of(2, 0), [PROMPTS[2], PROMPTS[0]]) == [found[2], found[0]]


def test_a_continuation_ends_at_the_first_stop_string_or_special_token(generate, words, on_rows):
    """<end> among them, which decoding leaves out; nothing is drawn behind it."""
    prompts, keys = [PROMPTS[0]] * 16, keys_of(*range(16))
    free, stopped = (generate(on_rows[1], keys, prompts, until) for until in ((), ("<end>", "b", "")))
    for before, written in zip(free, stopped, strict=True):
        stop = next((k for k, token in enumerate(before.tokens) if token in (1, 2, 4)), None)
        assert written.tokens == before.tokens[: None if stop is None else stop + 1]
        assert written.ended == (stop is not None)
        assert written.text.split() == words.decode(written.tokens[:stop], skip_special_tokens=True).split()
    assert sum(2 in written.tokens for written in stopped) > 2 and sum(4 in written.tokens for written in stopped) > 2


@pytest.mark.parametrize(
    "until, left",
    [
        (("c d", "b c"), "a "),  # the first to be complete, not the first of the list
        (("\n\n", "\n"), "a b c d"),
        (("e", ""), "a b c d\n\n"),
        (("x",), None),
    ],
    ids=["overlap", "lines", "empty", "none"],
)
def test_a_text_is_cut_at_the_first_stop_string(until, left):
    answer = "a b c d\n\ne f"
    assert engine.cut(answer, until) == ((answer, False) if left is None else (left, True))


def test_no_room_for_a_prompt_is_refused(words, tiny, on_rows):
    with pytest.raises(ValueError, match="64 tokens to write, and the model reads at most 64: there is no room for a prompt"):
        engine.generator(tiny.model, on_rows[0], words, batch=8, context=64, length=64)


@pytest.mark.parametrize(
    "context, continuation, tokens, targets",
    [
        ("a b", " c d", "a b c d", 2),
        ("a b \n", "c", "a b c", 1),
        ("", "a b", "<s> a b", 2),
        ("  ", "a", "<s> a", 1),
        ("", "<s> a", "<s> a", 1),  # BOS once
    ],
    ids=["plain", "white space", "no context", "blank context", "spelt out"],
)
def test_a_text_tokenised_as_a_whole(words, context, continuation, tokens, targets):
    document = engine.whole(words, context, continuation)
    assert document.tokens.tolist() == [WORDS.index(word) for word in tokens.split()]
    np.testing.assert_array_equal(document.weights, [0] * (len(document.tokens) - targets) + [1] * targets)


def test_a_token_across_the_boundary_is_of_the_whole_text(shared):
    """Where the pieces and the whole are cut into other tokens, each way says so by its own."""
    from jaxalign.models import checkpoints

    tokenizer = checkpoints.tokenizer(shared / "data" / "models" / "stories260k")
    whole, pieces = (
        make(tokenizer, "Once upo", "n a time") for make in (engine.whole, lambda *a: text.prompt_completion(*a, eos=False))
    )
    assert whole.tokens.tolist() == tokenizer("Once upon a time")["input_ids"] != pieces.tokens.tolist()
    assert pieces.tokens.tolist()[: -int(pieces.weights.sum())] == tokenizer("Once upo")["input_ids"]
