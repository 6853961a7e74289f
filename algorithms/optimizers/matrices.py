"""Parameters that are matrices, as optimizers of matrices see them.

The last two axes of a leaf are a matrix [in, out], as `nnx.Linear` keeps it; axes before them are a
batch, such as a mixture's experts. Papers and their code speak of W [out, in]: the transpose.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jaxtyping import Array
from optax.contrib import MuonDimensionNumbers

from algorithms.linalg import polar_factor, quintics
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


def orthogonalize(
    coefficients: str | Sequence[Sequence[float]] = "polar_express",
) -> optax.GradientTransformation:
    """The polar factor of each update in its place (`algorithms.linalg`)."""
    steps = quintics(coefficients)
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda u: polar_factor(u, steps), updates)
    )


def orthogonal_momentum(
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    coefficients: str | Sequence[Sequence[float]] = "polar_express",
) -> optax.GradientTransformation:
    """Muon's direction as in its official code: the polar factor of an average of gradients.

    `optax.contrib.scale_by_muon` corrects that average for its start at zero, by which Nesterov's
    look ahead weighs otherwise: after two steps the direction is another.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum} must be at least 0 and below 1.")
    return optax.chain(
        optax.trace(momentum, nesterov),
        optax.scale(1 - momentum),  # a sum becomes the average, so that EPSILON means the same
        orthogonalize(coefficients),
    )


def own_axes(leaf: Array) -> tuple[int, ...]:
    """The axes of one parameter, where others are a batch: the last two, or a vector's one."""
    return tuple(range(max(leaf.ndim - 2, 0), leaf.ndim))
