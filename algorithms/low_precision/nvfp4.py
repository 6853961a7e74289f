"""Pretraining large language models with NVFP4. NVIDIA, 2025, arXiv:2509.25149.

All three products of a linear layer are of NVFP4 numbers: E2M1, 16 of them to an E4M3 scale, and a
float32 for the tensor (Sec. 2). For inputs x, weights W [o, i] and gradients g (Sec. 4):
    y = q(x) q₂(W)ᵀ,   ∂x = SR(g) q₂(W),   ∂W = SR(gᵀ S H) q(xᵀ S H)ᵀ
q rounds to the nearest, SR at random; groups lie along the summed axis, but those of q₂ are squares
of 16 × 16, so that the forward and the backward pass see the same weights; H is a Hadamard matrix
of 16, S a diagonal of random signs drawn once. Some layers stay in high precision: `match` names
the others; the paper leaves out embeddings, head, norms, attention, and about 15 % of the linear
layers, at the end most of all.

This is emulated: numbers are rounded to NVFP4 and multiplied in float32. It differs from NVIDIA's
TransformerEngine in: 1. S is drawn for each layer, where one vector is written into the code; 2.
axes that are not whole blocks are filled with zeros.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, UInt32

from algorithms.formats import Format
from algorithms.formats import nvfp4 as grouped
from algorithms.low_precision.layers import RandomLinear
from algorithms.low_precision.rounding import padded, rotated, rounded
from algorithms.parametrization import Parametrization, require_dense
from kernels import dispatch

BLOCK = 16
ROWS = grouped(group_size=BLOCK)
SQUARES = Format(element=ROWS.element, columns=BLOCK, rows=BLOCK, scale_dtype=ROWS.scale_dtype,
                 nested=True)  # fmt: skip


class NVFP4Linear(RandomLinear):
    def __init__(self, linear: nnx.Linear, key: Key[Array, ""]):
        own, signs = jax.random.split(key)
        super().__init__(linear, own)
        self.signs = nnx.Variable(jax.random.rademacher(signs, (BLOCK,), jnp.float32))

    def product(self, x):
        dispatch.note("nvfp4_product", "emulated", "rounded to NVFP4, multiplied in float32")
        return nvfp4_product(x, self.kernel[...], self.signs[...], self.draw())


def nvfp4(*, match: str = r"blocks\..*") -> Parametrization:
    """Linear layers whose products are of NVFP4 numbers.

    match: the regular expression that a layer's whole path matches. Raises ValueError for layers
    that are not dense.
    """
    return Parametrization(
        make=lambda layer, key: NVFP4Linear(require_dense(layer, "nvfp4"), key), match=match
    )


@jax.custom_vjp
def nvfp4_product(
    x: Float[Array, "n i"],
    w: Float[Array, "i o"],
    signs: Float[Array, " c"],
    key: UInt32[Array, "k"],
) -> Float[Array, "n o"]:
    """x w in x's dtype; its gradients are rounded by the key of which `key` is the data."""
    return _forward(x, w, signs, key)[0]


def _forward(x, w, signs, key):
    qw = rounded(w.T, SQUARES)
    y = _dot(rounded(x, ROWS), qw).astype(x.dtype)
    return y, (x, qw, signs, key, jnp.zeros(0, w.dtype))


def _backward(residuals: Any, g: Float[Array, "n o"]):
    x, qw, signs, key, like = residuals
    first, second = jax.random.split(jax.random.wrap_key_data(key))
    dx = _dot(_random(g, first), qw.T)
    xt, gt = (rotated(t.T.astype(jnp.float32), signs.astype(jnp.float32)) for t in (x, g))
    dw = _dot(rounded(xt, ROWS), _random(gt, second))
    return dx.astype(x.dtype), dw.astype(like.dtype), jnp.zeros_like(signs), None


nvfp4_product.defvjp(_forward, _backward)


def _random(x: Float[Array, "p k"], key: Key[Array, ""]) -> Float[Array, "p k"]:
    return rounded(x, ROWS, jax.random.uniform(key, padded(x, BLOCK).shape))


def _dot(a: Float[Array, "p k"], b: Float[Array, "q k"]) -> Float[Array, "p q"]:
    return jnp.matmul(a, b.T, precision="highest")
