"""LoftQ. Li, Yu, Liang, He, Karampatziakis, Chen, Zhao, ICLR 2024, arXiv:2310.08659.

Where QLoRA begins: a packed weight and factors that together are near W, by T rounds of
    Q_t = quant(W - A_t-1 B_t-1),   A_t B_t = the best of rank r for W - Q_t
from A_0 B_0 = 0, with the singular values parted evenly, A_t = U √Σ and B_t = √Σ Vᵀ.

This differs from the official code in: 1. γ of LoRA is divided out of the factors, so that the
product is what it should be for every α. 2. Any format serves, where the code has its own grids.
3. The singular vectors are those of M Mᵀ.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from algorithms.adapters.lora import LEARNED, Factors, LoRALinear, scaling
from algorithms.formats import Format, nf4
from algorithms.low_rank.projection import leading
from algorithms.parametrization import Parametrization, parts_of
from algorithms.tensors import DenseTensor, LowRankTensor, QuantizedTensor


def loftq(
    *,
    rank: int = 16,
    alpha: float = 16.0,
    rank_stabilized: bool = False,
    rounds: int = 5,
    format: Format | None = None,
    match: str = r"blocks\..*",
) -> Parametrization:
    """QLoRA that begins near the dense weight; format: by default NF4."""
    gamma, format = scaling(rank, alpha, rank_stabilized), nf4() if format is None else format
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be positive: with none it is qlora.")

    def make(layer: Any, key: Key[Array, ""]) -> LoRALinear:
        tensor, bias = parts_of(layer)
        if not isinstance(tensor, DenseTensor):
            raise ValueError(
                f"loftq chooses the packed weight itself, and this is a {type(tensor).__name__}: "
                "begin with a dense model, or choose qlora."
            )
        q, product = alternate(tensor.weight, rank, format, rounds)
        return LoRALinear(q, bias, Factors(product.b.T, product.a.T / gamma, gamma))

    return Parametrization(make=make, match=match, learned=LEARNED)


def alternate(
    w: Float[Array, "o i"], rank: int, format: Format, rounds: int
) -> tuple[QuantizedTensor, LowRankTensor]:
    """Q and A B after some rounds."""
    product = jnp.zeros_like(w)
    for _ in range(rounds):
        q = format.quantize(w - product)
        low = best(w - q.dequantize(w.dtype), rank)
        product = low.a @ low.b
    return q, low


def best(m: Float[Array, "o i"], rank: int) -> LowRankTensor:
    """The matrix of some rank that is nearest to M; a rank beyond M's is filled with zeros."""
    u = leading(m, rank)
    b = u.T @ m  # Σ Vᵀ
    root = jnp.sqrt(jnp.linalg.norm(b, axis=1))
    a, b = u * root, b / jnp.where(root == 0, 1, root)[:, None]
    lacking = rank - u.shape[1]
    return LowRankTensor(jnp.pad(a, [(0, 0), (0, lacking)]), jnp.pad(b, [(0, lacking), (0, 0)]))
