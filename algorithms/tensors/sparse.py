"""Weights without their zeros: which entries there are, and the values of those alone."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from algorithms.elements import Element
from algorithms.numerics import running_count
from algorithms.tensors.base import CompressedTensor, spans
from algorithms.tensors.quantized import QuantizedTensor
from kernels import packing


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("mask", "values", "scale", "zero", "divisor"),
    meta_fields=("columns", "count", "row_count", "element", "block"),
)
@dataclasses.dataclass(frozen=True)
class SparseTensor(CompressedTensor):
    """W [o, i]: a bit for each entry, and what those that stay are, row by row: numbers, or codes
    of an element on the grid that a `QuantizedTensor` has.
    """

    # A pytree's leaves are not always arrays (shapes, shardings): `validate` checks, not types.
    mask: Any  # UInt8[Array, "o b"]
    values: Any  # Float16[Array, " n"], or UInt8[Array, " b"], codes packed
    columns: int
    count: int  # n, entries that stay
    row_count: int | None = None  # of each row, where all keep as many
    scale: Any = None  # as in QuantizedTensor; None: values are numbers
    zero: Any = None
    divisor: Any = None
    element: Element | None = None
    block: tuple[int, int] | None = None

    @classmethod
    def of(
        cls,
        w: Float[Array, "o i"] | QuantizedTensor,
        mask: Bool[Array, "o i"],
        count: int,
        *,
        row_count: int | None = None,
        dtype: DTypeLike = jnp.float16,
    ) -> "SparseTensor":
        """What the mask leaves of w: its numbers as `dtype`, or its codes.

        count: how many entries the mask has, as shapes must be known.
        """
        bits, columns = _packed(mask), mask.shape[1]
        if not isinstance(w, QuantizedTensor):
            kept = _gathered(w, mask, count).astype(dtype)
            return cls(bits, kept, columns, count, row_count)
        kept = packing.pack(_gathered(w.codes(), mask, count), w.bits)
        return cls(
            bits, kept, columns, count, row_count, w.scale, w.zero, w.divisor, w.element, w.block
        )

    def holding(self, w: Float[Array, "o i"] | QuantizedTensor) -> "SparseTensor":
        """The same entries, of another matrix: its numbers in the type of these, or its codes."""
        dtype = self.dtype or jnp.float16
        return self.of(w, self.alive(), self.count, row_count=self.row_count, dtype=dtype)

    @property
    def dtype(self) -> Any:
        """Of the numbers that are stored; None: they are codes."""
        return self.values.dtype if self.element is None else None

    def validate(self) -> None:
        o = self.mask.shape[0]
        if self.mask.shape != (o, packing.packed_width(self.columns, 1)):
            raise ValueError(f"mask.shape={self.mask.shape} does not hold {self.columns} columns.")
        if not 0 <= self.count <= o * self.columns:
            raise ValueError(f"count={self.count} is not of {o} x {self.columns} entries.")
        if self.row_count is not None and o * self.row_count != self.count:
            raise ValueError(f"{o} rows of {self.row_count} are not {self.count} entries.")
        width = self.count
        if self.element is not None:
            width = packing.packed_width(self.count, self.element.bits)
        if self.values.shape != (width,):
            raise ValueError(
                f"values.shape={self.values.shape} does not hold {self.count} entries: that is "
                f"({width},)."
            )
        if self.element is not None:
            self._with_codes(jnp.zeros(self.shape, jnp.uint8)).validate()
        if known(self.mask) and (alive := int(self.alive().sum())) != self.count:
            raise ValueError(f"The mask has {alive} entries, not count={self.count}.")

    @property
    def shape(self) -> tuple[int, int]:
        return self.mask.shape[0], self.columns

    def multiplications(self) -> int:
        return self.count

    def alive(self) -> Bool[Array, "o i"]:
        """Which entries there are."""
        return packing.unpack(self.mask, 1, self.columns).astype(bool)

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "o i"]:
        if (grid := self.quantized()) is not None:
            w = grid.dequantize()
        else:
            w = self._spread(self.values)
            w = w.astype(jnp.promote_types(w.dtype, jnp.float32))
        return jnp.where(self.alive(), w, 0).astype(dtype or w.dtype)

    def quantized(self) -> QuantizedTensor | None:
        """Codes for all entries, any for those that there are not; None: they are numbers."""
        if self.element is None:
            return None
        return self._with_codes(
            self._spread(packing.unpack(self.values, self.element.bits, self.count))
        )

    def _spread(self, values: Array) -> Array:
        mask = self.alive()
        at = running_count(mask.reshape(-1)).reshape(mask.shape) - 1
        return values[jnp.maximum(at, 0)] if self.count else jnp.zeros(mask.shape, values.dtype)

    def padded(self) -> "SparseTensor":
        """The same weights, with room for as many values as there are entries: a program that
        unpacks it serves whatever is left. Not to be stored.
        """
        entries = self.mask.shape[-2] * self.columns
        width = entries
        if self.element is not None:
            width = packing.packed_width(entries, self.element.bits)
        values = np.asarray(self.values)  # on the host: padding compiles nothing
        widths = [(0, 0)] * (values.ndim - 1) + [(0, width - values.shape[-1])]
        return dataclasses.replace(
            self, values=np.pad(values, widths), count=entries, row_count=None
        )

    def _with_codes(self, codes: Array) -> QuantizedTensor:
        assert self.element is not None
        return QuantizedTensor.from_codes(
            codes, self.scale, self.element, zero=self.zero, divisor=self.divisor, block=self.block
        )

    def split(self, rows: Sequence[int]) -> "list[SparseTensor]":
        if list(rows) == [self.shape[0]]:
            return [self]
        grids: Sequence[QuantizedTensor | None] = [None] * len(rows)
        values = self.values
        if self.element is not None:
            grids = self._with_codes(jnp.zeros(self.shape, jnp.uint8)).split(rows)
            values = packing.unpack(values, self.element.bits, self.count)
        found, start = [], 0
        for span, grid in zip(spans(rows), grids, strict=True):
            part = self.mask[span]
            if self.row_count is not None:
                count = self.row_count * (span.stop - span.start)
            else:  # rows differ: known where arrays are
                count = int(packing.unpack(part, 1, self.columns).sum(dtype=jnp.int32))
            own = values[start : start + count]
            start += count
            piece = dataclasses.replace(self, mask=part, values=own, count=count)
            if grid is not None:
                piece = dataclasses.replace(
                    piece, values=packing.pack(own, grid.bits), scale=grid.scale, zero=grid.zero,
                    block=grid.block,
                )  # fmt: skip
            found.append(piece)
        return found


def padded(tensor: Any) -> Any:
    """A weight with every sparse one within it `padded`, where its numbers are known: layers with
    sparsities of their own share programs.
    """

    def sparse(part: Any) -> bool:
        return isinstance(part, SparseTensor)

    return jax.tree.map(
        lambda part: part.padded() if sparse(part) and known(part.values) else part,
        tensor, is_leaf=sparse,
    )  # fmt: skip


def known(x: Any) -> bool:
    """Whether it is an array with numbers in it, not only its shape."""
    return isinstance(x, np.ndarray | jax.Array) and not isinstance(x, jax.core.Tracer)


def _packed(mask: Bool[Array, "o i"]) -> Array:
    return packing.pack(mask.astype(jnp.uint8), 1)


def _gathered(x: Array, mask: Bool[Array, "o i"], count: int) -> Array:
    """[n]: the entries of a mask, row by row."""
    alive = mask.reshape(-1)
    at = jnp.where(alive, running_count(alive) - 1, count)
    return jnp.zeros((count,), x.dtype).at[at].set(x.reshape(-1), mode="drop")
