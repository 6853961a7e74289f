"""The sandwich rule and in-place distillation. Yu, Huang, "Universally Slimmable Networks and
Improved Training Techniques", ICCV 2019, arXiv:1903.05134. Notes: papers/slimmable.md.

A step trains the whole network on data, and on the same batch the smallest of its sub-networks and
n that are drawn, which learn what the whole one says:
    L = CE(C(W, whole), y) + Σ_a D(stop_gradient C(W, whole) ‖ C(W, a)),   a = smallest, n drawn
So the two ends of the range are always there, and those between lie between (sandwiched). With a
share s, the smaller ones learn from s D + (1 - s) CE.

This differs from the official code in: 1. D is the KL, there the cross-entropy with soft targets:
slopes are the same. 2. Choices are of several dimensions, there of one width. 3. s is 1 there.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from algorithms.objectives import between, cross_entropy, positions
from algorithms.search.once_for_all import Counts, Places, Space, subnetwork
from algorithms.training import Batch, Objective, Predictions, Sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Which networks a step trains. choices: sizes by dimension, None where all units stay.

    distilled: a divergence of the smaller ones from the whole one; None: they learn from data.
    share: what it counts; the rest is the targets' cross-entropy.
    """

    choices: tuple[tuple[str, tuple[int, ...] | None], ...]
    largest: bool
    smallest: bool
    random: int
    distilled: Any
    share: float | int = 1.0

    def __post_init__(self) -> None:
        if self.random < 0:
            raise ValueError(f"random={self.random} must not be negative.")
        if not (self.largest or self.smallest or self.random):
            raise ValueError("largest=false, smallest=false and random=0 leave nothing to train.")
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} must be above 0, and at most 1.")
        if self.distilled is not None and not self.largest:
            raise ValueError(
                "distilled: smaller networks learn from the whole one, which largest=false leaves "
                "out: set distilled=null, and they learn from data."
            )


def sandwich(
    *,
    layers: Any = None,
    hidden: Any = None,
    heads: Any = None,
    kv_heads: Any = None,
    feed_forward: Any = None,
    largest: bool = True,
    smallest: bool = True,
    random: int = 2,
    share: float | int = 1.0,
    distilled: Any = None,
) -> Rule:
    """The sandwich rule with choices of these dimensions; other rules with less of it."""
    given = {"layers": layers, "hidden": hidden, "heads": heads, "kv_heads": kv_heads,
             "feed_forward": feed_forward}  # fmt: skip
    choices = tuple((name, None if v is None else tuple(v)) for name, v in given.items())
    return Rule(
        choices=choices, largest=largest, smallest=smallest, random=random, distilled=distilled,
        share=share,
    )  # fmt: skip


class Heard:
    """A model for an objective, which remembers what it was asked and said."""

    def __init__(self, model: Any):
        self.model = model
        self.said: tuple[Any, Predictions] | None = None

    def predictions(self, inputs: Any, **asked: Any) -> Predictions:
        found = self.model.predictions(inputs, **asked)
        self.said = inputs, found
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sandwich:
    """An objective around that of the whole network."""

    objective: Objective
    rule: Rule
    space: Space
    places: Places

    def __call__(
        self, model: Any, teacher: Any, batch: Batch, key: Key[Array, ""], *, training: bool
    ) -> Sums:
        """Evaluated, it is the whole network's, beside the smallest one's cross-entropy."""
        if not training:
            found = self.objective(model, teacher, batch, key, training=False)
            least = self._loss(model, self.space.smallest(), batch, batch.inputs, None)
            return _watching(found, smallest=least)
        own, other = jax.random.split(key)
        whole = Heard(model)
        if self.rule.largest:
            found = self.objective(whole, teacher, batch, own, training=True)
        else:
            found = Sums(jnp.zeros(()), jnp.sum(positions(batch)[1]))
        chosen = self._chosen(other)
        if chosen is None:
            return found
        total = self._total(model, chosen, batch, whole)
        learned = found._replace(loss=found.loss + total * lax.stop_gradient(found.positions))
        return _watching(learned, subnetworks=total)

    def _chosen(self, key: Key[Array, ""]) -> dict[str, Any] | None:
        """The smaller networks of a step, one behind the other."""
        parts = [self.space.drawn(key, self.rule.random)] if self.rule.random else []
        if self.rule.smallest:
            parts.append({name: jnp.asarray([n]) for name, n in self.space.smallest().items()})
        return jax.tree.map(lambda *each: jnp.concatenate(each), *parts) if parts else None

    def _total(
        self, model: Any, chosen: Mapping[str, Any], batch: Batch, whole: Heard
    ) -> Float[Array, ""]:
        """Their losses together: one program, run once for each."""
        inputs, taught = batch.inputs, None
        if self.rule.distilled is not None:
            if whole.said is None:
                raise ValueError(
                    "This loss asks the model for no predictions that smaller networks could learn "
                    "from: set elastic.distilled=null, or choose another loss."
                )
            inputs, said = whole.said
            weight = None if said.weight is None else lax.stop_gradient(said.weight)
            taught = said._replace(hidden=lax.stop_gradient(said.hidden), weight=weight)  # type: ignore[attr-defined]

        def add(total: Float[Array, ""], one: Counts) -> tuple[Float[Array, ""], None]:
            return total + self._loss(model, one, batch, inputs, taught), None

        return lax.scan(add, jnp.zeros(()), chosen)[0]

    def _loss(
        self, model: Any, chosen: Counts, batch: Batch, inputs: Any, taught: Predictions | None
    ) -> Float[Array, ""]:
        """Of one sub-network, the mean over positions."""
        said = subnetwork(model, chosen, self.space, self.places).predictions(inputs)
        targets, weights = positions(batch)
        if taught is None:
            losses = cross_entropy(said, targets)[0]
        else:
            losses = between(self.rule.distilled, said, taught)
        if taught is not None and (share := self.rule.share) < 1:
            losses = share * losses + (1 - share) * cross_entropy(said, targets)[0]
        return jnp.sum(weights * losses) / jnp.sum(weights)


def _watching(found: Sums, **means: Float[Array, ""]) -> Sums:
    """With means over positions that are only looked at."""
    totals = {name: mean * found.positions for name, mean in means.items()}
    return found._replace(watched={**found.watched, **totals})
