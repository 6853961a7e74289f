"""What an option costs: bits, multiplications per token, seconds on this machine."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from algorithms.tensors import CompressedTensor, DenseTensor, ExpertsTensor
from experiments.evaluation.floor import best_seconds

REPEATS = 7
SHORTEST = 1e-3  # seconds that one timing takes at least: shorter products are repeated within it


def multiplications(tensor: CompressedTensor, chosen: int) -> int:
    """For one token, which passes through `chosen` experts."""
    times = chosen if isinstance(tensor, ExpertsTensor) else 1
    return times * tensor.multiplications()


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
