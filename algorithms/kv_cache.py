"""Keys and values rounded onto 8-bit elements, by one scale for each layer's keys and one for its
values, as servers keep their caches (vLLM's `kv_cache_dtype=fp8` with scales of the checkpoint).

A scale is the largest magnitude that calibration saw over the largest element: nothing is clipped
there. E4M3: Micikevicius et al., 2022, arXiv:2209.05433. What attention computes on is what the
cache holds, in compression, evaluation and generation alike.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from algorithms.walk import NotFiniteError

SCALES = ("k_scale", "v_scale")  # of an attention


def fit(block: Any, chunks: Sequence[Any]) -> None:
    """Set the scales of a block by what its keys and values are for `chunks`, which stand where
    attention's projections read them; a block without attention has none.

    Raises NotFiniteError.
    """
    if not block.has_attention:
        return
    graph, state = nnx.split(block)
    largest = jnp.max(jnp.stack([_magnitudes(graph, state, flow) for flow in chunks]), 0)
    if not bool(jnp.isfinite(largest).all()):
        raise NotFiniteError(
            "The activations at attention.input hold NaN or infinity, or keys and values made of "
            "them do: look at the blocks before it, or at the calibration text."
        )
    for name, value in zip(SCALES, largest / block.attention.largest, strict=True):
        getattr(block.attention, name).set_value(value[None])


def exact(block: Any) -> Any:
    """A copy of the block that takes keys and values as they are."""
    copy = nnx.clone(block)
    if copy.has_attention and copy.attention.cache is not None:
        for name in SCALES:
            getattr(copy.attention, name).set_value(jnp.zeros(1))
    return copy


@functools.partial(jax.jit, static_argnames="graph")
def _magnitudes(graph, state, flow: Any) -> Float[Array, "2"]:
    attention = nnx.merge(graph, state).attention
    _, k, v = attention.projected(flow.activation, flow.positions)
    return jnp.stack([jnp.abs(z.astype(jnp.float32)).max() for z in (k, v)])
