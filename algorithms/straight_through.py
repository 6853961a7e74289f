"""Formats that gradients pass through: rounding counts as the identity.

Straight-through estimator: Bengio, Léonard, Courville, arXiv:1308.3432. For a group of weights with
range [low, high], and offsets v in units of the step:
    s = stored((high - low) / n),   z = round(-low / s),   q = clip(round(w / s + v) + z, 0, n)
    ŵ = s (q - z)
Forward, ŵ is what the format stores, to the last bit. Backward, `stored` and `round` have slope 1,
and `clip` has slope 1 inside and at its ends, 0 outside.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, UInt8

from algorithms.blockwise import BlockwiseMethod
from algorithms.elements import Element, Integer, SmallFloat
from algorithms.formats import Format, Grid
from algorithms.tensors import QuantizedTensor
from algorithms.tensors.quantized import load_scale


class Range(NamedTuple):
    """What each group of a row covers, zero included."""

    low: Float[Array, "o g"]
    high: Float[Array, "o g"]


class Quantized(NamedTuple):
    """A weight on its grid: what it is worth, differentiable, and what is stored."""

    dense: Float[Array, "o i"]
    codes: UInt8[Array, "o i"]
    grid: Grid

    def tensor(self, format: Format) -> QuantizedTensor:
        return format.tensor(self.codes, self.grid)


@jax.custom_jvp
def through(x: Array, value: Array) -> Array:
    """`value`, with the gradient of `x`."""
    return value


@through.defjvp
def _through_jvp(primals, tangents):
    return primals[1], tangents[0]


def require_learnable(format: Format, name: str) -> None:
    """Raise ValueError for a format whose ranges the method `name` cannot learn."""
    if format.rows != 1:
        raise ValueError(
            f"{name} learns a range for each group of one row, not for rows={format.rows}: "
            "choose a format with rows=1."
        )
    if format.search is not None:
        raise ValueError(
            f"search={format.search!r} has no effect on {name}, which learns ranges: choose null."
        )


def whole_range(w: Float[Array, "o i"], format: Format) -> Range:
    """From each group's least number to its largest, as `Format.fit` takes it."""
    groups = _grouped(w, format)
    low, high = jnp.minimum(groups.min(-1), 0), jnp.maximum(groups.max(-1), 0)
    least, most = format.element.empty
    empty = low == high
    return Range(jnp.where(empty, least, low), jnp.where(empty, most, high))


def quantize(
    w: Float[Array, "o i"],
    range: Range,
    format: Format,
    offset: Float[Array, "o i"] | None = None,
    *,
    zero_moves: bool = True,
) -> Quantized:
    """w on the grid that covers `range`, which centred elements take as [-m, m] with m the larger
    of -low and high. Groups of zeros take no offset: they stay zero.

    zero_moves: whether gradients pass the rounding of z; else z is a constant to them.
    """
    element, (low, high) = format.element, range
    if element.centred:
        high = jnp.maximum(-low, high)
        low = -high
    divisor = format.fit(w).divisor if format.nested else None  # of the whole weight: not learned
    grid = jax.lax.stop_gradient(format.grid(low, high, divisor))
    step = through(element.scale(low, high), load_scale(grid.scale, divisor).astype(w.dtype))
    if grid.zero is None:
        zero = jax.lax.stop_gradient(element.zero(low, step))
    else:
        zero = grid.zero.astype(w.dtype)
        zero = through(-low / step, zero) if zero_moves else zero
    step, zero = step[..., None], zero[..., None]

    groups = _grouped(w, format)
    x = groups / step
    if offset is not None:
        live = jnp.any(groups != 0, -1, keepdims=True)
        x = x + jnp.where(live, _grouped(offset, format), 0)
    codes = element.encode(x, zero)
    steps = jnp.where(inside(x, zero, element), x, -zero)  # at its ends, q is 0 or n whatever z is
    steps = through(steps, element.decode(codes, zero))
    return Quantized((steps * step).reshape(w.shape), codes.reshape(w.shape), grid)


def inside(
    x: Float[Array, "o g c"], zero: Float[Array, "o g 1"], element: Element
) -> Bool[Array, "o g c"]:
    """Where the element does not clip x, the ends of its range included."""
    if isinstance(element, Integer):
        whole = element.zero_dtype == "uint8"
        code = jnp.round(x) + zero if whole else jnp.round(x + zero)
        return (code >= 0) & (code <= element.top)
    peak = element.format.peak if isinstance(element, SmallFloat) else 1.0
    return jnp.abs(x) <= peak


def _grouped(x: Float[Array, "o i"], format: Format) -> Float[Array, "o g c"]:
    return x.reshape(x.shape[0], -1, format.block(x.shape)[1])


def learned(
    init: Callable[[Float[Array, "o i"]], Any],
    quantize: Callable[[Float[Array, "o i"], Any, Format], Quantized],
    format: Format,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    batch: int,
    keep_best: bool,
    project: Callable[[Any], Any] | None = None,
) -> BlockwiseMethod:
    """A method that learns how weights are rounded onto a format.

    init(w) gives a weight's parameters, quantize(w, parameters, format) what they round it to.
    """
    for name, value in {"steps": steps, "batch": batch}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be positive.")

    def approximate(w: Float[Array, "o i"], parameters: Any) -> Float[Array, "o i"]:
        return quantize(w, parameters, format).dense

    def finish(w: Float[Array, "o i"], parameters: Any) -> QuantizedTensor:
        return quantize(w, parameters, format).tensor(format)

    return BlockwiseMethod(init, approximate, finish, optimizer, steps, batch, keep_best, project)
