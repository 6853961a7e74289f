"""A weight as it is, where a compressed one may stand."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from algorithms.tensors.base import CompressedTensor, spans


@functools.partial(jax.tree_util.register_dataclass, data_fields=("weight",), meta_fields=())
@dataclasses.dataclass(frozen=True)
class DenseTensor(CompressedTensor):
    """W [o, i] itself."""

    weight: Any  # Float[Array, "o i"]

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "o i"]:
        return self.weight if dtype is None else self.weight.astype(dtype)

    def split(self, rows: Sequence[int]) -> "list[DenseTensor]":
        return [DenseTensor(self.weight[s]) for s in spans(rows)]
