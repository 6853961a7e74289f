"""AutoRound (SignRound). Cheng, Zhang, Shen, Cai, He, Lv, Liu, Findings of EMNLP 2024,
arXiv:2309.05516. Notes: papers/autoround.md.

Which way each weight is rounded and how far each group's range shrinks are learned, a block at a
time, on the block's output. With V in [-1/2, 1/2] of each weight, α, β in [0, 1] of each group:
    s = (α max(w) - β min(w)) / n,   z = round(-β min(w) / s)
    ŵ = s (clip(round(w / s + V) + z, 0, n) - z)
    p <- clip(p - η_t sign(∂L/∂p)) for p = V, α, β,   η_t = η (1 - t / steps),   η = 1 / steps
As Σ η_t is about 1/2, V can reach any neighbour, and no farther.
"""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from algorithms import straight_through
from algorithms.blockwise import BlockwiseMethod
from algorithms.elements import Integer, SmallFloat
from algorithms.formats import Format, integer
from algorithms.straight_through import Quantized, Range


class Parameters(NamedTuple):
    """Of one weight; `low` and `high` are the parts of a group's range that are kept."""

    offset: Float[Array, "o i"]  # V
    low: Float[Array, "o g"]  # β
    high: Float[Array, "o g"]  # α


LEAST, MOST = Parameters(-0.5, 0.0, 0.0), Parameters(0.5, 1.0, 1.0)  # type: ignore[arg-type]


def autoround(
    *,
    format: Format | None = None,
    steps: int = 100,
    batch: int = 2,
    learning_rate: float | None = None,
    range_learning_rate: float | None = None,
    keep_best: bool = True,
) -> BlockwiseMethod:
    """AutoRound onto a format, by default 4-bit integers.

    learning_rate: of V; None: 1 / steps. range_learning_rate: of α and β; None: V's.
    """
    format = integer() if format is None else format
    straight_through.require_learnable(format, "autoround")
    if not isinstance(format.element, Integer | SmallFloat):
        raise ValueError(
            f"autoround rounds to integers or small floats, not to {format.element}: a step of V "
            "has no size there."
        )
    rate = 1 / max(steps, 1) if learning_rate is None else learning_rate
    range_rate = rate if range_learning_rate is None else range_learning_rate
    if rate < 0 or range_rate < 0:
        raise ValueError(f"{learning_rate=} and {range_learning_rate=} must not be negative.")

    def init(w: Float[Array, "o i"]) -> Parameters:
        whole = straight_through.whole_range(w, format)
        return Parameters(jnp.zeros_like(w), *map(jnp.ones_like, whole))

    return straight_through.learned(
        init, quantize_weight, format, sign_descent(rate, range_rate, steps),
        steps=steps, batch=batch, keep_best=keep_best, project=project,
    )  # fmt: skip


def quantize_weight(w: Float[Array, "o i"], parameters: Parameters, format: Format) -> Quantized:
    """Round w / s + V; raises ValueError if groups do not divide i."""
    low, high = straight_through.whole_range(w, format)
    kept = Range(low * parameters.low, high * parameters.high)
    return straight_through.quantize(w, kept, format, parameters.offset)


def sign_descent(rate: float, range_rate: float, steps: int) -> optax.GradientTransformation:
    """Signed gradients, the rate of either kind falling to zero in a line."""

    def descent(rate: float) -> optax.GradientTransformation:
        schedule = optax.linear_schedule(rate, 0.0, steps)
        return optax.chain(optax.scale_by_sign(), optax.scale_by_learning_rate(schedule))

    rates = {"offset": descent(rate), "range": descent(range_rate)}
    return optax.partition(rates, Parameters("offset", "range", "range"))  # type: ignore[arg-type]


def project(parameters: Parameters) -> Parameters:
    """Back to V's, β's and α's intervals."""
    return optax.projections.projection_box(parameters, LEAST, MOST)
