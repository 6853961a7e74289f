"""A teacher's largest logits, compressed, for distillation without the teacher.

DistillKit, Goddard and Atkins, Arcee AI, github.com/arcee-ai/DistillKit (no paper): about 300 bytes
a token, 0.15 % of the logits of a vocabulary of 100000.

Of the k largest logits l_1 ≥ … ≥ l_k, v_i = l_i - l_1 are stored in few bits, and of the others

    r = log Σ_{i > k} exp(l_i - l_1)

so that the normalizer of what is stored is known, Z = Σ_{i ≤ k} e^v_i + e^r, and the mass of the
others, e^r / Z. The distribution is decoded as
    renormalized   v_i, and nothing else: the others have no probability
    uniform        v_i, and r - log(V - k) for each of the others
It is a family that grows with k, and the second is the member nearest to the teacher p:
KL(p ‖ uniform) falls with k, to 0 at k = V. So does KL(renormalized ‖ p) = -log(1 - e^r / Z).
Without decoding, the forward KL of `uniform` is one of k + 1 buckets, the others being one in both
models. Merging never raises a KL: it is at most KL(p ‖ student), and grows with k.

Values: floats; uint8, in steps of the range of a token's; or "polynomial", the first `exact` in
bfloat16 and least squares in the rank t of the others on {1, t, t², t³, t⁴, √t}.

This differs from DistillKit in: 1. Logits less the largest are stored, which round less than
log-probabilities. 2. Its log-probabilities sum to 1 less the others' mass only before they are
rounded; r is stored, so it is always true. 3. t is in [0, 1], where the terms have a condition of
1e3, and of 7e8 with its 0 … 111; the fit is the same function. 4. Its bins of residuals, delta
encoding and error diffusion, which its recommended settings leave out.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from algorithms.distillation.compressed_logits import (
    Entries,
    LogitCodec,
    bytes_of_token,
    pack_entries,
    unpack_entries,
)
from algorithms.numerics import widened
from kernels.linear_kl.divergence import LOWEST

FLOATS = ("float32", "float16", "bfloat16")
VALUES = (*FLOATS, "uint8", "polynomial")
TAILS = ("uniform", "renormalized")


class Steps(NamedTuple):
    """Values are -codes · step."""

    codes: UInt8[Array, "*m k"]
    step: Float[Array, "*m"]


class Polynomial(NamedTuple):
    exact: Float[Array, "*m e"]
    coefficients: Float[Array, "*m c"]


class TopKLogits(NamedTuple):
    entries: Entries  # of the vocabulary, the likeliest first
    values: Float[Array, "*m k"] | Steps | Polynomial  # logits less the largest
    rest: Float[Array, "*m"]  # log Σ exp of the others, less the largest too


def top_k_logits(
    *, k: int = 128, values: str = "bfloat16", exact: int = 16, tail: str = "uniform"
) -> LogitCodec:
    """Keep the k largest logits, and the sum of the others.

    values: float32, float16, bfloat16, uint8 or polynomial, of which `exact` are bfloat16. tail:
    what the others are, uniform or renormalized (away); of the latter the reverse KL is not
    finite. Raises ValueError for others, and for a k above the vocabulary.
    """
    if values not in VALUES:
        raise ValueError(f"values={values!r} must be one of {', '.join(VALUES)}.")
    if tail not in TAILS:
        raise ValueError(f"tail={tail!r} must be uniform or renormalized.")
    if k < 1:
        raise ValueError(f"k={k} must be at least 1.")
    if values == "polynomial" and not 1 <= exact <= k - len(_terms(2)[0]):
        raise ValueError(f"exact={exact} must leave a polynomial of 6 terms 6 of the k={k} values.")
    encoded = functools.partial(encode, k=k, values=values, exact=exact)
    uniform = tail == "uniform"

    def bytes_per_token(vocabulary: int) -> int:
        logits = jax.ShapeDtypeStruct((1, vocabulary), jnp.float32)
        return bytes_of_token(jax.eval_shape(encoded, logits))

    return LogitCodec(
        encoded,
        functools.partial(decode, uniform=uniform),
        functools.partial(forward_kl_of_kept, uniform=uniform),
        bytes_per_token,
    )


def encode(logits: Float[Array, "*m V"], *, k: int, values: str, exact: int = 16) -> TopKLogits:
    """Of finite logits."""
    vocabulary = logits.shape[-1]
    if k > vocabulary:
        raise ValueError(f"k={k} must be at most the vocabulary, {logits.shape=}.")
    logits = widened(logits)
    top, entries = lax.top_k(logits, k)
    others = jnp.put_along_axis(logits, entries, -jnp.inf, -1, inplace=False)
    rest = jax.nn.logsumexp(others, -1) - top[..., 0]
    stored = _stored(top - top[..., :1], values, exact)
    return TopKLogits(pack_entries(entries, vocabulary), stored, rest.astype(jnp.float32))


def decode(kept: TopKLogits, vocabulary: int, *, uniform: bool = True) -> Float[Array, "*m V"]:
    """Logits whose softmax is the distribution that was kept, float32."""
    entries, values = unpack_entries(kept.entries, vocabulary), kept_values(kept)
    others = vocabulary - values.shape[-1]
    fill = kept.rest[..., None] - math.log(max(others, 1)) if uniform else jnp.float32(LOWEST)
    filled = jnp.broadcast_to(fill, (*values.shape[:-1], vocabulary))
    return jnp.put_along_axis(filled, entries, values, -1, inplace=False)


def forward_kl_of_kept(
    student: Float[Array, "*m V"], kept: TopKLogits, *, uniform: bool = True
) -> Float[Array, "*m"]:
    """KL(kept ‖ student) at temperature 1; uniform: of k + 1 buckets, else renormalized."""
    student = widened(student)
    entries, values = unpack_entries(kept.entries, student.shape[-1]), kept_values(kept)
    log_q = jnp.take_along_axis(student, entries, -1)
    others = jnp.put_along_axis(student, entries, LOWEST, -1, inplace=False)
    if uniform:
        log_q = jnp.concatenate([log_q, jax.nn.logsumexp(others, -1, keepdims=True)], -1)
        values = jnp.concatenate([values, jnp.maximum(kept.rest, LOWEST)[..., None]], -1)
    log_p = jax.nn.log_softmax(values, -1)
    log_q = log_q - jax.nn.logsumexp(student, -1, keepdims=True)
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def kept_values(kept: TopKLogits) -> Float[Array, "*m k"]:
    """Logits less the largest, float32."""
    match kept.values:
        case Steps(codes, step):
            return -codes.astype(jnp.float32) * step[..., None]
        case Polynomial(exact, coefficients):
            terms, _ = _terms(kept.entries.low.shape[-1] - exact.shape[-1])
            fitted = _product(coefficients, terms)
            return jnp.concatenate([exact.astype(jnp.float32), fitted], -1)
    return kept.values.astype(jnp.float32)


def _stored(
    values: Float[Array, "*m k"], how: str, exact: int
) -> Float[Array, "*m k"] | Steps | Polynomial:
    if how in FLOATS:
        return values.astype(how)
    if how == "uint8":
        step = (-values[..., -1] / 255).astype(jnp.float32)
        codes = jnp.round(-values / jnp.where(step > 0, step, 1)[..., None])
        return Steps(codes.astype(jnp.uint8), step)
    _, solve = _terms(values.shape[-1] - exact)
    coefficients = _product(values[..., exact:], solve)
    return Polynomial(values[..., :exact].astype(jnp.bfloat16), coefficients.astype(jnp.float32))


def _product(x: Float[Array, "*m n"], y: np.ndarray) -> Float[Array, "*m c"]:
    return jnp.matmul(x, jnp.asarray(y, x.dtype), precision="highest")


def _terms(count: int) -> tuple[np.ndarray, np.ndarray]:
    """{1, t, t², t³, t⁴, √t} at `count` ranks t from 0 to 1, and what solves for coefficients."""
    t = np.linspace(0, 1, count)
    terms = np.stack([t**0, t, t**2, t**3, t**4, np.sqrt(t)])
    return terms, np.linalg.pinv(terms)
