"""Rows that belong to experts, each multiplied by its own expert's matrix.

Letters: n rows, e experts, i inputs, o outputs. Rows are sorted by expert.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

LARGEST = 128  # rows per product


def by_expert(
    x: Float[Array, "n i"],
    counts: Int[Array, " e"],
    multiply: Callable[[Float[Array, "b i"], Int[Array, ""]], Float[Array, "b o"]],
) -> Float[Array, "n o"]:
    """multiply(rows, expert) over blocks of rows, none of which two experts share.

    counts: rows of each expert, n in all. The work is that of the rows and, for each expert that
    has any, at most a block more; memory holds one expert's matrix beside the given ones.
    """
    n, e = x.shape[0], counts.shape[0]
    b = min(LARGEST, 1 << max(n // e, 1).bit_length() - 1)
    blocks = jnp.arange(n // b + min(e, n))  # no more are needed, however the rows fall
    needed = -(-counts // b)
    last = jnp.cumsum(needed)
    expert = jnp.minimum(jnp.searchsorted(last, blocks, side="right"), e - 1)
    end = jnp.cumsum(counts)
    start = (end - counts)[expert] + (blocks - (last - needed)[expert]) * b
    rows = start[:, None] + jnp.arange(b)[None]
    used = (rows < end[expert][:, None]) & (blocks < last[-1])[:, None]
    rows = jnp.where(used, rows, n)  # a row of zeros, where nothing is read from
    padded = jnp.concatenate([x, jnp.zeros_like(x[:1])])
    y = lax.map(lambda block: multiply(padded[block[0]], block[1]), (rows, expert))
    out = jnp.zeros((n + 1, y.shape[-1]), y.dtype)
    return out.at[rows.reshape(-1)].set(y.reshape(-1, y.shape[-1]))[:n]


def grouped_matmul(
    x: Float[Array, "n i"], w: Float[Array, "e i o"], counts: Int[Array, " e"]
) -> Float[Array, "n o"]:
    """x's rows times their expert's matrix: JAX's own product, which on a CPU runs every row
    through every expert; there, block by block.
    """
    return lax.platform_dependent(
        x, w, counts,
        cpu=lambda x, w, counts: by_expert(x, counts, lambda rows, e: rows @ w[e]),
        default=jax.lax.ragged_dot,
    )  # fmt: skip
