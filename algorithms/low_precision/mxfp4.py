"""Training LLMs with MXFP4. Tseng, Yu, Park, AISTATS 2025, arXiv:2502.20586.

The forward product is as it was; both products of the backward pass are of MXFP4 numbers (E2M1, 32
of them to a power of two), unbiased (Alg. 2 and 3):
    a bᵀ ≈ 16/9 SR(3/4 a S H) SR(3/4 b S H)ᵀ
H is a Hadamard matrix in blocks of 64 along the summed axis, S a diagonal of random signs drawn for
each product: their own inverse together, they spread outliers. SR rounds at random, and 3/4 keeps a
group's largest number, up to 8 times its scale, within E2M1's 6.

This is emulated: numbers are rounded to MXFP4 and multiplied in float32. It differs from the
official code, amazon-science/mxfp4-llm, in: 1. axes that are not whole blocks are filled with
zeros; 2. a group whose largest number is below 2^-124 has the scale 2^-126, float32's least normal
number.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, UInt32

from algorithms.formats import microscaling
from algorithms.low_precision.layers import RandomLinear
from algorithms.low_precision.rounding import padded, rotated, rounded
from algorithms.parametrization import Parametrization, require_dense
from kernels import dispatch

FORMAT = microscaling()
SHRINK = 3 / 4


class MXFP4Linear(RandomLinear):
    def __init__(self, linear: nnx.Linear, key: Key[Array, ""], rotation: int | None):
        super().__init__(linear, key)
        self.rotation = rotation

    def product(self, x):
        dispatch.note("mxfp4_product", "emulated", "rounded to MXFP4, multiplied in float32")
        return mxfp4_product(self.rotation, x, self.kernel[...].astype(x.dtype), self.draw())


def mxfp4(*, rotation: int | None = 64, match: str = r"blocks\..*") -> Parametrization:
    """Linear layers whose gradients are products of MXFP4 numbers.

    rotation: the size of H, a power of two from 32; null for none. match: the regular expression
    that a layer's whole path matches. Raises ValueError for another size, and for layers that are
    not dense.
    """
    if rotation is not None and (rotation < 32 or rotation & (rotation - 1)):
        raise ValueError(f"rotation={rotation} must be a power of two from 32, or null.")
    return Parametrization(
        make=lambda layer, key: MXFP4Linear(require_dense(layer, "mxfp4"), key, rotation),
        match=match,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mxfp4_product(
    rotation: int | None,
    x: Float[Array, "n i"],
    w: Float[Array, "i o"],
    key: UInt32[Array, "k"],
) -> Float[Array, "n o"]:
    """x w; its gradients are drawn by the key of which this is the data."""
    return x @ w


def _forward(rotation, x, w, key):
    return x @ w, (x, w, key)


def _backward(rotation: int | None, residuals: Any, g: Float[Array, "n o"]):
    x, w, key = residuals
    first, second = jax.random.split(jax.random.wrap_key_data(key))
    dx = estimated(g, w, first, rotation)
    dw = estimated(x.T, g.T, second, rotation)
    return dx.astype(x.dtype), dw.astype(w.dtype), None


mxfp4_product.defvjp(_forward, _backward)


def estimated(
    a: Float[Array, "p k"], b: Float[Array, "q k"], key: Key[Array, ""], rotation: int | None
) -> Float[Array, "p q"]:
    """a bᵀ of MXFP4 numbers, right on average."""
    signs, *own = jax.random.split(key, 3)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    if rotation is not None:
        s = jax.random.rademacher(signs, (rotation,), jnp.float32)
        a, b = rotated(a, s), rotated(b, s)
    a, b = (
        rounded(t, FORMAT, jax.random.uniform(k, padded(t, 32).shape), SHRINK)
        for t, k in zip((a, b), own, strict=True)
    )
    return jnp.matmul(a, b.T, precision="highest")
