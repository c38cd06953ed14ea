"""Laws by variation: the same rows, laid out anew, give the same numbers. Each is a function (bench) -> Checked, which raises
Broken where it does not hold; its docstring is the law."""

from functools import partial, wraps
from typing import NamedTuple

import jax
import numpy as np

from jaxalign.contract.layout import ROWS, SPARE, cases, change, lay, like, starts, targets, tied
from jaxalign.contract.measure import Bench, cheap, compare, step_of


class Checked(NamedTuple):
    """How a law was checked."""

    tried: int  # variations
    deviation: float  # the largest found, relative; of "gradient", that from finite differences
    note: str = ""  # why nothing was tried


class Broken(Exception):
    """What a law says; `check_objective` adds the law's name."""

    def __init__(self, what: str, case=None, leaves=None, change: str = ""):
        super().__init__(what)
        self.what, self.case, self.leaves, self.change = what, case, leaves, change


def variation(*vary, token_wise: bool = False, share: int = 1, examples: int | None = None):
    """Makes a law of (bench, case) -> (leaves, changed leaves, words): both give the same numbers. Hypothesis looks where not.

    The function may return, too, how to measure the changed leaves.
    Args:
        vary: fields of Case that it reads. share: old rows that share a new one.
        token_wise: it does not hold where rows are scored as wholes. examples: at most.
    """

    def law_of(function):
        @wraps(function)
        def law(bench: Bench) -> Checked:
            if token_wise and bench.unit == "row":
                return Checked(0, 0.0, "rows are scored as wholes")
            return _search(bench, function, vary, share, min(bench.examples, examples or bench.examples))

        return law

    return law_of


def _search(bench: Bench, law, vary, share: int, examples: int) -> Checked:
    import hypothesis
    from hypothesis import strategies as st

    tally = [0, 0.0]

    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(cases(bench, st, vary, share))
    def run(case):
        hypothesis.assume(not tied(bench.table, case))
        before, after, words, *how = law(bench, case)
        try:
            want = bench.measure(before)
            got = (how[0] if how else bench.measure)(after) if 0 < want.weight < np.inf else None
        except Exception as error:
            raise Broken(f"raised {type(error).__name__}: {str(error).partition(chr(10))[0]}", case, after, words) from error
        hypothesis.assume(got is not None)
        deviation, what = compare(want, got)
        if deviation > bench.tolerance:
            raise Broken(f"{what} (tolerance {bench.tolerance:g})", case, after, words)
        tally[:] = tally[0] + 1, max(tally[1], deviation)

    try:
        run()
    except hypothesis.errors.Unsatisfiable:
        return Checked(0, 0.0, "no variation of this data had any weight")
    return Checked(*tally)


@variation("order")
def row_order(bench, case):
    """The order of rows changes nothing."""
    leaves = lay(bench.table, case)
    return leaves, [x[np.asarray(case.order)] for x in leaves], f"in the order {case.order}"


def micro_batches(bench: Bench) -> Checked:
    """Sums of micro-batches (make_step's accumulate) add up to those of the batch: no mean, whitening or count over one part."""

    def compile_step(step, state):
        return partial(jax.jit(step, compiler_options=cheap()), state)

    accumulated = step_of(bench, compile_step, accumulate=ROWS)

    def law(bench, case):
        leaves = lay(bench.table, case)
        return leaves, leaves, f"in {ROWS} micro-batches of one row", accumulated

    return variation()(law)(bench)


@variation("left")
def pad_side(bench, case):
    """Padding may stand on the left, on the right or on both sides of a row, and of its source."""
    return lay(bench.table, case), lay(bench.table, case, left=case.left), f"moved right by {case.left} columns, as far as they go"


@variation("left")
def pad_length(bench, case):
    """More padding, of the source too, changes nothing: no count of columns, or of B x T."""
    return lay(bench.table, case), lay(bench.table, case, left=case.left, spare=SPARE + 4), "with 4 more columns of padding"


@variation("left", "token")
def pad_id(bench, case):
    """Any token id may fill the padding, one of the text's too (pad == eos): padding is where `segments` is 0."""
    leaves, filled = (lay(bench.table, case, left=case.left, pad=pad) for pad in (0, case.token))
    return leaves, filled, f"padded with token {case.token} instead of 0"


@variation("left", token_wise=True, share=2)
def packing(bench, case):
    """Documents may share a row, and their sources another, where targets are summed (unit="token")."""
    a, b, c, d = case.rows
    pairs = [(a, b), (c, d)] * 2  # every row twice: a factor of the sums and of the weight
    return lay(bench.table, case), lay(bench.table, case, pairs, left=case.left), f"packed into rows as {pairs}"


@variation("left", "step", "stray")
def weight_0(bench, case):
    """What has no weight does not exist: the numbers in per-token arrays where `targets` is 0, NaN and inf too, tokens of padding,
    and weights of padding and of a document's first token, which nothing predicts."""
    table, leaves = bench.table, lay(bench.table, case, left=case.left)
    stray = change(table, leaves, "weights", lambda x, segments: np.where(starts(segments), 5, x))
    for kind in ("tokens", "source"):
        stray = change(table, stray, kind, lambda x, segments: np.where(segments > 0, x, _other(bench, x, case.step)))
    for i, x in enumerate(leaves):
        if table.kinds[i] == "token" and x.dtype.kind == "f":
            stray[i] = np.where(like(targets(table, leaves, table.owners[i]), x), x, np.asarray(case.stray, x.dtype))
    words = f"{case.stray:g} in per-token arrays, other tokens in padding, weights of 5 in padding and at first tokens"
    return leaves, stray, words


@variation("flag")
def masked_rows(bench, case):
    """A row of padding alone, or without targets where weights are read, adds nothing."""
    a, b, _, _ = case.rows
    if case.flag and bench.reads_weights:
        live = (np.arange(ROWS) < 2)[:, None]
        empty, words = change(bench.table, lay(bench.table, case), "weights", lambda x, _: x * live), "of weight 0"
    else:
        empty, words = lay(bench.table, case, [(a,), (b,), (), ()]), "of padding alone"
    twice = case._replace(rows=(a, b, a, b))  # a factor of the sums and of the weight
    return lay(bench.table, twice), empty, f"rows {a} and {b}, and two {words}"


def weights(bench: Bench) -> Checked:
    """A weight is a multiplicity, where targets are summed (unit="token"): a factor of all weights cancels, and sums over some of
    the targets and over the others add up."""
    if bench.unit == "token" and not bench.reads_weights:
        raise Broken("no number depends on the weights of the data")

    def added(leaves):
        even = [change(bench.table, leaves, "weights", lambda x, _, k=k: x * (np.arange(x.shape[1]) % 2 == k)) for k in (0, 1)]
        parts = [bench.measure(part) for part in even]
        total = sum(part.weight for part in parts)
        shares = [max(part.weight, 1e-9) / max(total, 1e-9) for part in parts]
        sums = [jax.tree.map(lambda x, share=share: share * x, part) for share, part in zip(shares, parts)]
        return jax.tree.map(lambda a, b: a + b, *sums)

    def law(bench, case):
        leaves = lay(bench.table, case, left=case.left)
        scaled = change(bench.table, leaves, "weights", lambda x, _: x * case.factor)
        return leaves, scaled, f"all weights times {case.factor:g}, even and odd columns measured apart and added", added

    return variation("left", "factor", token_wise=True)(law)(bench)


@variation("end", "step", token_wise=True)
def future(bench, case):
    """Tokens after the last target do not matter, where targets are summed (unit="token"): entry t speaks of token t."""

    def later(x):
        return np.arange(x.shape[1])[None] >= case.end

    leaves = change(bench.table, lay(bench.table, case), "weights", lambda x, _: np.where(later(x), 0, x))
    other = change(bench.table, leaves, "tokens", lambda x, s: np.where(later(x) & (s > 0), _other(bench, x, case.step), x))
    return leaves, other, f"no weights and other tokens from column {case.end} on"


def _other(bench: Bench, tokens, step: int):
    """For every token another one, of the ids to try."""
    ids = np.asarray(bench.ids)
    return ids[(np.searchsorted(ids, tokens).clip(0, len(ids) - 1) + step) % len(ids)]
