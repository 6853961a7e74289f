"""PACT. Choi, Wang, Venkataramani, Chuang, Srinivasan, Gopalakrishnan, 2018, arXiv:1805.06085.

A layer's input is clipped where α says, which is learned, and rounded to k bits:
    y = clip(x, 0, α),   y_q = round(y (2^k - 1) / α) α / (2^k - 1)
    ∂y_q/∂α = 0 for x < α, 1 for x ≥ α;   ∂y_q/∂x = 1 for 0 < x < α, 0 beyond
α begins large, and the optimizer's weight decay (the paper's λ_α) brings it down.

This differs from the paper in:
1. The inputs of a transformer's layers have both signs. Symmetric, Q_p = 2^(k-1) - 1:
       y = clip(x, -(Q_p + 1) α / Q_p, α),   step α / Q_p
   on all 2^k codes; below, ∂y_q/∂α is -(Q_p + 1) / Q_p. With symmetric=False it is the paper's.
2. Weights are rounded straight-through onto a format, or not at all; there by DoReFa.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from algorithms.elements import Integer
from algorithms.formats import Format, Grid
from algorithms.numerics import through
from algorithms.parametrization import Parametrization, parts_of
from algorithms.quantization import aware
from algorithms.quantization.aware import AwareLinear, Nearest, Start
from algorithms.tensors import CompressedTensor, DenseTensor, QuantizedInput
from algorithms.training import exact


def pact(
    *,
    bits: int = 4,
    alpha: float = 8.0,
    symmetric: bool = True,
    format: Format | None = None,
    match: str = r"blocks\..*",
) -> Parametrization:
    """Inputs of `bits`, clipped where `alpha` begins; format: of weights; None: as they are."""
    if not alpha > 0:
        raise ValueError(f"{alpha=} must be positive.")
    Integer(bits=bits)  # or ValueError

    def make(layer: Any, key: Key[Array, ""]) -> AwareLinear:
        inputs = ClippedInputs(bits, alpha, symmetric=symmetric)
        tensor, bias = parts_of(layer)
        if format is None and isinstance(tensor, DenseTensor):
            nothing = Format(element=Integer(bits=bits))  # unused: the weight stays dense
            return AwareLinear(Start(tensor.weight, bias, nothing, None, None), Dense(), inputs)
        start = aware.start(layer, format)
        return AwareLinear(start, Nearest(start.format, start.grid), inputs)

    return Parametrization(make=make, match=match)


class Dense(nnx.Module):
    """A weight that is not rounded."""

    def dense(self, w: Float[Array, "o i"]) -> Float[Array, "o i"]:
        return w

    def tensor(self, w: Float[Array, "o i"]) -> DenseTensor:
        return DenseTensor(w)


class ClippedInputs(nnx.Module):
    """An input between ends that α gives."""

    def __init__(self, bits: int, alpha: float, *, symmetric: bool):
        element = Integer(bits=bits, symmetric=symmetric)
        self.format = Format(element=element, columns=None, rows=None, scale_dtype="float32")
        self.alpha = exact(nnx.Param(jnp.float32(alpha)))
        self.codes = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1  # above zero
        self.below = self.codes + 1 if symmetric else 0

    def rounded(self, x: Float[Array, "*m i"]) -> Float[Array, "*m i"]:
        high = self.alpha[...].astype(jnp.float32)
        low, rows = -high * (self.below / self.codes), x.reshape(-1, x.shape[-1])
        rows = rows.astype(jnp.float32)
        clipped = jnp.where(rows >= high, high, jnp.where(rows <= low, low, rows))
        y = through(clipped, self.format.nearest(rows, self.grid))
        return y.reshape(x.shape).astype(x.dtype)

    @property
    def grid(self) -> Grid:
        step = (self.alpha[...] / self.codes).reshape(1, 1)
        zero = None if self.format.element.centred else jnp.zeros((1, 1))
        return Grid(self.format.stored(step, step), zero, None)

    def around(self, tensor: CompressedTensor) -> QuantizedInput:
        return QuantizedInput(tensor, *self.grid, self.format)
