"""Magnitude pruning: the smallest weights become zero. Han, Pool, Tran, Dally, NeurIPS 2015,
arXiv:1506.02626. Notes: papers/magnitude.md.

What every other score is compared with. Weights are compared within a layer, as Wanda's code does
for its baseline, or within each row, which is an output.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from algorithms.layerwise import LayerwiseMethod
from algorithms.pruning.patterns import Pattern
from algorithms.tensors import CompressedTensor


def magnitude(
    *,
    sparsity: float = 0.5,
    keep: int | None = None,
    block: int | None = None,
    within: str = "layer",
    dtype: str = "float16",
) -> LayerwiseMethod:
    """Keep the largest weights: all but the fraction `sparsity`, or `keep` of each `block`.

    within: "layer" or "row", which weights are compared. dtype: what is stored of those that stay.
    Raises ValueError for what is no pattern.
    """
    pattern = Pattern(sparsity=sparsity, keep=keep, block=block)
    if within not in ("layer", "row"):
        raise ValueError(f"within={within!r} must be layer or row.")
    rows = within == "row" or block is not None

    def compress(w: Float[Array, "o i"], stats: None) -> CompressedTensor:
        size = jnp.abs(w)
        mask = pattern.of_rows(size) if rows else pattern.of_all(size)
        return pattern.tensor(w, mask, rows=rows, dtype=dtype)

    return LayerwiseMethod(None, None, compress, stacked=rows)
