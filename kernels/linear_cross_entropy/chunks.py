"""Logits a chunk of the vocabulary at a time, and the gradients that follow from them.

For logits l = h wᵀ and a cotangent d = ∂L/∂l, ∂L/∂h = d w and ∂L/∂w = dᵀ h. A chunk of the
vocabulary is a slice of w's rows: its share of ∂L/∂w is final, and ∂L/∂h is a sum over chunks, in
float32. Memory holds one chunk of logits and cotangents, whatever the vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

ELEMENTS = 2**26  # of a chunk of logits: 256 MiB in float32, and products large enough for a GPU
NARROWEST = 1024  # with more tokens than ELEMENTS / NARROWEST, chunks grow with them, as h does
MULTIPLE = 256  # of a kernel's tile


def columns(tokens: int, vocabulary: int) -> int:
    """How much of the vocabulary a chunk has."""
    most = max(ELEMENTS // max(tokens, 1), NARROWEST) // MULTIPLE * MULTIPLE
    return min(vocabulary, most)


def fold(step: Callable[[Any, Any, int], Any], carry: Any, length: int, size: int) -> Any:
    """The carry after step(carry, start, size) for each chunk in turn; the last may be smaller."""
    full, rest = divmod(length, size)
    if full == 1:
        carry = step(carry, 0, size)
    else:
        carry = lax.fori_loop(0, full, lambda i, carry: step(carry, i * size, size), carry)
    return step(carry, full * size, rest) if rest else carry


def rows(w, start, size: int):
    return lax.dynamic_slice_in_dim(w, start, size)


def wide(*arrays):
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def cotangent_dtype(*arrays):
    """Of ∂L/∂l: bfloat16 has the range for it, float16 has not."""
    operands = jnp.result_type(*arrays)
    return operands if operands == jnp.bfloat16 else wide(*arrays)


def logits(h, w, cap=None):
    z = jnp.einsum("td,vd->tv", h, w, preferred_element_type=wide(h, w))
    return z if cap is None else cap * jnp.tanh(z / cap)


def gradients(h, w, size: int, cotangent: Callable[[Any, int], Any]):
    """(∂L/∂h, ∂L/∂w), where cotangent(start, size) is ∂L/∂l of a chunk, [T, size]."""

    def step(carry, start, size):
        by_h, by_w = carry
        d = cotangent(start, size)
        by_h += jnp.einsum("tv,vd->td", d, rows(w, start, size), preferred_element_type=by_h.dtype)
        chunk = jnp.einsum("tv,td->vd", d, h, preferred_element_type=by_h.dtype)
        return by_h, lax.dynamic_update_slice_in_dim(by_w, chunk.astype(w.dtype), start, 0)

    zeros = jnp.zeros(h.shape, wide(h, w)), jnp.zeros_like(w)
    by_h, by_w = fold(step, zeros, w.shape[0], size)
    return by_h.astype(h.dtype), by_w
