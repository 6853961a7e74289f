"""What linear_kl computes, all logits at once. The equations are in `divergence`."""

import jax
import jax.numpy as jnp

from kernels.linear_kl.divergence import Divergence


def linear_kl(h_s, w_s, h_t, w_t, *, divergence: Divergence):
    log_q = _log_softmax(h_s, w_s, divergence.temperature)
    log_p = _log_softmax(h_t, w_t, divergence.temperature)
    if divergence.kind == "forward":
        return _kl(log_p, log_q)
    if divergence.kind == "reverse":
        return _kl(log_q, log_p)
    beta = divergence.beta
    log_m = jnp.logaddexp(jnp.log(beta) + log_p, jnp.log1p(-beta) + log_q)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _log_softmax(h, w, temperature):
    wide = jnp.promote_types(jnp.result_type(h, w), jnp.float32)
    logits = jnp.matmul(h.astype(wide), w.astype(wide).T, precision="highest")
    return jax.nn.log_softmax(logits / temperature, axis=1)


def _kl(log_a, log_b):
    return (jnp.exp(log_a) * (log_a - log_b)).sum(axis=1)
