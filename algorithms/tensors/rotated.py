"""A weight kept in rotated coordinates, in whatever compressed form."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, UInt8

from algorithms import incoherence
from algorithms.tensors.base import CompressedTensor
from kernels import packing


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("weight", "signs_in", "signs_out"),
    meta_fields=("row_block", "column_block"),
)
@dataclasses.dataclass(frozen=True)
class RotatedTensor(CompressedTensor):
    """W = Vᵀ W' U for a compressed W' (see `algorithms.incoherence`): y = Vᵀ W' (U x).

    The signs of U are stored as bits (1 is +1, the lowest bit first), those of V too, a row of
    bytes for each block of `row_block` outputs, so that blocks can be taken apart. `signs_out=None`
    leaves the outputs as they are. `column_block=None`: all inputs rotate together.
    """

    # A pytree's leaves are not always arrays (shapes, shardings): `validate` checks, not types.
    weight: Any  # CompressedTensor of shape [o, i]
    signs_in: Any  # UInt8[Array, " b"]
    signs_out: Any  # UInt8[Array, "o//row_block b"] | None
    row_block: int | None = None
    column_block: int | None = None

    @classmethod
    def from_signs(
        cls,
        weight: CompressedTensor,
        signs_in: Int8[Array, " i"],
        signs_out: Int8[Array, " o"] | None = None,
        row_block: int | None = None,
        column_block: int | None = None,
    ) -> "RotatedTensor":
        """W' and the signs it was rotated by; without `row_block` all outputs are one block."""
        if signs_out is None:
            return cls(weight, _pack(signs_in), None, None, column_block)
        row_block = row_block or signs_out.shape[0]
        if signs_out.shape[0] % row_block:
            raise ValueError(
                f"row_block={row_block} must divide the output dimension, {weight.shape=}."
            )
        blocks = _pack(signs_out.reshape(-1, row_block))
        return cls(weight, _pack(signs_in), blocks, row_block, column_block)

    def validate(self) -> None:
        """Raise ValueError unless the parts fit together."""
        self.weight.validate()
        o, i = self.shape
        if self.signs_in.shape != (packing.packed_width(i, 1),):
            raise ValueError(f"signs_in.shape={self.signs_in.shape} does not hold {i} signs.")
        if i % (self.column_block or i):
            raise ValueError(f"column_block={self.column_block} does not divide {i} columns.")
        if (self.signs_out is None) != (self.row_block is None):
            raise ValueError(f"row_block={self.row_block} goes with signs_out, and one is missing.")
        if self.row_block is None:
            return
        if self.row_block < 1 or o % self.row_block:
            raise ValueError(f"row_block={self.row_block} does not divide {o} rows.")
        blocks = (o // self.row_block, packing.packed_width(self.row_block, 1))
        if self.signs_out.shape != blocks:
            raise ValueError(
                f"signs_out.shape={self.signs_out.shape} does not hold {o} signs in blocks of "
                f"{self.row_block}."
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape

    def multiplications(self) -> int:
        return self.weight.multiplications()

    def input_signs(self) -> Int8[Array, " i"]:
        return _unpack(self.signs_in, self.shape[1])

    def output_signs(self) -> Int8[Array, " o"] | None:
        if self.signs_out is None or self.row_block is None:
            return None
        return _unpack(self.signs_out, self.row_block).reshape(-1)

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "o i"]:
        """The dense weight Vᵀ W' U, computed in W's own wide type, then cast."""
        w = incoherence.unrotate_weight(
            self.weight.dequantize(),
            self.input_signs(),
            self.output_signs(),
            self.row_block,
            self.column_block,
        )
        return w.astype(dtype or w.dtype)

    def matmul(self, x: Float[Array, "*m i"]) -> Float[Array, "*m o"]:
        """x Wᵀ without the dense W: rotate x, multiply by W', rotate the outputs back."""
        y = self.weight.matmul(incoherence.rotate(x, self.input_signs(), self.column_block))
        signs_out = self.output_signs()
        return y if signs_out is None else incoherence.unrotate(y, signs_out, self.row_block)

    @property
    def online(self) -> bool:
        return self.weight.online

    def unpacked(self, dtype: DTypeLike | None = None) -> CompressedTensor:
        """The dense weight; a rotation around the inner one where that does more to its input."""
        if not self.online:
            return super().unpacked(dtype)
        return dataclasses.replace(self, weight=self.weight.unpacked(dtype))

    def split(self, rows: Sequence[int]) -> "list[RotatedTensor]":
        """Consecutive pieces of the given numbers of rows, each with the signs of all inputs.

        Raises ValueError where a piece would cut a block of outputs.
        """
        pieces = self.weight.split(rows)
        block = self.row_block
        if self.signs_out is None or block is None:
            return [dataclasses.replace(self, weight=piece) for piece in pieces]
        if any(n % block for n in rows):
            raise ValueError(
                f"rows={list(rows)} must be multiples of row_block={block}, whose outputs are "
                f"mixed: compress with row_block={incoherence.common_block(rows)} or without."
            )
        starts = [sum(rows[:n]) // block for n in range(len(rows))]
        return [
            dataclasses.replace(self, weight=piece, signs_out=self.signs_out[a : a + n // block])
            for piece, a, n in zip(pieces, starts, rows, strict=True)
        ]


def _pack(signs: Int8[Array, "*r n"]) -> UInt8[Array, "*r b"]:
    return packing.pack((signs > 0).astype(jnp.uint8), 1)


def _unpack(packed: UInt8[Array, "*r b"], n: int) -> Int8[Array, "*r n"]:
    return 2 * packing.unpack(packed, 1, n).astype(jnp.int8) - 1
