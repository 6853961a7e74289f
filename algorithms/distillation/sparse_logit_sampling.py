"""Sampled logits of a teacher. Anshumann et al., Sparse Logit Sampling: Accelerating Knowledge
Distillation in LLMs, ACL 2025, arXiv:2503.16870.

What the k largest logits leave out biases the student. Entries x_1 … x_N drawn from a proposal
g ∝ p^t, with importance weights, are right on average:
    p̂_v = Σ_n 1[x_n = v] p_v / (N g_v),   E p̂ = p
The slope of -Σ_v p̂_v log q_v by the student's logits is (Σ_v p̂_v) q - p̂, on average q - p: that of
the KL with the whole teacher. For t = 1 weights are counts over N.

Entries are stored once each with their weight, in N slots of which some are empty (weight 0), the
used ones first: `trimmed` cuts off what no token uses, most of them.

The authors' code is not public (github.com/akhilkedia/RandomSamplingKD has none at 9d0f381).
Defaults are ours, and weights are not normalized to a sum of 1 where t is not 1: they would be
biased.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from algorithms.distillation.compressed_logits import (
    Entries,
    LogitCodec,
    bytes_of_token,
    pack_entries,
    unpack_entries,
)
from algorithms.numerics import widened
from kernels.linear_kl.divergence import LOWEST


class SampledLogits(NamedTuple):
    entries: Entries
    weights: Float[Array, "*m k"]  # 0: an empty slot


def sparse_logit_sampling(
    *, samples: int = 50, exponent: float = 1.0, weights: str = "float16"
) -> LogitCodec:
    """Keep entries drawn at random, with weights that make them right on average.

    samples: N. exponent: t. weights: how they are stored; float16 rounds, float32 does not.
    """
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1.")
    if not exponent > 0:
        raise ValueError(f"exponent={exponent} must be positive.")
    if weights not in ("float16", "bfloat16", "float32"):
        raise ValueError(f"weights={weights!r} must be float16, bfloat16 or float32.")
    encoded = functools.partial(encode, samples=samples, exponent=exponent, dtype=weights)

    def bytes_per_token(vocabulary: int) -> int:
        logits = jax.ShapeDtypeStruct((1, vocabulary), jnp.float32)
        return bytes_of_token(jax.eval_shape(encoded, logits, jax.eval_shape(jax.random.key, 0)))

    return LogitCodec(encoded, decode, cross_entropy, bytes_per_token, seeded=True)


def encode(
    logits: Float[Array, "*m V"],
    key: Key[Array, ""],
    *,
    samples: int,
    exponent: float = 1.0,
    dtype: str = "float16",
) -> SampledLogits:
    log_p = jax.nn.log_softmax(widened(logits), -1)
    log_g = jax.nn.log_softmax(exponent * log_p, -1)
    uniform = jax.random.uniform(key, (*logits.shape[:-1], samples), log_g.dtype)
    entries, weights = weighed(draws(log_g, uniform), log_p, log_g)
    return SampledLogits(pack_entries(entries, logits.shape[-1]), weights.astype(dtype))


@functools.partial(jnp.vectorize, signature="(v),(k)->(k)")
def draws(log_g: Float[Array, " V"], uniform: Float[Array, " k"]) -> Int[Array, " k"]:
    """Entries where the cumulative distribution passes each number of [0, 1): V + k log V
    operations, where Gumbel noise would take k V.
    """
    ends = jnp.cumsum(jnp.exp(log_g))
    last = jnp.max(jnp.where(log_g > -jnp.inf, jnp.arange(ends.size), 0))
    return jnp.minimum(jnp.searchsorted(ends, uniform * ends[-1], side="right"), last)


def weighed(
    drawn: Int[Array, "*m k"], log_p: Float[Array, "*m V"], log_g: Float[Array, "*m V"]
) -> tuple[Int[Array, "*m k"], Float[Array, "*m k"]]:
    """Each drawn entry once, and p̂ of it; empty slots, at the end, have weight 0."""
    drawn = jnp.sort(drawn, -1)
    ratio = jnp.exp(jnp.take_along_axis(log_p - log_g, drawn, -1)) / drawn.shape[-1]
    new = jnp.diff(drawn, axis=-1, prepend=-1) > 0
    slot = jnp.cumsum(new, -1) - 1
    at = jax.nn.one_hot(slot, drawn.shape[-1], axis=-2, dtype=ratio.dtype)  # [*m slot draw]
    weights = jnp.einsum("...sd,...d->...s", at, ratio, precision="highest")
    return jnp.put_along_axis(jnp.zeros_like(drawn), slot, drawn, -1, inplace=False), weights


def trimmed(kept: SampledLogits, slots: int, vocabulary: int) -> SampledLogits:
    """The first slots alone, where the others are empty."""
    entries = unpack_entries(kept.entries, vocabulary)[..., :slots]
    return SampledLogits(pack_entries(entries, vocabulary), kept.weights[..., :slots])


def decode(kept: SampledLogits, vocabulary: int) -> Float[Array, "*m V"]:
    """Logits of p̂, over its sum where that is not 1."""
    estimate = estimated(kept, vocabulary)
    return jnp.where(estimate > 0, jnp.log(jnp.where(estimate > 0, estimate, 1)), LOWEST)


def estimated(kept: SampledLogits, vocabulary: int) -> Float[Array, "*m V"]:
    """p̂."""
    entries = unpack_entries(kept.entries, vocabulary)

    @functools.partial(jnp.vectorize, signature="(k),(k)->(v)")
    def spread(entries: Int[Array, " k"], weights: Float[Array, " k"]) -> Float[Array, " V"]:
        return jnp.zeros(vocabulary).at[entries].add(weights)

    return spread(entries, kept.weights.astype(jnp.float32))


def cross_entropy(student: Float[Array, "*m V"], kept: SampledLogits) -> Float[Array, "*m"]:
    """-Σ p̂ log q: on average the cross-entropy with the teacher, its KL but for a constant."""
    log_q = jax.nn.log_softmax(widened(student), -1)
    entries = unpack_entries(kept.entries, student.shape[-1])
    return -(kept.weights * jnp.take_along_axis(log_q, entries, -1)).sum(-1)
