"""What structured pruning shares: which units of a dimension stay, and what is left of a tensor.

A dimension is what one size of an architecture counts (hidden channels, heads, experts); one of its
units is one channel of some tensors and several of others, such as a head's.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped


def highest(scores: Float[np.ndarray, " n"], count: int) -> Int[np.ndarray, " m"]:
    """The `count` units with the highest scores, in their order; of equals, the first ones."""
    if not 0 < count <= len(scores):
        raise ValueError(f"count={count} must be from 1 to the {len(scores)} units that there are.")
    return np.sort(np.argsort(-np.asarray(scores), kind="stable")[:count])


def highest_heads(
    heads: Float[np.ndarray, " a"], kv_heads: Float[np.ndarray, " k"], counts: tuple[int, int]
) -> tuple[Int[np.ndarray, " b"], Int[np.ndarray, " l"]]:
    """The query heads and key-value heads that stay; counts: how many of both.

    A key-value head goes with the query heads that it serves, and counts what they do beside its
    own; of each that stays, equally many of its query heads do. Raises ValueError where that cannot
    be.
    """
    require_heads(counts, (len(heads), len(kv_heads)))
    grouped = np.asarray(heads).reshape(len(kv_heads), -1)
    kept_kv = highest(kv_heads + grouped.sum(1), counts[1])
    size, each = grouped.shape[1], counts[0] // counts[1]
    kept = [group * size + highest(grouped[group], each) for group in kept_kv]
    return np.concatenate(kept), kept_kv


def require_heads(counts: tuple[int, int], there: tuple[int, int]) -> None:
    """Refuse counts of query and key-value heads that do not go together, of so many."""
    (heads, kv_heads), each = counts, there[0] // there[1]
    for name, count, most in (("kv_heads", kv_heads, there[1]), ("heads", heads, there[0])):
        if not 0 < count <= most:
            raise ValueError(f"{name}={count} must be from 1 to the {most} that there are.")
    if heads % kv_heads or heads // kv_heads > each:
        raise ValueError(
            f"heads={heads} with kv_heads={kv_heads}: each key-value head keeps equally many of "
            f"the {each} query heads that it serves, so heads must be kv_heads times 1 to {each}."
        )


def take(
    x: Shaped[np.ndarray, "..."], axis: int, kept: Int[np.ndarray, " m"], units: int
) -> Shaped[np.ndarray, "..."]:
    """What stays of a tensor of which one axis has `units` units, one behind the other."""
    shape = list(x.shape)
    split = x.reshape(*shape[:axis], units, -1, *shape[axis + 1 :])
    shape[axis] = len(kept) * (shape[axis] // units)
    return np.take(split, kept, axis).reshape(shape)


def norm_over_fewer(
    gamma: Float[np.ndarray, " m"], before: int, after: int
) -> Float[np.ndarray, " m"]:
    """γ √(before / after): a norm divides by the root of a mean over the channels that are left;
    were what went zero, the mean over all of them was after / before times as much.
    """
    if before == after:
        return gamma
    return np.asarray(gamma, np.float32) * np.float32(math.sqrt(before / after))


def spans(numbers: Sequence[int]) -> str:
    """Whole numbers in a few characters: "0, 3-5"."""
    found: list[list[int]] = []
    for n in numbers:
        if found and n == found[-1][1] + 1:
            found[-1][1] = n
        else:
            found.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)
