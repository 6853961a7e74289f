"""DoRA. Liu, Wang, Yin, Molchanov, Wang, Cheng, Chen, ICML 2024, arXiv:2402.09353.

A weight as magnitudes and directions, whose directions move by LoRA: with V = W + γ (A B)ᵀ and ‖·‖
the norm of each of its rows, an output's,
    W' = m V / ‖V‖
m begins at ‖W‖, so that W' does at W. To gradients ‖V‖ is a constant (§4.3), which saves memory.

This differs from the paper in: 1. A row of zeros, whose norm divides by nothing, keeps its scale.
2. W may be packed: once learned, m / ‖V‖ multiplies its scales, kept in float32, and B. 3. The
paper writes norms of columns; as in its code, they are of what makes one output.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from algorithms.adapters.lora import Factors, factors, scaling
from algorithms.parametrization import Parametrization, parts_of
from algorithms.tensors import (
    CompressedTensor,
    DenseTensor,
    LowRankTensor,
    QuantizedTensor,
    SumTensor,
)
from algorithms.tensors.quantized import load_scale


def dora(
    *,
    rank: int = 16,
    alpha: float = 16.0,
    rank_stabilized: bool = False,
    match: str = r"blocks\..*",
) -> Parametrization:
    """Magnitudes, and factors for directions, of every weight, dense or packed in rows."""
    gamma = scaling(rank, alpha, rank_stabilized)

    def make(layer: Any, key: Key[Array, ""]) -> DoRALinear:
        tensor, bias = parts_of(layer)
        return DoRALinear(tensor, bias, factors(tensor, rank, gamma, key))

    return Parametrization(make=make, match=match, learned=r".*\.(lora_[ab]|magnitude)")


class DoRALinear(nnx.Module):
    """A weight that is kept, its directions moved and its magnitudes learned."""

    def __init__(self, base: CompressedTensor, bias: Any, lora: Factors):
        packed = isinstance(base, QuantizedTensor) and base.block[0] == 1
        if not packed and not isinstance(base, DenseTensor):
            raise ValueError(
                f"dora scales the rows of a dense weight, or of a packed one with scales of single "
                f"rows, and this is a {type(base).__name__}: choose lora."
            )
        self.base, self.bias, self.lora = nnx.Variable(base), bias, lora
        lora.magnitude = nnx.Param(jnp.linalg.norm(base.dequantize(), axis=1))  # m

    def __call__(self, x: Float[Array, "*m i"]) -> Float[Array, "*m o"]:
        y = SumTensor(self.base.get_value(), self.lora.tensor).matmul(x)
        y = y * self._ratio().astype(y.dtype)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def _ratio(self) -> Float[Array, " o"]:
        """m / ‖V‖."""
        v = self.base.get_value().dequantize() + self.lora.tensor.dequantize()
        norm = jax.lax.stop_gradient(jnp.linalg.norm(v, axis=1))
        return jnp.where(norm == 0, 1, self.lora.magnitude[...] / jnp.where(norm == 0, 1, norm))

    def finished(self) -> CompressedTensor | Float[Array, "o i"]:
        base, low, ratio = self.base.get_value(), self.lora.tensor, self._ratio()[:, None]
        if isinstance(base, DenseTensor):
            return ratio * (base.weight + low.dequantize(base.weight.dtype))
        assert isinstance(base, QuantizedTensor)
        scale = load_scale(base.scale, base.divisor) * ratio
        return SumTensor(
            dataclasses.replace(base, scale=scale, divisor=None),
            LowRankTensor(ratio * low.a, low.b),
        )
