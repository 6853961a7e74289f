"""Fewer experts in every mixture, equally many in each: what conf/structure/reap.yaml names."""

import dataclasses

import numpy as np
from jaxtyping import Int

from algorithms.pruning import reap as contributions
from algorithms.pruning.structured import highest
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
    """REAP: how many experts of each mixture stay; None: all but the fraction."""

    experts: int | None = None
    fraction: float | int = 0.25
    score: str = "reap"

    def __post_init__(self) -> None:
        if self.experts is None and not 0 <= self.fraction < 1:
            raise ValueError(f"fraction={self.fraction} must be from 0 to less than 1.")
        contributions.require_score(self.score)

    def effort(self, config: DecoderConfig) -> Effort:
        return Effort(1, 0)

    def __call__(
        self, source: Source, windows: Int[np.ndarray, "n T"] | None = None, *, chunk: int = 4
    ) -> CutSource:
        count = self._count(source.config)
        shape = of_sizes(source.config, {"experts": count})

        def find() -> Kept:
            layers, mixtures = tuple(range(source.config.layers)), {}
            if shape != source.config:
                seen, _ = observe_blocks(source, windows, _see, chunk=chunk)
                mixtures = {n: {"experts": self._best(s, count)} for n, s in enumerate(seen) if s}
            return Kept(layers, within=mixtures)

        return CutSource(source, shape, find)

    def _best(self, seen: contributions.Contribution, count: int) -> Int[np.ndarray, " _"]:
        return highest(np.asarray(contributions.saliency(seen, self.score)), count)

    def _count(self, config: DecoderConfig) -> int:
        """How many stay; raises UserError where that cannot be."""
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


def reap(
    *, experts: int | None = None, fraction: float | int = 0.25, score: str = "reap"
) -> Experts:
    """REAP: experts that add least to what their mixture gives go; or those chosen least often."""
    return Experts(experts=experts, fraction=fraction, score=score)


def _see(block: Block, flow: Flow) -> tuple[contributions.Contribution | tuple[()], Flow]:
    """What each expert adds; of a block without experts, nothing."""
    found: contributions.Contribution | tuple[()] = ()
    *stages, last = block.stages()
    for stage in stages:
        flow = stage(flow)
    if isinstance(block, MixtureBlock):
        assert flow.routing is not None
        y = block.mlp.experts.down(flow.activation, flow.routing.counts)
        found = contributions.observe(y, flow.routing.weights, flow.routing.counts)
    flow = last(flow)
    return found, Flow(flow.residual, flow.residual, flow.positions)
