"""Real shapes: the activations of Llama-3 8B and 70B and of Qwen2.5-7B, before their products."""

import functools

import jax
import jax.numpy as jnp

from kernels.quantize_rows.api import bucket, quantize_rows
from kernels.workload import Cost, Workload, shapes

WIDTHS = {
    "8B hidden": 4096,
    "70B hidden": 8192,
    "8B down": 14336,
    "Qwen 7B hidden": 3584,
    "Qwen 7B down": 18944,
}
# Codes that lie beside a tie go either way where the arithmetic differs by a rounding; a step is
# what that moves one by.
TOLERANCE = {"int8": 4e-3, "fp8": 1e-2, "int4": 2e-2}


def workload(m, k, dtype="int8", *, summed=False, normed=False, hadamard=0) -> Workload:
    def arguments(key):
        x, residual, weight = jax.random.split(key, 3)
        spread = jnp.exp(jax.random.normal(weight, (k,)))  # channels differ, some by far
        return (
            (jax.random.normal(x, (m, k)) * spread).astype(jnp.bfloat16),
            (jax.random.normal(residual, (m, k)) * spread).astype(jnp.bfloat16) if summed else None,
            (1 + 0.3 * jax.random.normal(weight, (k,))).astype(jnp.bfloat16) if normed else None,
        )

    run = functools.partial(quantize_rows, hadamard=hadamard, dtype=dtype)
    moved = m * k * (2 + 1 + 4 * summed) + 4 * m + 2 * k * normed
    found = Workload(arguments, run, Cost(moved, 0), temporary=(1 << 16) if hadamard else 256)
    x, residual, weight = shapes(found)
    return found._replace(bucket=bucket(x, residual, weight, hadamard), tolerance=TOLERANCE[dtype])


WORKLOADS = {
    **{
        f"{layer} M={m}, sum, norm, int8": workload(m, WIDTHS[layer], summed=True, normed=True)
        for layer, m in [
            ("8B hidden", 1),
            ("8B hidden", 16),
            ("8B hidden", 8192),
            ("70B hidden", 8192),
            ("Qwen 7B hidden", 8192),
        ]
    },
    "8B hidden M=8192, sum, norm, fp8": workload(8192, 4096, "fp8", summed=True, normed=True),
    "8B hidden M=8192, int8": workload(8192, 4096),
    "8B down M=16, int8": workload(16, 14336),
    "8B down M=8192, int8": workload(8192, 14336),
    "Qwen 7B down M=8192, fp8": workload(8192, 18944, "fp8"),
    "8B hidden M=8192, hadamard 128, int8": workload(8192, 4096, hadamard=128),
    "8B hidden M=8192, hadamard 64, int4": workload(8192, 4096, "int4", hadamard=64),
    "8B hidden M=16, hadamard 128, fp8": workload(16, 4096, "fp8", hadamard=128),
    "8B down M=8192, hadamard 128, int8": workload(8192, 14336, hadamard=128),
    "8B down M=8192, hadamard 256, int4": workload(8192, 14336, "int4", hadamard=256),
    "8B hidden M=8192, sum, norm, hadamard 128, int8": workload(
        8192, 4096, summed=True, normed=True, hadamard=128
    ),
}
