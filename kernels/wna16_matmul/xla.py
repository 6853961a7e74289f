"""The best XLA form: dequantize into x's dtype, then one product; on a GPU, for few rows of x,
products and sums that need no dequantized weight.

Compiled for an H200, the first writes W to memory and reads it again, whatever the form of it: a
product with each group's codes, scaled and summed, writes the codes in bfloat16 instead. Only a sum
of products that is no matrix product is fused with the decoding of W. It decodes W anew for every
FEW rows, as XLA stops fusing it into more.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from kernels import dispatch, packing
from kernels.wna16_matmul.codes import decode

FEW = 4  # rows of x
MOST = 16  # rows for which W decoded anew is still less than W in bfloat16, written and read


def wna16_matmul(x, packed, scale, zero, divisor, bits, kind):
    m, size = x.shape[0], x.shape[1] // scale.shape[1]
    whole = size % packing.codes_together(bits) == 0  # no group begins inside a byte
    if dispatch.device().platform == "cpu" or m > MOST or not whole:
        return _product(x, packed, scale, zero, divisor, bits, kind)
    padded = jnp.pad(x, [(0, -m % FEW if m > FEW else 0), (0, 0)])
    few = padded.reshape(-1, min(m, FEW), x.shape[1])
    if len(few) == 1:
        return _sums(x, packed, scale, zero, divisor, bits, kind)
    y = lax.map(lambda rows: _sums(rows, packed, scale, zero, divisor, bits, kind), few)
    return y.reshape(len(padded), -1)[:m]


@functools.partial(jax.checkpoint, static_argnums=(5, 6))  # W is not kept for gradients
def _product(x, packed, scale, zero, divisor, bits, kind):
    i, (o, groups) = x.shape[1], scale.shape
    codes = packing.unpack(packed, bits, i).reshape(o, groups, i // groups)
    plain = kind == "int" and divisor is None and scale.dtype.itemsize > 1
    # Small floats and codebooks are dequantized in float32, as they are defined.
    wide = jnp.float64 if scale.dtype == jnp.float64 else jnp.float32
    wide = x.dtype if plain else wide
    w = _numbers(codes, zero, bits, kind, wide) * _steps(scale, divisor, wide)
    w = w.reshape(o, i).astype(x.dtype)
    # One product, but in their last bits a CPU's differ; records of each were made with its own.
    return jnp.einsum("mi,oi->mo", x, w) if plain else x @ w.T


def _sums(x, packed, scale, zero, divisor, bits, kind):
    """Row by row, x and W multiplied and summed, in float32."""
    (m, i), (o, groups) = x.shape, scale.shape
    wide = jnp.promote_types(x.dtype, jnp.float32)
    count, steps = packing.codes_together(bits), _steps(scale, None, wide)
    planes = [plane[:, : i // count] for plane in packing.planes(packed, bits)]
    codes = [plane.reshape(o, groups, -1) for plane in planes]
    w = [_numbers(plane, zero, bits, kind, wide) * steps for plane in codes]
    rows = x.reshape(m, 1, groups, -1, count).astype(wide)
    sums = [sum(row[..., n] * plane for n, plane in enumerate(w)).sum((1, 2)) for row in rows]
    y = jnp.stack(sums)  # divided here: a table of quotients would be written to memory
    return (y if divisor is None else y / divisor).astype(x.dtype)


def _numbers(codes, zero, bits, kind, dtype):
    """Of codes [o, g, c]: before their scale."""
    numbers = decode(codes, kind, dtype)
    if kind != "int":
        return numbers
    return numbers - (2 ** (bits - 1) if zero is None else zero[:, :, None].astype(dtype))


def _steps(scale, divisor, dtype):
    scale = scale.astype(dtype)
    return (scale if divisor is None else scale / divisor)[:, :, None]
