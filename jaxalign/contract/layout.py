"""Data as rows that can be laid out anew: which array is what, and the cases that the laws draw from them."""

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxalign import shard
from jaxalign.types import Batch

ROWS = 4  # of every batch that is tried: one shape, so few programs to compile
SPARE = 3  # columns of padding beside the longest row


class Table(NamedTuple):
    """Data as NumPy leaves, and whose each is."""

    leaves: list
    tree: Any
    names: list  # of each leaf: its path
    kinds: list  # of each leaf: "tokens", "segments", "weights", "source", "source_segments", "token" (others of [B,T]), "row"
    owners: list  # of each leaf: the number of its Batch, None of a row's
    widths: list  # of each Batch: the most real tokens of a row, over the Batches that came with the same width
    source_width: int  # the most real tokens of a row of any source

    def at(self, kind: str, owner: int) -> int | None:
        return next((i for i in range(len(self.kinds)) if self.kinds[i] == kind and self.owners[i] == owner), None)

    @property
    def batches(self):
        return range(len(self.widths))


class Case(NamedTuple):
    """An example before it is laid out, and what laws vary of it."""

    rows: tuple  # ROWS rows of the data
    keep: int  # of each, so many of its last tokens
    leaves: list  # the table's, with these weights
    weights: str = "as given"
    left: tuple = (0,) * ROWS  # columns of padding before each row, as far as there is room
    order: tuple = (0, 1, 2, 3)
    token: int = 0
    step: int = 1
    end: int = 2
    factor: float = 1.0
    stray: float = np.nan
    flag: bool = False


def read_table(data) -> Table:
    """What travels with what. An array [B,T,...] of a Batch's shape in the same struct is per token; another [B,...] is per row.

    Where a struct holds several Batches of one shape, the name of the array has to hold the Batch's: `chosen_logp`.
    Raises TypeError where this does not say it.
    """
    flat, tree = jax.tree_util.tree_flatten_with_path(data)
    found, _ = jax.tree_util.tree_flatten_with_path(data, is_leaf=lambda x: isinstance(x, Batch))
    batches = [(path, np.shape(x.tokens)) for path, x in found if isinstance(x, Batch)]
    shapes = ", ".join(str(shape) for _, shape in batches) or "none"
    if len({shape[:-1] for _, shape in batches}) != 1 or len(batches[0][1]) != 2:
        raise TypeError(f"data must hold types.Batch of [B,T], all of one number of rows B; the shapes of its Batches: {shapes}")

    def kind_of(path, x):
        key = _key(path)
        near = [i for i, (at, _) in enumerate(batches) if path[: len(at)] == at]
        if near:  # a Batch's own
            return key, near[0]
        for depth in range(len(path) - 1, -1, -1):
            near = near or [i for i, (at, _) in enumerate(batches) if at[:depth] == path[:depth]]
        fitting = [i for i in near if x.shape[:2] == batches[i][1]]
        if len(fitting) > 1:
            fitting = [i for i in fitting if _key(batches[i][0]) in key]
        elif not fitting and x.shape[:1] == batches[0][1][:1]:
            return "row", None
        if len(fitting) != 1:
            raise TypeError(
                f"whose is data{jax.tree_util.keystr(path)} of shape {x.shape}? It must be per token, [B,T] of a Batch in its "
                f"struct, or per row, [B]; the shapes of the Batches: {shapes}. Where several fit, put each into a struct with "
                "what is its own, or name it so (chosen_logp of chosen). Hyperparameters are bound by functools.partial"
            )
        return "token", fitting[0]

    leaves = shard.fetch([x for _, x in flat])
    kinds, owners = map(list, zip(*(kind_of(path, x) for (path, _), x in zip(flat, leaves))))
    lengths = [int((x > 0).sum(1).max()) for x, kind in zip(leaves, kinds) if kind == "segments"]
    widths = [max(n for n, (_, other) in zip(lengths, batches) if other == shape) for _, shape in batches]
    if min(widths) < 2:
        raise TypeError("a Batch of the data has no row of two tokens, so that nothing in it can be a target")
    source = max([int((x > 0).sum(1).max()) for x, kind in zip(leaves, kinds) if kind == "source_segments"], default=0)
    return Table(leaves, tree, ["data" + jax.tree_util.keystr(path) for path, _ in flat], kinds, owners, widths, source)


def _key(path) -> str:
    entry = path[-1] if path else ""
    return str(getattr(entry, "name", getattr(entry, "key", getattr(entry, "idx", entry))))


def lay(table: Table, case: Case, slots=None, *, left=(0,) * ROWS, pad: int = 0, spare: int = SPARE) -> list:
    """A case as leaves [ROWS, ...].

    Args:
        slots: of every new row, the old rows that are packed into it; by default the case's, one each, which per-row arrays follow.
        left: columns of padding before each, and before its source. pad: token id of padding. spare: columns beside the longest
            row, and beside two of the longest source.
    """
    slots = [(row,) for row in case.rows] if slots is None else slots
    out = [x[np.asarray(case.rows)] for x in case.leaves]
    for owner in table.batches:
        segments = table.leaves[table.at("segments", owner)]
        kept = [[(row, np.unique(segments[row, _kept(table, owner, row, case.keep)])) for row in slot] for slot in slots]
        places = {"": _places(kept, segments, table.widths[owner] + spare, left, case.keep)}
        if (i := table.at("source_segments", owner)) is not None:
            places["source"] = _places(kept, table.leaves[i], 2 * table.source_width + spare, left)
        for i, (x, kind) in enumerate(zip(case.leaves, table.kinds)):
            if table.owners[i] == owner:
                rows, columns, numbers = places["source" if kind.startswith("source") else ""]
                fill = np.asarray(pad if kind in ("tokens", "source") else 0, x.dtype)
                out[i] = numbers if kind.endswith("segments") else np.where(like(numbers > 0, x), x[rows, columns], fill)
    return out


def _places(kept, segments, width: int, left, most: int = 2**31 - 1):
    """Where each column of the new rows is from: row, column and the new number of its document, i32 [ROWS, width]; 0: padding.

    Args: kept: of every new row, (old row, the documents of it that are kept). most: of each old row, so many of its last tokens.
    """
    rows, columns, numbers = np.zeros((3, ROWS, width), np.int32)
    for new, slot in enumerate(kept):
        parts = [(row, documents, np.flatnonzero(np.isin(segments[row], documents))[-most:]) for row, documents in slot]
        at, before = min(left[new], width - sum(len(part) for *_, part in parts)), 1
        for row, documents, part in parts:
            here = slice(at, at := at + len(part))
            rows[new, here], columns[new, here] = row, part
            numbers[new, here] = before + np.searchsorted(documents, segments[row, part])
            before += len(documents)
    return rows, columns, numbers


def like(mask, x):
    """A mask [B,T] for an array [B,T,...]."""
    return mask.reshape(mask.shape + (1,) * (x.ndim - 2))


def starts(segments):
    """Where nothing predicts a token: in padding, and at the first of a document."""
    return (segments == 0) | (segments != np.pad(segments[:, :-1], ((0, 0), (1, 0))))


def targets(table: Table, leaves, owner: int):
    """Where a Batch's targets are."""
    return ~starts(leaves[table.at("segments", owner)]) & (leaves[table.at("weights", owner)] > 0)


def change(table: Table, leaves, kind: str, new) -> list:
    """The leaves, each Batch's tokens, weights or, where it has one, source x replaced by new(x, segments of x)."""
    out = list(leaves)
    for owner in table.batches:
        if (i := table.at(kind, owner)) is not None:
            x = np.asarray(leaves[i], np.float32) if kind == "weights" else leaves[i]
            out[i] = np.asarray(new(x, leaves[table.at("source_segments" if kind == "source" else "segments", owner)]), x.dtype)
    return out


def given(table: Table, start: int = 0) -> Case:
    """The data's own rows from `start` on, whole and in turn."""
    return Case(tuple((start + i) % len(table.leaves[0]) for i in range(ROWS)), max(table.widths), table.leaves)


def cases(bench, st, vary, share: int = 1):
    """The strategy of cases: rows, how many tokens of each (so that `share` fit into one), weights, and the fields `vary`."""
    longest = max(bench.table.widths)
    most = longest if share == 1 else (min(bench.table.widths) + SPARE) // share
    rows, place, columns = st.integers(0, len(bench.table.leaves[0]) - 1), st.integers(0, ROWS - 1), st.integers(0, longest)
    drawn = {
        "left": st.tuples(*[columns] * ROWS),
        "order": st.permutations(range(ROWS)).map(tuple),
        "token": st.sampled_from(bench.ids),
        "step": st.integers(1, len(bench.ids) - 1),
        "end": st.integers(2, longest),
        "factor": st.sampled_from((1.0, 0.3, 3.0)),
        "stray": st.sampled_from((7.0, -1e6, np.inf, np.nan)),
        "flag": st.booleans(),
    }
    return st.builds(
        partial(_case, bench.table),
        rows=st.tuples(*[rows] * ROWS),
        keep=st.integers(2, min(longest, most)),
        every=st.booleans(),
        zeroed=st.frozensets(st.tuples(place, st.integers(1, longest)), max_size=6),
        **{name: drawn[name] for name in vary},
    )


def _case(table: Table, rows, keep, every, zeroed, **varied) -> Case:
    """Weights are the data's or, with `every`, 1 where numbers are finite; but 0 at (place in `rows`, token from its end)."""
    leaves = list(table.leaves)
    zeroed = sorted({(rows[place], back) for place, back in zeroed if back <= keep})
    for owner in table.batches:
        i = table.at("weights", owner)
        known = table.leaves[table.at("segments", owner)] > 0
        for x, kind, whose in zip(leaves, table.kinds, table.owners):
            if kind == "token" and whose == owner and x.dtype.kind == "f":
                known &= np.isfinite(x).reshape(*known.shape, -1).all(-1)
        leaves[i] = np.where(known & every, 1, leaves[i]).astype(np.float32)
        for row, back in zeroed:
            leaves[i][row, _kept(table, owner, row, keep)[-back:][:1]] = 0
    words = "1 at every token" if every else "as given"
    return Case(rows, keep, leaves, words + (f", but 0 at (row, token from its end) {zeroed}" if zeroed else ""), **varied)


def _kept(table: Table, owner: int, row: int, keep: int):
    return np.flatnonzero(table.leaves[table.at("segments", owner)][row] > 0)[-keep:]


def tied(table: Table, case: Case) -> bool:
    """Whether Batches have the same text in a row: then a comparison is a tie, which rounding may decide either way."""
    for row in case.rows:
        said = [tuple(table.leaves[table.at("tokens", i)][row][_kept(table, i, row, case.keep)]) for i in table.batches]
        if len(set(said)) < len(said):
            return True
    return False
