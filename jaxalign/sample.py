"""Prefill once, then a token at a time with an explicit cache. Decoding runs the forward function of scoring and training."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.ops import filters
from jaxalign.score import of_logits
from jaxalign.types import Batch, Model

FIRST = 128  # columns for responses that a cache has at first; they double


def choose(u, logits, allowed=None, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0):
    """Draw one token a row. -> (tokens i32 [B], logp f32 [B], drawn_logp f32 [B])

    logp is of the tempered distribution, which scoring and training speak of; drawn_logp of what `allowed`, and of that top-k and
    top-p, left of it. Temperature 0 takes the most likely token; both log-probabilities are then of temperature 1.
    Args: u [B,2], uniform in [0, 1); logits [B,V]; allowed: i32 [B,V], below 0 for what is never drawn; None: all may be.
    Raises ValueError for a temperature, top_k or top_p below 0.
    """
    if min(temperature, top_k, top_p) < 0:
        raise ValueError(f"temperature = {temperature}, top_k = {top_k}, top_p = {top_p}: none may be below 0")
    z = logits.astype(jnp.float32) / (temperature or 1)
    kept = z if allowed is None else jnp.where(allowed >= 0, z, -jnp.inf)
    if temperature == 0:
        tokens = jnp.argmax(kept, axis=-1).astype(jnp.int32)
    else:
        kept = filters.top_p(filters.top_k(kept, top_k), top_p)
        tokens = filters.categorical(u, kept)
    logp = of_logits(logits, tokens, temperature=temperature or 1).logp
    return tokens, logp, logp if kept is z else of_logits(kept, tokens).logp


def sample(
    model: Model,
    params,
    keys,
    prompts: Batch,
    *,
    length: int,
    eos: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    slots: int = 0,
    allowed=None,
    until=None,
):
    """Continue prompts by up to `length` tokens, up to and including EOS. -> (Batch, logp, drawn_logp), each [B, T + length]

    The batch's weights are 1 on the tokens drawn. What follows the end is padding: token 0, segment 0.
    Args:
        keys: random keys [B], one a row; draw i of a row is keyed by fold_in(key, i), whatever the rest of the batch does.
        prompts: left-padded, so that every row's last column is its last token. B of them, or B/n: each is read once, and continued
            in n rows, one behind the other.
        eos: id of the token that ends a response; -1 for none.
        slots: how many rows are decoded at a time: where one ends, another begins. 0: all. It changes no sample.
        allowed: i32 [S,V], of prompts.constrain: in state s, token v leads to state allowed[s,v]; -1: it is never drawn. A row
            begins in state 0. A response that has no EOS yet when its length is up is the start of one that is allowed.
        until: i32 [S,V], of prompts.constrain: in state s, token v leads to state until[s,v]; -1: it ends the response.
    Raises ValueError where the rows of `allowed` or `until` are not as long as the vocabulary, and, of NumPy arrays, where prompts
    are padded on the right.
    """
    (asked, start), rows = prompts.tokens.shape, len(keys)
    if isinstance(prompts.segments, np.ndarray) and ((prompts.segments > 0).any(1) & (prompts.segments[:, -1] == 0)).any():
        raise ValueError("a prompt ends before the last column, where its continuation begins: pad on the left")
    if rows % asked:
        raise ValueError(f"{rows} keys for {asked} prompts: each prompt has as many")
    for name, table in {"allowed": allowed, "until": until}.items():
        if table is not None and table.shape[1] != model.config.vocab:
            raise ValueError(f"{name} is of a vocabulary of {table.shape[1]}, and the model's has {model.config.vocab}")
    group, slots = rows // asked, min(slots or rows, rows)

    def draw(state, logits):
        """Rows with a token more, those that live."""
        live, count = state["live"], state["count"]
        u = jnp.take_along_axis(state["u"], count[:, None, None], axis=1, mode="clip")[:, 0]
        follows = None if allowed is None else jnp.asarray(allowed)[state["place"]]
        drawn = choose(u, logits, follows, temperature=temperature, top_k=top_k, top_p=top_p)
        if allowed is not None:
            state = state | {"place": jnp.take_along_axis(follows, drawn[0][:, None], axis=1)[:, 0]}
        going = drawn[0] != eos
        if until is not None:
            state = state | {"spelt": jnp.asarray(until)[state["spelt"], drawn[0]]}
            going &= state["spelt"] >= 0
        here = live[:, None] & (jnp.arange(length)[None] == count[:, None])
        said = jax.tree.map(lambda x, new: jnp.where(here, new[:, None], x), state["said"], drawn)
        token, count = jnp.where(live, drawn[0], 0), count + live
        return state | {"token": token, "said": said, "count": count, "live": live & going & (count < length)}

    def one(carry):
        at, cache, state = carry
        segments = jnp.where(state["live"], state["segment"], 0)
        hidden, cache = model.apply(params, state["token"][:, None], segments[:, None], cache, at)
        return at + 1, cache, draw(state, model.unembed(params, hidden[:, 0]))

    hidden, read = model.read(params, prompts, model.cache(asked, start), 0)
    prompts = jax.tree.map(lambda x: jnp.repeat(x, group, axis=0), prompts)
    last, zeros = prompts.segments[:, -1], jnp.zeros((rows, length), jnp.float32)
    state = {"row": jnp.arange(rows), "u": _uniform(keys, length), "segment": last, "live": last > 0}
    state |= dict.fromkeys(("token", "count", "place", "spelt"), 0 * last) | {"said": (zeros.astype(jnp.int32), zeros, zeros)}
    state = draw(state, jnp.repeat(model.unembed(params, hidden[:, -1]), group, axis=0))
    state = (_at_once if slots == rows else _in_turn)(model, one, read, state, slots=slots, group=group, start=start, length=length)

    none = jnp.zeros((rows, start), jnp.float32)
    weights = (jnp.arange(length)[None] < state["count"][:, None]).astype(jnp.float32)
    tokens, logp, drawn_logp = state["said"]
    batch = Batch(
        jnp.concatenate([prompts.tokens, tokens], axis=1),
        jnp.concatenate([prompts.segments, weights.astype(jnp.int32) * last[:, None]], axis=1),
        jnp.concatenate([none, weights], axis=1),
        prompts.source,
        prompts.source_segments,
    )
    return batch, jnp.concatenate([none, logp], axis=1), jnp.concatenate([none, drawn_logp], axis=1)


def _uniform(keys, length: int):
    """All random numbers of rows with these keys, f32 [B,length,2]: few, so there is no need to make them a step at a time."""

    def of_draw(key, i):
        return jax.random.uniform(jax.random.fold_in(key, i), (2,))

    return jax.vmap(jax.vmap(of_draw, (None, 0)), (0, None))(keys, jnp.arange(length))


def _at_once(model, one, read, state, *, slots, group, start, length):
    """All rows decoded at the same time. The cache grows, for attention reads all columns of it, filled or not."""
    at, cache, columns = jnp.int32(start), _repeated(read, group, slots), start
    while columns < start + length - 1:  # no row's last token is read
        columns = min(start + length - 1, start + max(FIRST, 2 * (columns - start)))

        def unfinished(carry, columns=columns):
            return carry[2]["live"].any() & (carry[0] < columns)

        at, cache, state = jax.lax.while_loop(unfinished, one, (at, _grown(model, cache, slots, columns), state))
    return state


def _in_turn(model, one, read, state, *, slots, group, start, length):
    """Rows decoded `slots` at a time. A row that begins has its prompt end at the column where the others are."""
    need = start + length - 1
    columns, own = need + need // 4 + 1, model.cache(1, 1).keys()  # own: what of a cache has columns

    def slide(carry):
        """The oldest columns leave, which no row needs."""
        at, cache, *rest = carry
        back = {name: jax.tree.map(lambda x: jnp.roll(x, need - columns, _axis(x) + 1), cache[name]) for name in own}
        return at - columns + need, cache | back, *rest

    def stored(every, state):
        return jax.tree.map(lambda x, new: x.at[state["row"]].set(new), every, state)

    def refill(carry):
        at, cache, state, every, waiting = carry
        every, free = stored(every, state), ~state["live"]
        following = jnp.nonzero(waiting, size=slots, fill_value=len(waiting))[0][jnp.cumsum(free) - 1]
        fresh = free & (following < len(waiting))
        rows = jnp.where(fresh, following, state["row"])

        def put(x, prompt, columned):
            axis = _axis(x)
            if prompt.shape[axis] != len(waiting) // group:
                return x  # of virtual tokens, which all rows share
            old = jax.lax.dynamic_slice_in_dim(x, at - start, start, axis + 1) if columned else x
            here = fresh.reshape(-1, *(1,) * (x.ndim - axis - 1))
            new = jnp.where(here, prompt.take(rows // group, axis), old)
            return jax.lax.dynamic_update_slice_in_dim(x, new, at - start, axis + 1) if columned else new

        cache = cache | {"segments": jnp.where(fresh[:, None], 0, cache["segments"])}
        cache = {name: jax.tree.map(partial(put, columned=name in own), part, read[name]) for name, part in cache.items()}
        return at, cache, jax.tree.map(lambda x: x[rows], every), every, waiting.at[rows].set(False)

    def step(carry):
        at, cache, state, *queue = jax.lax.cond(carry[0] == columns, slide, tuple, carry)
        carry = *one((at, cache, state)), *queue
        return jax.lax.cond(carry[4].any() & ~carry[2]["live"].all(), refill, tuple, carry)

    def unfinished(carry):
        return carry[2]["live"].any() | carry[4].any()

    waiting = state["live"] & (state["row"] >= slots)
    first = jax.tree.map(lambda x: x[:slots], state)
    cache = _grown(model, _repeated(read, group, slots), slots, columns)
    _, _, last, every, _ = jax.lax.while_loop(unfinished, step, (jnp.int32(start), cache, first, state, waiting))
    return stored(every, last)


def _axis(x) -> int:
    """The axis of rows of a cache's leaf, [B,T] or [L,B,T,...]."""
    return min(1, x.ndim - 2)


def _repeated(cache, group: int, rows: int):
    """Of a cache of prompts, each `group` times, the first `rows`."""
    many = cache["segments"].shape[0]

    def one(x):
        if x.shape[_axis(x)] != many:
            return x
        few = jax.lax.slice_in_dim(x, 0, -(-rows // group), axis=_axis(x))
        return jax.lax.slice_in_dim(jnp.repeat(few, group, _axis(x)), 0, rows, axis=_axis(x))

    return jax.tree.map(one, cache)


def _grown(model, cache, rows: int, columns: int):
    """A cache with so many columns."""
    blank = model.cache(rows, columns)
    old = {name: cache[name] for name in blank}
    return cache | jax.tree.map(lambda x, old: jax.lax.dynamic_update_slice(x, old, (0,) * x.ndim), blank, old)
