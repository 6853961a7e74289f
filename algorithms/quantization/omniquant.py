"""OmniQuant's learnable weight clipping. Shao, Chen, Zhang, Xu, Zhao, Li, Zhang, Gao, Qiao, Luo,
ICLR 2024, arXiv:2308.13137. Notes: papers/omniquant.md.

How far each group's range shrinks is learned, a block at a time, on the block's output. With γ
and β of each group, σ the logistic function:
    s = (σ(γ) max(w) - σ(β) min(w)) / n,   z = round(-σ(β) min(w) / s)
    ŵ = s (clip(round(w / s) + z, 0, n) - z)
γ and β begin at 4, where σ is 0.98, and follow AdamW; to their gradients z is a constant.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from algorithms import straight_through
from algorithms.blockwise import BlockwiseMethod
from algorithms.formats import Format, integer
from algorithms.straight_through import Quantized, Range

START = 4.0  # of γ and β
EPSILON = 1e-16  # of AdamW: gradients of a relative error in one of many groups are small


class Parameters(NamedTuple):
    """Of one weight; σ of them are the parts of a group's range that are kept."""

    low: Float[Array, "o g"]  # β
    high: Float[Array, "o g"]  # γ


def omniquant(
    *,
    format: Format | None = None,
    steps: int = 100,
    batch: int = 2,
    learning_rate: float = 0.05,
    keep_best: bool = False,
) -> BlockwiseMethod:
    """Learnable weight clipping on a format, by default 4-bit integers."""
    format = integer() if format is None else format
    straight_through.require_learnable(format, "omniquant")
    if learning_rate < 0:
        raise ValueError(f"{learning_rate=} must not be negative.")

    def init(w: Float[Array, "o i"]) -> Parameters:
        whole = straight_through.whole_range(w, format)
        return Parameters(*(jnp.full_like(end, START) for end in whole))

    optimizer = optax.adamw(learning_rate, eps=EPSILON, weight_decay=0.0)
    return straight_through.learned(
        init, quantize_weight, format, optimizer, steps=steps, batch=batch, keep_best=keep_best
    )


def quantize_weight(w: Float[Array, "o i"], parameters: Parameters, format: Format) -> Quantized:
    """Round w to the grid of its clipped ranges; raises ValueError if groups do not divide i."""
    low, high = straight_through.whole_range(w, format)
    kept = Range(low * jax.nn.sigmoid(parameters.low), high * jax.nn.sigmoid(parameters.high))
    return straight_through.quantize(w, kept, format, zero_moves=False)
