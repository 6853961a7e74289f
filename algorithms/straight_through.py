"""Formats that gradients pass through: rounding counts as the identity.

Straight-through estimator: Bengio, Léonard, Courville, arXiv:1308.3432. For a group of weights with
range [low, high], and offsets v in units of the step:
    s = stored((high - low) / n),   z = round(-low / s),   q = clip(round(w / s + v) + z, 0, n)
    ŵ = s (q - z)
Forward, ŵ is what the format stores, to the last bit. Backward, `stored` and `round` have slope 1,
and `clip` has slope 1 inside and at its ends, 0 outside. `on_steps` has s and z themselves, learned
directly, in place of a range.
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
from algorithms.numerics import through
from algorithms.tensors import QuantizedTensor
from algorithms.tensors.quantized import load_scale

OUTGROWN = 1 + 2**-5  # of the largest scale that is stored: up to there E4M3 rounds down to it


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
    divisor: Float[Array, ""] | None = None,
    clip_first: bool = False,
) -> Quantized:
    """w on the grid that covers `range`, which centred elements take as [-m, m] with m the larger
    of -low and high. Groups of zeros take no offset: they stay zero.

    zero_moves: whether gradients pass the rounding of z; else z is a constant to them. divisor: of
    nested scales; None: the one that fits w, which is not learned. clip_first: as in `inside`.
    """
    element, (low, high) = format.element, range
    if element.centred:
        high = jnp.maximum(-low, high)
        low = -high
    if format.nested and divisor is None:
        divisor = format.fit(w).divisor
    grid = jax.lax.stop_gradient(format.grid(low, high, divisor))
    step = through(element.scale(low, high), load_scale(grid.scale, divisor).astype(w.dtype))
    if grid.zero is None:
        zero = jax.lax.stop_gradient(element.zero(low, step))
    else:
        zero = grid.zero.astype(w.dtype)
        zero = through(-low / step, zero) if zero_moves else zero
    return _rounded(w, step, zero, grid, format, offset, clip_first)


def on_steps(
    w: Float[Array, "o i"],
    step: Float[Array, "o g"],
    format: Format,
    *,
    zero: Float[Array, "o g"] | None = None,
    low: Float[Array, "o g"] | None = None,
    divisor: Float[Array, ""] | None = None,
    clip_first: bool = False,
) -> Quantized:
    """w on the grid of given steps, each as the format stores scales.

    Elements that are not centred begin at a zero point, or at `low` with zero = -low / step.
    divisor, clip_first: as in `quantize`.
    """
    element, ones = format.element, jnp.ones_like(step)
    if format.nested and divisor is None:
        divisor = format.fit(w).divisor
    kept = stored_step(step, format, divisor)
    if element.centred:
        zero = own = jax.lax.stop_gradient(element.zero(-ones, ones))
        grid = Grid(kept.scale, None, kept.divisor)
    else:
        real = zero if low is None else -low / kept.step
        assert real is not None
        own = jax.lax.stop_gradient(element.zero(-real, ones))
        zero, grid = through(real, own), Grid(kept.scale, own, kept.divisor)
    return _rounded(w, kept.step, zero, grid, format, None, clip_first)


class StoredStep(NamedTuple):
    """A step that is learned: what it is worth, differentiable, and what is stored."""

    step: Float[Array, "o g"]
    scale: Any  # Array
    divisor: Float[Array, ""] | None


def stored_step(
    step: Float[Array, "R G"], format: Format, divisor: Float[Array, ""] | None = None
) -> StoredStep:
    """A nested scale's divisor holds until a step is too large for it, then fits the largest."""
    if divisor is not None:
        largest, most = float(jnp.finfo(format.scale_dtype or step.dtype).max), step.max()
        fits = most * divisor < largest * OUTGROWN
        divisor = jax.lax.stop_gradient(jnp.where(fits, divisor, largest / most))
    peak = step / format.element.scale(*(jnp.full_like(step, end) for end in (-1, 1)))
    scale = jax.lax.stop_gradient(format.stored(step, peak, divisor))
    return StoredStep(through(step, load_scale(scale, divisor).astype(step.dtype)), scale, divisor)


def _rounded(w, step, zero, grid, format: Format, offset, clip_first: bool) -> Quantized:
    element, step, zero = format.element, step[..., None], zero[..., None]
    groups = _grouped(w, format)
    x = groups / step
    if offset is not None:
        live = jnp.any(groups != 0, -1, keepdims=True)
        x = x + jnp.where(live, _grouped(offset, format), 0)
    codes = element.encode(x, zero)
    within = inside(x, zero, element, clip_first=clip_first)
    steps = jnp.where(within, x, -zero)  # at its ends, q is 0 or n whatever z is
    steps = through(steps, element.decode(codes, zero))
    return Quantized((steps * step).reshape(w.shape), codes.reshape(w.shape), grid)


def inside(
    x: Float[Array, "o g c"],
    zero: Float[Array, "o g 1"],
    element: Element,
    *,
    clip_first: bool = False,
) -> Bool[Array, "o g c"]:
    """Where the element does not clip x, the ends of its range included.

    clip_first: before x is rounded, so that up to half a step beyond an integer's ends is outside;
    small floats have it so in any case.
    """
    if isinstance(element, Integer) and clip_first:
        return (x + zero >= 0) & (x + zero <= element.top)
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
