"""Retrieval: the rows that are nearest to a text, by their words (BM25) or by a model's states.

found = search(rows, bm25([row["text"] for row in rows])([question])[0], k=3)
prompt = render(template, {"question": question, "passages": found})
"""

import logging

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jaxalign import shard
from jaxalign.data import tables
from jaxalign.models.files import open_safetensors


def bm25(texts: list[str]):
    """-> (queries) -> scores f32 [queries, texts], by bm25s: its tokens, without English stop words, k1 = 1.5, b = 0.75.

    A query with no known word scores 0 throughout. ImportError without the package.
    """
    try:
        import bm25s
    except ImportError as error:
        raise ImportError('BM25 wants the package bm25s: pip install -e ".[retrieval]"') from error

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells of each index

    def split(texts):
        return bm25s.tokenize(texts, return_ids=False, show_progress=False)

    index = bm25s.BM25()
    index.index(split(texts), show_progress=False)

    def scores(queries: list[str]) -> np.ndarray:
        known = [index.get_tokens_ids(words) for words in split(queries)]
        return np.stack([index.get_scores_from_ids(ids) for ids in known])

    return scores


def mean_of(hidden, segments):
    """The mean of the states at a row's real tokens, [B,T,D] -> [B,D]; `score.last_of` has the last one."""
    real = (segments > 0)[..., None]
    return jnp.where(real, hidden, 0).sum(1) / real.sum(1)


def embed(model, params, mesh, documents, *, size: int, pool=mean_of) -> np.ndarray:
    """A vector of length 1 of each `text.Document`, f32 [N,D]; their products are cosines.

    Args: size: documents at a time; it divides over the mesh's rows. pool: (hidden [B,T,D], segments [B,T]) -> [B,D].
    """

    def one(params, batch):
        pooled = pool(model.read(params, batch)[0].astype(jnp.float32), batch.segments)
        return pooled / jnp.linalg.norm(pooled, axis=1, keepdims=True)

    run, vectors = shard.on_mesh(jax.jit(one), mesh), {}
    order = sorted(range(len(documents)), key=lambda n: len(documents[n].tokens))  # those of about one length together
    for start in range(0, len(order), size):
        part = order[start : start + size]
        rows = [documents[n] for n in part + part[:1] * (size - len(part))]
        batch = tables.pad(rows, tables.bucket(len(documents[part[-1]].tokens), 32))
        vectors |= dict(zip(part, shard.fetch(run(params, shard.place(batch, mesh))), strict=False))
    return np.stack([vectors[n] for n in range(len(documents))])


def save(path, vectors, mark: str):
    """Write vectors [N,D]. Args: mark: what tells their model and documents from others (template.fingerprint)."""
    save_file({mark: np.asarray(vectors, np.float32)}, path)


def load(path, mark: str) -> np.ndarray:
    """The vectors of a file. ValueError where they are of another model or of other documents."""
    if mark not in (found := open_safetensors(path)):
        raise ValueError(f"{path} is of another model or of other documents ({', '.join(found)}, not {mark}): make it anew")
    return found[mark].read()


def search(rows: list[dict], scores, *, k: int) -> list[dict]:
    """The k rows of the highest scores [N], each with its "score", the best first; of equals the first."""
    return [rows[n] | {"score": float(scores[n])} for n in np.argsort(-np.asarray(scores), kind="stable")[:k]]


def ranks(scores, relevant) -> np.ndarray:
    """How many rows `search` puts before the relevant one, i64 [Q]. Args: scores [Q,N]; relevant: its row, i [Q]."""
    scores, relevant = np.asarray(scores), np.asarray(relevant)[:, None]
    own = np.take_along_axis(scores, relevant, 1)
    return ((scores > own) | ((scores == own) & (np.arange(scores.shape[1])[None] < relevant))).sum(1)


def recall(ranks, *, k: int) -> float:
    """How often the relevant row is among the first k."""
    return float((np.asarray(ranks) < k).mean())


def mrr(ranks) -> float:
    """The mean of 1 / place of the relevant row, which counts from 1."""
    return float((1 / (np.asarray(ranks) + 1)).mean())
