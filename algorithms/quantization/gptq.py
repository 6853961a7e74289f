"""GPTQ. Frantar, Ashkboos, Hoefler, Alistarh, ICLR 2023, arXiv:2210.17323. Notes: papers/gptq.md.

For a layer y = W x, minimise ‖W X - Ŵ X‖² one input column at a time (Alg. 1). With
H = X Xᵀ + λ I and H⁻¹ = Uᵀ U, U upper triangular:
    ŵ_j = quant(w_j),   e_j = (w_j - ŵ_j) / U_jj,   W <- W - e_j U_j,:
Columns go in blocks: inside a block the update is applied at once, to the rest of W once per block
(Step 2, "lazy batch-updates").
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from algorithms import hessian
from algorithms.formats import Format, Grid, integer
from algorithms.hessian import HessianStats
from algorithms.layerwise import LayerwiseMethod
from algorithms.tensors import QuantizedTensor
from kernels.gptq_block import gptq_block


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQConfig:
    """The format, and how GPTQ walks its grid."""

    format: Format = integer()
    activation_order: bool = True  # columns with the largest diag(H) first
    static_groups: bool = True  # ranges from the original W; else from W as updated at group start
    damping: float = 0.01  # λ as a fraction of mean(diag(X Xᵀ)) (Step 3)
    block_size: int = 64  # columns per lazy update; the result does not depend on it

    def __post_init__(self) -> None:
        if self.activation_order and not self.static_groups and self.format.columns is not None:
            raise ValueError(
                "activation_order=True needs static_groups=True: a group met out of order has no "
                "moment at which all its columns are current."
            )
        plain = self.format.rows == 1 and not self.format.nested and not self.format.needs_data
        if not self.static_groups and not plain:
            raise ValueError(
                "static_groups=False needs scales of one row's group each, fitted without data: "
                f"format={self.format} has others."
            )
        if self.damping < 0:
            raise ValueError(f"damping={self.damping} must not be negative.")
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} must be positive.")


def gptq(**config) -> LayerwiseMethod:
    """GPTQ with one Hessian per site; the fields of `GPTQConfig` are the hyperparameters."""
    settings = GPTQConfig(**config)

    def compress(w: Float[Array, "o i"], stats: HessianStats) -> QuantizedTensor:
        return quantize_weight(w, stats.gram, settings)

    def compress_sparse(
        w: Float[Array, "o i"], mask: Bool[Array, "o i"], stats: HessianStats
    ) -> QuantizedTensor:
        return quantize_weight(w, stats.gram, settings, mask)

    return hessian.method(compress, row_block=settings.format.rows, compress_sparse=compress_sparse)


def quantize_weight(
    w: Float[Array, "o i"],
    h: Float[Array, "i i"],
    config: GPTQConfig,
    mask: Bool[Array, "o i"] | None = None,
) -> QuantizedTensor:
    """Quantize W given X Xᵀ, summed or averaged: without dead inputs its scale does not matter.

    mask: which weights there are. Others are zero whatever their codes say, and what earlier errors
    would move there is an error itself, for others to make up.

    Raises ValueError if groups do not divide i. If H + λ I is not positive definite, every scale
    is NaN: rounding in its place would hide it.
    """
    format, (_, i) = config.format, w.shape
    c = format.block(w.shape)[1]
    dead = jnp.diag(h) == 0  # inputs that are always zero: their weights are free
    w, gram = jnp.where(dead, 0, w), h
    h = h + jnp.diag(dead.astype(h.dtype))
    order = hessian.by_activity(h) if config.activation_order else jnp.arange(i)
    u = hessian.inverse_factor(h[order][:, order], config.damping)

    grid = format.fit(w, gram)
    static = config.static_groups or c == i
    keep = None if mask is None else mask.T[order]
    codes, grid = _quantize_columns(w.T[order], u, order // c, grid, keep, format, config, static)
    codes = jnp.zeros_like(codes).at[order].set(codes)
    singular = jnp.logical_not(jnp.isfinite(u).all())
    return format.tensor(codes.T, grid.void(singular))


def _quantize_columns(
    w: Float[Array, "i o"],
    u: Float[Array, "i i"],
    group: Int[Array, " i"],
    grid: Grid,
    keep: Bool[Array, "i o"] | None,
    format: Format,
    config: GPTQConfig,
    static: bool,
):
    """The loop over W's columns, given as rows (contiguous in memory), block by block."""
    (i, o), c = w.shape, format.block(w.T.shape)[1]
    b = _block_size(i if static else c, config.block_size)

    def quantize_block(carry, start):
        w, grid = carry
        if not static:
            grid = lax.cond(start % c == 0, lambda: _refit(w, grid, start, c, format), lambda: grid)
        scale, zero = (table.T for table in format.spread(grid, w.T))
        u_rows = lax.dynamic_slice(u, (start, 0), (b, i))
        u_block = lax.dynamic_slice(u_rows, (0, start), (b, b))

        block = lax.dynamic_slice(w, (start, 0), (b, o))
        of_block = lax.dynamic_slice(group, (start,), (b,))
        stay = None if keep is None else lax.dynamic_slice(keep, (start, 0), (b, o))
        codes, errors = gptq_block(block, u_block, scale, zero, of_block, stay, grid=format.points)
        return (w - u_rows.T @ errors, grid), codes

    (_, grid), codes = lax.scan(quantize_block, (w, grid), jnp.arange(0, i, b))
    return codes.reshape(i, o), grid


def _refit(w, grid: Grid, start, c, format: Format) -> Grid:
    """Replace the range of the group that begins at column `start` by that of W as it is now."""
    fresh = format.fit(lax.dynamic_slice(w, (start, 0), (c, w.shape[1])).T)

    def put(table, column):
        return lax.dynamic_update_slice(table, column, (0, start // c))

    zero = None if grid.zero is None or fresh.zero is None else put(grid.zero, fresh.zero)
    return grid._replace(scale=put(grid.scale, fresh.scale), zero=zero)


def _block_size(columns: int, largest: int) -> int:
    """The largest divisor of `columns` up to `largest`."""
    return max(b for b in range(1, min(columns, largest) + 1) if columns % b == 0)
