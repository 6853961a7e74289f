"""Quantized activations: a one-shot method whose layers round their input first.

The input of a layer is rounded onto a format as the matrix [n, i] of tokens: one scale per token is
a scale per row, per tensor is `rows: null`. Dynamic scales are fitted to each input; static ones to
what calibration saw.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from algorithms.formats import Format, Grid
from algorithms.layerwise import LayerwiseMethod, WithOwn, beside
from algorithms.tensors import QuantizedInput


class RangeStats(NamedTuple):
    """The range of each channel."""

    low: Float[Array, " i"]
    high: Float[Array, " i"]


def quantized_inputs(
    *, format: Format, dynamic: bool = True
) -> Callable[[LayerwiseMethod], LayerwiseMethod]:
    """Make a method's layers round their input onto `format`.

    The method's own statistics are of activations before rounding, as in QuaRot's and SmoothQuant's
    code. Raises ValueError for static scales of single tokens, which nobody knows beforehand.
    """
    if format.needs_data:
        raise ValueError(f"search={format.search} is for weights: activations have search=null.")
    if not dynamic and format.rows is not None:
        raise ValueError(
            f"dynamic=false needs rows=null in {format}: a token's own scale is known only when "
            "the token is there."
        )

    def wrap(method: LayerwiseMethod) -> LayerwiseMethod:
        def compress(w, stats, *key):
            inner = stats if dynamic else stats.inner
            grid = Grid(None, None, None) if dynamic else _static(stats.own, format)
            return QuantizedInput(method.compress(w, inner, *key), *grid, format)

        if dynamic:
            return method._replace(compress=compress)
        return _with_ranges(method)._replace(compress=compress)

    return wrap


def _static(ranges: RangeStats, format: Format) -> Grid:
    return format.fit(jnp.stack(ranges))


def _observe(ranges: RangeStats, x: Float[Array, "n i"]) -> RangeStats:
    return RangeStats(jnp.minimum(ranges.low, x.min(0)), jnp.maximum(ranges.high, x.max(0)))


def _with_ranges(method: LayerwiseMethod) -> LayerwiseMethod:
    within = beside(method, lambda i: RangeStats(jnp.zeros(i), jnp.zeros(i)), _observe)

    def error(
        w: Float[Array, "o i"], approximation: Float[Array, "o i"], stats: WithOwn
    ) -> Float[Array, ""]:
        """NaN where a range is not finite: no scale would be either."""
        finite = jnp.isfinite(jnp.stack(stats.own)).all()
        return jnp.where(finite, within.error(w, approximation, stats), jnp.nan)

    return within._replace(error=error)
