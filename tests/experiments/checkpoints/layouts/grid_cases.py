"""Random tensors on integer grids, as methods return them."""

import jax.numpy as jnp
import numpy as np

from algorithms.elements import Integer
from algorithms.tensors import QuantizedTensor


def random_grid(o, i, *, bits, group, symmetric, seed=0, scale_dtype=np.float16, low=0):
    """Every code, and zero points from `low` up to the largest code."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (o, i)).astype(np.uint8)
    scale = rng.uniform(1e-3, 0.1, (o, i // group)).astype(scale_dtype)
    zero = rng.integers(low, 2**bits, (o, i // group)).astype(np.uint8)
    zero.flat[:2] = low, 2**bits - 1
    return QuantizedTensor.from_codes(
        jnp.asarray(codes),
        jnp.asarray(scale),
        Integer(bits=bits, symmetric=symmetric),
        zero=None if symmetric else jnp.asarray(zero),
        block=(1, group),
    )


def assert_same(found, expected):
    """The same numbers bit for bit, of the same grid."""
    a, b = np.asarray(found.dequantize()), np.asarray(expected.dequantize())
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))
    np.testing.assert_array_equal(found.codes(), expected.codes())
    assert (found.element, found.block) == (expected.element, expected.block)
