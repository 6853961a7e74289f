"""Parameters that are matrices, as optimizers of matrices see them.

The last two axes of a leaf are a matrix [in, out], as `nnx.Linear` keeps it; axes before them are a
batch, such as a mixture's experts. Papers and their code speak of W [out, in]: the transpose.
"""

from typing import Any

import jax
from jaxtyping import Array
from optax.contrib import MuonDimensionNumbers

from algorithms.optimizers.groups import named


def require_matrices(params: Any, name: str) -> None:
    """Raise ValueError unless each leaf has at least two axes."""
    for path, leaf in named(params).items():
        if leaf.ndim < 2:
            raise ValueError(
                f"{name} moves matrices alone, and {path} has shape {leaf.shape}: give it another "
                "optimizer (`grouped`)."
            )


def muon_dimensions(params: Any) -> Any:
    """What `optax.contrib.muon` wants to know of each leaf."""
    return jax.tree.map(lambda _: MuonDimensionNumbers(reduction_axis=-2, output_axis=-1), params)


def own_axes(leaf: Array) -> tuple[int, ...]:
    """The axes of one parameter, where others are a batch: the last two, or a vector's one."""
    return tuple(range(max(leaf.ndim - 2, 0), leaf.ndim))
