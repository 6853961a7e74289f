"""Walks on a bitshift trellis, one for each tile, with a scale for each row of tiles."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from algorithms import trellis
from algorithms.tensors.base import CompressedTensor


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("packed", "scale"),
    meta_fields=("rows", "bits", "state_bits", "code", "tile"),
)
@dataclasses.dataclass(frozen=True)
class TrellisTensor(CompressedTensor):
    """W[o, i] in tiles of `tile` x `tile` weights: scale times the values of a walk's states.

    A walk goes through its tile row by row, `bits` bits a weight, over states of `state_bits` bits
    whose values are those of `code` (see `algorithms.trellis`). The last tiles may hold more than
    the `rows` there are.
    """

    # A pytree's leaves are not always arrays (shapes, shardings): `validate` checks, not types.
    packed: Any  # UInt8[Array, "r i//tile b"]
    scale: Any  # Float[Array, " r"]
    rows: int
    bits: int
    state_bits: int
    code: str
    tile: int

    def validate(self) -> None:
        """Raise ValueError unless the parts fit together."""
        if self.code not in trellis.CODES:
            raise ValueError(f"code={self.code!r} must be one of {', '.join(trellis.CODES)}.")
        trellis.check(self.tile**2, self.bits, self.state_bits)
        (rows, _, width), enough = self.packed.shape, -(-self.rows // self.tile)
        if (rows, width) != (enough, trellis.packed_width(self.tile**2, self.bits)):
            raise ValueError(
                f"packed.shape={self.packed.shape} does not hold {self.rows} rows in tiles of "
                f"{self.tile} x {self.tile} weights of {self.bits} bits."
            )
        if self.scale.shape != (rows,):
            raise ValueError(f"scale.shape={self.scale.shape} does not hold {rows} rows of tiles.")

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.packed.shape[1] * self.tile

    def states(self) -> Int[Array, "r c n"]:
        """Each tile's walk."""
        return trellis.unpack(self.packed, self.bits, self.state_bits)

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "o i"]:
        """The dense weight, computed in float32 (or the scale's wider type), then cast."""
        wide = jnp.promote_types(self.scale.dtype, jnp.float32)
        values = trellis.decode(self.states(), self.code, self.state_bits).astype(wide)
        values = values * self.scale.astype(wide)[:, None, None]
        tiles = values.reshape(*values.shape[:2], self.tile, self.tile)
        w = tiles.swapaxes(1, 2).reshape(-1, self.shape[1])
        return w[: self.rows].astype(dtype or wide)

    def split(self, rows: Sequence[int]) -> "list[TrellisTensor]":
        """Consecutive pieces of the given numbers of rows.

        Raises ValueError where a piece would cut a tile.
        """
        starts = [sum(rows[:n]) for n in range(len(rows))]
        if any(start % self.tile for start in starts):
            raise ValueError(
                f"rows={list(rows)} must be multiples of tile={self.tile}, whose weights are one "
                "walk: compress with a tile that divides them, or each by itself."
            )
        ends = [-(-(start + n) // self.tile) for start, n in zip(starts, rows, strict=True)]
        return [
            dataclasses.replace(self, packed=self.packed[a:b], scale=self.scale[a:b], rows=n)
            for a, b, n in zip([start // self.tile for start in starts], ends, rows, strict=True)
        ]
