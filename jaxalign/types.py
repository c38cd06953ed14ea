"""The values that flow through jaxalign, and the one rule that aligns them.

Axis letters: B rows, T tokens of a row, V vocabulary, D width, L layers, H heads, G key/value heads, K head size.

**The alignment rule.** Every per-token array is [B, T], and its entry t speaks of `tokens[:, t]`: the log-probability of that
token given the tokens before it, the value *before* it was emitted, its reward, its advantage, its weight.
`score.evaluate` is the only function that shifts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array


@struct.dataclass
class Batch:
    """Rows of tokens. Left padding, right padding and packing are one thing: segments.

    Documents of a row are contiguous runs, numbered 1, 2, ... from left to right; 0 is padding.
    """

    tokens: Array  # i32 [B,T]
    segments: Array  # i32 [B,T]; 0 = padding, 1.. = document within the row
    weights: Array  # f32 [B,T]; > 0 where the token is a target

    @property
    def targets(self) -> Array:
        """f32 [B,T]: the weights, 0 at padding and at the first token of a document, which nothing predicts."""
        before = jnp.pad(self.segments[:, :-1], ((0, 0), (1, 0)))
        return jnp.where((self.segments > 0) & (self.segments == before), self.weights, 0.0)


@struct.dataclass
class Pairs:
    """Two responses to the same prompts, in the order somebody preferred them."""

    chosen: Batch
    rejected: Batch
    margin: Array  # f32 [B]; by how much, in the units of the reward (0: not said)


@struct.dataclass
class Rollout:
    """Sampled rows and all that the policy update needs to know of them. No model enters the update but the policy."""

    batch: Batch  # weights are 1 on response tokens up to and including EOS
    logp: Array  # f32 [B,T] nats, of the policy that sampled, tempered
    ref_logp: Array  # f32 [B,T] nats, of the reference policy, tempered
    value: Array  # f32 [B,T], predicted return before each token
    reward: Array  # f32 [B,T], KL penalty and score (ops.advantages.token_rewards)
    advantage: Array  # f32 [B,T]
    target: Array  # f32 [B,T], what the value is regressed on
    score: Array  # f32 [B], of the whole response


@struct.dataclass
class TrainState:
    """All that the next number of a run depends on, beside (seed, step): what a checkpoint holds."""

    step: Array  # i32 [], updates of the parameters so far
    params: Any
    opt: Any
    loop: Any = struct.field(default_factory=dict)  # arrays that a loop carries between updates: {"beta": KL coefficient}


class Model(NamedTuple):
    """A language model as pure functions: the only door to Flax. Parameters are always arguments."""

    config: Any  # the architecture, a frozen dataclass
    init: Callable  # (key) -> params, each leaf boxed with its logical axes (shard.Declared)
    apply: Callable  # (params, tokens, segments, cache=None, at=0) -> (hidden [B,T,D], cache)
    unembed: Callable  # (params, hidden [...,D]) -> logits f32 [...,V]
    scalar: Callable  # (params, hidden [...,D]) -> f32 [...], the reward or value head
    cache: Callable  # (rows, length) -> pytree for `apply`
