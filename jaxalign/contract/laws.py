"""LAWS: what must hold, by name. Those of `variations`, and here those that measure otherwise. A docstring is the law."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign import shard
from jaxalign.contract import variations
from jaxalign.contract.layout import ROWS, change, given, lay, targets
from jaxalign.contract.measure import Bench, Numbers, cheap, compare, step_of
from jaxalign.contract.variations import Broken, Checked, variation


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


def token_ids(bench: Bench) -> Checked:
    """No token id is special (a pad or end token that is masked wherever it stands): a text of one id counts as one of any other,
    if the model tells no token from another, as with all parameters at 0."""
    case, zero = given(bench.table), jax.tree.map(jnp.zeros_like, bench.params)
    leaves, seen = lay(bench.table, case), {}
    for token in bench.ids:
        text = leaves
        for kind in ("tokens", "source"):
            text = change(bench.table, text, kind, lambda x, segments, token=token: np.where(segments > 0, token, x))
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
    "row order": variations.row_order,
    "micro-batches": variations.micro_batches,
    "pad side": variations.pad_side,
    "pad length": variations.pad_length,
    "pad id": variations.pad_id,
    "token ids": token_ids,
    "packing": variations.packing,
    "weight 0": variations.weight_0,
    "masked rows": variations.masked_rows,
    "masked batch": masked_batch,
    "weights": variations.weights,
    "future": variations.future,
    "precision": precision,
    "gradient": gradient,
    "devices": devices,
    "on policy": on_policy,
    "jit": jit,
}
