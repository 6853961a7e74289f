"""Stochastic rounding. Gupta, Agrawal, Gopalakrishnan, Narayanan, ICML 2015, arXiv:1502.02551.
Notes: papers/stochastic_rounding.md.

On a grid with scale s and zero point z, a weight w between two points goes to either with the
probability that makes it right on average (Sec. 3.1):
    x = w / s,   q = clip(⌊x⌋ + [u < x - ⌊x⌋] + z, 0, 2^bits - 1),   u ~ U[0, 1),   ŵ = s (q - z)
so that E ŵ = w inside the range. This is ⌊x + u⌋, without the sum: rounded to float32, it could
reach the next whole number and move a weight that lies on the grid.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from algorithms.layerwise import LayerwiseMethod
from algorithms.numerics import IntegerGrid
from algorithms.tensors import QuantizedTensor


def stochastic_rounding(**grid) -> LayerwiseMethod:
    """Data-free rounding at random onto an `IntegerGrid`, whose fields are the hyperparameters."""
    compress = functools.partial(quantize_weight, grid=IntegerGrid(**grid))
    return LayerwiseMethod(None, None, compress, seeded=True)


def quantize_weight(
    w: Float[Array, "o i"], stats: None, key: Key[Array, ""], *, grid: IntegerGrid
) -> QuantizedTensor:
    """Round each weight up or down its group's grid, as `key` says.

    Raises ValueError if groups do not divide i.
    """
    groups = w.reshape(w.shape[0], -1, grid.columns_per_group(w))
    scale, zero = grid.fit(groups)
    steps = groups / scale[..., None]
    below = jnp.floor(steps)
    up = jax.random.uniform(key, steps.shape) < steps - below
    codes = jnp.clip(below + up + zero[..., None], 0, 2**grid.bits - 1).astype(jnp.uint8)
    return QuantizedTensor.from_codes(codes.reshape(w.shape), *grid.stored(scale, zero), grid.bits)
