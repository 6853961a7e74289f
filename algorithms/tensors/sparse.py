"""Weights without their zeros: which entries there are, and the values of those alone."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from algorithms.elements import Element
from algorithms.tensors.base import CompressedTensor, spans
from algorithms.tensors.dense import DenseTensor
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

    def holding(self, tensor: QuantizedTensor) -> "SparseTensor":
        """The same entries, of another matrix."""
        return self.of(tensor, self.alive(), self.count, row_count=self.row_count)

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
        if _known(self.mask) and (alive := int(self.alive().sum())) != self.count:
            raise ValueError(f"The mask has {alive} entries, not count={self.count}.")

    @property
    def shape(self) -> tuple[int, int]:
        return self.mask.shape[0], self.columns

    def alive(self) -> Bool[Array, "o i"]:
        """Which entries there are."""
        return packing.unpack(self.mask, 1, self.columns).astype(bool)

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "o i"]:
        mask = self.alive()
        values = self.values
        if self.element is not None:
            values = packing.unpack(values, self.element.bits, self.count)
        at = jnp.cumsum(mask.reshape(-1)).reshape(mask.shape) - 1
        spread = values[jnp.maximum(at, 0)] if self.count else jnp.zeros(mask.shape, values.dtype)
        if self.element is not None:
            w = self._with_codes(spread).dequantize()
        else:
            w = spread.astype(jnp.promote_types(spread.dtype, jnp.float32))
        return jnp.where(mask, w, 0).astype(dtype or w.dtype)

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


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("positions", "values"),
    meta_fields=("columns", "keep", "of"),
)
@dataclasses.dataclass(frozen=True)
class BlockSparseTensor(CompressedTensor):
    """W [o, i] with `keep` entries in each `of` consecutive columns (N:M).

    Which ones is a number below C(of, keep) for each block, packed: 3 bits for 2 of 4. The values
    of those alone are a tensor [o, i keep / of] of any kind.
    """

    positions: Any  # UInt8[Array, "o b"]
    values: CompressedTensor  # of shape [o, k]
    columns: int
    keep: int
    of: int

    @staticmethod
    def fits(keep: int, of: int, group: int = 0) -> bool:
        """Whether a block's number is a byte at most, and groups of columns have whole blocks."""
        return of <= 16 and math.comb(of, keep) <= 256 and group % of == 0

    def holding(self, tensor: QuantizedTensor) -> "SparseTensor | BlockSparseTensor":
        """The same entries, of another matrix."""
        return sparse_blocks(tensor, self.alive(), self.keep, self.of)

    def validate(self) -> None:
        o = self.positions.shape[0]
        if not (0 < self.keep < self.of and self.fits(self.keep, self.of)):
            raise ValueError(f"keep={self.keep} of {self.of} has no number of a byte.")
        if self.columns % self.of:
            raise ValueError(f"{self.columns} columns are no whole blocks of {self.of}.")
        blocks = self.columns // self.of
        if self.positions.shape != (o, packing.packed_width(blocks, _bits(self.keep, self.of))):
            raise ValueError(
                f"positions.shape={self.positions.shape} does not hold {o} rows of {blocks} blocks."
            )
        if self.values.shape != (o, blocks * self.keep):
            raise ValueError(f"values.shape={self.values.shape} is not {o} x {blocks * self.keep}.")
        self.values.validate()
        if _known(self.positions):
            largest = int(self._numbers().max(initial=0))
            if largest >= math.comb(self.of, self.keep):
                raise ValueError(f"positions has {largest}, which is no {self.keep} of {self.of}.")

    @property
    def shape(self) -> tuple[int, int]:
        return self.positions.shape[0], self.columns

    def _numbers(self) -> Array:
        return packing.unpack(self.positions, _bits(self.keep, self.of), self.columns // self.of)

    def alive(self) -> Bool[Array, "o i"]:
        """Which entries there are."""
        patterns = jnp.asarray(_patterns(self.keep, self.of))
        return patterns[self._numbers()].reshape(self.shape)

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "o i"]:
        mask, values = self.alive(), self.values.dequantize()
        o, i = self.shape
        blocks = mask.reshape(o, i // self.of, self.of)
        at = jnp.maximum(jnp.cumsum(blocks, -1) - 1, 0)
        kept = values.reshape(o, i // self.of, self.keep)
        w = jnp.where(blocks, jnp.take_along_axis(kept, at, -1), 0).reshape(o, i)
        w = w.astype(jnp.promote_types(w.dtype, jnp.float32))
        return w.astype(dtype or w.dtype)

    def split(self, rows: Sequence[int]) -> "list[BlockSparseTensor]":
        pieces = zip(spans(rows), self.values.split(rows), strict=True)
        return [
            dataclasses.replace(self, positions=self.positions[span], values=values)
            for span, values in pieces
        ]


def sparse_blocks(
    w: Float[Array, "o i"] | QuantizedTensor,
    mask: Bool[Array, "o i"],
    keep: int,
    of: int,
    *,
    dtype: DTypeLike = jnp.float16,
) -> SparseTensor | BlockSparseTensor:
    """What a mask of `keep` entries in each `of` columns leaves of w: its numbers as `dtype`, or
    its codes. Blocks by their number where it is a byte at most and groups have whole blocks, else
    with a bit for each entry.
    """
    o, i = mask.shape
    if not BlockSparseTensor.fits(keep, of, w.block[1] if isinstance(w, QuantizedTensor) else 0):
        of_row = i // of * keep
        return SparseTensor.of(w, mask, o * of_row, row_count=of_row, dtype=dtype)
    slots = _slots(mask, keep, of)
    values: CompressedTensor
    if isinstance(w, QuantizedTensor):
        rows, columns = w.block
        values = QuantizedTensor.from_codes(
            _of_blocks(w.codes(), slots), w.scale, w.element, zero=w.zero, divisor=w.divisor,
            block=(rows, columns * keep // of),
        )  # fmt: skip
    else:
        values = DenseTensor(_of_blocks(w, slots).astype(dtype))
    return BlockSparseTensor(_numbered(mask, keep, of), values, i, keep, of)


def _known(x: Any) -> bool:
    """Whether it is an array with numbers in it, not only its shape."""
    return isinstance(x, np.ndarray | jax.Array) and not isinstance(x, jax.core.Tracer)


def _packed(mask: Bool[Array, "o i"]) -> Array:
    return packing.pack(mask.astype(jnp.uint8), 1)


def _gathered(x: Array, mask: Bool[Array, "o i"], count: int) -> Array:
    """[n]: the entries of a mask, row by row."""
    return x.reshape(-1)[jnp.flatnonzero(mask.reshape(-1), size=count, fill_value=0)]


@functools.cache
def _patterns(keep: int, of: int) -> np.ndarray:
    """[C(of, keep), of]: every choice, in lexicographic order of positions."""
    found = np.zeros((math.comb(of, keep), of), bool)
    for row, chosen in enumerate(itertools.combinations(range(of), keep)):
        found[row, list(chosen)] = True
    return found


def _bits(keep: int, of: int) -> int:
    return max(1, (math.comb(of, keep) - 1).bit_length())


def _numbered(mask: Bool[Array, "o i"], keep: int, of: int) -> Array:
    """Which choice each block is, packed."""
    powers = 1 << np.arange(of)
    table = np.zeros(1 << of, np.uint8)
    table[_patterns(keep, of) @ powers] = np.arange(math.comb(of, keep))
    blocks = mask.reshape(mask.shape[0], -1, of)
    numbers = jnp.asarray(table)[blocks @ jnp.asarray(powers)]
    return packing.pack(numbers, _bits(keep, of))


def _slots(mask: Bool[Array, "o i"], keep: int, of: int) -> Int[Array, "o n keep"]:
    """Of each block, the positions of what stays."""
    blocks = mask.reshape(mask.shape[0], -1, of)
    reached = jnp.cumsum(blocks, -1)[..., None, :] > jnp.arange(keep)[:, None]
    return jnp.argmax(reached, -1)


def _of_blocks(x: Array, slots: Int[Array, "o n k"]) -> Array:
    """[o, n k]: the entries at those positions."""
    o, n, k = slots.shape
    return jnp.take_along_axis(x.reshape(o, n, -1), slots, -1).reshape(o, n * k)
