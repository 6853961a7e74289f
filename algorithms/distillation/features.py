"""Matching a teacher's activations, of layers that `layer_map` pairs.

FitNets. Romero, Ballas, Kahou, Chassang, Gatta, Bengio, ICLR 2015, arXiv:1412.6550. With a learned
regressor r of each pair, averaged over tokens (Eq. 3):
    ½ ‖h_t - r(h_s)‖²,   r(h) = h W + b

TinyBERT. Jiao et al., Findings of EMNLP 2020, arXiv:1909.10351. Summed over the pairs (Eqs. 7, 8):
    MSE(h_s W, h_t) + MSE(a_s, a_t)
where a are the attention's scores, before the softmax.

This differs in: 1. TinyBERT shares one W among layers; here each pair has its own, with a bias, as
FitNets. 2. TinyBERT's code sets the scores of what is masked to 0 in both and divides by all; here
they do not count. 3. A causal mask, for decoders.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Key

from algorithms.distillation.masking import Mask, masked_mean, seen_pairs
from algorithms.numerics import widened


class Regressor(NamedTuple):
    """From the student's channels to the teacher's."""

    kernel: Float[Array, "ds dt"]
    bias: Float[Array, " dt"]


class FeatureLoss(NamedTuple):
    """init(key, pairs, student's width, teacher's) gives what is trained beside the student, of
    which and of both models' activations `loss` is a function.
    """

    init: Callable[[Key[Array, ""], int, int, int], Any]
    loss: Callable[..., Float[Array, ""]]


def layer_map(
    student: int, teacher: int, *, strategy: str = "uniform"
) -> tuple[tuple[int, int], ...]:
    """Pairs of the numbers of blocks of a student and its teacher, counted from 0.

    strategy: "uniform", each of the student's after the same share of the model as the teacher's
    (TinyBERT's g(m) = m N / M); "top", the teacher's last ones in order; "last", one pair of the
    last ones (MiniLM), whichever has more. Raises ValueError for another, and but for "last" for a
    student with more blocks.
    """
    if strategy == "last" and min(student, teacher) > 0:
        return ((student - 1, teacher - 1),)
    if not 0 < student <= teacher:
        raise ValueError(f"student={student} must have from 1 to teacher={teacher} layers.")
    if strategy == "uniform":
        return tuple((m, (m + 1) * teacher // student - 1) for m in range(student))
    if strategy == "top":
        return tuple((m, teacher - student + m) for m in range(student))
    raise ValueError(f"strategy={strategy!r} must be uniform, top or last.")


def fitnets() -> FeatureLoss:
    """Half the squared distance of hints: loss(regressors, student's, teacher's hidden, mask)."""

    def loss(
        regressors: Sequence[Regressor] | None,
        student: Sequence[Float[Array, "*m ds"]],
        teacher: Sequence[Float[Array, "*m dt"]],
        mask: Mask | None = None,
    ) -> Float[Array, ""]:
        width = teacher[0].shape[-1]
        return width / 2 * hidden_error(regressors, student, teacher, mask)

    return FeatureLoss(init_regressors, loss)


def tinybert(*, hidden: float = 1.0, attention: float = 1.0, causal: bool = False) -> FeatureLoss:
    """Hidden states and scores: loss(regressors, student's hidden, teacher's hidden, student's
    scores, teacher's scores, mask).

    hidden, attention: their weights. causal: no token sees those behind it, as in a decoder.
    """

    def loss(
        regressors: Sequence[Regressor] | None,
        student: Sequence[Float[Array, "B T ds"]],
        teacher: Sequence[Float[Array, "B T dt"]],
        student_scores: Sequence[Float[Array, "B a T T"]],
        teacher_scores: Sequence[Float[Array, "B a T T"]],
        mask: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, ""]:
        by_hidden = hidden_error(regressors, student, teacher, mask)
        by_scores = attention_error(student_scores, teacher_scores, mask, causal)
        return hidden * by_hidden + attention * by_scores

    return FeatureLoss(init_regressors, loss)


def init_regressors(
    key: Key[Array, ""], pairs: int, student: int, teacher: int
) -> tuple[Regressor, ...]:
    """Of variance-preserving kernels, one for each pair; student, teacher: widths."""
    kernels = jax.nn.initializers.lecun_normal(batch_axis=0)(key, (pairs, student, teacher))
    return tuple(Regressor(kernel, jnp.zeros(teacher)) for kernel in kernels)


def hidden_error(
    regressors: Sequence[Regressor] | None,
    student: Sequence[Float[Array, "*m ds"]],
    teacher: Sequence[Float[Array, "*m dt"]],
    mask: Mask | None = None,
) -> Float[Array, ""]:
    """The sum over layers of the mean square of differences; None where widths agree."""
    total = jnp.zeros(())
    for n, (h_s, h_t) in enumerate(zip(student, teacher, strict=True)):
        if regressors is not None:
            h_s = h_s @ regressors[n].kernel + regressors[n].bias
        apart = widened(h_s) - widened(lax.stop_gradient(h_t))
        total += masked_mean(jnp.mean(apart**2, -1), mask)
    return total


def attention_error(
    student: Sequence[Float[Array, "B a T T"]],
    teacher: Sequence[Float[Array, "B a T T"]],
    mask: Bool[Array, "B T"] | None,
    causal: bool,
) -> Float[Array, ""]:
    """The sum over layers of the mean square of differences of scores that are seen; the models'
    heads must be as many.
    """
    total = jnp.zeros(())
    for a_s, a_t in zip(student, teacher, strict=True):
        seen = seen_pairs(a_s, mask, causal)
        apart = widened(a_s) - widened(lax.stop_gradient(a_t))
        apart = jnp.where(seen, apart, 0)  # scores may be -inf elsewhere
        total += masked_mean(apart**2, seen)
    return total
