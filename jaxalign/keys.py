"""Random keys. Every draw is keyed by (seed, role, counters...), never by where in a batch, on which host or device it happens."""

import jax
import jax.numpy as jnp
import numpy as np

ROLES = ("init", "sample", "shuffle", "evaluate", "compare", "annotate")


def key(seed: int, role: str, *counters):
    """The key of one role (ROLES) at, say, one step. ValueError for a role that is not on the list, a seed beyond 32 bits."""
    if role not in ROLES:
        raise ValueError(f"role {role!r}; there are {', '.join(ROLES)}")
    if isinstance(seed, int) and not 0 <= seed < 2**32:  # JAX would take its last 32 bits, and so the key of another seed
        raise ValueError(f"seed = {seed}: it is a whole number from 0 to {2**32 - 1}")
    made = jax.random.fold_in(jax.random.key(seed), ROLES.index(role))
    for counter in counters:
        made = jax.random.fold_in(made, counter)
    return made


def of_rows(base, examples):
    """One key a row, from the number of its example and how often that example came before in this call. -> keys [B]"""
    examples = np.asarray(examples)
    times = np.array([(examples[:row] == example).sum() for row, example in enumerate(examples)], np.int32)
    fold = jax.vmap(jax.random.fold_in)
    return fold(fold(jnp.broadcast_to(base, examples.shape), jnp.asarray(examples, jnp.int32)), jnp.asarray(times))
