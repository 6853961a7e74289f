"""The grid that rows are rounded to, the same in every implementation."""

import jax.numpy as jnp
from jax import lax

LARGEST = {"int8": 127, "fp8": 448, "int4": 7}  # what the largest magnitude of a row becomes
STORED = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn, "int4": jnp.int8}

# 2^-126, the smallest scale: float32's smallest normal number, whose reciprocal is finite. Rows of
# zeros have it too.
SMALLEST = float(jnp.finfo(jnp.float32).tiny)


def quantize(y, dtype):
    """(codes, scale) of float rows y: codes are 0 where a row's scale is infinite or NaN."""
    scale = jnp.maximum(largest(y) / LARGEST[dtype], SMALLEST)
    # A reciprocal for each row is what the kernel affords, so it is the definition.
    scaled = jnp.where(jnp.isfinite(scale), y * (1 / scale), 0)
    return (scaled if dtype == "fp8" else jnp.round(scaled)).astype(STORED[dtype]), scale


def largest(y):
    """max|y| of each row, NaN where there is one.

    The bits of magnitudes are in the order of the magnitudes, with NaN above infinity. A maximum of
    floats leaves NaN out on a CPU (XLA of JAX 0.11.2).
    """
    bits = lax.bitcast_convert_type(jnp.abs(y), f"int{8 * y.dtype.itemsize}")
    return lax.bitcast_convert_type(bits.max(-1, keepdims=True), y.dtype)


def add(x, residual):
    """x + residual as x's type has it, in float32 or x's wider type."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if residual is None:
        return x.astype(wide)
    return round_to(x.astype(wide) + residual.astype(wide), x.dtype)


def round_to(y, dtype):
    """y's nearest numbers of a narrower type: XLA leaves out the rounding of a cast to and fro."""
    narrow = jnp.finfo(dtype)
    return lax.reduce_precision(y, narrow.nexp, narrow.nmant)
