"""Codes of points of the lattice E8, one for every eight weights, with a scale for each row."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from algorithms import lattice
from algorithms.tensors.base import CompressedTensor, spans

_RESIDUAL = {2: None, 3: jnp.uint8, 4: jnp.uint16}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "residual", "scale"),
    meta_fields=("bits",),
)
@dataclasses.dataclass(frozen=True)
class LatticeTensor(CompressedTensor):
    """W[o, i] = scale · points, with 16 bits of E8P for 8 columns, and 8 or 16 for what it leaves.

    `residual=None` at 2 bits. Leading axes appear when layers of one shape are compressed in one
    batch (vmap).
    """

    # A pytree's leaves are not always arrays (shapes, shardings): `validate` checks, not types.
    codes: Any  # UInt16[Array, "*l o i/8"]
    residual: Any  # UInt8[Array, "*l o i/8"] | UInt16[Array, "*l o i/8"] | None
    scale: Any  # Float[Array, "*l o"]
    bits: int

    def validate(self) -> None:
        """Raise ValueError unless the parts fit together."""
        if self.bits not in _RESIDUAL:
            raise ValueError(f"bits={self.bits} must be 2, 3 or 4.")
        if self.codes.dtype != jnp.uint16 or self.codes.shape[:-1] != self.scale.shape:
            raise ValueError(
                f"codes {self.codes.dtype}{self.codes.shape} must be uint16, a row for each of "
                f"scale.shape={self.scale.shape}."
            )
        found = None if self.residual is None else (self.residual.dtype, self.residual.shape)
        dtype = _RESIDUAL[self.bits]
        if found != (None if dtype is None else (dtype, self.codes.shape)):
            raise ValueError(
                f"residual {found} is not what bits={self.bits} and codes.shape="
                f"{self.codes.shape} need: none at 2 bits, uint8 at 3, uint16 at 4."
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[-2], 8 * self.codes.shape[-1]

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "o i"]:
        """The dense weight, computed in float32 (or the scale's wider type), then cast."""
        wide = jnp.promote_types(self.scale.dtype, jnp.float32)
        points = lattice.reconstruct(self.codes, self.residual, self.bits).astype(wide)
        w = points * self.scale.astype(wide)[..., None, None]
        return w.reshape(*self.codes.shape[:-1], -1).astype(dtype or wide)

    def split(self, rows: Sequence[int]) -> "list[LatticeTensor]":
        """Consecutive pieces of the given numbers of rows."""
        return [jax.tree.map(lambda part, s=s: part[s], self) for s in spans(rows)]
