"""Incoherence processing. Tseng, Chee, Sun, Kuleshov, De Sa, "QuIP#: Even Better LLM Quantization
with Hadamard Incoherence and Lattice Codebooks", ICML 2024, arXiv:2402.04396. Notes:
papers/quip_sharp.md.

The randomized Hadamard transform of n numbers, s random signs, is the rotation
    x -> x Uᵀ,   Uᵀ = diag(s) H / √n.
For y = W x with G = X Xᵀ, and such rotations U of the inputs and V of the outputs (Lemma 3.1):
    W' = V W Uᵀ,   G' = U G Uᵀ,   x' = U x,   y = Vᵀ W' x'
The error is kept, tr(ΔW' G' ΔW'ᵀ) = tr(ΔW G ΔWᵀ), while with probability 1 - δ
    max|W'| <= 2 log(4 o i / δ) ‖W‖_F / √(o i):
no weight stands out, so that a grid or a codebook fits all of them.

Where this differs from the official code: 1. Outputs rotate in blocks of rows, or not at all, since
the readers of a site are stacked as rows and taken apart again: a block must lie inside one of
them. 2. Inputs may rotate in blocks too, where their number has no Hadamard matrix. 3. H of an
order that is no power of two may be another matrix than theirs. 4. Their rescaling of W's columns
is no rotation, and not here.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Key, Shaped

from algorithms.numerics import relative_error
from kernels.hadamard import hadamard, largest_block

Signs = Int8[Array, " n"]


def signs(key: Shaped[Array, "..."], n: int) -> Signs:
    """n random signs, +1 or -1."""
    return jax.random.rademacher(key, (n,), dtype=jnp.int8)


def rotate(x: Float[Array, "*r n"], signs: Signs, block: int | None = None) -> Float[Array, "*r n"]:
    """x diag(signs) H / √n over the last axis, or over each `block` of it by itself.

    Raises ValueError if `block` does not divide n, or has no Hadamard matrix: `largest_block(n)`
    gives one that does and has.
    """
    return _by_blocks(x * signs.astype(x.dtype), block, inverse=False)


def unrotate(
    x: Float[Array, "*r n"], signs: Signs, block: int | None = None
) -> Float[Array, "*r n"]:
    """What `rotate` undoes: x Hᵀ diag(signs) / √n."""
    return _by_blocks(x, block, inverse=True) * signs.astype(x.dtype)


def rotate_weight(
    w: Float[Array, "o i"],
    signs_in: Int8[Array, " i"],
    signs_out: Int8[Array, " o"] | None = None,
    row_block: int | None = None,
    column_block: int | None = None,
) -> Float[Array, "o i"]:
    """V W Uᵀ; V is the identity without `signs_out`, else a rotation of each `row_block` rows."""
    w = rotate(w, signs_in, column_block)
    return w if signs_out is None else rotate(w.T, signs_out, row_block).T


def unrotate_weight(
    w: Float[Array, "o i"],
    signs_in: Int8[Array, " i"],
    signs_out: Int8[Array, " o"] | None = None,
    row_block: int | None = None,
    column_block: int | None = None,
) -> Float[Array, "o i"]:
    """Vᵀ W U: what `rotate_weight` undoes."""
    w = unrotate(w, signs_in, column_block)
    return w if signs_out is None else unrotate(w.T, signs_out, row_block).T


def rotate_gram(
    gram: Float[Array, "i i"], signs_in: Int8[Array, " i"], column_block: int | None = None
) -> Float[Array, "i i"]:
    """U G Uᵀ, exactly symmetric."""
    rotated = rotate(rotate(gram, signs_in, column_block).T, signs_in, column_block)
    return (rotated + rotated.T) / 2


def process(
    w: Float[Array, "o i"],
    gram: Float[Array, "i i"],
    signs_out: Int8[Array, " o"] | None,
    signs_in: Int8[Array, " i"],
    row_block: int | None = None,
    column_block: int | None = None,
) -> tuple[Float[Array, "o i"], Float[Array, "i i"]]:
    """(V W Uᵀ, U G Uᵀ), which measure errors as (W, G) do.

    signs_out: None leaves the outputs as they are.
    row_block: how many consecutive rows rotate together; all of them if None. Stacked readers need
    one that divides each of their numbers of rows: `common_block` gives the largest.
    column_block: the same for inputs.

    Raises ValueError for a block that divides nothing or has no Hadamard matrix.
    """
    rotated = rotate_weight(w, signs_in, signs_out, row_block, column_block)
    return rotated, rotate_gram(gram, signs_in, column_block)


class Turns(NamedTuple):
    """The signs of a weight's rotations, as `RotatedTensor.from_signs` takes them."""

    signs_in: Signs
    signs_out: Signs | None
    row_block: int | None


def prepare(
    w: Float[Array, "o i"],
    gram: Float[Array, "i i"],
    key: Key[Array, ""],
    row_block: int | None,
) -> tuple[Float[Array, "o i"], Float[Array, "i i"], Turns]:
    """W and X Xᵀ turned by signs drawn from `key`; weights of inputs that are always zero are free,
    and become zero first.

    row_block: outputs that rotate together, or the largest block below that divides o; None: none.
    """
    key_in, key_out = jax.random.split(key)
    signs_in, signs_out, block = signs(key_in, w.shape[1]), None, None
    if row_block is not None:
        block = largest_block(math.gcd(w.shape[0], row_block))
        signs_out = signs(key_out, w.shape[0])
    w = jnp.where((jnp.diag(gram) == 0)[None], 0, w)
    return *process(w, gram, signs_out, signs_in, block), Turns(signs_in, signs_out, block)


def common_block(rows: Sequence[int]) -> int:
    """The largest size that divides each of `rows` and has a Hadamard matrix; 1 if one is odd."""
    return largest_block(math.gcd(*rows))


def incoherence(w: Float[Array, "o i"]) -> Float[Array, ""]:
    """μ = max|W| √(o i) / ‖W‖_F: 1 where all weights are of one size; 0 for a weight of zeros."""
    largest = jnp.max(jnp.abs(w))
    return relative_error(largest * math.sqrt(w.size), jnp.sqrt(jnp.sum(w**2)))


def _by_blocks(x: Float[Array, "*r n"], block: int | None, *, inverse: bool):
    n = x.shape[-1]
    if block is None:
        return hadamard(x, inverse=inverse)
    if block < 1 or n % block:
        raise ValueError(
            f"block={block} must be positive and divide the {n} channels that rotate: take one of "
            f"their divisors, up to {largest_block(n)}."
        )
    return hadamard(x.reshape(*x.shape[:-1], n // block, block), inverse=inverse).reshape(x.shape)
