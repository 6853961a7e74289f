"""What linear_kl computes, all logits at once. The equations are in `divergence`."""

import jax
import jax.numpy as jnp

from kernels.linear_kl.divergence import Divergence


def linear_kl(h_s, w_s, h_t, w_t, *, divergence: Divergence):
    log_q = log_softmax(_logits(h_s, w_s), divergence.temperature)
    log_p = log_softmax(_logits(h_t, w_t), divergence.temperature)
    return between(log_p, log_q, divergence)


def between(log_p, log_q, divergence: Divergence):
    """The divergence of teacher and student whose log-probabilities the last axis holds."""
    if divergence.kind == "forward":
        return kl(log_p, log_q)
    if divergence.kind == "reverse":
        return kl(log_q, log_p)
    log_m = log_mixture(log_p, log_q, divergence.beta)
    return divergence.beta * kl(log_p, log_m) + (1 - divergence.beta) * kl(log_q, log_m)


def kl(log_a, log_b):
    return (jnp.exp(log_a) * (log_a - log_b)).sum(axis=-1)


def log_mixture(log_p, log_q, beta):
    """log (β p + (1 - β) q)."""
    return jnp.logaddexp(jnp.log(beta) + log_p, jnp.log1p(-beta) + log_q)


def log_softmax(logits, temperature):
    return jax.nn.log_softmax(logits / temperature, axis=-1)


def _logits(h, w):
    wide = jnp.promote_types(jnp.result_type(h, w), jnp.float32)
    return jnp.matmul(h.astype(wide), w.astype(wide).T, precision="highest")
