"""Matrices rounded in blocks along the axis that a product sums over, their last: [p, k].

Stochastic rounding: algorithms/quantization/stochastic_rounding.py, here on the grids of small
floats, whose steps are powers of two: 2^(e - M) for magnitudes from 2^e, M bits of mantissa.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from algorithms.elements import SmallFloat
from algorithms.formats import Format
from algorithms.minifloat import Minifloat
from kernels.hadamard import hadamard


def padded(x: Float[Array, "p k"], block: int) -> Float[Array, "p K"]:
    """With zeros, which a sum does not notice, up to whole blocks."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)])


def rotated(x: Float[Array, "p k"], signs: Float[Array, " c"]) -> Float[Array, "p K"]:
    """x S H / √c in blocks of c, S the diagonal of `signs`: products of two such are as without."""
    x = padded(x, len(signs))
    return hadamard(x.reshape(x.shape[0], -1, len(signs)) * signs).reshape(x.shape)


def rounded(
    x: Float[Array, "p k"],
    format: Format,
    uniform: Float[Array, "p K"] | None = None,
    shrink: float = 1.0,
) -> Float[Array, "p k"]:
    """x on a format of small floats, in float32, to the nearest.

    uniform: numbers of U[0, 1), for x padded to whole blocks: it is rounded at random by them.
    shrink: what x is multiplied by on its grid and divided by again behind it, so that a group's
    largest is not above the element's.
    """
    assert isinstance(format.element, SmallFloat)
    own = padded(x.astype(jnp.float32), format.columns or 1)
    scale, zero = format.columns_of(format.fit(own), own)
    if uniform is None:
        y = format.decode(format.encode(own * shrink, scale, zero), scale, zero)
    else:
        y = stochastic(own * shrink / scale, format.element.format, uniform) * scale
    return y[:, : x.shape[1]] / shrink


def stochastic(
    x: Float[Array, "*s"], form: Minifloat, uniform: Float[Array, "*s"]
) -> Float[Array, "*s"]:
    """One of the two neighbours of x in the format, right on average but above its peak."""
    magnitude = jnp.abs(x.astype(jnp.float32))
    exponent = lax.bitcast_convert_type(magnitude, jnp.int32) >> 23  # with float32's bias, 127
    exponent = jnp.maximum(exponent, 128 - form.bias) - form.mantissa
    step = lax.bitcast_convert_type(exponent << 23, jnp.float32)
    steps = magnitude / step
    below = jnp.floor(steps)
    y = jnp.minimum((below + (uniform < steps - below)) * step, form.peak)
    return jnp.where(x < 0, -y, y).astype(x.dtype)
