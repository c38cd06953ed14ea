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
from jaxalign.objectives.reward import Judged, Ranked, Rated, Stepwise
from jaxalign.types import Batch, Pairs


class Table(NamedTuple):
    documents: list  # what `make` gave for each row that was kept: a Document, or a tuple of them
    rows: np.ndarray  # i64; the number of each in the source, from 0
    counts: dict  # rows, kept, cut (made shorter), without_target, equal; tokens and targets, of what was kept


LOOKS = 64  # rows that `pack` looks at for room on both sides


def collect(rows, make, *, length: int, source: str, keep: str = "start", targets: bool = True, source_length: int = 0) -> Table:
    """The documents of a data set, each made shorter where it is longer than `length` tokens (text.fit).

    A row is dropped, and counted, where a document has no target left, or where two of its documents are equal (a pair that
    prefers nothing).
    Args:
        make: (row) -> Document, or a tuple of them: chosen and rejected, or K responses.
        targets: False for prompts, which have none; only an empty one is dropped.
        source: the name of the data set, for messages.
        source_length: tokens of what an encoder reads, which has nothing to do with `source`; 0: `length`.
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
        parts = [fit(document, length, keep=keep, source_length=source_length) for document in whole]
        if source_length and any(part.source is None for part in parts):
            raise ValueError(f"source_length = {source_length}, but these documents have no source: it is for encoder-decoders")
        counts["rows"] += 1
        counts["cut"] += any(len(a.ids) < len(b.ids) for a, b in zip(parts, whole, strict=True))
        if not all((part.weights[1:] > 0).any() if targets else len(part.tokens) for part in parts):
            counts["without_target"] += 1
        elif len({part.ids for part in parts}) < len(parts):
            counts["equal"] += 1
        else:
            counts["kept"] += 1
            counts["tokens"] += sum(len(part.tokens) for part in parts)
            counts["targets"] += int(sum((part.weights[1:] > 0).sum() for part in parts))
            documents.append(parts[0] if isinstance(made, Document) else tuple(parts))
            numbers.append(number)
    if not documents:
        if not targets:
            raise ValueError(f"{source}: the prompts of all {counts['rows']} rows are empty")
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


def pad(
    documents: list[Document], length: int, *, side: str = "right", pad_id: int = 0, source_length: int = 0, prompt: int = 0
) -> Batch:
    """One document a row, padded on one side ("left": prompts to sample from). Padding is where segments are 0, whatever pad_id is.

    Sources are always padded on the right, to `source_length` (0: `length`). Raises ValueError, naming the row, for a document that
    is empty or longer than `length`.
    Args: prompt: the column in which the first target of every row stands, with padding on both sides; 0: as `side` has it.
    """
    if side not in ("right", "left"):
        raise ValueError(f"side = {side!r}; there are 'right' and 'left'")
    batch = pack_rows([[document] for document in documents], length, pad_id, source_length)
    for row, document in enumerate(documents):
        move = length - len(document.tokens) if side == "left" else prompt and prompt - _asked(document)
        if move > length - len(document.tokens) or move < 0:
            raise ValueError(f"row {row}: {_asked(document)} of {len(document.tokens)} tokens before column {prompt} of {length}")
        for x in (batch.tokens, batch.segments, batch.weights) if move else ():
            x[row] = np.roll(x[row], move)
    return batch


def _asked(document) -> int:
    """How many tokens stand before the first target."""
    return int(np.argmax(document.weights > 0))


def in_common(rows, length: int) -> tuple[int, int]:
    """The layout in which rows of two documents, each a prompt and one response to it, share the prompt: -> (prompt, length)

    prompt: columns of all prompts, for `pad` and for Model.sharing; 0, and the length as it was, where prompts of one row differ,
    or where so much padding would come in that less than a quarter of the columns were saved.
    """
    ends = [_asked(first) for first, *_ in rows]
    for end, (first, second, *_) in zip(ends, rows, strict=True):
        same = end == _asked(second) and (first.tokens[:end] == second.tokens[:end]).all()
        if not (end and same and np.array_equal(_source(first), _source(second))):
            return 0, length
    if rows[0][0].source is not None:
        return (1, length) if set(ends) == {1} else (0, length)  # it is the source that is shared
    prompt, response = max(ends), max(len(one.tokens) - end for end, row in zip(ends, rows, strict=True) for one in row[:2])
    return (prompt, prompt + response) if prompt + 2 * response <= 0.75 * 2 * length else (0, length)


def pack(documents: list[Document], length: int, source_length: int = 0) -> list[list[Document]]:
    """Documents put together in rows of at most `length` tokens, each document once and whole. Best fit decreasing, O(n log n).

    The longest first, each into the fullest row that has room (Krell et al. 2021 section 3). Rows so come in order of length: let
    `order` shuffle them. Raises ValueError, naming the document, where one is empty or longer than `length`.

    With sources, a row has at most `source_length` (0: `length`) tokens of them too: a document goes into the first row with room
    for both, of the LOOKS fullest that have room for its tokens.
    """
    most = source_length or length
    rows, room, source_room = [], [], []  # room: (tokens left, row), sorted; source_room: of each row

    def share(i):
        return max(len(documents[i].tokens) / length, len(_source(documents[i])) / most)

    for i in sorted(range(len(documents)), key=share, reverse=True):
        size = _size(documents[i].tokens, length, f"document {i}")
        source = 0 if documents[i].source is None else _size(documents[i].source, most, f"document {i}, source")
        at = bisect_left(room, (size, -1))
        at = next((k for k in range(at, min(at + LOOKS, len(room))) if source_room[room[k][1]] >= source), len(room))
        left, row = room.pop(at) if at < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
            source_room.append(most)
        rows[row].append(documents[i])
        source_room[row] -= source
        insort(room, (left - size, row))
    return rows


def pack_rows(rows: list[list[Document]], length: int, pad_id: int = 0, source_length: int = 0) -> Batch:
    """Packed rows as a Batch: segments 1..K from left to right, then padding; weight 0 at the first token of each document.

    Sources likewise, in rows of `source_length` (0: `length`); all documents have one, or none has.
    """
    tokens, segments = _side([[document.tokens for document in row] for row in rows], length, pad_id, "")
    weights = np.zeros(tokens.shape, np.float32)
    for r, row in enumerate(rows):
        weights[r, segments[r] > 0] = np.concatenate([np.append(0, document.weights[1:]) for document in row] or [[]])
    have = {document.source is not None for row in rows for document in row}
    if len(have) > 1:
        raise ValueError("some of these documents have a source, and some have none")
    if True not in have:
        return Batch(tokens, segments, weights)
    sources = _side([[document.source for document in row] for row in rows], source_length or length, pad_id, ", source")
    return Batch(tokens, segments, weights, *sources)


def _side(rows, length, pad_id, what):
    """Rows of arrays, one behind the other. -> (tokens, segments), i32 [B,length]"""
    tokens = np.full((len(rows), length), pad_id, np.int32)
    segments = np.zeros_like(tokens)
    for r, row in enumerate(rows):
        start = 0
        for k, part in enumerate(row, 1):
            end = start + _size(part, length - start, f"row {r}{what}")
            tokens[r, start:end], segments[r, start:end] = part, k
            start = end
    return tokens, segments


def _source(document):
    return () if document.source is None else document.source


def _size(part, most, what) -> int:
    size = len(part)
    if not 0 < size <= most:
        raise ValueError(f"{what}: a document of {size} tokens, where 1 to {most} fit; `text.fit` makes it shorter")
    return size


def pairs(chosen: list[Document], rejected: list[Document], margin, length: int, **layout) -> Pairs:
    """Pairs. margin: f32 [B], in units of the reward (0: not said); layout: of `pad`. ValueError where the counts differ."""
    margin = np.asarray(margin, np.float32)
    if not (len(chosen) == len(rejected) and margin.shape == (len(chosen),)):
        raise ValueError(
            f"{len(chosen)} chosen, {len(rejected)} rejected and margins of shape {margin.shape}: one of each makes a pair"
        )
    if not np.isfinite(margin).all():
        raise ValueError(f"row {np.argmin(np.isfinite(margin))}: the margin is {margin[np.argmin(np.isfinite(margin))]}")
    return Pairs(*(pad(side, length, **layout) for side in (chosen, rejected)), margin)


def judged(first: list[Document], second: list[Document], won, tied, length: int, **layout) -> Judged:
    """Two responses a row, and shares of votes for the first and for neither, f32 [B]. ValueError where they are no shares."""
    won, tied = (np.asarray(x, np.float32) for x in (won, tied))
    wrong = ~((won >= 0) & (tied >= 0) & (won + tied <= 1 + 1e-6))
    if wrong.any():
        row = np.argmax(wrong)
        raise ValueError(f"row {row}: won {won[row]} and tied {tied[row]} are shares of votes, from 0 to 1, together at most 1")
    return Judged(*(pad(side, length, **layout) for side in (first, second)), won, tied)


def ranked(
    responses: list[list[Document]], rank: list[list[int]], most: int, length: int, *, pad_id: int = 0, source_length: int = 0
) -> Ranked:
    """Up to `most` responses a row and the rank of each, of which the least is the best. ValueError where the counts differ."""
    columns, ranks = [[] for _ in range(most)], np.zeros((len(responses), most), np.int32)
    for row, (documents, order_of) in enumerate(zip(responses, rank, strict=True)):
        if not len(documents) == len(order_of) <= most:
            raise ValueError(
                f"row {row}: {len(documents)} responses and {len(order_of)} ranks, where there are at most {most} of each"
            )
        ranks[row, : len(order_of)] = order_of
        for k, column in enumerate(columns):
            column.append(list(documents[k : k + 1]))
    return Ranked(tuple(pack_rows(column, length, pad_id, source_length) for column in columns), ranks)


def rated(documents: list[Document], rating, length: int, *, pad_id: int = 0, source_length: int = 0) -> Rated:
    """Responses, and the number that each should score, f32 [B] in units of the reward."""
    return Rated(pad(documents, length, pad_id=pad_id, source_length=source_length), np.asarray(rating, np.float32))


def stepwise(documents: list[Document], labels: list[list], length: int, *, pad_id: int = 0, source_length: int = 0) -> Stepwise:
    """Solutions (text.in_steps), and the labels of the steps of each, None where nobody said; of a cut one the last steps."""
    solutions = pad(documents, length, pad_id=pad_id, source_length=source_length)
    label = np.full(solutions.tokens.shape, np.nan, np.float32)
    for row, said in enumerate(labels):
        ends = np.flatnonzero(solutions.weights[row])
        label[row, ends] = np.array(said, np.float32)[len(said) - len(ends) :]
    return Stepwise(solutions, label)


def prompt_of(document: Document) -> Document:
    """What stands before the first target, without targets: what its response was asked by. ValueError where nothing does."""
    end = int(np.argmax(document.weights > 0))
    if not end:
        raise ValueError("a document without a target, or without anything before it, has no prompt")
    return document._replace(tokens=document.tokens[:end], weights=np.zeros_like(document.weights[:end]))


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
    if batch.source is not None:
        try:
            check(Batch(batch.source, batch.source_segments, np.zeros(np.shape(batch.source), np.float32)), vocab, targets=False)
        except ValueError as error:
            raise ValueError(f"source: {error}") from error
        many = np.stack([x.max(axis=1, initial=0) for x in (segments, np.asarray(batch.source_segments))])
        if (many[0] != many[1]).any():
            row = np.argmax(many[0] != many[1])
            raise ValueError(f"row {row}: {many[0][row]} documents and {many[1][row]} sources; one of each goes together")
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
    source, sources = (None if x is None else np.asarray(x)[:rows] for x in (batch.source, batch.source_segments))
    lines = []
    for r in range(len(tokens)):
        for k in range(1, segments[r].max(initial=0) + 1):
            ids, weight = tokens[r, segments[r] == k], weights[r, segments[r] == k]
            lines.append(f"row {r}, document {k}: {len(ids)} tokens, {(weight > 0).sum()} of them targets")
            if source is not None:
                read = source[r, sources[r] == k]
                lines.append(f"its source, {len(read)} tokens: {_marked(tokenizer, read, np.zeros(len(read)))}")
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
