"""Codes on a grid, with a scale for each group."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from algorithms import minifloat
from algorithms.elements import Element, Integer, NormalFloat, SmallFloat
from algorithms.tensors.base import CompressedTensor, spans
from kernels import packing
from kernels.wna16_matmul import wna16_matmul


def load_scale(stored: Array, divisor: Array | None) -> Float[Array, "R G"]:
    """The effective scale, in float32 or wider."""
    if stored.dtype == jnp.float8_e8m0fnu:
        scale = minifloat.decode_power(jax.lax.bitcast_convert_type(stored, jnp.uint8))
    else:
        scale = stored.astype(jnp.float64 if stored.dtype == jnp.float64 else jnp.float32)
    return scale if divisor is None else scale / divisor


def _kind(element: Element) -> str | None:
    """What `wna16_matmul` calls it, if it has it."""
    if isinstance(element, Integer):
        return "int"
    if isinstance(element, NormalFloat):
        return "nf4"
    return "fp4" if element == SmallFloat(name="e2m1") else None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("packed", "scale", "zero", "divisor"),
    meta_fields=("element", "columns", "block"),
)
@dataclasses.dataclass(frozen=True)
class QuantizedTensor(CompressedTensor):
    """W[o, i] = scale / divisor · element(code, zero), codes packed along i.

    Each `block` of (rows, columns) shares an entry of the tables `scale` and `zero`; blocks at the
    edges may be cut off. `zero=None` is the element's own, `divisor=None` is 1.
    """

    # A pytree's leaves are not always arrays (shapes, shardings): `validate` checks, not types.
    packed: Any  # UInt8[Array, "o b"]
    scale: Any  # Float[Array, "R G"], small floats included
    zero: Any  # UInt8 or Float16[Array, "R G"] | None
    divisor: Any  # Float32[Array, ""] | None
    element: Element
    columns: int
    block: tuple[int, int]

    @classmethod
    def from_codes(
        cls,
        codes: UInt8[Array, "o i"],
        scale: Array,
        element: Element,
        *,
        zero: Array | None = None,
        divisor: Array | None = None,
        block: tuple[int, int] | None = None,
    ) -> "QuantizedTensor":
        """Codes packed; by default a scale serves consecutive columns of one row."""
        columns = codes.shape[1]
        block = (1, columns // scale.shape[1]) if block is None else block
        packed = packing.pack(codes, element.bits)
        return cls(packed, scale, zero, divisor, element, columns, block)

    def validate(self) -> None:
        o, (r, c) = self.packed.shape[0], self.block
        if self.packed.shape != (o, packing.packed_width(self.columns, self.bits)):
            raise ValueError(
                f"packed.shape={self.packed.shape} does not hold {o} rows of {self.columns} codes "
                f"of {self.bits} bits."
            )
        if not (0 < r <= max(o, 1) and 0 < c <= max(self.columns, 1)):
            raise ValueError(f"block={self.block} does not lie within {self.shape}.")
        table = (-(-o // r), -(-self.columns // c))
        if self.scale.shape != table:
            raise ValueError(
                f"scale.shape={self.scale.shape} is not {table}, which blocks of {self.block} "
                f"make of {self.shape}."
            )
        if self.zero is not None and self.zero.shape != self.scale.shape:
            raise ValueError(f"zero.shape={self.zero.shape} is not scale.shape={self.scale.shape}.")

    @property
    def bits(self) -> int:
        return self.element.bits

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], self.columns

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.block[1]

    def codes(self) -> UInt8[Array, "o i"]:
        return packing.unpack(self.packed, self.bits, self.columns)

    def zero_point(self) -> Array:
        """The code of zero, [R, G], as it is stored."""
        if self.zero is not None:
            return self.zero
        own = self.element.zero(*[jnp.zeros(self.scale.shape)] * 2)
        return own.astype(jnp.uint8)

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "o i"]:
        (o, i), (r, c) = self.shape, self.block
        scale, zero = load_scale(self.scale, self.divisor), self.zero_point()
        scale, zero = (
            t if r == 1 else jnp.repeat(t, r, 0)[:o] for t in (scale, zero.astype(scale.dtype))
        )
        groups = jnp.pad(self.codes(), [(0, 0), (0, -i % c)]).reshape(o, -1, c)
        w = self.element.decode(groups, zero[..., None]) * scale[..., None]
        return w.reshape(o, -1)[:, :i].astype(dtype or scale.dtype)

    def matmul(self, x: Float[Array, "*m i"]) -> Float[Array, "*m o"]:
        kind = _kind(self.element)
        whole = self.block[0] == 1 and self.columns % self.block[1] == 0
        if kind is None or not whole:
            return super().matmul(x)
        return wna16_matmul(
            x, self.packed, self.scale, self.zero, self.divisor, bits=self.bits, kind=kind
        )

    def split(self, rows: Sequence[int]) -> "list[QuantizedTensor]":
        return [self._rows(s.start, s.stop) for s in spans(rows)]

    def _rows(self, start: int, stop: int) -> "QuantizedTensor":
        r = self.block[0]
        if r != self.shape[0] and start % r:
            raise ValueError(f"block={self.block} does not let rows be parted at {start}.")
        whole = r == self.shape[0]  # one scale for all rows goes with each piece
        table = slice(None) if whole else slice(start // r, -(-stop // r))
        return dataclasses.replace(
            self,
            packed=self.packed[start:stop],
            scale=self.scale[table],
            zero=None if self.zero is None else self.zero[table],
            block=(stop - start if whole else r, self.block[1]),
        )
