"""Calibration activations of real layers: n tokens at the inputs of Llama-3 8B's and 70B's matrices
(i of 4096, 8192, 14336), for their Hessians.
"""

import jax
import jax.numpy as jnp

from kernels.gram.api import bucket, gram
from kernels.workload import Cost, Workload


def workload(n: int, i: int, dtype: str = "bfloat16", tolerance: float = 4e-3) -> Workload:
    def arguments(key):
        """Channels of different spread, correlated, as activations are."""
        keys = jax.random.split(key, 3)
        common = jax.random.normal(keys[0], (n, 1)) * jax.random.normal(keys[1], (1, i)) / 2
        return ((jax.random.normal(keys[2], (n, i)) + common).astype(dtype),)

    size = jnp.dtype(dtype).itemsize
    cost = Cost(bytes=n * i * size + i * i * 4, operations=n * i * (i + 1), unit=dtype)
    return Workload(
        arguments, gram, cost, bucket=bucket(n, i, dtype), temporary=0, tolerance=tolerance,
        plain=lambda x: jnp.einsum("na,nb->ab", x, x, preferred_element_type=jnp.float32),
    )  # fmt: skip


WORKLOADS = {
    f"{n}x{i}": workload(n, i) for n in (2048, 16384) for i in (4096, 8192, 14336)
}  # fmt: skip
