"""What every compressed weight can do."""

import abc
import itertools
from collections.abc import Sequence

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def spans(rows: Sequence[int]) -> list[slice]:
    """Consecutive slices of the given lengths."""
    ends = list(itertools.accumulate(rows))
    return [slice(end - n, end) for end, n in zip(ends, rows, strict=True)]


class CompressedTensor(abc.ABC):
    """A weight W [o, i] in some other form: what a method's `compress` returns.

    A frozen dataclass, registered as a pytree: its data fields are arrays, None or other compressed
    tensors; its meta fields are numbers, strings, tuples of them, or frozen dataclasses of such.
    Both are all that a checkpoint keeps.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """(o, i) of the dense form."""

    @abc.abstractmethod
    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "o i"]:
        """The dense weight, computed in float32 or wider, then cast."""

    @abc.abstractmethod
    def split(self, rows: Sequence[int]) -> "Sequence[CompressedTensor]":
        """Consecutive pieces of the given numbers of rows, each complete in itself."""

    def validate(self) -> None:  # noqa: B027 (a form with nothing to check may leave it)
        """Raise ValueError unless the parts fit together."""

    def storage_bits(self) -> int:
        """Every bit that is stored, padding included."""
        return sum(8 * leaf.nbytes for leaf in jax.tree.leaves(self))

    def multiplications(self) -> int:
        """By the numbers that there are, for one x; what a rotation or rounding adds is left out.
        Of a weight for each expert, those of one.
        """
        o, i = self.shape
        return o * i

    def matmul(self, x: Float[Array, "*m i"]) -> Float[Array, "*m o"]:
        """x Wᵀ in x's dtype, computed on the compressed form."""
        # Two axes: XLA's CPU product of a batched x is far slower.
        y = x.reshape(-1, x.shape[-1]) @ self.dequantize(x.dtype).T
        return y.reshape(*x.shape[:-1], y.shape[-1])

    @property
    def online(self) -> bool:
        """Whether `matmul` does more to x than multiply it by the dense form."""
        return False

    def unpacked(self, dtype: DTypeLike | None = None) -> "CompressedTensor":
        """The same computation with dense weights in place of packed ones, to be run many times."""
        from algorithms.tensors.dense import DenseTensor  # which derives from this

        assert not self.online
        return DenseTensor(self.dequantize(dtype))
