"""SparseGPT. Frantar, Alistarh, ICML 2023, arXiv:2301.00774. Notes: papers/sparsegpt.md.

GPTQ's walk over columns, in which weights become zero (Alg. 1). With H = X Xᵀ + λ I and
H⁻¹ = Uᵀ U, U upper triangular, what it costs to lose a weight that the columns before have updated
is
    S_ij = w_ij² / U_jj²
Of each block of columns the cheapest go, in a block of the matrix or in each `block` consecutive
columns of a row (N:M), chosen when the walk gets there. Then column by column
    ŵ_j = w_j where it stays, or its nearest point of a format, else 0
    e_j = (w_j - ŵ_j) / U_jj,   W <- W - e_j U_j,:
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from algorithms import hessian
from algorithms.formats import Format, Grid
from algorithms.hessian import HessianStats
from algorithms.layerwise import LayerwiseMethod
from algorithms.pruning.patterns import Pattern, top
from algorithms.tensors import CompressedTensor
from kernels.gptq_block import UNROUNDED, gptq_block


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseGPTConfig:
    """What goes, what those that stay are rounded to, and how SparseGPT walks."""

    pattern: Pattern = Pattern()
    format: Format | None = None  # None: numbers, stored as `dtype`
    activation_order: bool = False  # columns with the largest diag(H) first
    damping: float = 0.01  # λ as a fraction of mean(diag(X Xᵀ))
    block_size: int = 128  # columns of a lazy update, and among which weights are compared
    dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.damping < 0:
            raise ValueError(f"damping={self.damping} must not be negative.")
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} must be positive.")
        if self.format is not None and self.format.rows != 1:
            raise ValueError(
                f"format={self.format} shares scales between rows; SparseGPT wants rows=1."
            )

    def columns(self, i: int) -> int:
        """Of a block of the walk, of i in all."""
        step = self.pattern.block or 1
        return max(step, min(self.block_size, i) // step * step)


def sparsegpt(
    *,
    sparsity: float = 0.5,
    keep: int | None = None,
    block: int | None = None,
    format: Format | None = None,
    activation_order: bool = False,
    damping: float = 0.01,
    block_size: int = 128,
    dtype: str = "float16",
) -> LayerwiseMethod:
    """Remove the fraction `sparsity` of a layer, or all but `keep` of each `block`, and have what
    stays make up for it.

    format: what those that stay are rounded to in the same walk. dtype: how they are stored without
    one. activation_order: the most active columns first. Raises ValueError for settings
    outside their ranges.
    """
    config = SparseGPTConfig(
        pattern=Pattern(sparsity=sparsity, keep=keep, block=block), format=format,
        activation_order=activation_order, damping=damping, block_size=block_size, dtype=dtype,
    )  # fmt: skip

    def compress(w: Float[Array, "o i"], stats: HessianStats) -> CompressedTensor:
        return prune_weight(w, stats.gram, config)

    return hessian.method(compress, stacked=block is not None)


def prune_weight(
    w: Float[Array, "o i"], h: Float[Array, "i i"], config: SparseGPTConfig
) -> CompressedTensor:
    """Prune W given X Xᵀ, summed or averaged.

    Raises ValueError if blocks or groups do not divide i. If H + λ I is not positive definite, what
    stays is NaN.
    """
    pattern, format, (o, i) = config.pattern, config.format, w.shape
    pattern.require(i)
    dead = jnp.diag(h) == 0  # inputs that are always zero: their weights are free
    w, gram = jnp.where(dead, 0, w), h
    together = pattern.block or 1  # one block of N:M stays together
    order = hessian.by_activity(h, together) if config.activation_order else jnp.arange(i)
    h = h + jnp.diag(dead.astype(h.dtype))
    u = hessian.inverse_factor(h[order][:, order], config.damping)
    grid = None if format is None else format.fit(w, gram)

    walked = _walk(w.T[order], u, order, grid, config)
    found, mask = (jnp.zeros_like(x).at[order].set(x).T for x in walked)
    singular = jnp.logical_not(jnp.isfinite(u).all())
    b = config.columns(i)
    count = sum(pattern.kept(o * min(b, i - start)) for start in range(0, i, b))
    if format is None or grid is None:
        values = jnp.where(singular, jnp.nan, found)
        return pattern.tensor(values, mask, count=count, dtype=config.dtype)
    return pattern.tensor(format.tensor(found, grid.void(singular)), mask, count=count)


def _walk(
    w: Float[Array, "i o"], u: Float[Array, "i i"], order: Int[Array, " i"], grid: Grid | None,
    config: SparseGPTConfig,
):  # fmt: skip
    """Over W's columns, given as rows: what stays of each or its codes, and which do; [i, o].

    order: which columns of the grid they are.
    """
    (i, o), b, format = w.shape, config.columns(len(w)), config.format
    scale, zero = (jnp.ones((1, o), w.dtype), jnp.zeros((1, o), w.dtype))
    if format is not None and grid is not None:
        scale, zero = (table.T for table in format.spread(grid, w.T))
    group = order // (i // len(scale))
    # Columns beyond the last, so that blocks are whole: they are chosen first, and change nothing.
    more = -i % b
    w, group = jnp.pad(w, [(0, more), (0, 0)]), jnp.pad(group, (0, more))
    u = jnp.pad(u, (0, more)) + jnp.diag((jnp.arange(i + more) >= i).astype(u.dtype))

    kept = [config.pattern.kept(o * columns) for columns in (b, i % b or b)]

    def step(w, start):
        rows = lax.dynamic_slice(u, (start, 0), (b, i + more))
        own = lax.dynamic_slice(rows, (0, start), (b, b))
        block = lax.dynamic_slice(w, (start, 0), (b, o))
        of_block = lax.dynamic_slice(group, (start,), (b,))
        there = start + jnp.arange(b) < i
        stay = jnp.where(start + b > i, kept[1], kept[0])
        found, keep, errors = _block(block, own, there, stay, (scale, zero, of_block), config)
        return w - rows.T @ errors, (found, keep)

    _, (found, keep) = lax.scan(step, w, jnp.arange(0, i + more, b))
    return found.reshape(-1, o)[:i], keep.reshape(-1, o)[:i]


def _block(w: Float[Array, "b o"], u: Float[Array, "b b"], there, stay, tables, config):
    """One block of columns: what stays or its codes, which do, and the errors.

    there: which columns are; stay: how many of their weights do, of all together.
    """
    (b, o), pattern = w.shape, config.pattern
    points = UNROUNDED if config.format is None else config.format.points
    scale, zero, group = tables
    d = jnp.diag(u)
    if pattern.block is None:
        worth = jnp.where(there[:, None], (w / d[:, None]) ** 2, -1).reshape(-1)
        keep = top(worth, stay).reshape(b, o)
        found, errors = gptq_block(w, u, scale, zero, group, keep, grid=points)
        return found, keep, errors

    before = (u - jnp.diag(d)).T  # row j holds U_kj of the columns k before j

    def choose(errors, at):
        def part(x):
            return lax.dynamic_slice_in_dim(x, at, pattern.block)

        left = part(w) - part(before) @ errors
        keep = pattern.of_rows((left / part(d)[:, None]).T ** 2).T
        own = lax.dynamic_slice(u, (at, at), (pattern.block, pattern.block))
        found, lost = gptq_block(left, own, scale, zero, part(group), keep, grid=points)
        return lax.dynamic_update_slice(errors, lost, (at, 0)), (found, keep)

    errors, (found, keep) = lax.scan(choose, jnp.zeros_like(w), jnp.arange(0, b, pattern.block))
    return found.reshape(b, o), keep.reshape(b, o), errors
