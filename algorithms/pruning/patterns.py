"""Which weights of a matrix stay: so many of all, of each row, or of each block of a row."""

import dataclasses
import math

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from algorithms.numerics import running_count
from algorithms.tensors import BlockSparseTensor, QuantizedTensor, SparseTensor
from algorithms.tensors.block_sparse import sparse_blocks

SMALL = 16  # of so few, each is compared with each


def top(scores: Float[Array, "*b n"], count: Int[Array, "*#b"] | int) -> Bool[Array, "*b n"]:
    """The `count` largest of each row; of equal ones the first, NaN after all numbers.

    Without a sort: among few, how many are larger than each; among many, the smallest that stays,
    one binary digit after another.
    """
    n, ranked = scores.shape[-1], _ordered(scores)
    wanted = jnp.asarray(count)[..., None]
    if n <= SMALL:
        above = ranked[..., None, :] > ranked[..., None]
        before = (ranked[..., None, :] == ranked[..., None]) & (
            jnp.arange(n) < jnp.arange(n)[:, None]
        )
        return (above | before).sum(-1) < wanted
    bits = jnp.iinfo(ranked.dtype).bits

    def digit(step, least):
        tried = least | (jnp.ones((), ranked.dtype) << (bits - 1 - step).astype(ranked.dtype))
        enough = (ranked >= tried).sum(-1, keepdims=True) >= wanted
        return jnp.where(enough, tried, least)

    least = lax.fori_loop(0, bits, digit, jnp.zeros((*scores.shape[:-1], 1), ranked.dtype))
    above, equal = ranked > least, ranked == least
    return above | (equal & (running_count(equal) <= wanted - above.sum(-1, keepdims=True)))


def _ordered(x: Float[Array, "*b n"]) -> Array:
    """Unsigned integers in the order of the numbers; 0 is NaN's alone."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    kind = {32: jnp.uint32, 64: jnp.uint64}[jnp.finfo(x.dtype).bits]
    raw = lax.bitcast_convert_type(jnp.where(x == 0, 0, x), kind)  # -0 too
    sign = jnp.asarray(1, kind) << jnp.asarray(jnp.iinfo(kind).bits - 1, kind)
    return jnp.where(jnp.isnan(x), 0, jnp.where(raw & sign, ~raw, raw | sign))


def of_blocks(scores: Float[Array, "o i"], keep: int, block: int) -> Bool[Array, "o i"]:
    """The `keep` largest of each `block` consecutive inputs of a row."""
    o, i = scores.shape
    return top(scores.reshape(o, i // block, block), keep).reshape(o, i)


def require_blocks(keep: int, block: int) -> None:
    """Raise ValueError unless some of a block stay and some go."""
    if not 0 < keep < block:
        raise ValueError(f"keep={keep} must be from 1 to block={block} - 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pattern:
    """`sparsity`, the fraction that goes, or `keep` of each `block` consecutive inputs of a row."""

    sparsity: float | int = 0.5
    keep: int | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        if (self.keep is None) is not (self.block is None):
            raise ValueError(
                f"keep={self.keep} and block={self.block} come together or not at all."
            )
        if self.keep is not None and self.block is not None:
            require_blocks(self.keep, self.block)
        elif not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity} must be from 0 to below 1.")

    @property
    def gone(self) -> float:
        """The fraction that goes."""
        if self.keep is None or self.block is None:
            return self.sparsity
        return 1 - self.keep / self.block

    def require(self, columns: int) -> None:
        """Raise ValueError if blocks do not divide a row."""
        if self.block is not None and columns % self.block:
            raise ValueError(
                f"block={self.block} must divide the input dimension of w, which is {columns}."
            )

    def kept(self, n: int) -> int:
        """Of n weights that are compared with one another; the official codes' rounding. Of whole
        blocks, all together.
        """
        if self.keep is not None and self.block is not None:
            return n * self.keep // self.block
        return n - int(n * self.sparsity)

    def of_rows(self, scores: Float[Array, "o i"]) -> Bool[Array, "o i"]:
        """What stays of each row, those of the largest scores."""
        i = scores.shape[1]
        self.require(i)
        if self.keep is not None and self.block is not None:
            return of_blocks(scores, self.keep, self.block)
        return top(scores, self.kept(i))

    def of_all(self, scores: Float[Array, "o i"]) -> Bool[Array, "o i"]:
        """What stays of the matrix, whatever the row; of blocks as of rows."""
        if self.block is not None:
            return self.of_rows(scores)
        return top(scores.reshape(-1), self.kept(math.prod(scores.shape))).reshape(scores.shape)

    def tensor(
        self,
        w: Float[Array, "o i"] | QuantizedTensor,
        mask: Bool[Array, "o i"],
        *,
        rows: bool = False,
        count: int | None = None,
        dtype: DTypeLike = "float16",
    ) -> SparseTensor | BlockSparseTensor:
        """What stays of a matrix, numbers as `dtype` or codes, without what goes.

        rows: whether the mask is `of_rows`; else count is how many stay, by default `of_all`.
        """
        if self.keep is not None and self.block is not None:
            return sparse_blocks(w, mask, self.keep, self.block, dtype=dtype)
        o, i = mask.shape
        if rows:
            of_row = self.kept(i)
            return SparseTensor.of(w, mask, o * of_row, row_count=of_row, dtype=dtype)
        count = self.kept(o * i) if count is None else count
        return SparseTensor.of(w, mask, count, dtype=dtype)
