"""The laws: each a function (bench) -> Checked, which raises Broken where it does not hold. Its docstring is the law."""

from functools import partial, wraps
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign import shard
from jaxalign.contract.layout import ROWS, SPARE, cases, change, given, lay, like, starts, targets, tied
from jaxalign.contract.measure import Bench, Numbers, cheap, compare, step_of


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


def result(bench: Bench) -> Checked:
    """An objective returns a sum and a dict of sums with "weight", all float32 scalars; on the data as given they and the gradient
    are finite, and the weight is above 0."""
    case = given(bench.table)
    leaves = lay(bench.table, case)
    out = jax.eval_shape(bench.objective, bench.params, bench.table.tree.unflatten(leaves))
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], dict) and "weight" in out[1]):
        raise Broken(
            f'it returned {jax.tree.map(lambda x: str(x.dtype), out)} and not (sum, {{"weight": n, ...sums}})', case, leaves
        )
    for name, x in {"the loss": out[0], **out[1]}.items():
        if name.startswith(("loss/total", "train/")):
            raise Broken(f"{name} is a name of the step's own metrics", case, leaves)
        if getattr(x, "shape", None) != () or x.dtype != jnp.float32:
            kind = f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") else type(x).__name__
            raise Broken(f"{name} is {kind} and not a float32 scalar", case, leaves)
    got = bench.measure(leaves)
    for name, x in {**got.metrics, **got.gradient}.items():
        if not np.isfinite(x).all():
            raise Broken(f"{name} is not finite", case, leaves)
    if not 0 < got.weight < np.inf:
        raise Broken(f"the weight is {got.weight:g}", case, leaves)
    return Checked(1, 0.0)


def deterministic(bench: Bench) -> Checked:
    """Called twice it gives the same numbers, and traced twice the same program: no random draw, counter or other state outside."""
    case = given(bench.table)
    leaves = lay(bench.table, case)
    deviation, what = compare(bench.measure(leaves), bench.measure(leaves))
    if deviation:
        raise Broken(what, case, leaves, "measured twice")
    data = bench.table.tree.unflatten(leaves)
    programs = [jax.jit(lambda *args: bench.objective(*args)).lower(bench.params, data).as_text().splitlines() for _ in range(2)]
    if programs[0] != programs[1]:
        first, again = next(pair for pair in zip(*programs) if pair[0] != pair[1])
        raise Broken(f"traced again, its program says {again.strip()[:100]} and not {first.strip()[:100]}", case, leaves)
    return Checked(2, 0.0)


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
    """Padding may stand on the left, on the right or on both sides of a row."""
    return lay(bench.table, case), lay(bench.table, case, left=case.left), f"moved right by {case.left} columns, as far as they go"


@variation("left")
def pad_length(bench, case):
    """More padding changes nothing: no count of columns, or of B x T."""
    return lay(bench.table, case), lay(bench.table, case, left=case.left, spare=SPARE + 4), "with 4 more columns of padding"


@variation("left", "token")
def pad_id(bench, case):
    """Any token id may fill the padding, one of the text's too (pad == eos): padding is where `segments` is 0."""
    leaves, filled = (lay(bench.table, case, left=case.left, pad=pad) for pad in (0, case.token))
    return leaves, filled, f"padded with token {case.token} instead of 0"


def token_ids(bench: Bench) -> Checked:
    """No token id is special (a pad or end token that is masked wherever it stands): a text of one id counts as one of any other,
    if the model tells no token from another, as with all parameters at 0."""
    case, zero = given(bench.table), jax.tree.map(jnp.zeros_like, bench.params)
    leaves, seen = lay(bench.table, case), {}
    for token in bench.ids:
        text = change(bench.table, leaves, "tokens", lambda x, segments, token=token: np.where(segments > 0, token, x))
        got = bench.measure(text, zero)
        seen[token] = Numbers(got.weight, {**got.metrics, "weight": got.weight}, {}), text
    alike = {token: [compare(a, b)[0] <= bench.tolerance for b, _ in seen.values()] for token, (a, _) in seen.items()}
    usual = max(alike, key=lambda token: sum(alike[token]))
    if sum(alike[usual]) <= len(seen) / 2:
        return Checked(0, 0.0, "with all parameters at 0 this model still tells tokens apart")
    for token, (got, text) in seen.items():
        deviation, what = compare(seen[usual][0], got)
        if deviation > bench.tolerance:
            raise Broken(f"{what}, as of token {usual}", case, text, f"every token replaced by {token}, all parameters 0")
    return Checked(len(seen), 0.0)


@variation("left", token_wise=True, share=2)
def packing(bench, case):
    """Documents may share a row, where targets are summed (unit="token")."""
    a, b, c, d = case.rows
    pairs = [(a, b), (c, d)] * 2  # every row twice: a factor of the sums and of the weight
    return lay(bench.table, case), lay(bench.table, case, pairs, left=case.left), f"packed into rows as {pairs}"


@variation("left", "step", "stray")
def weight_0(bench, case):
    """What has no weight does not exist: the numbers in per-token arrays where `targets` is 0, NaN and inf too, tokens of padding,
    and weights of padding and of a document's first token, which nothing predicts."""
    table, leaves = bench.table, lay(bench.table, case, left=case.left)
    stray = change(table, leaves, "weights", lambda x, segments: np.where(starts(segments), 5, x))
    stray = change(table, stray, "tokens", lambda x, segments: np.where(segments > 0, x, _other(bench, x, case.step)))
    for i, x in enumerate(leaves):
        if table.kinds[i] == "token" and x.dtype.kind == "f":
            stray[i] = np.where(like(targets(table, leaves, table.owners[i]), x), x, np.asarray(case.stray, x.dtype))
    words = f"{case.stray:g} in per-token arrays, other tokens in padding, weights of 5 in padding and at first tokens"
    return leaves, stray, words


def _other(bench: Bench, tokens, step: int):
    """For every token another one, of the ids to try."""
    ids = np.asarray(bench.ids)
    return ids[(np.searchsorted(ids, tokens).clip(0, len(ids) - 1) + step) % len(ids)]


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


def masked_batch(bench: Bench) -> Checked:
    """A batch of padding alone, or without targets, has finite metrics, and a loss and a gradient of 0 (without targets: where
    weights are read)."""
    case = given(bench.table)
    whole = lay(bench.table, case)
    none = change(bench.table, whole, "weights", lambda x, _: 0 * x)
    for words, leaves in (("all weights 0", none), ("padding alone", lay(bench.table, case, [()] * ROWS))):
        got = bench.measure(leaves)
        for name, x in {"weight": got.weight, **got.metrics, **got.gradient}.items():
            if not np.isfinite(x).all():
                raise Broken(f"{name} is not finite", case, leaves, words)
            none = bench.reads_weights or words == "padding alone"
            if none and (name == "loss/total" or name.startswith("gradient")) and np.any(x):
                raise Broken(f"{name} is not 0", case, leaves, words)
    return Checked(2, 0.0)


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


def precision(bench: Bench) -> Checked:
    """A float of the data counts as it is, not rounded (a buffer of integers: zeros_like(tokens))."""
    table, case, tried = bench.table, given(bench.table), 0
    leaves = lay(table, case)
    values = (-2.3, -1.6, -0.8, 0.1, 0.7, 1.4, 2.2)  # to tenths or to whole numbers, none is rounded otherwise than it + 0.01
    for i, x in enumerate(leaves):
        if table.kinds[i] not in ("token", "row") or x.dtype.kind != "f":
            continue
        places = [(0,)] if table.kinds[i] == "row" else np.argwhere(targets(table, leaves, table.owners[i]))[-1:]

        def put(value, i=i, x=x, places=places):
            new = x.copy()
            new[tuple(zip(*places))] = value
            return [*leaves[:i], new, *leaves[i + 1 :]]

        def numbers(value, put=put):
            got = bench.measure(put(value))
            return got.metrics | {name: float(g.ravel() @ np.cos(np.arange(g.size))) for name, g in got.gradient.items()}

        pairs = [(numbers(value), numbers(value + 0.01)) for value in values] if len(places) else []
        tried += len(pairs)
        for name in pairs[0][0] if pairs else ():
            seen = [a[name] for a, _ in pairs]
            rises = max(seen) - min(seen) > 1e-3 * (max(map(abs, seen)) + 1e-3)  # far above rounding
            if rises and len(set(seen)) > 3 and all(a[name] == b[name] for a, b in pairs):
                where = f"{table.names[i]}{[int(k) for k in places[0]]}"
                raise Broken(f"{name} climbs in steps with {where}: it is the same at 2.2 and at 2.21", case, put(2.21))
    return Checked(tried, 0.0, "" if tried else "the data hold no floats but weights")


def gradient(bench: Bench) -> Checked:
    """The gradient is the loss's: central differences along a direction in every parameter agree to 3%. (Deselect it where a
    gradient is stopped on purpose.)"""
    case, draw, worst = given(bench.table), np.random.default_rng(0), 0.0
    leaves = lay(bench.table, case)
    flat, tree = jax.tree.flatten(shard.fetch(bench.params))
    here = bench.measure(leaves)

    def loss(i, step):
        got = bench.measure(leaves, tree.unflatten([*flat[:i], (flat[i] + step).astype(flat[i].dtype), *flat[i + 1 :]]))
        return got.metrics["loss/total"] * got.weight / here.weight

    for i, (name, slope) in enumerate(here.gradient.items()):
        random = draw.normal(size=slope.shape)
        direction = random / np.linalg.norm(random) + slope / max(np.linalg.norm(slope), 1e-30)
        said, found = float((slope * direction).sum()), []
        for h in (1e-2, 3e-2, 3e-3, 1e-3):  # a loss has corners: one step that avoids them will do
            numeric = (loss(i, h * direction) - loss(i, -h * direction)) / (2 * h)
            rounding = 2e-6 * (1 + abs(here.metrics["loss/total"])) / h
            found.append((max(0.0, abs(numeric - said) - rounding) / max(abs(numeric), abs(said), 1e-9), numeric))
            if found[-1][0] < 0.03:
                break
        off, numeric = min(found)
        if not off < 0.03:
            raise Broken(f"{name} says a slope of {said:.4g} where loss/total has {numeric:.4g}", case, leaves)
        worst = max(worst, off)
    return Checked(len(flat), worst)


def devices(bench: Bench) -> Checked:
    """A mesh of any shape gives the same: rows and parameters split by jit, or every device summing its own rows (shard_map)."""
    there, checked = jax.devices(), []
    if len(there) < 2:
        return Checked(0, 0.0, "there is one device; jax.config.update('jax_num_cpu_devices', 8) at the start makes eight")
    full = [2 if len(there) >= n else 1 for n in (2, 4, 8)]
    for how, sizes in (("jit", full), ("shard_map", [4 if len(there) >= 4 else 2, 1, 1])):
        mesh = shard.make_mesh(**dict(zip(shard.AXES, sizes)), devices=there[: int(np.prod(sizes))])

        def compile_step(step, state, mesh=mesh, how=how):
            where = jax.tree.map(lambda _: NamedSharding(mesh, P()), state)
            if how == "jit":
                where = where.replace(params=jax.tree.map(lambda x: NamedSharding(mesh, _split(x.shape, mesh)), state.params))
            else:
                step, rows = partial(step, axis=shard.ROWS), (P(), P(shard.ROWS))
                step = jax.shard_map(step, mesh=mesh, in_specs=rows, out_specs=P(), check_vma=False)
            run, state = shard.on_mesh(jax.jit(step, compiler_options=cheap()), mesh), shard.put(state, where)
            return lambda data: run(state, shard.place(data, mesh))

        spread = step_of(bench, compile_step)

        def law(bench, case, spread=spread, words=f"by {how} over the mesh {dict(mesh.shape)}"):
            leaves = lay(bench.table, case)
            return leaves, leaves, words, spread

        checked.append(variation(examples=6)(law)(bench))
    return Checked(sum(c.tried for c in checked), max(c.deviation for c in checked))


def _split(shape, mesh) -> P:
    """Any layout that divides has to do: the last axes over tensor and fsdp."""
    axes, left = [None] * len(shape), ["tensor", "fsdp"]
    for i in reversed(range(len(shape))):
        if left and shape[i] > 1 and shape[i] % mesh.shape[left[0]] == 0:
            axes[i] = left.pop(0)
    return P(*axes)


def on_policy(bench: Bench) -> Checked:
    """Where the data's log-probabilities are what the scorer says for these parameters, the metrics named in on_policy= have their
    known values (a ratio of 1, a KL of 0): no temperature is forgotten."""
    count, worst = len(bench.table.leaves[0]), 0.0
    if not bench.on_policy:
        return Checked(0, 0.0, "on_policy= names no metric")
    for start in range(0, count, ROWS):
        case = given(bench.table, start)
        leaves = lay(bench.table, case)
        metrics = bench.measure(leaves).metrics
        for name, want in bench.on_policy.items():
            if name not in metrics:
                raise Broken(f"there is no metric {name} among {sorted(metrics)}", case, leaves)
            off = abs(metrics[name] - want) / (1 + abs(want))
            if not off <= bench.tolerance:
                raise Broken(f"{name} is {metrics[name]:.7g} instead of {want:g}", case, leaves)
            worst = max(worst, off)
    return Checked(-(-count // ROWS), worst)


def jit(bench: Bench) -> Checked:
    """Compiled or not, loss and metrics are the same."""
    case = given(bench.table)
    leaves = lay(bench.table, case)
    loss, sums = bench.objective(bench.params, jax.tree.map(jnp.asarray, bench.table.tree.unflatten(leaves)))
    by = float(sums["weight"])
    own = {name: float(x) / by for name, x in {**sums, "loss/total": loss}.items() if name != "weight"}
    deviation, what = compare(bench.measure(leaves)._replace(gradient={}), Numbers(by, own, {}))
    if deviation > bench.tolerance:
        raise Broken(f"without jit, {what}", case, leaves)
    return Checked(1, deviation)


LAWS = {
    "result": result,
    "deterministic": deterministic,
    "row order": row_order,
    "micro-batches": micro_batches,
    "pad side": pad_side,
    "pad length": pad_length,
    "pad id": pad_id,
    "token ids": token_ids,
    "packing": packing,
    "weight 0": weight_0,
    "masked rows": masked_rows,
    "masked batch": masked_batch,
    "weights": weights,
    "future": future,
    "precision": precision,
    "gradient": gradient,
    "devices": devices,
    "on policy": on_policy,
    "jit": jit,
}
