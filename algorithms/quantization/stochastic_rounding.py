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

from algorithms.elements import Integer
from algorithms.formats import Format, integer
from algorithms.layerwise import LayerwiseMethod
from algorithms.tensors import QuantizedTensor


def stochastic_rounding(*, format: Format | None = None) -> LayerwiseMethod:
    """Data-free rounding at random onto integers, by default 4 bits."""
    format = integer() if format is None else format
    if not isinstance(format.element, Integer) or format.needs_data:
        raise ValueError(
            f"format={format} must be integers whose ranges need no data: other grids are not "
            "uniform."
        )
    compress = functools.partial(quantize_weight, format=format)
    return LayerwiseMethod(None, None, compress, seeded=True, row_block=format.rows)


def quantize_weight(
    w: Float[Array, "o i"], stats: None, key: Key[Array, ""], *, format: Format
) -> QuantizedTensor:
    """Round each weight up or down its group's grid, as `key` says.

    Raises ValueError if groups do not divide i.
    """
    grid = format.fit(w)
    scale, zero = format.columns_of(grid, w)
    steps = w / scale
    below = jnp.floor(steps)
    up = jax.random.uniform(key, steps.shape) < steps - below
    return format.tensor(format.element.encode(below + up, zero), grid)
