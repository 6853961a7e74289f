"""QTIP. Tseng, Sun, Hou, De Sa, NeurIPS 2024, arXiv:2406.11235. Notes: papers/qtip.md.

Rotate, so that weights look like draws from a normal distribution, which random codes fit:
    W' = V W Uᵀ,   G' = U X Xᵀ Uᵀ       (algorithms/incoherence.py)
Then round blocks of columns with feedback, H = G' + λ I = L D Lᵀ by blocks, from the last to the
first (BlockLDLQ, algorithms/block_ldlq.py):
    Ŵ_k = s TCQ((W'_k + Σ_{j>k} (W'_j - Ŵ_j) L_jk) / s)
TCQ takes a tile of the block, 256 weights, for one sequence, and gives the nearest walk on a
trellis (algorithms/trellis.py): the shape of its error is that of a 256-dimensional codebook.
"""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from algorithms import hessian, incoherence, trellis
from algorithms.block_ldlq import block_ldlq
from algorithms.hessian import HessianStats
from algorithms.layerwise import LayerwiseMethod
from algorithms.tensors.rotated import RotatedTensor
from algorithms.tensors.trellis import TrellisTensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class QTIPConfig:
    """The trellis, and how weights are brought to it."""

    bits: int = 2  # k, per weight
    state_bits: int = 12  # L: 2^L states; each bit more doubles the work, and it decodes as fast
    code: str = "3inst"  # what a state stands for: 3inst, 1mad or lut
    spread: float = 0.9  # rms of W' as a fraction of the code's
    tile: int = 16  # rows, and columns, that one walk goes through
    row_block: int | None = 64  # outputs that rotate together, or fewer, to divide rows; None: none
    damping: float = 0.01  # λ as a fraction of mean(diag(X Xᵀ))

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 4:
            raise ValueError(f"bits={self.bits} must be from 2 to 4.")
        if self.code not in trellis.CODES:
            raise ValueError(f"code={self.code!r} must be one of {', '.join(trellis.CODES)}.")
        if self.tile < 1:
            raise ValueError(f"tile={self.tile} must be positive.")
        trellis.check(self.tile**2, self.bits, self.state_bits)
        if self.spread <= 0:
            raise ValueError(f"spread={self.spread} must be positive.")
        if self.row_block is not None and self.row_block < 1:
            raise ValueError(
                f"row_block={self.row_block} must be positive, or null: outputs stay as they are."
            )
        if self.damping < 0:
            raise ValueError(f"damping={self.damping} must not be negative.")


def qtip(**config) -> LayerwiseMethod:
    """QTIP without its fine-tuning; the fields of `QTIPConfig` are the hyperparameters."""
    settings = QTIPConfig(**config)

    def compress(w: Float[Array, "o i"], stats: HessianStats, key: Key[Array, ""]) -> RotatedTensor:
        return quantize_weight(w, stats.gram, key, settings)

    return hessian.method(
        compress, seeded=True, row_block=math.lcm(settings.tile, settings.row_block or 1)
    )


def quantize_weight(
    w: Float[Array, "o i"], h: Float[Array, "i i"], key: Key[Array, ""], config: QTIPConfig
) -> RotatedTensor:
    """Quantize W given X Xᵀ, summed or averaged; `key` draws the signs of the rotations.

    Raises ValueError if tiles do not divide i, or it has no Hadamard matrix. If H + λ I is not
    positive definite, every scale is NaN.
    """
    i = w.shape[1]
    if i % config.tile:
        raise ValueError(
            f"tile={config.tile} must divide the input dimension of w, {w.shape=}: take a divisor "
            "of it, or leave this layer out."
        )
    rotated, gram, turns = incoherence.prepare(w, h, key, config.row_block)
    return RotatedTensor.from_signs(quantize_rotated(rotated, gram, config), *turns)


def quantize_rotated(
    w: Float[Array, "o i"], h: Float[Array, "i i"], config: QTIPConfig
) -> TrellisTensor:
    """Walks for a W whose weights are nearly normal, given X Xᵀ in the same coordinates.

    Each row of tiles has a scale, from its weights before any feedback.
    """
    (o, i), tile = w.shape, config.tile
    values = trellis.levels(config.code, config.state_bits).astype(w.dtype)
    w = jnp.pad(w, ((0, -o % tile), (0, 0)))
    rows = jnp.minimum(o - jnp.arange(0, o, tile), tile)  # the last tiles may hold fewer
    rms = jnp.sqrt(jnp.sum(w.reshape(-1, tile * i) ** 2, axis=1) / (rows * i))
    scale = rms / (config.spread * jnp.sqrt(jnp.mean(values**2)))

    def quantize(block, k):
        sequences = block.reshape(-1, tile * tile)
        states = trellis.quantize(sequences, values, config.bits)
        packed = trellis.pack(states, config.bits, config.state_bits)
        return values[states].reshape(block.shape), packed

    units = jnp.repeat(jnp.where(scale > 0, scale, 1), tile)[:, None]  # zeros stay zeros
    approximation, packed = block_ldlq(w / units, h, quantize, columns=tile, damping=config.damping)
    scale = jnp.where(jnp.isfinite(approximation).all(), scale, jnp.nan)
    layout = config.bits, config.state_bits, config.code, tile
    return TrellisTensor(packed.swapaxes(0, 1), scale, o, *layout)
