"""The divergences of distillation, their sums over the vocabulary and their slopes.

Agarwal et al., On-Policy Distillation of Language Models (GKD), ICLR 2024, arXiv:2306.13649. With
p = softmax(l_t / τ) of the teacher and q = softmax(l_s / τ) of the student, for each token

    forward   KL(p ‖ q) = Σ_v p_v (log p_v - log q_v)
    reverse   KL(q ‖ p) = Σ_v q_v (log q_v - log p_v)
    jsd       β KL(p ‖ m) + (1 - β) KL(q ‖ m),   m = β p + (1 - β) q

and their slopes by the student's logits, from ∂ log q_v / ∂l_u = (1[u = v] - q_u) / τ:

    forward   (q - p) / τ
    reverse   q (log q - log p - KL(q ‖ p)) / τ
    jsd       (1 - β) q (log q - log m - KL(q ‖ m)) / τ

A KL needs one pass over the logits: with a first distribution a and a second one b of logits l^a
and l^b, KL(a ‖ b) = Σ_v a_v (l^a_v - l^b_v) - logsumexp(l^a) + logsumexp(l^b), each of them a
running sum. log m is not linear in the logits: jsd needs a pass for each logsumexp first.

Written of operations that both XLA and the kernels have: values per token are spread `across`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

LOWEST = -1e30  # a logit that is none: finite, so that 0 times a difference of two is 0


class Divergence(NamedTuple):
    kind: str  # forward, reverse or jsd
    beta: float
    temperature: float

    @property
    def teacher_first(self) -> bool:
        return self.kind == "forward"


def across(values, logits):
    return lax.broadcast_in_dim(values, logits.shape, (0,))


INITIAL = (-jnp.inf, 0.0, 0.0, -jnp.inf, 0.0)  # of `accumulate`, before the first logits


def accumulate(state, first, second):
    """max l^a, Σ e^(l^a - max), Σ e^(l^a - max) (l^a - l^b), max l^b and Σ e^(l^b - max) over what
    they were taken over before, and the given logits.
    """
    highest, total, difference, highest_second, total_second = state
    raised = jnp.maximum(highest, first.max(axis=1))
    terms = jnp.exp(first - across(raised, first))
    scale = jnp.exp(highest - raised)
    total = total * scale + terms.sum(axis=1)
    difference = difference * scale + (terms * (first - second)).sum(axis=1)
    raised_second = jnp.maximum(highest_second, second.max(axis=1))
    terms = jnp.exp(second - across(raised_second, second)).sum(axis=1)
    total_second = total_second * jnp.exp(highest_second - raised_second) + terms
    return [raised, total, difference, raised_second, total_second]


def combined(state):
    """What `accumulate` would have come to over all of several parts, its states [part, token]."""
    highest, total, difference, highest_second, total_second = state
    raised, raised_second = highest.max(axis=0), highest_second.max(axis=0)
    scale = jnp.exp(highest - raised)
    total_second = (total_second * jnp.exp(highest_second - raised_second)).sum(axis=0)
    sums = (total * scale).sum(axis=0), (difference * scale).sum(axis=0)
    return [raised, *sums, raised_second, total_second]


def finished(state):
    """KL(a ‖ b), logsumexp(l^a) and logsumexp(l^b)."""
    highest, total, difference, highest_second, total_second = state
    first, second = highest + jnp.log(total), highest_second + jnp.log(total_second)
    return difference / total - first + second, first, second


def mixture(log_p, log_q, beta):
    """p, q and log m; where m is too small to be a number, neither p nor q counts."""
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    return p, q, jnp.log(jnp.maximum(beta * p + (1 - beta) * q, jnp.finfo(p.dtype).tiny))


def accumulate_mixture(state, log_p, log_q, beta):
    """Σ p (log p - log m) and Σ q (log q - log m): KL(p ‖ m) and KL(q ‖ m)."""
    p, q, log_m = mixture(log_p, log_q, beta)
    of_p, of_q = (p * (log_p - log_m)).sum(axis=1), (q * (log_q - log_m)).sum(axis=1)
    return [state[0] + of_p, state[1] + of_q]


def slope(divergence: Divergence, log_p, log_q, centre):
    """τ times the slope by the student's logits; centre: KL(q ‖ p) or KL(q ‖ m), at each entry."""
    if divergence.kind == "forward":
        return jnp.exp(log_q) - jnp.exp(log_p)
    if divergence.kind == "reverse":
        return jnp.exp(log_q) * (log_q - log_p - centre)
    _, q, log_m = mixture(log_p, log_q, divergence.beta)
    return (1 - divergence.beta) * q * (log_q - log_m - centre)
