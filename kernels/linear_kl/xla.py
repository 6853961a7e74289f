"""A chunk of the vocabulary at a time, with running sums. The equations are in `divergence`."""

import jax.numpy as jnp

from kernels.linear_cross_entropy import chunks
from kernels.linear_cross_entropy import xla as cross_entropy
from kernels.linear_kl import divergence as d
from kernels.linear_kl.differentiable import Form, Kept

HELD = 2  # chunks of logits at once, the student's and the teacher's


def linear_kl(h_s, w_s, h_t, w_t, *, divergence: d.Divergence):
    return FORM(h_s, w_s, h_t, w_t, divergence)


def forward(h_s, w_s, h_t, w_t, divergence):
    student, teacher = (h_s, w_s), (h_t, w_t)
    if divergence.kind == "jsd":
        return _jsd(student, teacher, divergence)
    first, second = (teacher, student) if divergence.teacher_first else (student, teacher)

    def step(state, start, size):
        return d.accumulate(state, *(_logits(x, start, size, divergence) for x in (first, second)))

    loss, one, other = d.finished(_fold(step, d.INITIAL, student, teacher))
    lse_s, lse_t = (other, one) if divergence.teacher_first else (one, other)
    return Kept(loss, lse_s, lse_t, loss)


def _jsd(student, teacher, divergence):
    lse_s, lse_t = (_logsumexp(x, divergence) for x in (student, teacher))

    def step(state, start, size):
        log_p = _logits(teacher, start, size, divergence) - lse_t[:, None]
        log_q = _logits(student, start, size, divergence) - lse_s[:, None]
        return d.accumulate_mixture(state, log_p, log_q, divergence.beta)

    of_p, of_q = _fold(step, (0.0, 0.0), student, teacher)
    beta = divergence.beta
    return Kept(beta * of_p + (1 - beta) * of_q, lse_s, lse_t, of_q)


def _logsumexp(layer, divergence):
    def step(state, start, size):
        highest, total = state
        return cross_entropy.accumulate(highest, total, _logits(layer, start, size, divergence))

    highest, total = _fold(step, (-jnp.inf, 0.0), layer)
    return cross_entropy.logsumexp(highest, total)


def _logits(layer, start, size, divergence):
    h, w = layer
    return chunks.logits(h, chunks.rows(w, start, size)) / divergence.temperature


def _fold(step, initial, *layers):
    """step(state, start, size) over all chunks, its values in the widest type of the layers."""
    tokens, vocabulary = layers[0][0].shape[0], layers[0][1].shape[0]
    dtype = chunks.wide(*(x for layer in layers for x in layer))
    state = [jnp.full(tokens, value, dtype) for value in initial]

    def cast(state, start, size):
        return [x.astype(dtype) for x in step(state, start, size)]

    return chunks.fold(cast, state, vocabulary, chunks.columns(HELD * tokens, vocabulary))


def cotangent(h_s, w_s, h_t, w_t, kept, by_loss, start, size, divergence):
    """∂L/∂(h_s w_sᵀ) of a chunk."""
    log_q = _logits((h_s, w_s), start, size, divergence) - kept.lse_s[:, None]
    log_p = _logits((h_t, w_t), start, size, divergence) - kept.lse_t[:, None]
    slope = d.slope(divergence, log_p, log_q, kept.centre[:, None])
    weighed = slope * (by_loss / divergence.temperature)[:, None]
    return weighed.astype(chunks.cotangent_dtype(h_s, w_s))


FORM = Form(forward, cotangent, HELD)
