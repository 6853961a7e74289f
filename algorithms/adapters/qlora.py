"""QLoRA. Dettmers, Pagnoni, Holtzman, Zettlemoyer, NeurIPS 2023, arXiv:2305.14314.

LoRA beside weights that are packed and stay so: NF4 has its sixteen points where a normal's mass is
cut into equal parts, and the backward pass goes through what the codes stand for:
    y = x Qᵀ + γ (x A) B,   ∂L/∂x = ∂L/∂y (Q + γ (A B)ᵀ)

This differs from the paper in: 1. Scales are not quantized again. 2. No dropout. 3. States of the
optimizer are not paged. 4. Any format serves; a layer that is packed already stays as it is.
"""

from typing import Any

from jaxtyping import Array, Key

from algorithms.adapters.lora import LEARNED, LoRALinear, factors, scaling
from algorithms.formats import Format, nf4
from algorithms.parametrization import Parametrization, parts_of
from algorithms.tensors import DenseTensor


def qlora(
    *,
    rank: int = 64,
    alpha: float = 16.0,
    rank_stabilized: bool = False,
    format: Format | None = None,
    match: str = r"blocks\..*",
) -> Parametrization:
    """LoRA beside weights of a format, by default NF4."""
    gamma, format = scaling(rank, alpha, rank_stabilized), nf4() if format is None else format

    def make(layer: Any, key: Key[Array, ""]) -> LoRALinear:
        tensor, bias = parts_of(layer)
        if isinstance(tensor, DenseTensor):
            tensor = format.quantize(tensor.weight)
        return LoRALinear(tensor, bias, factors(tensor, rank, gamma, key))

    return Parametrization(make=make, match=match, learned=LEARNED)
