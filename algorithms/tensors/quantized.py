"""Codes on a grid, with a scale for each group."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from algorithms.tensors.base import CompressedTensor
from kernels import packing


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("packed", "scale", "zero"),
    meta_fields=("bits", "columns"),
)
@dataclasses.dataclass(frozen=True)
class QuantizedTensor(CompressedTensor):
    """W[o, i] = scale (code - zero) with unsigned codes of `bits` bits, packed along i.

    Each row has scale.shape[1] groups of consecutive columns; `zero=None` means 2^(bits-1). Leading
    axes appear when layers of one shape are compressed in one batch (vmap).
    """

    # A pytree's leaves are not always arrays (shapes, shardings): `validate` checks, not types.
    packed: Any  # UInt8[Array, "*l o b"]
    scale: Any  # Float[Array, "*l o g"]
    zero: Any  # UInt8[Array, "*l o g"] | None
    bits: int
    columns: int

    @classmethod
    def from_codes(
        cls,
        codes: UInt8[Array, "o i"],
        scale: Float[Array, "o g"],
        zero: UInt8[Array, "o g"] | None,
        bits: int,
    ) -> "QuantizedTensor":
        return cls(packing.pack(codes, bits), scale, zero, bits, codes.shape[1])

    def validate(self) -> None:
        """Raise ValueError unless the parts fit together."""
        o, groups = self.scale.shape
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} must be from 2 to 8.")
        if self.packed.shape != (o, packing.packed_width(self.columns, self.bits)):
            raise ValueError(
                f"packed.shape={self.packed.shape} does not hold {o} rows of {self.columns} codes "
                f"of {self.bits} bits."
            )
        if self.columns % groups:
            raise ValueError(f"{groups} groups do not divide {self.columns} columns.")
        if self.zero is not None and self.zero.shape != self.scale.shape:
            raise ValueError(f"zero.shape={self.zero.shape} is not scale.shape={self.scale.shape}.")

    @property
    def shape(self) -> tuple[int, int]:
        return self.scale.shape[0], self.columns

    @property
    def group_size(self) -> int:
        return self.columns // self.scale.shape[1]

    def codes(self) -> UInt8[Array, "o i"]:
        return packing.unpack(self.packed, self.bits, self.columns)

    def zero_point(self) -> UInt8[Array, "o g"]:
        if self.zero is None:
            return jnp.full(self.scale.shape, 2 ** (self.bits - 1), jnp.uint8)
        return self.zero

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "o i"]:
        """The dense weight, computed in float32 (or the scale's wider type), then cast."""
        wide = jnp.promote_types(self.scale.dtype, jnp.float32)
        codes = self.codes().reshape(*self.scale.shape, self.group_size).astype(wide)
        zero = self.zero_point().astype(wide)[..., None]
        w = (codes - zero) * self.scale.astype(wide)[..., None]
        return w.reshape(self.shape).astype(dtype or wide)

    def split(self, rows: Sequence[int]) -> "list[QuantizedTensor]":
        """Consecutive pieces of the given numbers of rows."""
        starts = [sum(rows[:n]) for n in range(len(rows))]
        return [
            jax.tree.map(lambda part, a=a, n=n: part[a : a + n], self)
            for a, n in zip(starts, rows, strict=True)
        ]
