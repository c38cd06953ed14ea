"""The values that flow through jaxalign, and the one rule that aligns them.

Axis letters: B rows, T tokens of a row, S of a source, V vocabulary, D width, L layers, H heads, G key/value heads, K head size.

**The alignment rule.** Every per-token array is [B, T], and its entry t speaks of `tokens[:, t]`: the log-probability of that
token given the tokens before it, the value *before* it was emitted, its reward, its advantage, its weight.
`score.evaluate` is the only function that shifts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array


@struct.dataclass
class Batch:
    """Rows of tokens. Left padding, right padding and packing are one thing: segments.

    Documents of a row are contiguous runs, numbered 1, 2, ... from left to right; 0 is padding. For an encoder-decoder, each
    document has a source, the run of the same number, which all of it attends to; its first token is the one that decoding starts
    with.
    """

    tokens: Array  # i32 [B,T]
    segments: Array  # i32 [B,T]; 0 = padding, 1.. = document within the row
    weights: Array  # f32 [B,T]; > 0 where the token is a target
    source: Array | None = None  # i32 [B,S], what an encoder reads
    source_segments: Array | None = None  # i32 [B,S]

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
    ref_chosen: Array | None = None  # f32 [B] nats, of the targets by a frozen reference (objectives.preference.with_reference)
    ref_rejected: Array | None = None


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


def new_guard() -> dict:
    """Before the first update: how many were applied, the running mean and variance of their gradient norms; how many skipped."""
    counts = {name: jnp.int32(0) for name in ("applied", "skipped", "skipped_in_a_row")}
    return counts | {"mean": jnp.float32(0), "variance": jnp.float32(0)}


def join(frozen, params):
    """All parameters of a model, from two trees of dicts that share no leaf (models.adapters.split); frozen = (): `params`.

    The leaves are the same arrays.
    """
    if not isinstance(frozen, dict):
        return params
    return frozen | {name: join(frozen.get(name), part) for name, part in params.items()}


@struct.dataclass
class TrainState:
    """All that the next number of a run depends on, beside (seed, step): what a checkpoint holds, but for `frozen`."""

    step: Array  # i32 [], updates of the parameters so far
    params: Any  # those that are trained
    opt: Any
    loop: Any = struct.field(default_factory=dict)  # what a loop carries between updates: {"beta": price of KL, "rollout": Rollout}
    guard: Any = struct.field(default_factory=new_guard)  # what updates were like, and how many were skipped (train.step)
    frozen: Any = ()  # the model's other parameters; no step changes them, gives them away or copies them

    @property
    def model_params(self):
        """What the model takes: all of its parameters."""
        return join(self.frozen, self.params)


class Model(NamedTuple):
    """A language model as pure functions: the only door to Flax. Parameters are always arguments."""

    config: Any  # the architecture, a frozen dataclass
    init: Callable  # (key) -> params, each leaf boxed with its logical axes (shard.Declared)
    # (params, tokens, segments, cache=None, at=0, source=None, source_segments=None, shared=(1, 0)) -> (hidden [B,T,D], cache)
    apply: Callable
    unembed: Callable  # (params, hidden [...,D]) -> logits f32 [...,V]
    scalar: Callable  # (params, hidden [...,D]) -> f32 [...], the reward or value head
    cache: Callable  # (rows, T) -> dict for `apply`: "segments" [B,T], other leaves [B,T] or [L,B,T,...]
    head: Callable = lambda params: params  # (params) -> the part of them that `unembed` reads

    def read(self, params, batch: Batch, *cached):
        """`apply` to all that a batch holds. -> (hidden [B,T,D], cache). Args: cached: cache and at."""
        source = {} if batch.source is None else {"source": batch.source, "source_segments": batch.source_segments}
        return self.apply(params, batch.tokens, batch.segments, *cached, **source)

    def sharing(self, group: int, columns: int) -> "Model":
        """The model for rows of which each `group` have the same first `columns`, or the same source: read once for all of them.

        What it says is the same, but for rounding; of a group whose rows differ there it says NaN. B divides by `group`.
        """
        return self._replace(apply=partial(self.apply, shared=(group, columns)))
