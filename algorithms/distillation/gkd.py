"""GKD. Agarwal, Vieillard, Zhou, Stanczyk, Ramos, Geist, Bachem, On-Policy Distillation of Language
Models: Learning from Self-Generated Mistakes, ICLR 2024, arXiv:2306.13649.

With the probability λ a step takes what the student wrote, else the data's outputs (Algorithm 1);
samples are not differentiated. For outputs y of length |y|, token by token,
    loss = mean over y of (1 / |y|) Σ_n D(teacher ‖ student)(y_n | y_<n, x)
with D = JSD(β), or the forward KL for β = 0 and the reverse KL for β = 1.

The authors' code is not public. This differs from TRL's in: 1. Sequences weigh the same, as in the
paper (Eq. 2); TRL's mean is over the tokens of all. 2. `per_sequence` chooses for each sequence
instead of each batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from algorithms.distillation.divergences import DistillationLoss, forward_kl, jsd, reverse_kl
from algorithms.distillation.masking import Mask, mean_of_sequences


class GKD(NamedTuple):
    on_policy: Callable[[Key[Array, ""], int], Bool[Array, " B"]]  # of B rows, which are sampled
    divergence: DistillationLoss

    def loss(
        self,
        student: Float[Array, "B T V"],
        teacher: Float[Array, "B T V"],
        mask: Mask | None = None,
    ) -> Float[Array, ""]:
        """The mean over sequences. mask: of the outputs, `response_mask`."""
        return mean_of_sequences(self.divergence.per_token(student, teacher), mask)


def gkd(
    *,
    student_fraction: float = 1.0,
    beta: float = 0.5,
    temperature: float = 1.0,
    per_sequence: bool = False,
) -> GKD:
    """student_fraction: λ; 0 is supervised, 1 on-policy. beta: the teacher's share in the mixture;
    0: forward KL, 1: reverse KL.
    """
    if not 0 <= student_fraction <= 1:
        raise ValueError(f"student_fraction={student_fraction} must be from 0 to 1.")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta} must be from 0 (forward KL) to 1 (reverse KL).")

    def on_policy(key: Key[Array, ""], rows: int) -> Bool[Array, " B"]:
        chosen = jax.random.uniform(key, (rows if per_sequence else 1,)) < student_fraction
        return jnp.broadcast_to(chosen, (rows,))

    if beta == 0:
        return GKD(on_policy, forward_kl(temperature=temperature, rescale=False))
    if beta == 1:
        return GKD(on_policy, reverse_kl(temperature=temperature, rescale=False))
    return GKD(on_policy, jsd(beta=beta, temperature=temperature, rescale=False))


def mixed(chosen: Bool[Array, " B"], sampled: Any, data: Any) -> Any:
    """Rows of `sampled` where they are chosen, else of `data`: pytrees of arrays [B ...]."""

    def pick(s: Any, d: Any) -> Any:
        return jnp.where(chosen.reshape(-1, *[1] * (d.ndim - 1)), s, d)

    return jax.tree.map(pick, sampled, data)


def response_mask(
    prompt: Int[Array, " B"], length: Int[Array, " B"], tokens: int
) -> Bool[Array, "B T"]:
    """Where logits [B T V] predict a token of the response.

    prompt: how many tokens of a row are its prompt, at least 1; length: how many are prompt or
    response; padding is behind them. Position t predicts token t + 1.
    """
    predicted = jnp.arange(1, tokens + 1)
    return (prompt[:, None] <= predicted) & (predicted < length[:, None])
