"""What an option costs: bits, multiplications per token, seconds on this machine."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from algorithms.tensors import (
    BlockSparseTensor,
    CompressedTensor,
    DenseTensor,
    ExpertsTensor,
    LowRankTensor,
    QuantizedInput,
    RotatedTensor,
    SparseTensor,
    SumTensor,
)
from experiments.evaluation.floor import best_seconds

REPEATS = 7
SHORTEST = 1e-3  # seconds that one timing takes at least: shorter products are repeated within it


def multiplications(tensor: CompressedTensor, chosen: int) -> float:
    """Of the weights that there are, for one token, which passes through `chosen` experts; what a
    rotation or rounding adds is left out.
    """
    if isinstance(tensor, ExpertsTensor):
        one = jax.eval_shape(lambda: tensor.one(0))
        return chosen * multiplications(one, chosen)
    if isinstance(tensor, SparseTensor):
        return float(tensor.count)
    if isinstance(tensor, BlockSparseTensor):
        return tensor.shape[0] * tensor.shape[1] * tensor.keep / tensor.of
    if isinstance(tensor, LowRankTensor):
        return float(tensor.rank * sum(tensor.shape))
    if isinstance(tensor, SumTensor):
        return sum(multiplications(part, chosen) for part in (tensor.base, tensor.correction))
    if isinstance(tensor, QuantizedInput | RotatedTensor):
        return multiplications(tensor.weight, chosen)
    return float(tensor.shape[0] * tensor.shape[1])


@jax.jit
def _product(tensor: Any, x: Any, count: Any) -> Any:
    """`count` times, each on what the last one gave, so that none is left out."""

    def once(_: Any, y: Any) -> Any:
        return y + 1e-30 * tensor.matmul(x + y).sum()

    return jax.lax.fori_loop(0, count, once, jnp.zeros(()))


def seconds(tensors: Sequence[CompressedTensor], tokens: int, chosen: int) -> float:
    """Of the products of these layers with `tokens` activations each, as they are stored; each
    token passes through `chosen` experts.
    """
    return sum(
        chosen * _seconds(tensor.one(0), tokens)
        if isinstance(tensor, ExpertsTensor)
        else _seconds(tensor, tokens)
        for tensor in tensors
    )


def _seconds(tensor: CompressedTensor, tokens: int) -> float:
    x = jnp.ones((tokens, tensor.shape[1]))
    count = 1
    while True:
        spent = best_seconds(functools.partial(_product, tensor, x, count), REPEATS)
        if spent >= SHORTEST:
            return spent / count
        count *= max(2, round(SHORTEST / max(spent, 1e-6)))


def dense(shape: tuple[int, ...], dtype: Any) -> CompressedTensor:
    """A weight that stays as it is, as shapes."""
    weight = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    return ExpertsTensor(DenseTensor(weight)) if len(shape) == 3 else DenseTensor(weight)
