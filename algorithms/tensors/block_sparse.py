"""Weights without their zeros, as many in each block of a row: which they are, and their values."""

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

from algorithms.tensors.base import CompressedTensor, spans
from algorithms.tensors.dense import DenseTensor
from algorithms.tensors.quantized import QuantizedTensor
from algorithms.tensors.quantized_input import QuantizedInput
from algorithms.tensors.sparse import SparseTensor, known
from kernels import packing


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

    def holding(
        self, w: Float[Array, "o i"] | QuantizedTensor
    ) -> "SparseTensor | BlockSparseTensor":
        """The same entries, of another matrix: its numbers in the type of these, or its codes."""
        return sparse_blocks(w, self.alive(), self.keep, self.of, dtype=self.dtype or jnp.float16)

    @property
    def dtype(self) -> Any:
        """Of the numbers that are stored; None: they are codes."""
        return self.values.weight.dtype if isinstance(self.values, DenseTensor) else None

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
        if known(self.positions):
            largest = int(self._numbers().max(initial=0))
            if largest >= math.comb(self.of, self.keep):
                raise ValueError(f"positions has {largest}, which is no {self.keep} of {self.of}.")

    @property
    def shape(self) -> tuple[int, int]:
        return self.positions.shape[0], self.columns

    def multiplications(self) -> int:
        o, i = self.shape
        return o * i // self.of * self.keep

    def _numbers(self) -> Array:
        return packing.unpack(self.positions, _bits(self.keep, self.of), self.columns // self.of)

    def alive(self) -> Bool[Array, "o i"]:
        """Which entries there are."""
        patterns = jnp.asarray(_patterns(self.keep, self.of))
        return patterns[self._numbers()].reshape(self.shape)

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "o i"]:
        w = jnp.where(self.alive(), self._spread(self.values.dequantize()), 0)
        w = w.astype(jnp.promote_types(w.dtype, jnp.float32))
        return w.astype(dtype or w.dtype)

    def quantized(self) -> QuantizedTensor | None:
        """Codes for all entries, any for those that there are not; None: they are numbers."""
        kept = self.values
        if not isinstance(kept, QuantizedTensor):
            return None
        (rows, columns), codes = kept.block, self._spread(kept.codes())
        return QuantizedTensor.from_codes(
            codes, kept.scale, kept.element, zero=kept.zero, divisor=kept.divisor,
            block=(rows, columns * self.of // self.keep),
        )  # fmt: skip

    def _spread(self, values: Array) -> Array:
        o, blocks = self.shape[0], self.columns // self.of
        found = jnp.cumsum(self.alive().reshape(o, blocks, self.of), -1)
        kept = values.reshape(o, blocks, self.keep)
        return jnp.take_along_axis(kept, jnp.maximum(found - 1, 0), -1).reshape(self.shape)

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


def filled(tensor: CompressedTensor) -> CompressedTensor:
    """With the code of zero for each entry that there is not, where there are codes and zero is one
    of them: the same weight for who knows no sparse ones. Other tensors as they are.
    """
    if isinstance(tensor, QuantizedInput):
        return dataclasses.replace(tensor, weight=filled(tensor.weight))
    if not isinstance(tensor, SparseTensor | BlockSparseTensor):
        return tensor
    grid = tensor.quantized()
    if grid is None or grid.zero_point().dtype != jnp.uint8:
        return tensor
    (o, i), (r, c) = grid.shape, grid.block
    zero = jnp.repeat(jnp.repeat(grid.zero_point(), r, 0)[:o], c, 1)[:, :i]
    gone = grid.element.encode(jnp.zeros((), jnp.float32), zero.astype(jnp.float32))
    codes = jnp.where(tensor.alive(), grid.codes(), gone.astype(jnp.uint8))
    return QuantizedTensor.from_codes(
        codes, grid.scale, grid.element, zero=grid.zero, divisor=grid.divisor, block=grid.block
    )


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
