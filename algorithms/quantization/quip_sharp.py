"""QuIP#. Tseng, Chee, Sun, Kuleshov, De Sa, ICML 2024, arXiv:2402.04396. Notes:
papers/quip_sharp.md.

For a layer y = W x, with G = X Xᵀ and rotations U of the inputs and V of the outputs, each random
signs and a Hadamard matrix (see algorithms/incoherence.py):
    W' = V W Uᵀ,   G' = U G Uᵀ,   the weights of each row of W' nearly normal
    s = rms(w') / ρ for each row w',   ρ: where the codebook has its least error
    Ŵ' = s · BlockLDLQ(W' / s, G') with points of E8 for 8 columns at a time
    Ŵ = Vᵀ Ŵ' U
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from algorithms import hessian, incoherence, lattice
from algorithms.block_ldlq import block_ldlq
from algorithms.hessian import HessianStats
from algorithms.layerwise import LayerwiseMethod
from algorithms.tensors.lattice import LatticeTensor
from algorithms.tensors.rotated import RotatedTensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuIPSharpConfig:
    """The codebook, and how W is brought to it."""

    bits: int = 2  # E8P; 3: and 256 points of E8 for what it leaves; 4: and E8P again
    damping: float = 0.01  # λ as a fraction of mean(diag(X Xᵀ))
    codebook_scale: float | None = None  # ρ; None: 1.03, 0.98 or 1.03 at 2, 3 or 4 bits
    row_block: int | None = 64  # outputs that rotate together, or fewer, to divide rows; None: none

    def __post_init__(self) -> None:
        if self.bits not in lattice.NORMAL_SCALE:
            raise ValueError(f"bits={self.bits} must be 2, 3 or 4.")
        if self.damping < 0:
            raise ValueError(f"damping={self.damping} must not be negative.")
        if self.codebook_scale is not None and not self.codebook_scale > 0:
            raise ValueError(
                f"codebook_scale={self.codebook_scale} must be positive, or null for the "
                "codebook's own."
            )
        if self.row_block is not None and self.row_block < 1:
            raise ValueError(
                f"row_block={self.row_block} must be positive, or null to rotate no outputs."
            )


def quip_sharp(**config) -> LayerwiseMethod:
    """QuIP# without fine-tuning; the fields of `QuIPSharpConfig` are the hyperparameters."""
    settings = QuIPSharpConfig(**config)

    def compress(w: Float[Array, "o i"], stats: HessianStats, key: Key[Array, ""]) -> RotatedTensor:
        return quantize_weight(w, stats.gram, key, settings)

    return hessian.method(compress, seeded=True, row_block=settings.row_block or 1)


def quantize_weight(
    w: Float[Array, "o i"], h: Float[Array, "i i"], key: Key[Array, ""], config: QuIPSharpConfig
) -> RotatedTensor:
    """Rotate W by signs drawn from `key`, and quantize it given X Xᵀ.

    Raises ValueError if i is no multiple of 8 or has no Hadamard matrix. If H + λ I is not positive
    definite, every scale is NaN.
    """
    i = w.shape[1]
    if i % 8:
        raise ValueError(
            f"QuIP# codes 8 columns at a time, and the input dimension of w, {w.shape=}, is no "
            "multiple of 8: leave this layer out, or pad its inputs."
        )
    rotated, gram, turns = incoherence.prepare(w, h, key, config.row_block)
    return RotatedTensor.from_signs(quantize_rotated(rotated, gram, config), *turns)


def quantize_rotated(
    w: Float[Array, "o i"], h: Float[Array, "i i"], config: QuIPSharpConfig
) -> LatticeTensor:
    """Points of E8 for a W whose rows are nearly normal, given X Xᵀ in the same coordinates."""
    scale = _row_scale(w, config.codebook_scale or lattice.NORMAL_SCALE[config.bits])

    def quantize(block, index):
        codes, points = lattice.approximate(block, config.bits)
        return points, codes

    rows = w / jnp.where(scale == 0, 1, scale)[:, None]
    points, codes = block_ldlq(rows, h, quantize, columns=8, damping=config.damping)
    scale = jnp.where(jnp.isfinite(points).all(), scale, jnp.nan)
    codes, residual = jax.tree.map(jnp.transpose, codes)
    return LatticeTensor(codes, residual, scale.astype(jnp.float16), config.bits)


def _row_scale(w: Float[Array, "o i"], rho: float) -> Float[Array, " o"]:
    """rms / ρ of each row, rounded to float16 as it is stored; zero for a row of zeros alone."""
    exact = jnp.sqrt(jnp.mean(w**2, 1)) / rho
    info = jnp.finfo(jnp.float16)
    stored = jnp.clip(exact, info.tiny, info.max).astype(jnp.float16).astype(w.dtype)
    return jnp.where(exact == 0, 0, stored)
