"""LoRA. Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, ICLR 2022, arXiv:2106.09685.

Beside a weight W that is kept, a product of rank r is learned:
    y = x Wᵀ + γ (x A) B,   γ = α / r
With A uniform within ±1/√i, as the official code draws it, and B zero, it begins as W. rsLoRA has
γ = α / √r (Kalajdzievski, 2023, arXiv:2312.03732): a higher rank then does not learn more slowly.

Once learned, a dense W becomes W + γ (A B)ᵀ; a packed one stays, with the factors beside it
(`algorithms.tensors.low_rank`), so that nothing is rounded anew.

`nnx.LoRA` has neither γ nor a base that is kept out of what is learned; its `LoRAParam` serves.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from algorithms.low_rank.projection import require_rank
from algorithms.parametrization import Parametrization, parts_of
from algorithms.tensors import CompressedTensor, DenseTensor, LowRankTensor, SumTensor

LEARNED = r".*\.lora_[ab]"


def lora(
    *,
    rank: int = 16,
    alpha: float = 16.0,
    rank_stabilized: bool = False,
    match: str = r"blocks\..*",
) -> Parametrization:
    """Factors beside every weight, dense or packed; rank_stabilized: rsLoRA."""
    gamma = scaling(rank, alpha, rank_stabilized)

    def make(layer: Any, key: Key[Array, ""]) -> LoRALinear:
        tensor, bias = parts_of(layer)
        return LoRALinear(tensor, bias, factors(tensor, rank, gamma, key))

    return Parametrization(make=make, match=match, learned=LEARNED)


def scaling(rank: int, alpha: float, rank_stabilized: bool = False) -> float:
    """γ. Raises ValueError for a rank that is none."""
    require_rank(rank)
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)


class Factors(nnx.Module):
    """γ A B, as W [o, i] has it: transposed."""

    magnitude: Any  # of rows, where DoRA has them

    def __init__(self, a: Float[Array, "i r"], b: Float[Array, "r o"], gamma: float):
        self.lora_a, self.lora_b, self.gamma = nnx.LoRAParam(a), nnx.LoRAParam(b), gamma

    @property
    def tensor(self) -> LowRankTensor:
        return LowRankTensor(self.gamma * self.lora_b[...].T, self.lora_a[...].T)


def factors(tensor: CompressedTensor, rank: int, gamma: float, key: Key[Array, ""]) -> Factors:
    """Whose product is zero."""
    o, i = tensor.shape
    end = 1 / math.sqrt(i)
    a = jax.random.uniform(key, (i, rank), minval=-end, maxval=end)
    return Factors(a, jnp.zeros((rank, o)), gamma)


class LoRALinear(nnx.Module):
    """A weight that is kept and one of low rank that is learned, side by side."""

    def __init__(self, base: CompressedTensor, bias: Any, lora: Factors):
        self.base, self.bias, self.lora = nnx.Variable(base), bias, lora

    def __call__(self, x: Float[Array, "*m i"]) -> Float[Array, "*m o"]:
        y = SumTensor(self.base.get_value(), self.lora.tensor).matmul(x)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def finished(self) -> CompressedTensor | Float[Array, "o i"]:
        base = self.base.get_value()
        if not isinstance(base, DenseTensor):
            return SumTensor(base, self.lora.tensor)
        return base.weight + self.lora.tensor.dequantize(base.weight.dtype)
