"""Fewer experts in every mixture, equally many in each: what conf/structure/reap.yaml and
hc_smoe.yaml name.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from algorithms.pruning import hc_smoe as clustering
from algorithms.pruning import reap as contributions
from algorithms.pruning.structured import highest, spans
from experiments.checkpoints.cut import CutSource, Kept, of_sizes
from experiments.checkpoints.sources import Source
from experiments.errors import UserError
from experiments.recipes import Effort, Structure
from experiments.structures.observing import observe_blocks
from models.block import Block, Flow
from models.config import DecoderConfig
from models.experts import MixtureBlock


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts(Structure):
    """How many experts of each mixture there are; None: all but the fraction."""

    experts: int | None = None
    fraction: float | int = 0.25

    def __post_init__(self) -> None:
        if self.experts is None and not 0 <= self.fraction < 1:
            raise ValueError(f"fraction={self.fraction} must be from 0 to less than 1.")

    def __call__(
        self, source: Source, windows: Int[np.ndarray, "n T"] | None = None, *, chunk: int = 4
    ) -> CutSource:
        count = self._count(source.config)
        shape = of_sizes(source.config, {"experts": count})

        def find() -> Kept:
            if shape == source.config:
                return Kept(tuple(range(shape.layers)))
            return self._find(source, windows, chunk, count)

        return CutSource(source, shape, find)

    @abc.abstractmethod
    def _find(self, source: Source, windows: Any, chunk: int, count: int) -> Kept:
        """What `count` experts of each mixture are."""

    def _count(self, config: DecoderConfig) -> int:
        """How many there are to be; raises UserError where that cannot be."""
        mixing = config.experts
        if mixing is None:
            raise UserError(
                f"structure: a model of family {config.family} has no mixture of experts: choose "
                "another structure, such as minitron."
            )
        going = int(mixing.count * self.fraction)
        count = mixing.count - going if self.experts is None else self.experts
        if not mixing.chosen <= count <= mixing.count:
            raise UserError(
                f"structure: {count} of {mixing.count} experts cannot stay, as each token passes "
                f"through {mixing.chosen}: keep from {mixing.chosen} to {mixing.count}."
            )
        return count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruned(Experts):
    """REAP: the experts that are worth least go."""

    score: str = "reap"

    def __post_init__(self) -> None:
        super().__post_init__()
        contributions.require_score(self.score)

    def effort(self, config: DecoderConfig) -> Effort:
        return Effort(1, 0)

    def _find(self, source: Source, windows: Any, chunk: int, count: int) -> Kept:
        seen, _ = observe_blocks(source, windows, _contributions, chunk=chunk)
        best = {n: {"experts": self._best(s, count)} for n, s in enumerate(seen) if s}
        return Kept(tuple(range(source.config.layers)), within=best)

    def _best(self, seen: contributions.Contribution, count: int) -> Int[np.ndarray, " _"]:
        return highest(np.asarray(contributions.saliency(seen, self.score)), count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merged(Experts):
    """HC-SMoE: experts that give alike become one."""

    def effort(self, config: DecoderConfig) -> Effort:
        """Every expert sees every token."""
        mixing = config.experts
        return Effort(mixing.count / mixing.chosen if mixing else 1, 0)

    def _find(self, source: Source, windows: Any, chunk: int, count: int) -> Kept:
        seen, _ = observe_blocks(source, windows, _outputs, chunk=chunk)
        labels = {n: clustering.clusters(s, count) for n, s in enumerate(seen) if s}
        merged = {n: clustering.merging(of, np.asarray(seen[n].chosen)) for n, of in labels.items()}
        said = {f"blocks.{n}": _members(of) for n, of in labels.items()}
        return Kept(tuple(range(source.config.layers)), scores={"merged": said}, merged=merged)


def _members(labels: Int[np.ndarray, " E"]) -> list[str]:
    """The experts of each cluster of several."""
    found = [np.flatnonzero(labels == n).tolist() for n in range(labels.max() + 1)]
    return [spans(members) for members in found if len(members) > 1]


def reap(
    *, experts: int | None = None, fraction: float | int = 0.25, score: str = "reap"
) -> Pruned:
    """REAP: experts that add least to what their mixture gives go; or those chosen least often."""
    return Pruned(experts=experts, fraction=fraction, score=score)


def hc_smoe(*, experts: int | None = None, fraction: float | int = 0.25) -> Merged:
    """HC-SMoE: experts whose mean outputs are nearest are averaged, until few enough are left."""
    return Merged(experts=experts, fraction=fraction)


def _contributions(block: Block, flow: Flow) -> tuple[contributions.Contribution | None, Flow]:
    """What each expert adds; of a block without experts, nothing."""
    flow, last = _before_last(block, flow)
    found = None
    if isinstance(block, MixtureBlock):
        assert flow.routing is not None
        y = block.mlp.experts.down(flow.activation, flow.routing.counts)
        found = contributions.observe(y, flow.routing.weights, flow.routing.counts)
    return found, _passed(last(flow))


def _outputs(block: Block, flow: Flow) -> tuple[clustering.Outputs | None, Flow]:
    """What each expert gives for every token; of a block without experts, nothing."""
    flow, last = _before_last(block, flow)
    found = None
    if isinstance(block, MixtureBlock):
        assert flow.routing is not None and flow.mixed is not None
        x, experts = flow.mixed, block.mlp.experts

        def given(expert: Int[Array, ""]) -> Float[Array, "n D"]:
            hidden = block.as_if_sent(x, expert, "experts.hidden")
            counts = jnp.zeros(experts.count, jnp.int32).at[expert].set(len(hidden))
            return experts.down(hidden, counts)

        y = jax.lax.map(given, jnp.arange(experts.count))
        found = clustering.observe(y, flow.routing.counts)
    return found, _passed(last(flow))


def _before_last(block: Block, flow: Flow) -> tuple[Flow, Callable[[Flow], Flow]]:
    """What enters a block's last stage, and that stage."""
    *stages, last = block.stages()
    for stage in stages:
        flow = stage(flow)
    return flow, last


def _passed(flow: Flow) -> Flow:
    return Flow(flow.residual, flow.residual, flow.positions)
