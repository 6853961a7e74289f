"""Divergences of a student from its teacher, token by token.

Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, arXiv:1503.02531: forward KL
with a temperature. Agarwal et al., On-Policy Distillation of Language Models (GKD), ICLR 2024,
arXiv:2306.13649: reverse KL and the generalized Jensen-Shannon divergence. Wen et al.,
f-Divergence Minimization for Sequence-Level Knowledge Distillation, ACL 2023, arXiv:2307.15190:
total variation. Ko et al., DistiLLM, ICML 2024, arXiv:2402.03898: skewed KL.

With p = softmax(l_t / τ) of the teacher and q = softmax(l_s / τ) of the student, forward KL,
reverse KL and JSD are those of `kernels.linear_kl.divergence`, and

    total variation   ½ Σ_v |p_v - q_v|
    skewed forward    KL(p ‖ α p + (1 - α) q)
    skewed reverse    KL(q ‖ (1 - α) p + α q)

Losses fall as 1 / τ², total variation as 1 / τ: `rescale` makes up for it (Hinton et al., Sec. 2),
so that a loss keeps its weight beside another when τ changes. With the difference d of the logits,
each less its mean, a rescaled KL goes to Σ_v d_v² / 2V for τ → ∞ (their Eq. 4), and rescaled total
variation to Σ_v |d_v| / 2V.

This differs from the code of DistiLLM in: 1. Its forward KLs are cross-entropies, which would be
divergences less the teacher's entropy; slopes are the same. 2. It has no temperatures; DistillKit,
which has, multiplies total variation by τ² too.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from algorithms.distillation.masking import Mask, masked_mean
from algorithms.numerics import widened
from kernels.linear_kl import linear_kl, reference
from kernels.linear_kl.divergence import Divergence


class DistillationLoss(NamedTuple):
    """A divergence, of each token or averaged over those that count. The teacher is not
    differentiated.
    """

    per_token: Callable[..., Float[Array, "*m"]]  # of (student's, teacher's) logits [*m V]
    per_token_linear: Callable[..., Float[Array, "*m"]] | None  # the same of (h_s, w_s, h_t, w_t)

    def __call__(
        self,
        student: Float[Array, "*m V"],
        teacher: Float[Array, "*m V"],
        mask: Mask | None = None,
    ) -> Float[Array, ""]:
        """The mean over the tokens of the mask."""
        return masked_mean(self.per_token(student, teacher), mask)

    def linear(
        self,
        h_s: Float[Array, "*m ds"],
        w_s: Float[Array, "V ds"],
        h_t: Float[Array, "*m dt"],
        w_t: Float[Array, "V dt"],
        mask: Mask | None = None,
    ) -> Float[Array, ""]:
        """The same of the last activations and the heads' weights; logits are never held.

        Raises ValueError for a divergence that no kernel computes.
        """
        if self.per_token_linear is None:
            raise ValueError(
                "This divergence needs logits: forward_kl, reverse_kl and jsd can do without."
            )
        return masked_mean(self.per_token_linear(h_s, w_s, h_t, w_t), mask)


def forward_kl(*, temperature: float = 1.0, rescale: bool = True) -> DistillationLoss:
    """KL(teacher ‖ student): the student covers all that the teacher does."""
    return _of_kernel("forward", temperature, rescale)


def reverse_kl(*, temperature: float = 1.0, rescale: bool = True) -> DistillationLoss:
    """KL(student ‖ teacher): the student does nothing that the teacher does not."""
    return _of_kernel("reverse", temperature, rescale)


def jsd(*, beta: float = 0.5, temperature: float = 1.0, rescale: bool = True) -> DistillationLoss:
    """β KL(teacher ‖ m) + (1 - β) KL(student ‖ m), m = β teacher + (1 - β) student.

    It is β forward KL for β → 0 and (1 - β) reverse KL for β → 1, and at most log 2 (0.5).
    """
    if not 0 < beta < 1:
        raise ValueError(
            f"beta={beta} must lie between 0 and 1: the ends, over their weight, are forward_kl "
            "and reverse_kl."
        )
    return _of_kernel("jsd", temperature, rescale, beta)


def total_variation(*, temperature: float = 1.0, rescale: bool = True) -> DistillationLoss:
    """Half the sum of differences of probabilities: symmetric, at most 1."""

    def distance(log_p: Float[Array, "*m V"], log_q: Float[Array, "*m V"]) -> Float[Array, "*m"]:
        return jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)).sum(-1) / 2

    return DistillationLoss(_of_logits(distance, temperature, temperature, rescale), None)


def skewed_forward_kl(
    *, skew: float = 0.1, temperature: float = 1.0, rescale: bool = True
) -> DistillationLoss:
    """KL(teacher ‖ mixture with a share `skew` (α) of the teacher): at most -log α."""
    _require_share(skew)

    def distance(log_p: Float[Array, "*m V"], log_q: Float[Array, "*m V"]) -> Float[Array, "*m"]:
        return reference.kl(log_p, reference.log_mixture(log_p, log_q, skew))

    return DistillationLoss(_of_logits(distance, temperature, temperature**2, rescale), None)


def skewed_reverse_kl(
    *, skew: float = 0.1, temperature: float = 1.0, rescale: bool = True
) -> DistillationLoss:
    """KL(student ‖ mixture with a share `skew` (α) of the student): at most -log α."""
    _require_share(skew)

    def distance(log_p: Float[Array, "*m V"], log_q: Float[Array, "*m V"]) -> Float[Array, "*m"]:
        return reference.kl(log_q, reference.log_mixture(log_q, log_p, skew))

    return DistillationLoss(_of_logits(distance, temperature, temperature**2, rescale), None)


def _require_share(skew: float) -> None:
    if not 0 < skew < 1:
        raise ValueError(f"skew={skew} must lie between 0 and 1: of 0, it is the KL without skew.")


def _of_kernel(kind: str, temperature: float, rescale: bool, beta: float = 0.5) -> DistillationLoss:
    distance = functools.partial(reference.between, divergence=Divergence(kind, beta, temperature))
    scale = temperature**2

    def linear(
        h_s: Float[Array, "*m ds"],
        w_s: Float[Array, "V ds"],
        h_t: Float[Array, "*m dt"],
        w_t: Float[Array, "V dt"],
    ) -> Float[Array, "*m"]:
        rows = (h.reshape(-1, h.shape[-1]) for h in (h_s, h_t))
        arrays = next(rows), w_s, next(rows), w_t
        losses = linear_kl(*arrays, kind=kind, temperature=temperature, beta=beta)
        return (scale if rescale else 1.0) * losses.reshape(h_s.shape[:-1])

    return DistillationLoss(_of_logits(distance, temperature, scale, rescale), linear)


def _of_logits(
    distance: Callable[..., Float[Array, "*m"]], temperature: float, scale: float, rescale: bool
) -> Callable[..., Float[Array, "*m"]]:
    """A function of (log_p, log_q) as one of (student's, teacher's) logits."""
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive.")

    def per_token(
        student: Float[Array, "*m V"], teacher: Float[Array, "*m V"]
    ) -> Float[Array, "*m"]:
        logits = lax.stop_gradient(teacher), student
        log_p, log_q = (reference.log_softmax(widened(x), temperature) for x in logits)
        return (scale if rescale else 1.0) * distance(log_p, log_q)

    return per_token
