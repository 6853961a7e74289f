"""Codes into codebooks whose entries are added, with a scale for each row."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from algorithms.tensors.base import CompressedTensor, spans


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "codebooks", "scale"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class CodebookTensor(CompressedTensor):
    """Each group of c consecutive weights of a row is scale Σ_m codebooks[m, codes[m]].

    A code takes a whole byte, or two where a codebook has more than 256 entries. `split` gives each
    piece the codebooks whole, and each counts them.
    """

    # A pytree's leaves are not always arrays (shapes, shardings): `validate` checks, not types.
    codes: Any  # UInt8 or UInt16[Array, "o g m"]
    codebooks: Any  # Float[Array, "m k c"]
    scale: Any  # Float[Array, "o"]

    def validate(self) -> None:
        """Raise ValueError unless the parts fit together."""
        o, _, m = self.codes.shape
        if self.codebooks.ndim != 3 or self.codebooks.shape[0] != m:
            raise ValueError(
                f"codebooks.shape={self.codebooks.shape} must be [m, k, c] for the {m} codes of "
                f"each group, codes.shape={self.codes.shape}."
            )
        if self.scale.shape != (o,):
            raise ValueError(f"scale.shape={self.scale.shape} must be ({o},), one for each row.")
        expected = code_dtype(self.codebooks.shape[1])
        if self.codes.dtype != expected:
            raise ValueError(
                f"codes.dtype={self.codes.dtype} must be {expected} for codebooks of "
                f"{self.codebooks.shape[1]} entries."
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1] * self.codebooks.shape[2]

    @property
    def group_size(self) -> int:
        return self.codebooks.shape[2]

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "o i"]:
        """The dense weight, computed in float32 (or the codebooks' wider type), then cast."""
        wide = jnp.promote_types(self.codebooks.dtype, jnp.float32)
        tables = self.codebooks.astype(wide)
        entries = jax.vmap(lambda table, code: table[code], (0, 2))(tables, self.codes)
        w = entries.sum(0) * self.scale.astype(wide)[:, None, None]  # [o, g, c]
        return w.reshape(self.shape).astype(dtype or wide)

    def split(self, rows: Sequence[int]) -> "list[CodebookTensor]":
        """Consecutive pieces of the given numbers of rows, each with all codebooks."""
        return [CodebookTensor(self.codes[s], self.codebooks, self.scale[s]) for s in spans(rows)]


def code_dtype(entries: int) -> Any:
    """The type of a code into a codebook of so many entries."""
    return jnp.dtype(jnp.uint8 if entries <= 2**8 else jnp.uint16)
