"""The generated world: the same for everyone, within its vocabulary, and leaning neither way."""

import numpy as np
import pytest

from jaxalign.data import reviews
from jaxalign.rewards import sentiment


@pytest.fixture(scope="module")
def tokenizer():
    return reviews.tokenizer()


@pytest.fixture(scope="module")
def written():
    """Reviews and openings of a seed that the vocabulary was not made from."""
    return reviews.reviews(3000, seed=5), reviews.openings(1000, seed=5)


def test_a_seed_gives_the_same_world_in_every_version():
    assert reviews.reviews(1, seed=3) == [
        "the pace was fine . the children thought the plot was very clever . the film is by a new team ."
    ]
    assert reviews.openings(3, seed=3) == [
        "the hero follows two people . the dialogue was",
        "the hero follows three people . the script and the villain were",
        "it runs for two hours . the villain was",
    ]
    assert reviews.reviews(5, seed=0) == reviews.reviews(9, seed=0)[:5] != reviews.reviews(5, seed=1)
    assert len(set(reviews.reviews(500, seed=0))) > 490


def test_ids_are_the_same_in_every_version(tokenizer):
    assert len(tokenizer) == 82
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer("the film was").input_ids == [70, 23, 78]


def test_every_word_has_a_token_and_comes_back(tokenizer, written):
    for text in [*written[0], *written[1]]:
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids and tokenizer.eos_token_id not in ids and len(ids) == len(text.split())
        assert tokenizer.decode(ids) == text
    known = set(tokenizer.get_vocab())
    assert set(reviews.VALENCES) <= known
    seen = {word for text in [*written[0], *written[1]] for word in text.split()}
    assert known - seen == {"<pad>", "</s>", "<unk>"}  # and every word that has a token is written


def test_reviews_are_balanced_and_openings_say_nothing(written):
    points = np.array([sentiment(text, reviews.VALENCES) for text in written[0]])
    assert abs(points.mean()) < 4 * points.std() / len(points) ** 0.5 and points.std() > 1
    assert 0.45 < (points > 0).mean() < 0.55 and 0.45 < (points < 0).mean() < 0.55
    assert {sentiment(text, reviews.VALENCES) for text in written[1]} == {0.0}


def test_openings_stop_before_a_verdict_within_a_prompts_length(written):
    assert all(text.endswith((" was", " were")) and "{" not in text for text in written[1])
    assert max(len(text.split()) for text in written[1]) <= 16  # prompts.length of the configs: none is cut
    assert len(set(written[1])) > 600  # of 1000: held-out prompts are not all met in training


def test_what_was_said_hints_at_what_comes(written):
    said = [[sentiment(part, reviews.VALENCES) for part in text.split(" .")[:2]] for text in written[0]]
    assert 0.08 < np.corrcoef(np.array(said).T)[0, 1] < 0.5


def test_reviews_have_three_to_five_sentences(written):
    assert {text.count(".") for text in written[0]} == {3, 4, 5} and all(text.endswith(" .") for text in written[0])
