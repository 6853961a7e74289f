"""A weight for each expert, all in one form."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from algorithms.tensors.base import CompressedTensor
from kernels.grouped import by_expert


@functools.partial(jax.tree_util.register_dataclass, data_fields=("stacked",), meta_fields=())
@dataclasses.dataclass(frozen=True)
class ExpertsTensor(CompressedTensor):
    """W [e, o, i]: a compressed tensor whose every array has an axis of experts in front."""

    stacked: CompressedTensor

    @property
    def count(self) -> int:
        return jax.tree.leaves(self.stacked)[0].shape[0]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """(e, o, i) of the dense form."""
        first = jax.eval_shape(lambda t: jax.tree.map(lambda leaf: leaf[0], t), self.stacked)
        return self.count, *first.shape

    def one(self, expert: Any) -> Any:
        """The weight [o, i] of one expert, whose number may be traced."""
        return jax.tree.map(lambda leaf: leaf[expert], self.stacked)

    def multiplications(self) -> int:
        one: CompressedTensor = jax.eval_shape(lambda: self.one(0))
        return one.multiplications()

    def validate(self) -> None:
        """Raise ValueError unless the parts fit together."""
        counts = {leaf.shape[0] for leaf in jax.tree.leaves(self.stacked)}
        if len(counts) != 1:
            raise ValueError(f"The arrays of an ExpertsTensor are of {sorted(counts)} experts.")
        self.one(0).validate()

    @property
    def online(self) -> bool:
        return self.stacked.online

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "e o i"]:
        return jax.vmap(lambda tensor: tensor.dequantize(dtype))(self.stacked)

    def grouped_matmul(
        self, x: Float[Array, "n i"], counts: Int[Array, " e"]
    ) -> Float[Array, "n o"]:
        """Rows, sorted by expert, times their own expert's Wᵀ."""
        return by_expert(x, counts, lambda rows, expert: self.one(expert).matmul(rows))

    def unpacked(self, dtype: DTypeLike | None = None) -> "ExpertsTensor":
        return ExpertsTensor(jax.vmap(lambda tensor: tensor.unpacked(dtype))(self.stacked))

    def split(self, rows: Sequence[int]) -> "list[ExpertsTensor]":
        """Pieces of every expert's rows."""
        pieces = jax.vmap(lambda tensor: tuple(tensor.split(rows)))(self.stacked)
        return [ExpertsTensor(piece) for piece in pieces]
