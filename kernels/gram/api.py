"""The public function: checks shapes, chooses an implementation."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import dispatch
from kernels.gram import mosaic, reference, xla


def _product(x, g):
    """x (g + gᵀ), what a cotangent g of xᵀ x is to x."""
    g = (g + g.T).astype(x.dtype)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.matmul(x, g, preferred_element_type=wide).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _mosaic(x, interpret):
    return mosaic.gram(x, interpret=interpret)


def _forward(x, interpret):
    return mosaic.gram(x, interpret=interpret), x


def _backward(interpret, x, g):
    return (_product(x, g),)


_mosaic.defvjp(_forward, _backward)


def _kernel(x, *, interpret):
    return _mosaic(x, interpret)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "reference": reference.gram,
    "xla": xla.gram,
    "mosaic": _kernel,
}


def gram(x: Float[Array, "n i"], *, implementation: str = "auto") -> Float[Array, "i i"]:
    """The symmetric product xᵀ x, accumulated in float32 or x's wider type.

    implementation: see `kernels.dispatch`. Raises ValueError if it cannot run.
    """
    n, i = x.shape
    return dispatch.run(
        "gram", IMPLEMENTATIONS, implementation, x, lacks=_lacks(x),
        bucket=bucket(n, i, x.dtype),
    )  # fmt: skip


def bucket(n: int, i: int, dtype) -> str:
    """The class of shapes, in `kernels.measured`: full tiles of x's columns, and enough rows."""
    rows = next((f"n<{most}" for most in (512, 2048, 8192) if n < most), "n>=8192")
    columns = "i<4096" if i < 4096 else "i>=4096"
    return f"{rows}, {columns}, {jnp.dtype(dtype).name}"


def _lacks(x) -> str | None:
    n, i = x.shape
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes x in bfloat16 or float16, and x.dtype={x.dtype}"
    if n == 0 or i == 0 or n % 8 or i % 64:
        return f"takes n in multiples of 8 and i in multiples of 64, and x.shape={x.shape}"
    return None
