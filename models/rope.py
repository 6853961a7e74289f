"""Rotary position embedding. Su et al., 2021, arXiv:2104.09864, in the two-halves layout."""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the rotation frequencies are stretched beyond the context of pretraining.

    "linear" divides every frequency by `factor` (Chen et al., arXiv:2306.15595). "llama3" divides
    the low frequencies, keeps the high ones and interpolates between (Llama 3.1,
    arXiv:2407.21783): wavelengths above `original_context / low_frequency_factor` tokens are low,
    below `original_context / high_frequency_factor` high. "longrope" divides each by its own
    number, one of `short` within the original context and of `long` in longer sequences, and
    multiplies what is turned by `stretch` (Ding et al., arXiv:2402.13753).
    """

    kind: Literal["linear", "llama3", "longrope"]
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 8192
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()
    stretch: float = 1.0


def turning(
    size: int, theta: float, scaling: RopeScaling | None, positions: Int[Array, "B T"]
) -> Float[Array, "*rows pairs"]:
    """The frequencies for sequences that reach the largest of these positions."""
    f = frequencies(size, theta, scaling)
    if scaling is None or scaling.kind != "longrope":
        return f
    longer = jnp.asarray(plain(size, theta) / np.array(scaling.long, np.float32))
    reached = positions.max(-1)[:, None, None, None]
    return jnp.where(reached >= scaling.original_context, longer, f)


def plain(size: int, theta: float) -> Float[np.ndarray, " pairs"]:
    """Unscaled frequencies."""
    # In NumPy, for a compiler may fold powers its own way, and rounded in the steps that the
    # models were trained with: one ulp of f is 3e-5 radians at position 511.
    return np.float32(1) / (theta ** (np.arange(0, size, 2) / size)).astype(np.float32)


def frequencies(size: int, theta: float, scaling: RopeScaling | None) -> Float[Array, " pairs"]:
    """Radians per position of each pair of channels, highest first; within the original context."""
    f = plain(size, theta)
    return jnp.asarray(f if scaling is None else stretch(f, scaling))


def stretch(f: Float[np.ndarray, " pairs"], scaling: RopeScaling) -> Float[np.ndarray, " pairs"]:
    """The frequencies after scaling."""
    if scaling.kind == "linear":
        return f / np.float32(scaling.factor)
    if scaling.kind == "longrope":
        return f / np.array(scaling.short, np.float32)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    turns = scaling.original_context * f / (2 * math.pi)  # within the original context
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return keep * f + (1 - keep) * f / scaling.factor


def rotate(
    x: Float[Array, "B T n h"],
    positions: Int[Array, "B T"],
    f: Float[Array, "*rows pairs"],
    stretch: float = 1.0,
) -> Float[Array, "B T n h"]:
    """Rotate channel pairs (c, c + p) of x's first 2 p channels by positions × f, in float32."""
    angles = positions[:, :, None, None] * f  # (B, T, 1, p)
    cos, sin = jnp.cos(angles) * stretch, jnp.sin(angles) * stretch
    a, b, rest = jnp.split(x.astype(jnp.float32), [f.shape[-1], 2 * f.shape[-1]], axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x.dtype)
