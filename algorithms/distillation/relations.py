"""MiniLM, Wang, Wei, Dong, Bao, Yang, Zhou, NeurIPS 2020, arXiv:2002.10957; MiniLMv2, Wang et al.,
Findings of ACL 2021, arXiv:2012.15828.

Of one pair of layers, averaged over relation heads and tokens, and summed over relations such as of
queries to keys and of values to values (Eqs. 6, 9):
    KL(softmax(x_t y_tᵀ / √d_t) ‖ softmax(x_s y_sᵀ / √d_s))
It compares tokens with tokens, so widths may differ and nothing is learned beside the student.

In MiniLMv2's terms MiniLM is the case of as many relation heads as heads, and relations qk and vv.
This differs from MiniLMv2 in: 1. Any relation weighs 1. 2. A causal mask, for decoders.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from algorithms.distillation.features import FeatureLoss
from algorithms.distillation.masking import mean_of_sequences, seen_pairs
from algorithms.numerics import widened
from kernels.linear_kl import reference
from kernels.linear_kl.divergence import LOWEST

RELATIONS = ("q", "k", "v")


def minilm(
    *, relations: Sequence[str] = ("qk", "vv"), heads: int | None = None, causal: bool = False
) -> FeatureLoss:
    """Relations of one layer: loss(None, student's (q, k, v), teacher's (q, k, v), mask).

    relations: pairs of q, k and v; MiniLMv2's are qq, kk and vv. heads: relation heads, by default
    the teacher's heads of q. causal: no token sees those behind it, as in a decoder. Raises
    ValueError for other relations, and for heads that do not divide the widths.
    """
    if not relations or any(len(r) != 2 or not set(r) <= set(RELATIONS) for r in relations):
        raise ValueError(f"relations={relations} must be pairs of q, k and v, such as qk and vv.")

    def loss(
        nothing: None,
        student: Sequence[Float[Array, "B T _a _h"]],
        teacher: Sequence[Float[Array, "B T _b _g"]],
        mask: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, ""]:
        count = heads or teacher[0].shape[2]

        def of(pair: str) -> Float[Array, ""]:
            scores = _of_pair(pair, student, count), _of_pair(pair, teacher, count)
            return relation_divergence(*scores, mask, causal)

        return jnp.stack([of(pair) for pair in relations]).sum()

    return FeatureLoss(lambda key, pairs, student, teacher: None, loss)


def relation_divergence(
    student: Float[Array, "B a T T"],
    teacher: Float[Array, "B a T T"],
    mask: Bool[Array, "B T"] | None,
    causal: bool,
) -> Float[Array, ""]:
    """KL(teacher ‖ student) of the softmaxes: the mean over sequences of that over tokens."""
    seen = seen_pairs(student, mask, causal)
    log_p, log_q = (
        reference.log_softmax(jnp.where(seen, widened(x), LOWEST), 1.0)
        for x in (lax.stop_gradient(teacher), student)
    )
    return mean_of_sequences(reference.kl(log_p, log_q).mean(1), mask)


def relation(
    x: Float[Array, "B T _a _h"], y: Float[Array, "B T _b _g"], heads: int
) -> Float[Array, "B a T T"]:
    """x yᵀ / √d of `heads` relation heads of width d, split from the concatenated ones."""
    b, t = x.shape[:2]
    widths = [z.shape[2] * z.shape[3] for z in (x, y)]
    if widths[0] != widths[1] or widths[0] % heads:
        raise ValueError(
            f"heads={heads} must divide the widths {widths} of what is related, which must agree: "
            "repeat grouped keys and values first."
        )
    x, y = (z.reshape(b, t, heads, -1) for z in (x, y))
    return jnp.einsum("BTad,BSad->BaTS", x, y) / jnp.sqrt(x.shape[-1])


def _of_pair(pair: str, qkv: Sequence[Float[Array, "B T _a _h"]], heads: int):
    x, y = (qkv[RELATIONS.index(name)] for name in pair)
    return relation(x, y, heads)
