"""Quantized activations: a one-shot method whose layers round their input first.

The input of a layer is rounded onto a format as the matrix [n, i] of tokens: one scale per token is
a scale per row, per tensor is `rows: null`. Dynamic scales are fitted to each input; static ones to
what calibration saw.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from algorithms.formats import Format, Grid
from algorithms.layerwise import LayerwiseMethod, Statistics
from algorithms.tensors import QuantizedInput


class RangeStats(NamedTuple):
    """The range of each channel beside the method's own statistics."""

    low: Float[Array, " i"]
    high: Float[Array, " i"]
    inner: Statistics


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
            grid = Grid(None, None, None) if dynamic else _static(stats, format)
            return QuantizedInput(method.compress(w, inner, *key), *grid, format)

        if dynamic:
            return method._replace(compress=compress)
        return _with_ranges(method)._replace(compress=compress)

    return wrap


def _inner_notes(notes: Callable[..., dict[str, Array]], stats: RangeStats) -> dict[str, Array]:
    return notes(stats.inner)


def _static(stats: RangeStats, format: Format) -> Grid:
    return format.fit(jnp.stack([stats.low, stats.high]))


def _with_ranges(method: LayerwiseMethod) -> LayerwiseMethod:
    def init(i: int) -> RangeStats:
        inner = None if method.init is None else method.init(i)
        return RangeStats(jnp.zeros(i), jnp.zeros(i), inner)

    def observe(stats: RangeStats, x: Float[Array, "n i"]) -> RangeStats:
        inner = method.observe(stats.inner, x) if method.observe else None
        low, high = jnp.minimum(stats.low, x.min(0)), jnp.maximum(stats.high, x.max(0))
        return RangeStats(low, high, inner)

    def error(
        w: Float[Array, "o i"], approximation: Float[Array, "o i"], stats: RangeStats
    ) -> Float[Array, ""]:
        """NaN where a range is not finite: no scale would be either."""
        finite = jnp.isfinite(stats.low).all() & jnp.isfinite(stats.high).all()
        return jnp.where(finite, method.error(w, approximation, stats.inner), jnp.nan)

    return method._replace(
        init=init,
        observe=observe,
        error=error,
        notes=None if method.notes is None else functools.partial(_inner_notes, method.notes),
    )
