"""SR-STE, N:M sparsity from scratch. Zhou, Ma, Zhu, Liu, Zhang, Yuan, Sun, Li, ICLR 2021,
arXiv:2102.04010.

Of each block of `block` consecutive inputs of an output, the `keep` weights of the largest
magnitude are computed with. The gradient passes straight through to all of them, and pruned ones
decay, so that the choice settles (Eq. 8), with E the mask:
    W̃ = E ⊙ W,    W <- W - γ (∂L/∂W̃ + λ (1 - E) ⊙ W)

The official code, NM-sparsity/NM-sparsity, adds the decay in the backward pass of the layer. Here a
loss is a sum over positions whose gradient is divided by their number afterwards, and the decay
must not be: it is a gradient transformation around the optimizer, before clipping as there.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from algorithms.optimizers.groups import path_name
from algorithms.parametrization import Parametrization, require_dense
from algorithms.pruning.patterns import of_blocks, require_blocks
from algorithms.straight_through import through


class BlockSparseLinear(nnx.Module):
    """y = x W̃ᵀ + b."""

    def __init__(self, linear: nnx.Linear, keep: int, block: int):
        self.keep, self.block = keep, block
        self.kernel, self.bias = linear.kernel, linear.bias  # dense

    def sparse_kernel(self) -> Float[Array, "i o"]:
        w = self.kernel[...]
        mask = of_blocks(jnp.abs(w.T), self.keep, self.block).T
        return through(w, jnp.where(mask, w, jnp.zeros((), w.dtype)))

    def __call__(self, x: Float[Array, "*m i"]) -> Float[Array, "*m o"]:
        y = x @ self.sparse_kernel()
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def finished(self) -> Float[Array, "o i"]:
        return self.sparse_kernel().T


def sr_ste(
    *, keep: int = 2, block: int = 4, decay: float = 2e-4, match: str = r"blocks\..*"
) -> Parametrization:
    """Layers that compute with `keep` of each `block` consecutive weights of an output.

    decay: λ; 0 is the plain straight-through estimator. match: the regular expression that a
    layer's whole path matches. Raises ValueError for numbers outside their ranges, and for layers
    that are not dense or whose inputs are not whole blocks.
    """
    require_blocks(keep, block)
    if decay < 0:
        raise ValueError(f"decay={decay} must not be negative.")

    def make(layer: Any, key: Any) -> BlockSparseLinear:
        linear = require_dense(layer, "sr_ste")
        if linear.in_features % block:
            raise ValueError(
                f"block={block} must divide the {linear.in_features} inputs of a layer."
            )
        return BlockSparseLinear(linear, keep, block)

    def around(inner: optax.GradientTransformation) -> optax.GradientTransformation:
        return optax.chain(decay_pruned(keep, block, decay, rf"(?:{match})\.kernel"), inner)

    return Parametrization(make=make, match=match, around=around)


def decay_pruned(keep: int, block: int, decay: float, match: str) -> optax.GradientTransformation:
    """Adds λ (1 - E) ⊙ W to the gradients of kernels [in, out] whose path matches."""

    def added(gradients: Any, params: Any) -> Any:
        def one(path: Any, g: Any, w: Any) -> Any:
            if not re.fullmatch(match, path_name(path)):
                return g
            pruned = ~of_blocks(jnp.abs(w.T), keep, block).T
            return g + (decay * pruned * w).astype(g.dtype)

        return jax.tree_util.tree_map_with_path(one, gradients, params)

    return optax.stateless(added)
