"""What a student is trained to minimize: the parts of this folder around two models.

With a divergence D of the student from the teacher and the cross-entropy CE of the data's targets,
    loss = share · D + (1 - share) · CE
averaged over positions, and what an objective adds to it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Key

from algorithms.distillation.compressed_logits import LogitCodec
from algorithms.distillation.divergences import DistillationLoss
from algorithms.distillation.features import FeatureLoss, Regressor, layer_map
from algorithms.distillation.function_matching import FunctionMatching
from algorithms.objectives import accuracy, between, cross_entropy, positions
from algorithms.training import Batch, Predictions, Sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation:
    """A teacher's predictions, and the targets. share: what the teacher counts, from 0 to 1."""

    divergence: DistillationLoss
    share: float | int = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share} must be from 0 to 1.")

    def __call__(
        self, model: Any, teacher: Any, batch: Batch, key: Key[Array, ""], *, training: bool
    ) -> Sums:
        require_teacher(teacher)
        student, taught = model.predictions(batch.inputs), teacher.predictions(batch.inputs)
        return mixed(student, between(self.divergence, student, taught), batch, self.share)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matching:
    """Function matching: both models see inputs from between the data; targets play no part."""

    matching: FunctionMatching

    def __call__(
        self, model: Any, teacher: Any, batch: Batch, key: Key[Array, ""], *, training: bool
    ) -> Sums:
        require_teacher(teacher)
        inputs = self.matching.augment(key, jnp.asarray(batch.inputs)) if training else batch.inputs
        student, taught = model.predictions(inputs), teacher.predictions(inputs)
        return mixed(student, between(self.matching.loss, student, taught), batch, 1.0)


class Projections(nnx.Module):
    """Regressors from a student's channels to its teacher's, learned beside it."""

    def __init__(self, regressors: tuple[Regressor, ...]):
        self.kernels = nnx.List([nnx.Param(r.kernel) for r in regressors])
        self.biases = nnx.List([nnx.Param(r.bias) for r in regressors])

    def regressors(self) -> tuple[Regressor, ...]:
        pairs = zip(self.kernels, self.biases, strict=True)
        return tuple(Regressor(kernel[...], bias[...]) for kernel, bias in pairs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureDistillation:
    """A divergence, and activations of the blocks that `strategy` pairs.

    features: of hidden states. weight: what they count beside the rest.
    """

    divergence: DistillationLoss
    features: FeatureLoss
    share: float | int = 1.0
    weight: float | int = 1.0
    strategy: str = "uniform"

    def prepare(self, model: Any, teacher: Any, key: Key[Array, ""]) -> None:
        """Regressors for the model. Raises ValueError where layers cannot be paired."""
        pairs = self._pairs(model, teacher)
        widths = (each.config.hidden for each in (model, teacher))
        model.projections = Projections(self.features.init(key, len(pairs), *widths))

    def dismiss(self, model: Any) -> None:
        del model.projections

    def _pairs(self, model: Any, teacher: Any) -> tuple[tuple[int, int], ...]:
        return layer_map(len(model.blocks), len(teacher.blocks), strategy=self.strategy)

    def __call__(
        self, model: Any, teacher: Any, batch: Batch, key: Key[Array, ""], *, training: bool
    ) -> Sums:
        require_teacher(teacher)
        own, others = zip(*self._pairs(model, teacher), strict=True)
        student = model.predictions(batch.inputs, **self._asked(own))
        taught = teacher.predictions(batch.inputs, **self._asked(others))
        found = mixed(student, between(self.divergence, student, taught), batch, self.share)
        error = self._error(model.projections.regressors(), student, taught, batch)
        return added(found, "features", error, self.weight)

    def _asked(self, blocks: Sequence[int]) -> dict[str, Sequence[int]]:
        """Which activations are wanted."""
        return {"features": blocks}

    def _error(
        self, regressors: Any, student: Predictions, taught: Predictions, batch: Batch
    ) -> Float[Array, ""]:
        weights = positions(batch)[1]
        return self.features.loss(regressors, student.features, taught.features, weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionDistillation(FeatureDistillation):
    """The same with the scores of attention, of as many heads (TinyBERT)."""

    def _asked(self, blocks: Sequence[int]) -> dict[str, Sequence[int]]:
        return {"features": blocks, "related": blocks}

    def _error(
        self, regressors: Any, student: Predictions, taught: Predictions, batch: Batch
    ) -> Float[Array, ""]:
        both, windows = (student, taught), jnp.shape(batch.inputs)
        hidden = ([x.reshape(*windows, -1) for x in each.features] for each in both)
        seen = ([scores(qkv) for qkv in each.related] for each in both)
        return self.features.loss(regressors, *hidden, *seen, mask_of(batch))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelationDistillation:
    """A divergence, and how the tokens of one block's queries, keys and values relate (MiniLM).

    blocks: of student and teacher, by number, -1 for the last.
    """

    divergence: DistillationLoss
    relations: FeatureLoss
    share: float | int = 1.0
    weight: float | int = 1.0
    blocks: Sequence[int] = (-1, -1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))  # lists are not hashable

    def __call__(
        self, model: Any, teacher: Any, batch: Batch, key: Key[Array, ""], *, training: bool
    ) -> Sums:
        require_teacher(teacher)
        own, other = self._numbers(model, teacher)
        student = model.predictions(batch.inputs, related=(own,))
        taught = teacher.predictions(batch.inputs, related=(other,))
        found = mixed(student, between(self.divergence, student, taught), batch, self.share)
        qkv = (repeated(each.related[0]) for each in (student, taught))
        error = self.relations.loss(None, *qkv, mask_of(batch))
        return added(found, "relations", error, self.weight)

    def _numbers(self, model: Any, teacher: Any) -> tuple[int, ...]:
        both = zip((model, teacher), self.blocks, strict=True)
        return tuple(range(len(each.blocks))[n] for each, n in both)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfflineDistillation:
    """A teacher's logits that were stored before: `batch.taught` is what the codec made of them."""

    codec: LogitCodec
    share: float | int = 1.0

    def __call__(
        self, model: Any, teacher: Any, batch: Batch, key: Key[Array, ""], *, training: bool
    ) -> Sums:
        if batch.taught is None:
            raise ValueError("Stored logits of a teacher are distilled: give a teacher.")
        student = model.predictions(batch.inputs)
        kept = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch.taught)
        return mixed(student, self.codec.per_token(student.logits, kept), batch, self.share)


def require_teacher(teacher: Any) -> None:
    if teacher is None:
        raise ValueError("There is no teacher to learn from: give one (model@teacher=…).")


def mixed(
    student: Predictions, distances: Float[Array, " n"], batch: Batch, share: float | int
) -> Sums:
    """share · distances + (1 - share) · cross-entropy, summed; both are watched."""
    targets, weights = positions(batch)
    losses, _ = cross_entropy(student, targets)
    apart, hard = jnp.sum(weights * distances), jnp.sum(weights * losses)
    loss = apart if share == 1 else share * apart + (1 - share) * hard
    watched = {"divergence": apart, "cross_entropy": hard, **accuracy(student, targets, weights)}
    return Sums(loss, jnp.sum(weights), watched)


def added(found: Sums, name: str, mean: Float[Array, ""], weight: float | int) -> Sums:
    """With another mean over positions."""
    total = mean * lax.stop_gradient(found.positions)
    watched = {**found.watched, name: total}
    return found._replace(loss=found.loss + weight * total, watched=watched)


def mask_of(batch: Batch) -> Bool[Array, "B T"] | None:
    return None if batch.mask is None else jnp.asarray(batch.mask) > 0


def scores(qkv: tuple[Float[Array, "B T a h"], ...]) -> Float[Array, "B a T T"]:
    """Of attention, before the softmax."""
    q, k, _ = repeated(qkv)
    return jnp.einsum("BTah,BSah->BaTS", q, k) / jnp.sqrt(q.shape[-1])


def repeated(
    qkv: tuple[Float[Array, "B T _ h"], ...],
) -> tuple[Float[Array, "B T a h"], ...]:
    """With the keys and values of grouped heads as often as they serve."""
    q, k, v = qkv
    times = q.shape[2] // k.shape[2]
    return q, jnp.repeat(k, times, axis=2), jnp.repeat(v, times, axis=2)
