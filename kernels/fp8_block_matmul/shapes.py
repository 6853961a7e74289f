"""Real shapes: a product of DeepGEMM's tables, and Llama-3 8B's layers."""

import functools

import jax
import jax.numpy as jnp

from kernels.fp8_block_matmul import mosaic
from kernels.fp8_block_matmul.api import bucket, fp8_block_matmul
from kernels.fp8_block_matmul.blocks import BLOCK
from kernels.workload import Cost, Workload


def workload(m, n, k, out_dtype="bfloat16") -> Workload:
    scales = (m, -(-k // BLOCK)), (-(-n // BLOCK), -(-k // BLOCK))

    def arguments(key):
        x, w, x_scale, w_scale = jax.random.split(key, 4)
        return (
            _codes(x, (m, k)),
            _codes(w, (n, k)),
            jnp.exp(jax.random.normal(x_scale, scales[0])) / 100,  # blocks differ, some by far
            jnp.exp(jax.random.normal(w_scale, scales[1])) / 10000,
        )

    def plain_arguments(key):
        x, w = jax.random.split(key)
        return (
            jax.random.normal(x, (m, k), jnp.bfloat16),
            jax.random.normal(w, (n, k), jnp.bfloat16),
        )

    size = jnp.dtype(out_dtype).itemsize
    moved = m * k + n * k + 4 * sum(a * b for a, b in scales) + size * m * n
    return Workload(
        arguments,
        functools.partial(fp8_block_matmul, out_dtype=out_dtype),
        Cost(moved, 2 * m * n * k, "float8"),
        bucket=bucket(m),
        plain=lambda x, w: x @ w.T,
        plain_arguments=plain_arguments,
        temporary=_partial_sums(m, n, k) + (1 << 16),
    )


def _codes(key, shape):
    """As a quantizer leaves them: the largest of 128 near the end of the grid."""
    return jnp.clip(jax.random.normal(key, shape) * 160, -448, 448).astype(jnp.float8_e4m3fn)


def _partial_sums(m, n, k) -> int:
    splits = mosaic.plan(m, n, k).splits
    return 4 * splits * m * n if splits > 1 else 0


WORKLOADS = {
    "DeepGEMM 4096×7168×4096": workload(4096, 7168, 4096),
    **{
        f"8B {layer} M={m}": workload(m, n, k)
        for layer, n, k in [
            ("qkv", 6144, 4096),
            ("gate_up", 28672, 4096),
            ("down", 4096, 14336),
        ]
        for m in (128, 4096)
    },
    "8B qkv M=16, float32": workload(16, 6144, 4096, "float32"),
}
