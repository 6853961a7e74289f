"""Quantization-aware training by the straight-through estimator. Bengio, Léonard, Courville, 2013,
arXiv:1308.3432; for integers Jacob, Kligys, Chen, Zhu, Tang, Howard, Adam, Kalenichenko, CVPR 2018,
arXiv:1712.05877.

The forward pass rounds what is learned, the backward pass takes rounding for the identity:
    y = Q_x(x) Q(W)ᵀ,   ∂L/∂W = ∂L/∂Q(W),   ∂L/∂x = ∂L/∂Q_x(x)
Q's grid covers each group of W as it is at the step, or stays what it was, or has learned ends
(`algorithms.straight_through`: then weights beyond them have no gradient, as their end has it).
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from algorithms import straight_through
from algorithms.formats import Format, Grid
from algorithms.parametrization import Parametrization
from algorithms.quantization import aware
from algorithms.quantization.aware import AwareLinear, LearnedGrid, Nearest, Start
from algorithms.straight_through import Quantized, Range
from algorithms.tensors.quantized import load_scale
from algorithms.training import exact

RANGES = (None, "weights", "kept", "learned")


def ste(
    *,
    format: Format | None = None,
    activations: Format | None = None,
    ranges: str | None = None,
    match: str = r"blocks\..*",
) -> Parametrization:
    """Weights on a format, inputs too where `activations` says onto which.

    format: None keeps what a quantized layer has. ranges: of each group: "weights", what they cover
    at each step; "kept", what a quantized layer has; "learned"; None: weights of a dense layer,
    kept of a quantized one.
    """
    if ranges not in RANGES:
        raise ValueError(f"ranges={ranges!r} must be weights, kept, learned or null.")

    def make(layer: Any, key: Key[Array, ""]) -> AwareLinear:
        start = aware.start(layer, format)
        return AwareLinear(start, _rounding(start, ranges), aware.inputs_of(start, activations))

    return Parametrization(make=make, match=match)


def _rounding(start: Start, ranges: str | None) -> Any:
    if ranges == "learned":
        return LearnedRange(start)
    if ranges == "kept" and start.grid is None:
        raise ValueError("ranges='kept' needs a quantized layer, and this one is dense: null.")
    return Nearest(start.format, None if ranges == "weights" else start.grid)


class LearnedRange(LearnedGrid):
    """Of each group, from `low` to `high`; small floats take the larger magnitude."""

    def __init__(self, start: Start):
        straight_through.require_learnable(start.format, "ranges=learned")
        self.format = start.format
        if start.grid is None:
            found = straight_through.whole_range(start.w, self.format)
        else:
            found = covered(start.grid, self.format, start.w)
        self.low, self.high = (exact(nnx.Param(end)) for end in found)
        self.divisor = None if start.grid is None else aware.kept(start.grid.divisor)

    def quantized(self, w: Float[Array, "o i"]) -> Quantized:
        range = Range(self.low[...], self.high[...])
        divisor = None if self.divisor is None else self.divisor[...]
        return straight_through.quantize(w, range, self.format, divisor=divisor)


def covered(grid: Grid, format: Format, w: Float[Array, "o i"]) -> Range:
    """The range of each group of w that a grid covers."""
    step, zero = load_scale(grid.scale, grid.divisor).astype(w.dtype), grid.zero
    if zero is None:
        peak = step / format.element.scale(-jnp.ones_like(step), jnp.ones_like(step))
        return Range(-peak, peak)
    top = 2**format.bits - 1
    zero = zero.astype(w.dtype)
    return Range(-zero * step, (top - zero) * step)
