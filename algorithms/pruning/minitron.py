"""Minitron. Muralidharan, Sreenivas, Joshi, Chochowski, Patwary, Shoeybi, Catanzaro, Kautz,
Molchanov, "Compact Language Models via Pruning and Knowledge Distillation", NeurIPS 2024,
arXiv:2407.14679. Notes: papers/minitron.md.

What a channel is worth is how large its activations x are, over tokens t of windows b:
    s_i = ‖ mean_t |x_bti| ‖₂ over b
read where the channel is multiplied next: for a channel of the feed-forward layer before its last
projection, for a head before the output projection (the norm of its channels' s), for a channel of
the residual stream behind every norm (the sum over norms).
"""

from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float

type Aggregation = Literal["mean", "l2"]
AGGREGATIONS = get_args(Aggregation.__value__)


def require_aggregations(**chosen: str) -> None:
    """ValueError for a word that is none."""
    for name, how in chosen.items():
        if how not in AGGREGATIONS:
            raise ValueError(f"{name}={how!r} must be {' or '.join(AGGREGATIONS)}.")


def observe(
    x: Float[Array, "B T i"], *, over_batch: str = "l2", over_sequence: str = "mean"
) -> Float[Array, " i"]:
    """What a chunk of windows adds to the sum that `importance` is made of."""
    x = x.astype(jnp.float32)
    by_window = jnp.abs(x).mean(1) if over_sequence == "mean" else jnp.linalg.norm(x, axis=1)
    return jnp.sum(by_window if over_batch == "mean" else by_window**2, 0)


def importance(
    seen: Float[Array, " i"], windows: int, *, over_batch: str = "l2"
) -> Float[Array, " i"]:
    """s."""
    return seen / windows if over_batch == "mean" else jnp.sqrt(seen)


def head_importance(s: Float[Array, " i"], heads: int) -> Float[Array, " a"]:
    """Of heads, from their channels'."""
    return jnp.linalg.norm(s.reshape(heads, -1), axis=1)
