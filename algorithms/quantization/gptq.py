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
from jaxtyping import Array, Float, Int

from algorithms import hessian
from algorithms.hessian import HessianStats
from algorithms.layerwise import LayerwiseMethod
from algorithms.numerics import IntegerGrid
from algorithms.tensors import QuantizedTensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQConfig(IntegerGrid):
    """The grid, and how GPTQ walks it."""

    activation_order: bool = True  # columns with the largest diag(H) first
    static_groups: bool = True  # ranges from the original W; else from W as updated at group start
    damping: float = 0.01  # λ as a fraction of mean(diag(X Xᵀ)) (Step 3)
    block_size: int = 64  # columns per lazy update; the result does not depend on it

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation_order and not self.static_groups and self.group_size is not None:
            raise ValueError(
                "activation_order=True needs static_groups=True: a group met out of order has no "
                "moment at which all its columns are current."
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

    return LayerwiseMethod(
        hessian.init, hessian.observe, compress, hessian.output_error, notes=hessian.notes
    )


def quantize_weight(
    w: Float[Array, "o i"], h: Float[Array, "i i"], config: GPTQConfig
) -> QuantizedTensor:
    """Quantize W given X Xᵀ, summed or averaged: without dead inputs its scale does not matter.

    Raises ValueError if groups do not divide i. If H + λ I is not positive definite, every scale
    is NaN: rounding in its place would hide it.
    """
    (o, i), c = w.shape, config.columns_per_group(w)
    dead = jnp.diag(h) == 0  # inputs that are always zero: their weights are free
    w, h = jnp.where(dead, 0, w), h + jnp.diag(dead.astype(h.dtype))
    order = jnp.argsort(-jnp.diag(h)) if config.activation_order else jnp.arange(i)
    u = hessian.inverse_factor(h[order][:, order], config.damping)

    scale, zero = (table.T for table in config.fit(w.reshape(o, -1, c)))
    static = config.static_groups or c == i
    codes, scale, zero = _quantize_columns(w.T[order], u, order // c, scale, zero, config, static)
    codes = jnp.zeros_like(codes).at[order].set(codes)
    scale = jnp.where(jnp.isfinite(u).all(), scale, jnp.nan)
    return QuantizedTensor.from_codes(codes.T, *config.stored(scale.T, zero.T), config.bits)


def _quantize_columns(
    w: Float[Array, "i o"],
    u: Float[Array, "i i"],
    group: Int[Array, " i"],
    scale: Float[Array, "g o"],
    zero: Float[Array, "g o"],
    config: GPTQConfig,
    static: bool,
):
    """The loop over W's columns, given as rows (contiguous in memory), block by block."""
    (i, o), c = w.shape, w.shape[0] // scale.shape[0]
    b = _block_size(i if static else c, config.block_size)

    def quantize_block(carry, start):
        w, scale, zero = carry
        if not static:
            scale, zero = lax.cond(
                start % c == 0,
                lambda: _refit(w, scale, zero, start, c, config),
                lambda: (scale, zero),
            )
        u_rows = lax.dynamic_slice(u, (start, 0), (b, i))
        u_block = lax.dynamic_slice(u_rows, (0, start), (b, b))

        def quantize_column(errors, column):
            j, w_j, u_j, d, g = column
            w_j = w_j - u_j @ errors  # what the block's columns before j left for j to make up
            q = config.quantize(w_j[:, None], scale[g], zero[g])
            error = (w_j - config.dequantize(q, scale[g], zero[g])[:, 0]) / d
            return errors.at[j].set(error), q[:, 0].astype(jnp.uint8)

        d = jnp.diag(u_block)
        above = (u_block - jnp.diag(d)).T  # row j holds U_kj of the columns k before j
        block = lax.dynamic_slice(w, (start, 0), (b, o))
        columns = (jnp.arange(b), block, above, d, lax.dynamic_slice(group, (start,), (b,)))
        errors, codes = lax.scan(quantize_column, jnp.zeros_like(block), columns)
        return (w - u_rows.T @ errors, scale, zero), codes

    (_, scale, zero), codes = lax.scan(quantize_block, (w, scale, zero), jnp.arange(0, i, b))
    return codes.reshape(i, o), scale, zero


def _refit(w, scale, zero, start, c, config):
    """Replace the range of the group that begins at column `start` by that of W as it is now."""
    s, z = config.fit(lax.dynamic_slice(w, (start, 0), (c, w.shape[1])).T)
    at = (start // c, 0)
    return lax.dynamic_update_slice(scale, s[None], at), lax.dynamic_update_slice(zero, z[None], at)


def _block_size(columns: int, largest: int) -> int:
    """The largest divisor of `columns` up to `largest`."""
    return max(b for b in range(1, min(columns, largest) + 1) if columns % b == 0)
