"""log Σ exp(l) and l_y with gradients, of any form that computes them and a chunk's cotangents.

With p = softmax(l), ∂ log Σ exp(l) / ∂l = p and ∂ l_y / ∂l = onehot(y). Backward computes the
logits anew, a chunk at a time, from the log Σ exp(l) that forward kept.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from kernels.linear_cross_entropy import chunks


class Form(NamedTuple):
    """One way to compute them.

    forward(h, w, y, cap) -> log Σ exp(l), l_y;
    cotangent(h, w, y, log Σ exp(l), ∂L/∂ of the one, ∂L/∂ of the other, start, size, cap) ->
    ∂L/∂(h wᵀ) for `size` entries of the vocabulary, from `start` on.
    """

    forward: Callable[..., Any]
    cotangent: Callable[..., Any]

    def __call__(self, h, w, y, cap):
        return _statistics(self, cap, h, w, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _statistics(form, cap, h, w, y):
    return form.forward(h, w, y, cap)


def _forward(form, cap, h, w, y):
    lse, target = form.forward(h, w, y, cap)
    return (lse, target), (h, w, y, lse)


def _backward(form, cap, kept, by):
    h, w, y, lse = kept

    def cotangent(start, size):
        return form.cotangent(h, w, y, lse, *by, start, size, cap)

    size = chunks.columns(h.shape[0], w.shape[0])
    return *chunks.gradients(h, w, size, cotangent), None


_statistics.defvjp(_forward, _backward)
