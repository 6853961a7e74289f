"""REAP. Lasby, Lazarevich, Sinnadurai, Lie, Ioannou, Thangarasa, "REAP the Experts: Why Pruning
Prevails for One-Shot MoE Compression", ICLR 2026, arXiv:2510.13999. Notes: papers/reap.md.

An expert j is worth what it adds to its mixture's output, on average over the tokens X_j that are
sent to it: with g_j(x) what the router weighs it by and f_j(x) what it gives,
    S_j = 1/|X_j| Σ_{x in X_j} g_j(x) ‖f_j(x)‖₂
The experts with the lowest go; the router knows the others alone. What it is compared with is
    frequency_j = |X_j|,
how often an expert is chosen. R rows, sorted by expert; E experts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

SCORES = ("reap", "frequency")


class Contribution(NamedTuple):
    """Of each expert, over the tokens seen so far."""

    total: Float[Array, " E"]
    tokens: Int[Array, " E"]


def observe(
    y: Float[Array, "R D"], weights: Float[Array, " R"], counts: Int[Array, " E"]
) -> Contribution:
    """y: what experts gave; weights: what it counts; counts: rows of each expert."""
    experts = len(counts)
    ends = jnp.cumsum(counts)
    expert = jnp.searchsorted(ends, jnp.arange(len(y)), side="right")
    norms = jnp.linalg.norm(y.astype(jnp.float32), axis=-1)
    total = jax.ops.segment_sum(weights * norms, expert, num_segments=experts)
    return Contribution(total, counts)


def saliency(seen: Contribution, score: str = "reap") -> Float[Array, " E"]:
    """S; of an expert that no token was sent to, 0. Or the other score."""
    if score == "frequency":
        return seen.tokens.astype(jnp.float32)
    return seen.total / jnp.maximum(seen.tokens, 1)


def require_score(score: str) -> None:
    """ValueError for a word that is none."""
    if score not in SCORES:
        raise ValueError(f"score={score!r} must be {' or '.join(SCORES)}.")
