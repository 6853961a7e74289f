"""What a column's numbers are rounded onto."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp


class Functions(NamedTuple):
    """Any points: encode(x, scale, zero) is codes, decode(codes, scale, zero) numbers."""

    encode: Callable[[Any, Any, Any], Any]
    decode: Callable[[Any, Any, Any], Any]


def _itself(x, scale, zero):
    return x


UNROUNDED = Functions(_itself, _itself)  # every number stays as it is, unless it goes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Integers:
    """scale (code - zero), codes from 0 to 2^bits - 1."""

    bits: int
    whole_zero: bool = True  # the zero point is an integer, and added to what is rounded already

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} must be from 2 to 8.")

    @property
    def top(self) -> int:
        return 2**self.bits - 1

    def points(self, x, scale, zero):
        """Codes, as numbers of x's type."""
        x = x / scale
        x = jnp.round(x) + zero if self.whole_zero else jnp.round(x + zero)
        return jnp.clip(x, 0, self.top)

    def encode(self, x, scale, zero):
        return self.points(x, scale, zero).astype(jnp.uint8)

    def decode(self, codes, scale, zero):
        return (codes.astype(zero.dtype) - zero) * scale


type Grid = Integers | Functions
