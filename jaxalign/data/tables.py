"""Tables of documents, the order in which a run visits them, and their layout in rows of one length. All NumPy, on the host.

A table is a list; what a step trains on is a pure function of (seed, step), so there is no iterator whose state could be lost:

    make = lambda row: prompt_completion(tokenizer, fill(prompt, row), fill(completion, row))
    documents = collect(rows, make, length=256, source=source).documents
    data_at = lambda step: pad([documents[i] for i in order(len(documents), 8, seed=seed, step=step)], 256)
"""

from bisect import bisect_left, insort
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from jaxalign.data.text import Document, fit
from jaxalign.types import Batch, Pairs


class Table(NamedTuple):
    documents: list  # what `make` gave for each row that was kept: a Document, or a tuple of them
    rows: np.ndarray  # i64; the number of each in the source, from 0
    counts: dict  # rows, kept, cut (made shorter), without_target, equal; tokens and targets, of what was kept


def collect(rows, make, *, length: int, source: str, keep: str = "start", targets: bool = True) -> Table:
    """The documents of a data set, each made shorter where it is longer than `length` tokens (text.fit).

    A row is dropped, and counted, where a document has no target left, or where two of its documents are equal (a pair that
    prefers nothing).
    Args:
        make: (row) -> Document, or a tuple of them: chosen and rejected, or K responses.
        targets: False for prompts, which have none; only an empty one is dropped.
    Raises ValueError where nothing is left, and what `make` raises, with source and row.
    """
    documents, numbers = [], []
    counts = dict.fromkeys(("rows", "kept", "cut", "without_target", "equal", "tokens", "targets"), 0)
    for number, row in enumerate(rows):
        try:
            made = make(row)
        except ValueError as error:
            raise ValueError(f"{source}, row {number}: {error}") from error
        whole = [made] if isinstance(made, Document) else list(made)
        parts = [fit(document, length, keep=keep) for document in whole]
        counts["rows"] += 1
        counts["cut"] += any(len(a.tokens) < len(b.tokens) for a, b in zip(parts, whole, strict=True))
        if not all((part.weights[1:] > 0).any() if targets else len(part.tokens) for part in parts):
            counts["without_target"] += 1
        elif len({part.tokens.tobytes() for part in parts}) < len(parts):
            counts["equal"] += 1
        else:
            counts["kept"] += 1
            counts["tokens"] += sum(len(part.tokens) for part in parts)
            counts["targets"] += int(sum((part.weights[1:] > 0).sum() for part in parts))
            documents.append(parts[0] if isinstance(made, Document) else tuple(parts))
            numbers.append(number)
    if not documents:
        raise ValueError(
            f"{source}: nothing to learn from is left of {counts['rows']} rows: {counts['without_target']} have no target within "
            f"{length} tokens, {counts['equal']} prefer nothing; allow more tokens, keep the other end, or look at what is learnt"
        )
    return Table(documents, np.array(numbers, np.int64), counts)


def order(size: int, batch: int, *, seed: int, step: int) -> np.ndarray:
    """Which rows of a table of `size` step number `step` (from 0) sees. -> i64 [batch]

    Steps read on through one endless sequence: a fresh permutation of all rows for each epoch, so no row is dropped at the end
    of one, and a step may span two; with batch > size it spans several, and a row occurs in it more than once. A pure function, the
    same on every host. The permutation sorts by raw bits of Philox (Salmon et al. 2011) under the key (seed, epoch), which, unlike
    numpy's `permutation`, are the same in every version.
    """
    if size < 1 or batch < 1 or step < 0 or seed < 0:
        raise ValueError(
            f"order of size={size}, batch={batch}, seed={seed}, step={step}: sizes are at least 1, seed and step at least 0"
        )
    places = step * batch + np.arange(batch, dtype=np.int64)
    epochs = np.unique(places // size)
    return np.stack([_permutation(size, seed, int(epoch)) for epoch in epochs])[places // size - epochs[0], places % size]


@lru_cache(maxsize=4)  # the epochs of a few tables, for a permutation serves many steps
def _permutation(size, seed, epoch):
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(size)
    return np.argsort(bits, kind="stable")


def pad(documents: list[Document], length: int, *, side: str = "right", pad_id: int = 0) -> Batch:
    """One document a row, padded on one side ("left": prompts to sample from). Padding is where segments are 0, whatever pad_id is.

    Raises ValueError, naming the row, for a document that is empty or longer than `length`.
    """
    if side not in ("right", "left"):
        raise ValueError(f"side = {side!r}; there are 'right' and 'left'")
    batch = pack_rows([[document] for document in documents], length, pad_id)
    if side == "left":
        for row, document in enumerate(documents):
            for x in (batch.tokens, batch.segments, batch.weights):
                x[row] = np.roll(x[row], length - len(document.tokens))
    return batch


def pack(documents: list[Document], length: int) -> list[list[Document]]:
    """Documents put together in rows of at most `length` tokens, each document once and whole. Best fit decreasing, O(n log n).

    The longest first, each into the fullest row that has room (Krell et al. 2021 section 3). Rows so come in order of length: let
    `order` shuffle them. Raises ValueError, naming the document, where one is empty or longer than `length`.
    """
    rows, room = [], []  # room: (tokens left, row), sorted
    for i in sorted(range(len(documents)), key=lambda i: -len(documents[i].tokens)):
        size = _size(documents[i], length, f"document {i}")
        at = bisect_left(room, (size, -1))
        left, row = room.pop(at) if at < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(documents[i])
        insort(room, (left - size, row))
    return rows


def pack_rows(rows: list[list[Document]], length: int, pad_id: int = 0) -> Batch:
    """Packed rows as a Batch: segments 1..K from left to right, then padding; weight 0 at the first token of each document."""
    tokens = np.full((len(rows), length), pad_id, np.int32)
    segments, weights = np.zeros_like(tokens), np.zeros(tokens.shape, np.float32)
    for r, row in enumerate(rows):
        start = 0
        for k, document in enumerate(row, 1):
            end = start + _size(document, length - start, f"row {r}")
            tokens[r, start:end], segments[r, start:end] = document.tokens, k
            weights[r, start + 1 : end] = document.weights[1:]
            start = end
    return Batch(tokens, segments, weights)


def _size(document, most, what) -> int:
    size = len(document.tokens)
    if not 0 < size <= most:
        raise ValueError(f"{what}: a document of {size} tokens, where 1 to {most} fit; `text.fit` makes it shorter")
    return size


def pairs(chosen: list[Document], rejected: list[Document], margin, length: int, *, pad_id: int = 0) -> Pairs:
    """Pairs, padded on the right. margin: f32 [B], in units of the reward (0: not said). ValueError where the counts differ."""
    margin = np.asarray(margin, np.float32)
    if not (len(chosen) == len(rejected) and margin.shape == (len(chosen),)):
        raise ValueError(
            f"{len(chosen)} chosen, {len(rejected)} rejected and margins of shape {margin.shape}: one of each makes a pair"
        )
    if not np.isfinite(margin).all():
        raise ValueError(f"row {np.argmin(np.isfinite(margin))}: the margin is {margin[np.argmin(np.isfinite(margin))]}")
    return Pairs(pad(chosen, length, pad_id=pad_id), pad(rejected, length, pad_id=pad_id), margin)


def bucket(size: int, multiple: int) -> int:
    """`size` rounded up to a multiple, so that batches of many lengths make few shapes, each of which is compiled once."""
    return -(-size // multiple) * multiple


def check(batch: Batch, vocab: int, *, targets: bool = True) -> Batch:
    """The batch itself, if it is sound; for XLA clamps what is out of range and says nothing. To be called on the host.

    Raises ValueError, naming row and column, where a token is not an integer in [0, vocab); where documents are not contiguous
    runs 1, 2, ... from left to right; where a weight is not finite, negative, or on padding; and, naming the rows, where none of
    them has a target (`targets` = False for prompts, which have none).
    """
    tokens, segments, weights = (np.asarray(x) for x in (batch.tokens, batch.segments, batch.weights))
    if not (
        tokens.ndim == 2 and tokens.shape == segments.shape == weights.shape and tokens.dtype.kind == segments.dtype.kind == "i"
    ):
        found = [(x.dtype.name, x.shape) for x in (tokens, segments, weights)]
        raise ValueError(f"tokens, segments and weights are i32, i32, f32 [B,T], not {found}")
    before = np.pad(segments[:, :-1], ((0, 0), (1, 0)))
    newest = np.maximum.accumulate(before, axis=1)
    _refuse(
        (tokens < 0) | (tokens >= vocab), tokens, f"token id {{}} is not in a vocabulary of {vocab}: is this the model's tokenizer?"
    )
    runs = (segments == 0) | (segments == before) | (segments == newest + 1)
    _refuse(~runs, segments, "segment {} does not continue the runs 1, 2, ... before it")
    _refuse(~np.isfinite(weights) | (weights < 0), weights, "weight {} is not a finite number >= 0")
    _refuse((weights > 0) & (segments == 0), weights, "weight {} on padding")
    if targets and not ((weights > 0) & (segments == before)).any():
        raise ValueError(f"rows 0 to {len(tokens) - 1} have no target: every weight is 0, or at the first token of a document")
    return batch


def _refuse(wrong, values, message):
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(f"row {row}, column {column}: " + message.format(values[row, column]))


def preview(tokenizer, batch: Batch, *, rows: int = 2) -> str:
    """The first rows as text, targets in ⟦brackets⟧ (with *weight behind, where it is not 1): what is trained on."""
    tokens, segments, weights = (np.asarray(x)[:rows] for x in (batch.tokens, batch.segments, batch.targets))
    lines = []
    for r in range(len(tokens)):
        for k in range(1, segments[r].max(initial=0) + 1):
            ids, weight = tokens[r, segments[r] == k], weights[r, segments[r] == k]
            lines.append(f"row {r}, document {k}: {len(ids)} tokens, {(weight > 0).sum()} of them targets")
            lines.append(_marked(tokenizer, ids, weight))
        lines.append(f"row {r}: {(segments[r] == 0).sum()} of {tokens.shape[1]} columns are padding")
    return "\n".join(lines)


def _marked(tokenizer, ids, weight) -> str:
    cuts = [0, *(np.flatnonzero(np.diff(weight)) + 1), len(ids)]
    texts = [tokenizer.decode(ids[:cut], skip_special_tokens=False, clean_up_tokenization_spaces=False) for cut in cuts]
    out = []
    for start, before, after in zip(cuts[:-1], texts[:-1], texts[1:], strict=True):
        text = after[len(before) :]  # the difference, for a tokenizer may strip the space at the start of a text
        mark = "" if weight[start] == 1 else f"*{weight[start]:g}"
        out.append(f"⟦{text}⟧{mark}" if weight[start] > 0 else text)
    return "".join(out)
