"""Parameters that are matrices, as optimizers of matrices see them.

The last two axes of a leaf are a matrix [in, out], as `nnx.Linear` keeps it; axes before them are a
batch, such as a mixture's experts. Papers and their code speak of W [out, in]: the transpose.
"""

from collections.abc import Callable
from typing import Any

import jax
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


def muon_dimensions() -> Callable[[Any], Any]:
    """What `optax.contrib.muon` takes as its `muon_weight_dimension_numbers`."""
    matrix = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return lambda params: jax.tree.map(lambda _: matrix, params)
