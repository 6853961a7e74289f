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
    a: Any  # Float16[Array, "o r"], or a compressed tensor of that shape
    b: Any  # Float16[Array, "r i"], or a compressed tensor of that shape

    def validate(self) -> None:
        """Raise ValueError unless the factors fit together."""
        for factor in (self.a, self.b):
            if isinstance(factor, CompressedTensor):
                factor.validate()
        if len(self.a.shape) != 2 or self.a.shape[1:] != self.b.shape[:1]:
            raise ValueError(f"a.shape={self.a.shape} and b.shape={self.b.shape} have no product.")

    @property
    def shape(self) -> tuple[int, int]:
        return self.a.shape[0], self.b.shape[1]

    @property
    def rank(self) -> int:
        return self.b.shape[0]

    def multiplications(self) -> int:
        return self.rank * sum(self.shape)

    @property
    def online(self) -> bool:
        return any(isinstance(f, CompressedTensor) and f.online for f in (self.a, self.b))

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "o i"]:
        a, b = (_dense(factor) for factor in (self.a, self.b))
        wide = jnp.promote_types(a.dtype, jnp.float32)
        return (a.astype(wide) @ b.astype(wide)).astype(dtype or wide)

    def matmul(self, x: Float[Array, "*m i"]) -> Float[Array, "*m o"]:
        """(x Bᵀ) Aᵀ: through r numbers per token."""
        return _product(_product(x, self.b), self.a)

    def unpacked(self, dtype: DTypeLike | None = None) -> "LowRankTensor":
        """Dense factors: there are fewer numbers in them than in their product."""
        return LowRankTensor(*(_unpacked(factor, dtype) for factor in (self.a, self.b)))

    def split(self, rows: Sequence[int]) -> "list[LowRankTensor]":
        """Pieces of A, each with a copy of B."""
        if isinstance(self.a, CompressedTensor):
            return [LowRankTensor(piece, self.b) for piece in self.a.split(rows)]
        return [LowRankTensor(self.a[s], self.b) for s in spans(rows)]


def _dense(factor: Any) -> Array:
    return factor.dequantize() if isinstance(factor, CompressedTensor) else factor


def _product(x: Float[Array, "*m c"], factor: Any) -> Array:
    """x Fᵀ in x's dtype."""
    if isinstance(factor, CompressedTensor):
        return factor.matmul(x)
    return x @ factor.astype(x.dtype).T


def _unpacked(factor: Any, dtype: DTypeLike | None) -> Any:
    if not isinstance(factor, CompressedTensor):
        return factor if dtype is None else factor.astype(dtype)
    return factor.unpacked(dtype) if factor.online else factor.dequantize(dtype)


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

    def multiplications(self) -> int:
        return self.base.multiplications() + self.correction.multiplications()

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
