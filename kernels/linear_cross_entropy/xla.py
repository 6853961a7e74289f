"""A chunk of the vocabulary at a time, with a running maximum and sum of exponentials."""

import jax.numpy as jnp

from kernels.linear_cross_entropy import chunks
from kernels.linear_cross_entropy.differentiable import Form


def statistics(h, w, y, *, cap):
    return FORM(h, w, y, cap)


def forward(h, w, y, cap):
    tokens, vocabulary = h.shape[0], w.shape[0]
    dtype = chunks.wide(h, w)

    def step(carry, start, size):
        highest, total, target = carry
        logits = chunks.logits(h, chunks.rows(w, start, size), cap)
        highest, total = accumulate(highest, total, logits)
        at = y - start
        found = jnp.take_along_axis(logits, jnp.clip(at, 0, size - 1)[:, None], axis=1)[:, 0]
        return highest, total, jnp.where((at >= 0) & (at < size), found, target)

    start = jnp.full(tokens, -jnp.inf, dtype), jnp.zeros(tokens, dtype), jnp.zeros(tokens, dtype)
    size = chunks.columns(tokens, vocabulary)
    highest, total, target = chunks.fold(step, start, vocabulary, size)
    return logsumexp(highest, total), target


def accumulate(highest, total, logits):
    """max and Σ exp(l - max) over what they were taken over before, and the given logits."""
    raised = jnp.maximum(highest, logits.max(axis=1))
    base = finite(raised)
    terms = jnp.exp(logits - base[:, None]).sum(axis=1)
    return raised, total * jnp.exp(highest - base) + terms


def logsumexp(highest, total):
    return finite(highest) + jnp.log(total)


def finite(highest):
    """A maximum that can be subtracted: infinite logits stay infinite, not NaN."""
    return jnp.where(jnp.isfinite(highest), highest, 0)


def cotangent(h, w, y, lse, by_lse, by_target, start, size, cap):
    """∂L/∂(h wᵀ) of a chunk: (by_lse softmax + by_target onehot) · (1 - (l / cap)²)."""
    logits = chunks.logits(h, chunks.rows(w, start, size), cap)
    d = by_lse[:, None] * jnp.exp(logits - lse[:, None])
    at_target = (start + jnp.arange(size))[None] == y[:, None]
    d = jnp.where(at_target, d + by_target[:, None], d)
    if cap is not None:
        d *= 1 - (logits / cap) ** 2
    return d.astype(chunks.cotangent_dtype(h, w))


FORM = Form(forward, cotangent)
