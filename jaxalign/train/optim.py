"""The optimiser: Adam with a schedule, clipping and masked decay."""

from functools import partial

import jax
import jax.numpy as jnp
import optax

TINY = 1e-30  # under the root of Adam's second moment: changes no number, and gives the root a slope where all gradients were 0


def clip(bound: float) -> optax.GradientTransformation:
    """optax.clip_by_global_norm as one factor, which is fused into what follows. train.step says `norm`, which it knows."""

    def update(grads, state, params=None, *, norm=None, **_):
        size = jnp.minimum(1, bound / (optax.tree.norm(grads) if norm is None else norm))
        return jax.tree.map(lambda g: size * g, grads), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def scale_by_adam_tensorflow(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """TensorFlow 1's Adam: sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps), with eps outside the bias correction.

    Ziegler et al. 2019 trained with it. At a large eps its first updates are smaller than optax's and PyTorch's.
    """
    moments = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

    def update(grads, state, params=None):
        _, state = moments.update(grads, state, params)
        t = state.count.astype(jnp.float32)
        size = jnp.sqrt(1 - b2**t) / (1 - b1**t)
        return jax.tree.map(lambda m, v: size * m / (jnp.sqrt(v + TINY) + eps), state.mu, state.nu), state

    return optax.GradientTransformation(moments.init, update)


def schedule(*, learning_rate: float, steps: int, warmup: int = 0, decay: str = "linear"):
    """Linear warm-up over `warmup` updates, then to 0 at `steps` ("linear" or "cosine"), or "constant"."""
    rest = max(1, steps - warmup)
    shapes = {
        "constant": optax.constant_schedule(learning_rate),
        "linear": optax.linear_schedule(learning_rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(learning_rate, rest),
    }
    if decay not in shapes:
        raise ValueError(f"optim.decay = {decay!r}; there are {', '.join(shapes)}")
    if not warmup:
        return shapes[decay]
    return optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup), shapes[decay]], [warmup])


def adam(
    *,
    learning_rate: float,
    steps: int,
    warmup: int = 0,
    decay: str = "linear",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_placement: str = "pytorch",
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """Adam(W). `steps` counts updates. Weight decay, decoupled, touches kernels and LoRA only: no norm, bias or embedding.

    Args: eps_placement: "pytorch" (optax's too) or "tensorflow"; clip_norm: bound of the global gradient norm, 0 for none.
    """
    scalers = {"pytorch": partial(optax.scale_by_adam, eps_root=TINY), "tensorflow": scale_by_adam_tensorflow}
    if eps_placement not in scalers:
        raise ValueError(f"optim.eps_placement = {eps_placement!r}; there are {', '.join(scalers)}")

    def kernels(params):
        decayed = ("kernel", "lora_a", "lora_b")
        return jax.tree_util.tree_map_with_path(lambda path, _: getattr(path[-1], "key", None) in decayed, params)

    return optax.chain(
        clip(clip_norm) if clip_norm else optax.identity(),
        scalers[eps_placement](b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay, mask=kernels) if weight_decay else optax.identity(),
        optax.scale_by_learning_rate(schedule(learning_rate=learning_rate, steps=steps, warmup=warmup, decay=decay)),
    )
