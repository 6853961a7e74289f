"""Blocks of 64 and 128 columns of Llama-3 8B's matrices (14336, 4096 and 28672 rows), of one and of
eight: experts, or layers that share nothing but their shape.
"""

import jax
import jax.numpy as jnp

from kernels.gptq_block.api import bucket, gptq_block
from kernels.gptq_block.grids import Grid, Integers
from kernels.workload import Cost, Workload

INT4 = Integers(bits=4)


def workload(
    batch: tuple[int, ...], c: int, r: int, *, groups: int = 1, grid: Grid = INT4,
    dtype: str = "float32", tolerance: float = 1e-5, kept: float | None = None,
) -> Workload:  # fmt: skip
    """groups: that columns are spread over out of order, as in their order of activations.
    kept: the fraction of numbers that stay.
    """
    bits, whole = getattr(grid, "bits", 4), getattr(grid, "whole_zero", True)

    def arguments(key):
        keys = jax.random.split(key, 4)
        w = jax.random.normal(keys[0], (*batch, c, r))
        u = jnp.triu(jax.random.normal(keys[1], (*batch, c, c))) / 8 + jnp.eye(c)
        scale = 6 * jax.random.uniform(keys[2], (*batch, groups, r), minval=0.7) / 2**bits
        zero = 2 ** (bits - 1) + jax.random.uniform(keys[3], (*batch, groups, r), minval=-2)
        zero = jnp.clip(jnp.round(zero) if whole else zero, 0, 2**bits - 1)
        group = jnp.broadcast_to(jnp.arange(c) * 7 % groups, (*batch, c))
        found = *(x.astype(dtype) for x in (w, u, scale, zero)), group
        if kept is None:
            return found
        return *found, jax.random.uniform(jax.random.fold_in(key, 4), w.shape) < kept

    def run(*arrays, **implementation):
        return gptq_block(*arrays, grid=grid, **implementation)

    b = 1
    for size in batch:
        b *= size
    cost = Cost(bytes=b * c * (r * 9 + c * 4), operations=b * r * c * (c - 1), unit="float32")
    return Workload(
        arguments, run, cost, bucket=bucket((*batch, c, r)), temporary=64, tolerance=tolerance
    )


# On millions of numbers some lie so near the middle between two points that the last bit decides,
# and what follows in their row is then another: an error of one step in a few rows.
REAL = 5e-3
WORKLOADS = {
    f"{'8x' if batch else ''}{r}x{c}": workload(batch, c, r, tolerance=REAL)
    for batch in ((), (8,))
    for r in (4096, 14336, 28672)
    for c in ((128,) if batch else (64, 128))  # 64: what GPTQ takes by default
}
