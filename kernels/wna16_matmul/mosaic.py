"""yᵀ = W xᵀ for few rows of x, W decoded in registers: for Hopper GPUs.

One warpgroup loads tiles of packed W and of x into a ring of buffers; two multiply, 64 rows of W
each, which are wgmma's first operand, from registers. What shares a scale is multiplied on its own
and scaled in float32; groups too small for that are scaled in bfloat16, before. Where W has too few
rows to keep every SM busy its columns are split too, and the parts summed afterwards.

W is read as it is stored: nothing is prepared. x's columns are put into another order first
(`registers.Order`), by XLA, with whatever made x.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from kernels.wna16_matmul import codes, kernel, plan, xla


def wna16_matmul(x, packed, scale, zero, divisor, bits, kind, interpret):
    return _wna16_matmul(x, packed, scale, zero, divisor, bits, kind, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _wna16_matmul(x, packed, scale, zero, divisor, bits, kind, interpret):
    m, (o, groups) = x.shape[0], scale.shape
    padded = jnp.pad(x, [(0, -m % 8), (0, 0)])
    order = codes.order(kind, bits)
    p = plan.plan(padded.shape[0], x.shape[1], o, x.shape[1] // groups, order, kind)
    words = lax.bitcast_convert_type(packed.reshape(o, -1, 4), jnp.uint32)
    if scale.dtype == jnp.float8_e8m0fnu:  # which Mosaic has on no Hopper GPU
        scale = lax.bitcast_convert_type(scale, jnp.uint8)
    y = kernel.multiply(order.of(padded), words, scale, zero, p, interpret).sum(0)[:m]
    return (y if divisor is None else y / divisor).astype(x.dtype)


def _forward(x, packed, scale, zero, divisor, bits, kind, interpret):
    y = _wna16_matmul(x, packed, scale, zero, divisor, bits, kind, interpret)
    return y, (x, packed, scale, zero, divisor)


def _backward(bits, kind, interpret, kept, dy):
    """By the XLA form, whose memory is as it promises."""
    x, packed, scale, zero, divisor = kept
    smooth = zero is not None and jnp.issubdtype(zero.dtype, jnp.floating)

    def form(x, scale, divisor, z):
        return xla.wna16_matmul(x, packed, scale, z if smooth else zero, divisor, bits, kind)

    _, pull = jax.vjp(form, x, scale, divisor, zero if smooth else None)
    dx, dscale, ddivisor, dzero = pull(dy)
    return dx, None, dscale, dzero, ddivisor


_wna16_matmul.defvjp(_forward, _backward)
