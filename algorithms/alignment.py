"""Which neuron of one network corresponds to which of another.

Singh, Jaggi, "Model Fusion via Optimal Transport", NeurIPS 2020, arXiv:1910.05653. Neurons are the
points of two clouds, a row of features each: their weights, or their activations on some inputs.
With the squared distances as costs and equal masses, T the plan of least cost (or of least cost and
some entropy), and R = diag(T 1)⁻¹ T,
    R Y has in row i the neurons of Y, averaged, that correspond to neuron i of X,
and layer after layer (their Algorithm 1), R of the layer before for the columns:
    W' = W_Y R_beforeᵀ,   R from the rows of W_X and of W',   aligned: R W'.
A permutation of Y's neurons is undone exactly; networks of other widths are averaged to X's.

Where this differs from the official code (github.com/sidak/otfusion): 1. They align the first
network to the second, here it is Y to X. 2. The outputs of the last layer have names, so they stay
as they are: their `skip_last_layer`; without it they align these too. 3. ε is in units of the mean
cost, theirs absolute. 4. Exact plans are assignments, between layers of one width.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from optax.assignment import hungarian_algorithm

from algorithms.numerics import widened
from algorithms.transport import sinkhorn


def align_neurons(
    x: Float[Array, "n d"], y: Float[Array, "m e"], *, epsilon: float | None = None
) -> Float[Array, "n m"]:
    """R, whose row i says what neurons of y make up neuron i of x.

    epsilon: None for the permutation of least cost, by the Hungarian algorithm, which takes n = m;
    a number, in units of the mean cost, for averages by `sinkhorn`: differentiable, batched by vmap
    at little cost, and far faster for thousands of neurons on an accelerator.

    Raises ValueError for other numbers of neurons than a permutation or features that both have.
    """
    if x.shape[1] != y.shape[1] or (epsilon is None and len(x) != len(y)):
        raise ValueError(
            f"{x.shape=} and {y.shape=} must have the same features, and for a permutation "
            "(epsilon=None) the same number of neurons: give an epsilon such as 0.01."
        )
    cost = squared_distances(widened(x), widened(y))
    if epsilon is None:
        return _permutation(cost)
    mean = jax.lax.stop_gradient(cost.mean())  # the unit
    plan = sinkhorn(cost / jnp.where(mean > 0, mean, 1), epsilon=epsilon).plan
    return plan / plan.sum(1, keepdims=True)


def align_layers(
    x: Sequence[Float[Array, "_ _"]],
    y: Sequence[Float[Array, "_ _"]],
    *,
    epsilon: float | None = None,
) -> list[Float[Array, "_ _"]]:
    """The weights of a chain of layers y, [out, in] each, its hidden neurons in the places of x's.

    Their average with x's is the paper's fusion. Raises ValueError for chains of other lengths and
    for what `align_neurons` refuses.
    """
    if len(x) != len(y):
        raise ValueError(f"x and y must have as many layers, not {len(x)} and {len(y)}.")
    aligned = list[jax.Array]()
    before = None
    for number, (ours, theirs) in enumerate(zip(x, y, strict=True)):
        theirs = theirs if before is None else theirs @ before.T
        if number < len(x) - 1:
            before = align_neurons(ours, theirs, epsilon=epsilon)
            theirs = before @ theirs
        aligned.append(theirs)
    return aligned


@jax.jit
def _permutation(cost: Float[Array, "n n"]) -> Float[Array, "n n"]:
    rows, columns = hungarian_algorithm(cost)
    return jnp.zeros_like(cost).at[rows, columns].set(1)


@jax.jit
def squared_distances(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """‖x_i - y_j‖², by one product: in float32 about 1e-7 of the squared norms is lost."""
    squares = jnp.sum(x**2, 1)[:, None] + jnp.sum(y**2, 1)
    return jnp.maximum(squares - 2 * x @ y.T, 0)
