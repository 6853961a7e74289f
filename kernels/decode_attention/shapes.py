"""Caches of real models: 32 query heads of 128 over 8 (Llama-3 8B) and 64 over 8 (70B), of 2048 and
8192 places, for one sequence and for 32 of different lengths.
"""

import functools
import math

import jax
import jax.numpy as jnp

from kernels.decode_attention.api import STORED, bucket, decode_attention
from kernels.decode_attention.mosaic import splits
from kernels.packing import pack
from kernels.workload import Cost, Workload

BYTES = {"int8": 1, "int4": 0.5, "fp8": 1, "float": 2}  # of a number


def workload(
    b: int, s: int, n: int, heads: int, h: int, kind: str, *,
    dtype: str = "bfloat16", per_place: bool = False, ragged: bool = False,
    tolerance: float = 4e-3, **settings,
) -> Workload:  # fmt: skip
    """per_place: scales of each place and head, in place of one. ragged: lengths from none to S."""

    def arguments(key):
        keys = jax.random.split(key, 6)
        q = jax.random.normal(keys[0], (b, n, h)).astype(dtype)
        (k, k_scale), (v, v_scale) = (
            cache(key, mean) for key, mean in zip(keys[1:3], (1, 0), strict=True)
        )
        if per_place:
            k_scale, v_scale = (
                scale * jnp.exp(jax.random.normal(key, (b, s, heads)) / 2)
                for scale, key in ((k_scale, keys[3]), (v_scale, keys[4]))
            )
        if kind == "float":
            k_scale = v_scale = None
        lengths = jnp.full((b,), s)
        if ragged:
            lengths = jnp.linspace(0, s, b).round().astype(jnp.int32)
        return q, k, v, lengths, k_scale, v_scale

    def cache(key, mean):
        """Channels of different means, as keys have."""
        x = jax.random.normal(key, (b, s, heads, h))
        x = x + mean * jax.random.normal(jax.random.fold_in(key, 1), (heads, h))
        if kind == "float":
            return x.astype(dtype), None
        largest = {"int8": 127, "int4": 7, "fp8": 448}[kind]
        scale = (jnp.abs(x).max() / largest).reshape(1)
        x = x / scale
        if kind == "fp8":
            return x.astype(STORED[kind]), scale
        codes = jnp.round(x).astype(jnp.int8)
        return pack(codes.astype(jnp.uint8) & 15, 4) if kind == "int4" else codes, scale

    def run(q, k, v, lengths, k_scale, v_scale, **implementation):
        scales = dict(k_scale=k_scale, v_scale=v_scale)
        return decode_attention(q, k, v, lengths, kind=kind, **scales, **settings, **implementation)

    columns, partial = -(-n // heads // 8) * 8, splits(b, s, heads)
    held = b * heads * columns * (partial * (h + 2) * 4 + (h + 2) * 4)
    read = math.ceil(2 * b * s * heads * h * BYTES[kind])
    read += 8 * b * s * heads if per_place else 0
    return Workload(
        arguments, run, Cost(bytes=read + 4 * b * n * h, operations=4 * b * s * n * h),
        bucket=bucket(b, s, n, heads, h, kind), temporary=held, tolerance=tolerance,
        plain=functools.partial(plain, s=s),
        plain_arguments=functools.partial(bf16, b, s, n, heads, h),
    )  # fmt: skip


def bf16(b, s, n, heads, h, key):
    keys = jax.random.split(key, 3)
    shapes = ((b, 1, n, h), (b, s, heads, h), (b, s, heads, h))
    return tuple(
        jax.random.normal(k, x).astype("bfloat16") for k, x in zip(keys, shapes, strict=True)
    )


def plain(q, k, v, *, s):
    """Attention over the cache in bfloat16, as JAX has it."""
    lengths = jnp.full((q.shape[0],), s, jnp.int32)
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)


WORKLOADS = {
    f"{model}, {b}x{s}, {kind}{' per place' if per_place else ''}": workload(
        b, s, n, 8, 128, kind, per_place=per_place
    )
    for model, n in (("8B", 32), ("70B", 64))
    for b in (1, 32)
    for s in (2048, 8192)
    for kind in BYTES
    for per_place in (
        (False, True) if kind in ("int8", "int4") and (b, s) == (32, 8192) else (False,)
    )
}
