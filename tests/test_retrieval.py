"""Retrieval: what is near is found, ties go by row, a vector is its document's alone, and old vectors are refused."""

import jax
import numpy as np
import pytest

from jaxalign import shard
from jaxalign.data import sources
from jaxalign.data.text import Document
from jaxalign.prompts import retrieval
from jaxalign.prompts.retrieval import bm25, embed, mean_of, mrr, ranks, recall, search
from jaxalign.prompts.template import fingerprint
from jaxalign.score import last_of


def test_words_find_the_passages_of_squad(shared):
    passages = sources.read(str(shared / "data" / "retrieval" / "squad_passages.jsonl"))
    questions = sources.read(str(shared / "data" / "retrieval" / "squad_questions.jsonl"))
    number = {row["id"]: n for n, row in enumerate(passages)}
    scores = bm25([row["text"] for row in passages])([row["question"] for row in questions])
    own = [number[row["passage_id"]] for row in questions]
    found = ranks(scores, own)
    assert recall(found, k=5) == pytest.approx(0.927, abs=0.005) and mrr(found) == pytest.approx(0.836, abs=0.005)
    for n in range(20):
        rows = search(passages, scores[n], k=126)
        assert rows[found[n]]["id"] == questions[n]["passage_id"]
        assert rows[0]["score"] == scores[n].max()


def test_equals_go_by_row_and_unknown_words_find_nothing():
    scores = bm25(["a red fox", "the blue sky", "a red fox"])(["red fox", "the", "zebra", ""])
    assert scores.shape == (4, 3) and not scores[1:].any() and scores[0, 0] == scores[0, 2] > scores[0, 1] == 0
    assert ranks(scores, [2, 0, 1, 2]).tolist() == [1, 0, 1, 2]
    assert [row["n"] for row in search([{"n": n} for n in range(3)], scores[0], k=2)] == [0, 2]
    assert recall([1, 0, 1, 2], k=2) == 0.75 and mrr([1, 0, 1, 2]) == pytest.approx((1 + 0.5 + 0.5 + 1 / 3) / 4)


@pytest.mark.parametrize("pool", [mean_of, last_of])
def test_a_vector_is_its_documents_alone(tiny, pool):
    draw = np.random.default_rng(0)
    tokens = [draw.integers(1, 14, size).astype(np.int32) for size in (3, 40, 7, 1, 7)]
    documents = [Document(each, np.zeros(len(each), np.float32)) for each in tokens]
    mesh = shard.make_mesh(data=2, fsdp=2, tensor=2)
    vectors = embed(tiny.model, tiny.params, mesh, documents, size=4, pool=pool)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    one = shard.make_mesh(devices=jax.devices()[:1])
    for n, document in enumerate(documents):
        alone = embed(tiny.model, tiny.params, one, [document], size=1, pool=pool)
        assert np.allclose(vectors[n], alone[0], atol=1e-5)
    assert ranks(vectors @ vectors.T, range(5)).tolist() == [0] * 5


def test_vectors_of_another_model_or_other_documents_are_refused(tmp_path):
    path, vectors = tmp_path / "vectors.safetensors", np.eye(3, dtype=np.float32)
    mark = fingerprint("model", ["a", "b", "c"])
    retrieval.save(path, vectors, mark)
    assert (retrieval.load(path, mark) == vectors).all()
    with pytest.raises(ValueError, match="of another model or of other documents"):
        retrieval.load(path, fingerprint("model", ["a", "b", "d"]))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="vectors.safetensors"):
        retrieval.load(path, mark)
