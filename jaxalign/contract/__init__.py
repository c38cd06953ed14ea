"""The contract of an objective, checked on a small example: what cannot matter does not matter.

An objective returns sums, and the step divides them once, by the weight of the whole batch. So padding, packing, the order of rows,
micro-batches and devices change no loss, no gradient and no metric. `check_objective` tries it, for anyone's objective.

    layout.py      data as rows that can be laid out anew
    measure.py     what a step makes of a batch
    variations.py  laws that lay rows out anew
    laws.py        LAWS: these and the others
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import shard
from jaxalign.contract.laws import LAWS
from jaxalign.contract.layout import ROWS, Table, change, given, lay, read_table
from jaxalign.contract.measure import Bench, measure_of
from jaxalign.contract.variations import Broken, Checked
from jaxalign.types import Batch

__all__ = ["LAWS", "ROWS", "BrokenLaw", "Checked", "check_objective", "read_table"]


class BrokenLaw(AssertionError):
    """`law`, one of LAWS, does not hold: `what` differs. `example` is the smallest found: rows, keep, weights, change, data."""

    def __init__(self, law: str, what: str, example: dict):
        super().__init__(f"{law}: {what}. {_say(example)}The law: {' '.join(LAWS[law].__doc__.split())}")
        self.law, self.what, self.example = law, what, example


def check_objective(
    objective,
    params,
    data,
    *,
    laws=tuple(LAWS),
    unit: str | None = None,
    on_policy: dict[str, float] | None = None,
    examples: int = 15,
    tolerance: float = 1e-4,
) -> dict[str, Checked]:
    """Check that an objective keeps the contract. -> {law: Checked}: what was tried, and the largest deviation

        check_objective(partial(trusting_sft, model=model), params, batch)
        check_objective(partial(ppo, model=model, temperature=0.7), params, rollout, on_policy={"policy/ratio": 1.0})

    Take a small model and a few short rows. Each law lays these out anew, four at a time, and compares loss, gradient and metrics,
    each divided by the weight. Where they differ, it searches the fewest rows, tokens and changes that show it. "devices" wants
    more than one: `jax.config.update("jax_num_cpu_devices", 8)` at the start.

    Args:
        objective: (params, data) -> (sum, {"weight": n, ...sums}); model and hyperparameters bound by functools.partial.
        data: any tree that holds Batches, of NumPy or jax arrays; `read_table` says which array is what. A model with learned
            positions needs room for 7 columns beside the longest row.
        laws: names from LAWS; "result" is checked always.
        unit: what is summed. "token": each target adds a term of its own, so that documents can share a row. "row": rows are scored
            as wholes (pairs, means over a sequence, returns). By default "row" where the data hold several Batches, or a per-row
            array on which a number depends.
        on_policy: metrics and their values on `data`, whose log-probabilities are the scorer's for these `params`.
        examples: variations a law. tolerance: relative, for float32.
    It does not see a loss that is wrong everywhere alike (a sign, a value read one token late): golden numbers and the oracle do.
    Raises BrokenLaw for the first of LAWS that does not hold; TypeError where `data` cannot be read; ValueError for an unknown law.
    """
    try:
        import hypothesis  # noqa: F401
    except ImportError as error:
        raise ImportError('check_objective draws examples with hypothesis: pip install "jaxalign[test]"') from error
    if unknown := [law for law in laws if law not in LAWS]:
        raise ValueError(f"no law {unknown}; there are {', '.join(LAWS)}")
    if unit not in (None, "token", "row"):
        raise ValueError(f"unit = {unit!r}; there are 'token' and 'row'")
    table = read_table(data)
    params = jax.tree.map(jnp.asarray, shard.fetch(params))
    measure = measure_of(objective, params, table)
    bench = Bench(objective, params, table, measure, _ids(table), tolerance, examples, on_policy or {}, unit)
    report = {}
    for law, check in LAWS.items():
        if law in ("result", *laws):
            try:
                report[law] = check(bench)
            except Broken as broken:
                raise BrokenLaw(law, broken.what, _example(table, broken)) from broken.__cause__
        if law == "result":
            bench = bench._replace(**_traits(bench))
    return report


def _example(table: Table, broken: Broken) -> dict:
    if broken.case is None:
        return {}
    data = table.tree.unflatten(broken.leaves)
    return {name: getattr(broken.case, name) for name in ("rows", "keep", "weights")} | {"change": broken.change, "data": data}


def _ids(table: Table, most: int = 32) -> list[int]:
    """Token ids to try, at least two: all up to the largest, or those of padding, 0 and the most frequent."""
    both = [(table.leaves[table.at("tokens", i)], table.leaves[table.at("segments", i)] > 0) for i in table.batches]
    text = collections.Counter(np.concatenate([tokens[real] for tokens, real in both]).tolist())
    if max(text) < most:
        return list(range(max(max(text), 1) + 1))
    padding = np.concatenate([tokens[~real] for tokens, real in both]).tolist()
    return sorted({0, max(text), *padding, *(token for token, _ in text.most_common(most))})


def _traits(bench: Bench) -> dict:
    """What the objective reads, by what changes any of its numbers. -> unit and reads_weights of Bench"""
    table, leaves = bench.table, lay(bench.table, given(bench.table))
    here = jax.tree.leaves(bench.measure(leaves))

    def matters(other):
        return any(not np.array_equal(x, y) for x, y in zip(here, jax.tree.leaves(bench.measure(other))))

    def other(x):
        return ~x if x.dtype == bool else (1 - x).astype(x.dtype)

    reads_weights = any(matters(change(table, leaves, "weights", new)) for new in (lambda x, s: 0 * x, lambda x, s: s > 0))
    per_row = [i for i, kind in enumerate(table.kinds) if kind == "row"]
    whole = len(table.widths) > 1 or any(matters([*leaves[:i], other(leaves[i]), *leaves[i + 1 :]]) for i in per_row)
    return {"unit": bench.unit or ("row" if whole else "token"), "reads_weights": reads_weights}


def _say(example: dict) -> str:
    """An example in a sentence, with its first Batch where that is small."""
    if not example:
        return ""
    rows = ", ".join(map(str, example["rows"]))
    said = f"Smallest example: rows {rows} of the data, of each at most the last {example['keep']} tokens"
    said += f", weights {example['weights']}" + (f"; {example['change']}" if example["change"] else "")
    batch = next(x for x in jax.tree.leaves(example["data"], is_leaf=lambda x: isinstance(x, Batch)) if isinstance(x, Batch))
    if batch.tokens.size <= 80:
        arrays = ", ".join(f"{name} {x.tolist()}" for name, x in vars(batch).items() if x is not None)
        said += f"; its first Batch is {arrays}"
    return said + ". "
