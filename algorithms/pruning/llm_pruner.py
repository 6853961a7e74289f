"""LLM-Pruner. Ma, Fang, Wang, "LLM-Pruner: On the Structural Pruning of Large Language Models",
NeurIPS 2023, arXiv:2305.11627. Notes: papers/llm_pruner.md.

Channels that can only go together are a group: a channel of the feed-forward layer is a row of the
matrices that write it and a column of the one that reads it. A group is worth what its weights seem
to be worth to the loss L on a few texts, each by its first-order Taylor term, summed over the
matrices W of the group and over the rows, or columns, W_c of its channel:
    param_first   I_c = Σ_W Σ_k | W_ck ∂L/∂W_ck |
    vectorize     I_c = Σ_W | Σ_k W_ck ∂L/∂W_ck |
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

TAYLOR = ("param_first", "vectorize")


def require_taylor(taylor: str) -> None:
    if taylor not in TAYLOR:
        raise ValueError(f"taylor={taylor!r} must be {' or '.join(TAYLOR)}.")


def channel_salience(
    w: Float[Array, "..."], gradient: Float[Array, "..."], axis: int, taylor: str = "param_first"
) -> Float[Array, " c"]:
    """What one matrix adds to the importance of each channel along one of its axes."""
    terms = w * gradient
    others = tuple(n for n in range(w.ndim) if n != axis)
    if taylor == "vectorize":
        return jnp.abs(terms.sum(others))
    return jnp.abs(terms).sum(others)


def importance(
    weights: Mapping[str, Float[Array, "..."]],
    gradients: Mapping[str, Float[Array, "..."]],
    groups: Mapping[str, Sequence[str | None]],
    units: Mapping[str, int],
    taylor: str = "param_first",
) -> dict[str, Float[Array, " u"]]:
    """Of every unit of the dimensions in `units`, which says how many there are of each.

    groups: of every weight by name, the dimension that each of its axes is of.
    """
    found = {dimension: jnp.zeros(count) for dimension, count in units.items()}
    for name, w in weights.items():
        for axis, dimension in enumerate(groups[name]):
            if dimension in found:
                channels = channel_salience(w, gradients[name], axis, taylor)
                found[dimension] += channels.reshape(units[dimension], -1).sum(1)
    return jax.block_until_ready(found)
