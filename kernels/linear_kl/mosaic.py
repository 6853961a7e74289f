"""Both layers' products and what follows from them in one kernel, for Hopper GPUs.

Forward: a warpgroup has the student's and the teacher's logits of the same tile in registers, and
keeps running sums of each token; XLA combines those of the ranges of the vocabulary. jsd needs both
log-sum-exps first: a kernel for each layer. Backward: a kernel writes ∂L/∂(h_s w_sᵀ) of a chunk of
the vocabulary in bfloat16, and XLA's products make the gradients of it.
"""

import functools

from kernels.linear_cross_entropy import mosaic as cross_entropy
from kernels.linear_cross_entropy import passes, tiles
from kernels.linear_kl import divergence as d
from kernels.linear_kl.differentiable import Form, Kept

WIDTH = 192  # entries of a tile: 2 times 96 registers of each thread hold its logits
AT_ONCE = {"forward": 32, "reverse": 32, "jsd": 16}  # columns: more would spill registers


def lacks(h_s, w_s, h_t, w_t) -> str | None:
    """Why the kernel cannot take them."""
    return cross_entropy.lacks(h_s, w_s, "h_s and w_s") or cross_entropy.lacks(
        h_t, w_t, "h_t and w_t"
    )


def linear_kl(h_s, w_s, h_t, w_t, *, divergence: d.Divergence, interpret: bool):
    return form(interpret)(h_s, w_s, h_t, w_t, divergence)


@functools.cache
def form(interpret: bool) -> Form:
    settings = {"interpret": interpret, "sms": tiles.CLUSTER if interpret else tiles.SMS}
    forward, cotangent = (functools.partial(f, **settings) for f in (_forward, _cotangent))
    return Form(forward, cotangent, held=1)  # none, but cotangents


def _forward(h_s, w_s, h_t, w_t, divergence, **settings):
    student, teacher = (h_s, w_s), (h_t, w_t)
    if divergence.kind == "jsd":
        return _jsd(student, teacher, divergence, **settings)

    def add(state, _, first, second):
        return d.accumulate(state, first, second)

    layers = [teacher, student] if divergence.teacher_first else [student, teacher]
    totals = _totals(layers, [], d.INITIAL, add, divergence, **settings)
    loss, one, other = d.finished(d.combined(totals))
    lse_s, lse_t = (other, one) if divergence.teacher_first else (one, other)
    return Kept(loss, lse_s, lse_t, loss)


def _jsd(student, teacher, divergence, **settings):
    lse_s, lse_t = (
        cross_entropy.logsumexp(*layer, temperature=divergence.temperature, **settings)
        for layer in (student, teacher)
    )

    def add(state, per_token, log_p, log_q):
        lse_t, lse_s = (d.across(x, log_p) for x in per_token)
        return d.accumulate_mixture(state, log_p - lse_t, log_q - lse_s, divergence.beta)

    arguments = ([teacher, student], [lse_t, lse_s], (0.0, 0.0), add, divergence)
    of_p, of_q = (x.sum(axis=0) for x in _totals(*arguments, **settings))
    return Kept(divergence.beta * of_p + (1 - divergence.beta) * of_q, lse_s, lse_t, of_q)


def _totals(layers, per_token, initial, add, divergence, *, interpret, sms):
    tokens, vocabulary = layers[0][0].shape[0], layers[0][1].shape[0]
    plan = tiles.schedule(tokens, vocabulary, WIDTH, sms)
    at_once = AT_ONCE[divergence.kind]

    def use(state, constants, logits, column):
        for first in range(0, WIDTH, at_once):
            parts = [x[:, first : first + at_once] * (1 / divergence.temperature) for x in logits]
            parts = [tiles.bounded(x, column + first, vocabulary, d.LOWEST, plan) for x in parts]
            state = add(state, constants, *parts)
        return state

    name = f"{divergence.kind}_divergence"
    return passes.totals(name, layers, per_token, plan, initial, use, interpret)


def _cotangent(h_s, w_s, h_t, w_t, kept, by_loss, start, size, divergence, *, interpret, sms):
    """`xla.cotangent`, of logits that never leave the registers."""
    plan = tiles.schedule(h_s.shape[0], size, WIDTH, sms)

    def part(logits, per_token, _):
        lse_t, lse_s, centre, weight = per_token
        log_p, log_q = (x * (1 / divergence.temperature) for x in logits)
        return weight * d.slope(divergence, log_p - lse_t, log_q - lse_s, centre)

    per_token = [kept.lse_t, kept.lse_s, kept.centre, by_loss / divergence.temperature]
    layers = [(h_t, w_t), (h_s, w_s)]
    name = f"{divergence.kind}_cotangent"
    return passes.each_entry(name, layers, per_token, plan, part, start, size, interpret)
