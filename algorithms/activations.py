"""Quantized activations: a one-shot method whose layers round their input first.

The input of a layer is rounded onto a format as the matrix [n, i] of tokens: one scale per token is
a scale per row, per tensor is `rows: null`. Dynamic scales are fitted to each input; static ones to
what calibration saw. In between, of nested scales, the number that the whole tensor shares is from
calibration and the scales beneath it are fitted to each input: NVFP4 as servers run it.
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
    *, format: Format, dynamic: bool | str = True
) -> Callable[[LayerwiseMethod], LayerwiseMethod]:
    """Make a method's layers round their input onto `format`.

    dynamic: true, false, or "local", which is dynamic but for a nested format's divisor. The
    method's own statistics are of activations before rounding, as in QuaRot's and SmoothQuant's
    code. Raises ValueError for static scales of single tokens, which nobody knows beforehand.
    """
    if dynamic not in (True, False, "local"):
        raise ValueError(f"dynamic={dynamic!r} must be true, false or local.")
    if dynamic == "local" and not format.nested:
        raise ValueError(f"dynamic=local is for nested scales, which {format} has not.")
    if format.needs_data:
        raise ValueError(f"search={format.search} is for weights: activations have search=null.")
    if not dynamic and format.rows is not None:
        raise ValueError(
            f"dynamic=false needs rows=null in {format}: a token's own scale is known only when "
            "the token is there."
        )

    def wrap(method: LayerwiseMethod) -> LayerwiseMethod:
        def compress(w, stats, *key):
            inner = stats if dynamic is True else stats.inner
            grid = Grid(None, None, None) if dynamic is True else _static(stats.own, format)
            if dynamic == "local":
                grid = Grid(None, None, grid.divisor)
            return QuantizedInput(method.compress(w, inner, *key), *grid, format)

        if dynamic is True:
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
