"""What a model without a teacher is trained to minimize."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from algorithms.training import Batch, Predictions, Sums
from kernels.linear_cross_entropy import linear_cross_entropy_and_logsumexp


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """-log p of each position's target, in nats.

    z_loss: what log² of the softmax's denominator counts, which keeps logits near what they are
    (Chowdhery et al., PaLM, arXiv:2204.02311, 1e-4).
    """

    z_loss: float | int = 0.0

    def __post_init__(self) -> None:
        if self.z_loss < 0:
            raise ValueError(f"z_loss={self.z_loss} must not be negative.")

    def __call__(
        self, model: Any, teacher: Any, batch: Batch, key: Key[Array, ""], *, training: bool
    ) -> Sums:
        predictions = model.predictions(batch.inputs)
        targets, weights = positions(batch)
        losses, normalizers = cross_entropy(predictions, targets)
        loss = jnp.sum(weights * losses)
        watched = {"cross_entropy": loss, **accuracy(predictions, targets, weights)}
        if self.z_loss:
            loss = loss + self.z_loss * jnp.sum(weights * normalizers**2)
        return Sums(loss, jnp.sum(weights), watched)


def accuracy(
    predictions: Predictions, targets: Int[Array, " n"], weights: Float[Array, " n"]
) -> dict[str, Float[Array, ""]]:
    """How many targets are the likeliest class, where classes are few; of a vocabulary, nothing."""
    if predictions.weight is not None:
        return {}
    return {"accuracy": jnp.sum(weights * (jnp.argmax(predictions.hidden, -1) == targets))}


def positions(batch: Batch) -> tuple[Int[Array, " n"], Float[Array, " n"]]:
    """The target of each position, and what it counts."""
    targets = batch.targets.reshape(-1)
    if batch.mask is None:
        return targets, jnp.ones(targets.shape, jnp.float32)
    return targets, batch.mask.reshape(-1).astype(jnp.float32)


def cross_entropy(
    predictions: Predictions, targets: Int[Array, " n"]
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Of each position, with the logarithm of its softmax's denominator; no logits are kept."""
    if predictions.weight is None:
        logits = predictions.hidden.astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return losses, losses + jnp.take_along_axis(logits, targets[:, None], -1)[:, 0]
    return linear_cross_entropy_and_logsumexp(
        predictions.hidden, predictions.weight, targets, cap=predictions.cap
    )


@runtime_checkable
class PerToken(Protocol):
    """A divergence, of each position: of logits, or of activations and heads where it can be."""

    @property
    def per_token(self) -> Callable[..., Float[Array, " n"]]: ...
    @property
    def per_token_linear(self) -> Callable[..., Float[Array, " n"]] | None: ...


def between(divergence: PerToken, student: Predictions, teacher: Predictions) -> Float[Array, " n"]:
    """Of each position; logits are computed only where the divergence or a cap asks for them."""
    pair = (student, teacher)
    linear = divergence.per_token_linear
    if linear is not None and all(p.weight is not None and p.cap is None for p in pair):
        return linear(student.hidden, student.weight, teacher.hidden, teacher.weight)
    return divergence.per_token(student.logits, teacher.logits)
