"""What one code stands for, before its scale: integers, small floats, quantiles of a normal.

An element maps codes of `bits` bits to values in steps of its group's scale, and says which scale
and zero point cover a range [low, high] that holds zero.
"""

import abc
import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from algorithms import minifloat

Steps = Float[Array, "*n"]  # in units of the scale
Codes = UInt8[Array, "*n"]


ELEMENTS: dict[str, type["Element"]] = {}  # by name, as checkpoints know them; yours join


class Element(abc.ABC):
    """Frozen and hashable: part of a tensor's type."""

    bits: int
    centred: ClassVar[bool] = True  # its ranges are [-m, m], and it has no zero point
    empty: ClassVar[tuple[float, float]] = (-1.0, 1.0)  # the range of a group of zeros

    def __init_subclass__(cls) -> None:
        ELEMENTS[cls.__name__] = cls

    @abc.abstractmethod
    def scale(self, low: Float[Array, "*g"], high: Float[Array, "*g"]) -> Float[Array, "*g"]:
        """The step that covers [low, high]; centred elements are given low = -high."""

    @abc.abstractmethod
    def encode(self, x: Steps, zero: Steps) -> Codes:
        """The nearest code of x, which broadcasts with its zero point."""

    @abc.abstractmethod
    def decode(self, codes: Codes, zero: Steps) -> Steps:
        """What codes stand for, in the zero point's dtype."""

    def zero(self, low: Float[Array, "*g"], scale: Float[Array, "*g"]) -> Float[Array, "*g"]:
        """The code of zero, for elements that have a choice."""
        return jnp.zeros_like(scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Integer(Element):
    """code - zero. Symmetric: 2^(bits-1) is zero and [-m, m] spans 2^bits - 1 steps. Asymmetric:
    [low, high] spans them, with a whole zero point, so that zero is on the grid, or a real one.
    """

    bits: int = 4
    symmetric: bool = False
    zero_dtype: str = "uint8"  # as stored, or float16; of an asymmetric grid

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} must be from 2 to 8.")
        if self.zero_dtype not in ("uint8", "float16"):
            raise ValueError(f"zero_dtype={self.zero_dtype!r} must be uint8 or float16.")

    @property
    def centred(self) -> bool:  # type: ignore[override]
        return self.symmetric

    @property
    def empty(self) -> tuple[float, float]:  # type: ignore[override]
        """With a real zero point, zero is on the grid of a range that begins there."""
        return (-1.0, 1.0) if self.symmetric or self.zero_dtype == "uint8" else (0.0, 1.0)

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def scale(self, low, high):
        return (high - low) / self.top

    def zero(self, low, scale):
        if self.symmetric:
            return jnp.full_like(scale, 2 ** (self.bits - 1))
        zero = -low / scale
        if self.zero_dtype == "uint8":
            return jnp.clip(jnp.round(zero), 0, self.top)
        return zero.astype(self.zero_dtype).astype(scale.dtype)

    def encode(self, x, zero):
        if self.zero_dtype == "uint8":
            return jnp.clip(jnp.round(x) + zero, 0, self.top).astype(jnp.uint8)
        return jnp.clip(jnp.round(x + zero), 0, self.top).astype(jnp.uint8)

    def decode(self, codes, zero):
        return codes.astype(zero.dtype) - zero


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallFloat(Element):
    """A float of 4, 6 or 8 bits, by its name: e4m3, e5m2, e3m2, e2m3, e2m1."""

    name: str

    def __post_init__(self) -> None:
        if self.name not in minifloat.MINIFLOATS:
            known = ", ".join(minifloat.MINIFLOATS)
            raise ValueError(f"name={self.name!r} is no small float: choose from {known}.")

    @property
    def format(self) -> minifloat.Minifloat:
        return minifloat.MINIFLOATS[self.name]

    @property
    def bits(self) -> int:  # type: ignore[override]
        return self.format.bits

    def scale(self, low, high):
        return high / self.format.peak

    def encode(self, x, zero):
        return self.format.encode(x.astype(jnp.float32))

    def decode(self, codes, zero):
        return self.format.decode(codes).astype(zero.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalFloat(Element):
    """NF4: sixteen quantiles of a normal between -1 and 1. Dettmers et al., arXiv:2305.14314."""

    bits: int = 4

    def __post_init__(self) -> None:
        if self.bits != 4:
            raise ValueError(f"bits={self.bits} must be 4: normal float has no other width.")

    def scale(self, low, high):
        return high

    def encode(self, x, zero):
        return minifloat.encode_levels(x.astype(jnp.float32), minifloat.NF4_LEVELS)

    def decode(self, codes, zero):
        return minifloat.decode_levels(codes, minifloat.NF4_LEVELS).astype(zero.dtype)
