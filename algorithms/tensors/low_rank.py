"""A weight of low rank, and a compressed weight with another added to it."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from algorithms.tensors.base import CompressedTensor, spans


@functools.partial(jax.tree_util.register_dataclass, data_fields=("a", "b"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class LowRankTensor(CompressedTensor):
    """W = A B: r (o + i) numbers in place of o i."""

    # A pytree's leaves are not always arrays (shapes, shardings): `validate` checks, not types.
    a: Any  # Float16[Array, "o r"]
    b: Any  # Float16[Array, "r i"]

    def validate(self) -> None:
        """Raise ValueError unless the factors fit together."""
        if len(self.a.shape) != 2 or self.a.shape[1:] != self.b.shape[:1]:
            raise ValueError(f"a.shape={self.a.shape} and b.shape={self.b.shape} have no product.")

    @property
    def shape(self) -> tuple[int, int]:
        return self.a.shape[0], self.b.shape[1]

    @property
    def rank(self) -> int:
        return self.b.shape[0]

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "o i"]:
        wide = jnp.promote_types(self.a.dtype, jnp.float32)
        return (self.a.astype(wide) @ self.b.astype(wide)).astype(dtype or wide)

    def matmul(self, x: Float[Array, "*m i"]) -> Float[Array, "*m o"]:
        """(x Bᵀ) Aᵀ: through r numbers per token."""
        return (x @ self.b.astype(x.dtype).T) @ self.a.astype(x.dtype).T

    def unpacked(self, dtype: DTypeLike | None = None) -> "LowRankTensor":
        """The factors are dense already: only their dtype changes."""
        dtype = dtype or self.a.dtype
        return LowRankTensor(self.a.astype(dtype), self.b.astype(dtype))

    def split(self, rows: Sequence[int]) -> "list[LowRankTensor]":
        """Pieces of A, each with a copy of B."""
        return [LowRankTensor(self.a[s], self.b) for s in spans(rows)]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("base", "correction"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class SumTensor(CompressedTensor):
    """W = base + correction, computed side by side: a base that rounds its input rounds its own."""

    base: CompressedTensor
    correction: CompressedTensor

    def validate(self) -> None:
        """Raise ValueError unless the parts fit together."""
        self.base.validate()
        self.correction.validate()
        if self.base.shape != self.correction.shape:
            raise ValueError(
                f"base.shape={self.base.shape} is not correction.shape={self.correction.shape}."
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def online(self) -> bool:
        return self.base.online or self.correction.online

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "o i"]:
        w = self.base.dequantize() + self.correction.dequantize()
        return w.astype(dtype or w.dtype)

    def matmul(self, x: Float[Array, "*m i"]) -> Float[Array, "*m o"]:
        return self.base.matmul(x) + self.correction.matmul(x)

    def unpacked(self, dtype: DTypeLike | None = None) -> CompressedTensor:
        """The dense sum; both parts, where the input means something else to each."""
        if not self.online:
            return super().unpacked(dtype)
        return SumTensor(self.base.unpacked(dtype), self.correction.unpacked(dtype))

    def split(self, rows: Sequence[int]) -> "list[SumTensor]":
        pieces = zip(self.base.split(rows), self.correction.split(rows), strict=True)
        return [SumTensor(base, correction) for base, correction in pieces]
