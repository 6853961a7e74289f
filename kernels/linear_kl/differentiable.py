"""The divergence with its gradients by the student's h and w, of any form that computes it and a
chunk's cotangents. Backward computes the logits anew, a chunk of the vocabulary at a time, from
what forward kept of each token.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from kernels.linear_cross_entropy import chunks


class Kept(NamedTuple):
    """What forward finds of each token, [t] each, of the logits over the temperature."""

    loss: Any
    lse_s: Any
    lse_t: Any
    centre: Any  # KL(student ‖ teacher), or KL(student ‖ mixture) for jsd


class Form(NamedTuple):
    """forward(h_s, w_s, h_t, w_t, divergence) -> Kept; cotangent(h_s, w_s, h_t, w_t, kept, ∂L/∂ of
    the losses, start, size, divergence) -> ∂L/∂(h_s w_sᵀ) of `size` entries, from `start` on.
    """

    forward: Callable[..., Kept]
    cotangent: Callable[..., Any]
    held: int  # chunks of float32 logits that it holds at once

    def __call__(self, h_s, w_s, h_t, w_t, divergence):
        return _divergence(self, divergence, h_s, w_s, h_t, w_t)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _divergence(form, divergence, *layers):
    return form.forward(*layers, divergence).loss


def _forward(form, divergence, *layers):
    kept = form.forward(*layers, divergence)
    return kept.loss, (layers, kept)


def _backward(form, divergence, residuals, by_loss):
    layers, kept = residuals
    h_s, w_s = layers[:2]

    def cotangent(start, size):
        return form.cotangent(*layers, kept, by_loss, start, size, divergence)

    size = chunks.columns(form.held * h_s.shape[0], w_s.shape[0])
    return *chunks.gradients(h_s, w_s, size, cotangent), None, None


_divergence.defvjp(_forward, _backward)
