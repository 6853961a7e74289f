"""Training what pruning has left. Han, Pool, Tran, Dally, NeurIPS 2015, arXiv:1506.02626 (Sec. 3).
Notes: papers/magnitude.md.

What is gone stays gone, and the rest is learned as it is stored. With E the mask and Q the rounding
to the stored type, or to the codes of a layer that is quantized too, straight-through:
    y = x (E ⊙ Q(W))ᵀ,   ∂L/∂W = E ⊙ ∂L/∂(E ⊙ Q(W))
A sparse layer keeps its form, so that a checkpoint takes as many bytes as before. Of a dense one,
the zeros that it has stay zeros.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from algorithms.formats import Grid, format_of
from algorithms.numerics import through
from algorithms.parametrization import Parametrization, parts_of
from algorithms.tensors import BlockSparseTensor, CompressedTensor, DenseTensor, SparseTensor
from algorithms.tensors.sparse import known
from algorithms.training import exact


class MaskedLinear(nnx.Module):
    """y = x (E ⊙ Q(W))ᵀ + b."""

    def __init__(self, tensor: SparseTensor | BlockSparseTensor | DenseTensor, bias: Any):
        w, dense = tensor.dequantize(), isinstance(tensor, DenseTensor)
        self.kernel, self.bias = exact(nnx.Param(w.T)), bias
        self.mask = nnx.Variable(w != 0 if isinstance(tensor, DenseTensor) else tensor.alive())
        self.form = None if dense else nnx.Variable(tensor)  # what is stored, but for its numbers

    def __call__(self, x: Float[Array, "*m i"]) -> Float[Array, "*m o"]:
        w = self.kernel[...].T
        w = jnp.where(self.mask[...], through(w, self._rounded(w)), jnp.zeros((), w.dtype))
        y = DenseTensor(w).matmul(x)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def _stored(self) -> Any:
        """A sparse layer's tensor, as it was."""
        return None if self.form is None else self.form.get_value()

    def _rounded(self, w: Float[Array, "o i"]) -> Float[Array, "o i"]:
        """Q(W)."""
        if (form := self._stored()) is None:
            return w
        if (grid := form.quantized()) is None:
            return w.astype(form.dtype).astype(w.dtype)
        return format_of(grid).nearest(w, Grid(grid.scale, grid.zero, grid.divisor))

    def finished(self) -> CompressedTensor | Float[Array, "o i"]:
        w = self.kernel[...].T
        if (form := self._stored()) is None:
            return jnp.where(self.mask[...], w, jnp.zeros((), w.dtype))
        if (grid := form.quantized()) is None:
            return form.holding(w)
        return form.holding(format_of(grid).round(w, Grid(grid.scale, grid.zero, grid.divisor)))


def masked(*, match: str = r"blocks\..*") -> Parametrization:
    """Layers that keep their zeros.

    match: the regular expression that a layer's whole path matches. Raises ValueError for layers
    that have no zeros, or are compressed in another form.
    """

    def make(layer: Any, key: Key[Array, ""]) -> MaskedLinear:
        tensor, bias = parts_of(layer)
        if not isinstance(tensor, SparseTensor | BlockSparseTensor | DenseTensor):
            raise ValueError(
                f"A {type(tensor).__name__} has no zeros that could be kept: begin with a model "
                "that was pruned (algorithm=sparsegpt, or pruning=… before another)."
            )
        if isinstance(tensor, DenseTensor) and known(tensor.weight) and bool(tensor.weight.all()):
            raise ValueError(
                "masked keeps zeros, and a layer has none: begin with a model that was pruned, or "
                "choose a match without the layers that were not."
            )
        return MaskedLinear(tensor, bias)

    return Parametrization(make=make, match=match)
