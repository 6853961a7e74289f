"""A compressed weight whose layer rounds its input."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from algorithms.numerics import through
from algorithms.tensors.base import CompressedTensor


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("weight", "scale", "zero", "divisor"),
    meta_fields=("format",),
)
@dataclasses.dataclass(frozen=True)
class QuantizedInput(CompressedTensor):
    """y = Q(x) Wᵀ, Q rounding onto `format`, tokens as rows.

    scale, zero, divisor: a grid that calibration fixed (`algorithms.formats.Grid`); scale=None fits
    one to every input, nested scales to the `divisor` if there is one.
    """

    weight: CompressedTensor
    scale: Any
    zero: Any
    divisor: Any
    format: Any  # algorithms.formats.Format

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape

    def multiplications(self) -> int:
        return self.weight.multiplications()

    @property
    def online(self) -> bool:
        return True

    def rounded(self, x: Float[Array, "*m i"]) -> Float[Array, "*m i"]:
        """The input as the weight sees it; to gradients, the input itself."""
        rows = x.reshape(-1, x.shape[-1]).astype("float32")
        grid = self.scale, self.zero, self.divisor
        if self.scale is None:
            grid = self.format.fit(rows, divisor=self.divisor)
        return through(x, self.format.nearest(rows, grid).reshape(x.shape).astype(x.dtype))

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "o i"]:
        return self.weight.dequantize(dtype)

    def matmul(self, x: Float[Array, "*m i"]) -> Float[Array, "*m o"]:
        return self.weight.matmul(self.rounded(x))

    def unpacked(self, dtype: DTypeLike | None = None) -> "QuantizedInput":
        return dataclasses.replace(self, weight=self.weight.unpacked(dtype))

    def split(self, rows: Sequence[int]) -> "list[QuantizedInput]":
        return [dataclasses.replace(self, weight=piece) for piece in self.weight.split(rows)]

    def validate(self) -> None:
        self.weight.validate()
