"""Formats: an element, who shares its scale, and how the scale itself is stored.

`integer`, `fp8`, `microscaling`, `nvfp4` and `nf4` compose the published ones; any other
combination is a `Format` of its own. Letters: o outputs, i inputs; R, G rows and columns of the
table of scales; n the numbers that share a scale.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from algorithms import minifloat
from algorithms.elements import Element, Integer, NormalFloat, SmallFloat
from algorithms.tensors.quantized import QuantizedTensor, load_scale
from kernels.gptq_block import Functions, Integers

FLOATS = ("float16", "bfloat16", "float32")
POWERS = "float8_e8m0fnu"
SEARCHES = (None, "weights", "diagonal", "groups")
RANGES = 80  # that a search tries: p = 1, 0.99, …, 0.21


class Grid(NamedTuple):
    """What groups share, as stored: tables [R, G], and one number for the whole tensor."""

    scale: Any  # Array
    zero: Array | None
    divisor: Array | None  # of a nested scale: the effective one is scale / divisor

    def void(self, failed: Bool[Array, ""]) -> "Grid":
        """NaN in place of every scale where a solve failed."""
        nan = jnp.full_like(self.scale, jnp.nan)
        return self._replace(scale=jnp.where(failed, nan, self.scale))


class Spread(NamedTuple):
    """A grid's effective scale and zero point for each row: [o, G]; column j is in group j // c."""

    scale: Float[Array, "o G"]
    zero: Float[Array, "o G"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """How numbers of a matrix [o, i] become codes; frozen and hashable.

    search: None takes each group's whole range; else it is shrunk to the p in (0.2, 1] with the
    least Σ|Δ|^2.4 ("weights"), Σ_j G_jj Δ_j² ("diagonal") or Δ G_gg Δᵀ ("groups"), where Δ is a
    group's rounding error and G = X Xᵀ over calibration activations.
    """

    element: Element
    columns: int | None = 64  # consecutive columns that share a scale; None: all of a row
    rows: int | None = 1  # rows that do; None: all
    scale_dtype: str | None = "float16"  # as stored, before codes are chosen; None: the weight's
    nested: bool = False  # scales are stored times one float32 that fits the whole tensor to them
    search: str | None = None

    def __post_init__(self) -> None:
        if self.columns is not None and self.columns < 1:
            raise ValueError(
                f"group_size={self.columns} must be positive, or null for one group per row."
            )
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows={self.rows} must be positive, or null for all rows.")
        known = (None, *FLOATS, "float8_e4m3fn", POWERS)
        if self.scale_dtype not in known:
            raise ValueError(
                f"scale_dtype={self.scale_dtype!r} must be float16, bfloat16, float32, "
                "float8_e4m3fn, float8_e8m0fnu or null."
            )
        if self.scale_dtype == POWERS and not isinstance(self.element, SmallFloat):
            raise ValueError(f"scale_dtype={POWERS} is for small floats, not {self.element}.")
        if self.search not in SEARCHES:
            raise ValueError(
                f"search={self.search!r} must be weights, diagonal, groups or null for none."
            )
        if self.search == "groups" and self.rows != 1:
            raise ValueError(f"search=groups needs scales of one row each, not rows={self.rows}.")

    @property
    def bits(self) -> int:
        return self.element.bits

    @property
    def points(self) -> Integers | Functions:
        """What numbers are rounded onto, as `gptq_block` knows it."""
        if isinstance(self.element, Integer):
            return Integers(bits=self.bits, whole_zero=self.element.zero_dtype == "uint8")
        return Functions(self.encode, self.decode)

    @property
    def needs_data(self) -> bool:
        """Whether `fit` wants G."""
        return self.search in ("diagonal", "groups")

    def block(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(rows, columns) that share a scale in a matrix of this shape.

        Raises ValueError for groups of a row that do not divide it; blocks of several rows may be
        cut off at the edges, as published block formats are.
        """
        o, i = shape
        r, c = self.rows or o, self.columns or i
        if r == 1 and i % c:
            raise ValueError(
                f"group_size={c} must divide the input dimension of w, w.shape={shape}."
            )
        return min(r, o), min(c, i)

    def fit(
        self, w: Float[Array, "o i"], gram: Float[Array, "i i"] | None = None, divisor: Any = None
    ) -> Grid:
        """The scales of w's groups; gram: G, for a search that needs it; divisor: of nested scales,
        by default the one that fits w.
        """
        if self.needs_data and gram is None:
            raise ValueError(f"search={self.search} needs calibration activations.")
        groups = self._grouped(w)
        low, high = jnp.minimum(groups.min(-1), 0), jnp.maximum(groups.max(-1), 0)
        if self.element.centred:
            high = jnp.maximum(-low, high)
            low = -high
        empty = (low == 0) & (high == 0)
        least, most = self.element.empty
        low, high = jnp.where(empty, least, low), jnp.where(empty, most, high)
        if self.nested and divisor is None:
            divisor = self._divisor(w)
        if self.search is None:
            return self.grid(low, high, divisor)
        return self._search(groups, low, high, divisor, gram)

    def _grouped(self, w):
        """[R, G, n]: what shares a scale side by side, cut-off blocks filled with zeros."""
        r, c = self.block(w.shape)
        w = jnp.pad(w, [(0, -w.shape[0] % r), (0, -w.shape[1] % c)])
        o, i = w.shape
        return w.reshape(o // r, r, i // c, c).swapaxes(1, 2).reshape(o // r, i // c, r * c)

    def _divisor(self, w):
        """So that the largest group's scale is the largest that is stored."""
        peak = self.element.scale(*(jnp.float32(s) for s in (-1, 1)))  # of a largest magnitude 1
        largest = float(jnp.finfo(self.scale_dtype or jnp.float32).max)
        most = jnp.abs(w).max()
        return (largest / (jnp.where(most == 0, 1, most) * peak)).astype(jnp.float32)

    def grid(self, low, high, divisor=None) -> Grid:
        """The grid that covers [low, high], both [R, G], with zero inside; stored as it will be."""
        scale = self.element.scale(low, high)
        stored = self.stored(scale, high, divisor)
        step = load_scale(stored, divisor).astype(scale.dtype)
        zero = None if self.element.centred else self.element.zero(low, step)
        return Grid(stored, zero, divisor)

    def stored(self, scale, high, divisor=None):
        """A step as it is kept; a power of two follows from the largest magnitude, `high`."""
        if self.scale_dtype == POWERS:
            assert isinstance(self.element, SmallFloat)
            exponent = self.element.format.peak_exponent
            power = minifloat.encode_power(minifloat.mx_scale(high.astype(jnp.float32), exponent))
            return lax.bitcast_convert_type(power, jnp.dtype(POWERS))
        if self.scale_dtype is None:
            return scale
        info = jnp.finfo(self.scale_dtype)
        least = info.tiny if self.scale_dtype in FLOATS else info.smallest_subnormal
        scale = scale if divisor is None else scale * divisor
        return jnp.clip(scale, float(least), float(info.max)).astype(self.scale_dtype)

    def _search(self, groups, low, high, divisor, gram) -> Grid:
        def try_range(best, step):
            p = (1 - step / 100).astype(groups.dtype)
            grid = self.grid(p * low, p * high, divisor)
            scale, zero = self._loaded(grid, groups.dtype)
            codes = self.encode(groups, scale[..., None], zero[..., None])
            rounded = self.decode(codes, scale[..., None], zero[..., None])
            error = self._error(rounded - groups, gram)
            better = error < best[0]
            kept = [jnp.where(better, new, old) for new, old in zip(grid[:2], best[1], strict=True)
                    if new is not None]  # fmt: skip
            return (jnp.minimum(error, best[0]), (*kept, *[None] * (2 - len(kept)))), None

        first = self.grid(low, high, divisor)
        start = (jnp.full_like(low, jnp.inf), tuple(first[:2]))
        (_, (scale, zero)), _ = lax.scan(try_range, start, jnp.arange(RANGES))
        return Grid(scale, zero, divisor)

    def _error(self, d: Float[Array, "R G n"], gram) -> Float[Array, "R G"]:
        if self.search == "weights":  # as the official GPTQ code's `mse` option
            return (jnp.abs(d) ** 2.4).sum(-1)
        c = gram.shape[0] // d.shape[1] if self.rows == 1 else None
        if self.search == "groups":
            blocks = gram.reshape(d.shape[1], c, d.shape[1], c)
            blocks = jnp.moveaxis(jnp.diagonal(blocks, axis1=0, axis2=2), -1, 0)  # G c c
            return jnp.einsum("RGc,Gcd,RGd->RG", d, blocks, d)
        o = d.shape[0] if c else self.rows or d.shape[2] // gram.shape[0]
        weights = self._grouped(jnp.broadcast_to(jnp.diag(gram), (o, gram.shape[0])))[:1]
        return (weights * d**2).sum(-1)

    def _loaded(self, grid: Grid, dtype) -> Spread:
        scale = load_scale(grid.scale, grid.divisor).astype(dtype)
        zero = self.element.zero(scale, scale) if grid.zero is None else grid.zero.astype(dtype)
        return Spread(scale, zero)

    def spread(self, grid: Grid, w: Float[Array, "o i"]) -> Spread:
        """The grid's scale and zero point for each row of w, in w's dtype."""
        r, _ = self.block(w.shape)
        scale, zero = self._loaded(grid, w.dtype)
        return Spread(*(jnp.repeat(t, r, 0)[: w.shape[0]] for t in (scale, zero)))

    def encode(self, x, scale, zero):
        """The nearest code of x on the grid of `scale` and `zero`, which broadcast with it."""
        return self.element.encode(x / scale, zero)

    def decode(self, codes, scale, zero):
        """What codes stand for."""
        return self.element.decode(codes, zero) * scale

    def round(self, w: Float[Array, "o i"], grid: Grid) -> QuantizedTensor:
        """Each number of w at its nearest point."""
        scale, zero = self.columns_of(grid, w)
        return self.tensor(self.encode(w, scale, zero), grid)

    def columns_of(self, grid: Grid, w: Float[Array, "o i"]) -> Spread:
        """The grid's scale and zero point for each number of w: [o, i]."""
        c = self.block(w.shape)[1]
        return Spread(*(jnp.repeat(t, c, 1)[:, : w.shape[1]] for t in self.spread(grid, w)))

    def tensor(self, codes, grid: Grid) -> QuantizedTensor:
        """Codes [o, i] as a tensor that keeps them packed."""
        zero = grid.zero
        if zero is not None:
            assert isinstance(self.element, Integer)
            zero = zero.astype(self.element.zero_dtype)
        return QuantizedTensor.from_codes(
            codes, grid.scale, self.element,
            zero=zero, divisor=grid.divisor, block=self.block(codes.shape),
        )  # fmt: skip

    def nearest(self, x: Float[Array, "n i"], grid: Any = None) -> Float[Array, "n i"]:
        """x rounded onto a grid's points, by default one fitted to it."""
        grid = self.fit(x) if grid is None else Grid(*grid)
        scale, zero = self.columns_of(grid, x)
        return self.decode(self.encode(x, scale, zero), scale, zero)

    def quantize(self, w: Float[Array, "o i"], gram=None) -> QuantizedTensor:
        """Fit, then round."""
        return self.round(w, self.fit(w, gram))


def format_of(tensor: QuantizedTensor) -> Format:
    """The format that a tensor is in, whose scales are no longer fitted to anything."""
    (rows, columns), dtype = tensor.block, str(tensor.scale.dtype)
    return Format(
        element=tensor.element, rows=rows, columns=columns,
        scale_dtype=None if dtype == "float64" else dtype, nested=tensor.divisor is not None,
    )  # fmt: skip


def integer(
    *,
    bits: int = 4,
    group_size: int | None = 64,
    symmetric: bool = False,
    scale_dtype: str | None = "float16",
    zero_dtype: str = "uint8",
    search: str | None = None,
) -> Format:
    """A uniform grid of 2^bits points per group of consecutive columns; None: one group per row."""
    element = Integer(bits=bits, symmetric=symmetric, zero_dtype=zero_dtype)
    return Format(element=element, columns=group_size, scale_dtype=scale_dtype, search=search)


def fp8(
    *,
    element: str = "e4m3",
    rows: int | None = 1,
    columns: int | None = None,
    scale_dtype: str | None = "float32",
    search: str | None = None,
) -> Format:
    """FP8 by channel (rows=1, columns=None), tensor (both None) or block (both 128)."""
    return Format(
        element=SmallFloat(name=element), rows=rows, columns=columns,
        scale_dtype=scale_dtype, search=search,
    )  # fmt: skip


def microscaling(
    *, element: str = "e2m1", group_size: int = 32, search: str | None = None
) -> Format:
    """OCP MX v1.0: MXFP8, MXFP6 and MXFP4, 32 numbers to a power of two."""
    return Format(
        element=SmallFloat(name=element), columns=group_size, scale_dtype=POWERS, search=search
    )


def nvfp4(*, group_size: int = 16, search: str | None = None) -> Format:
    """NVFP4: 16 E2M1 numbers to an E4M3 scale, and a float32 for the tensor."""
    return Format(
        element=SmallFloat(name="e2m1"), columns=group_size, scale_dtype="float8_e4m3fn",
        nested=True, search=search,
    )  # fmt: skip


def nf4(
    *, group_size: int | None = 64, scale_dtype: str = "float16", search: str | None = None
) -> Format:
    """NF4 of QLoRA, its scales not quantized again."""
    return Format(element=NormalFloat(), columns=group_size, scale_dtype=scale_dtype, search=search)
