"""Fewer directions of the residual stream: what conf/structure/slicegpt.yaml names."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from algorithms.pruning import slicegpt as principal
from experiments.checkpoints.cut import CutSource, Kept, of_sizes
from experiments.checkpoints.rotated import RotatedSource, require_turnable
from experiments.checkpoints.sources import Source
from experiments.errors import UserError
from experiments.recipes import Effort, Structure
from experiments.structures.observing import observe_blocks
from models.block import Block, Flow
from models.config import DecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slices(Structure):
    """SliceGPT with one rotation for all blocks."""

    hidden: int | None = None  # directions that stay; None: all but the fraction
    fraction: float | int = 0.2
    multiple: int = 8  # of which the number that the fraction leaves is one, rounded down
    normalized: bool = True

    def __post_init__(self) -> None:
        if self.hidden is None and not 0 <= self.fraction < 1:
            raise ValueError(f"fraction={self.fraction} must be from 0 to less than 1.")
        if self.multiple < 1:
            raise ValueError(f"multiple={self.multiple} must be positive.")

    def effort(self, config: DecoderConfig) -> Effort:
        return Effort(2, 0)  # XᵀX at each norm is about as much as a pass

    def __call__(
        self, source: Source, windows: Int[np.ndarray, "n T"] | None = None, *, chunk: int = 4
    ) -> CutSource:
        require_turnable(source.config, "structure=slicegpt")
        kept = self._kept(source.config)
        find = functools.partial(self._directions, source, windows, chunk)
        turned = RotatedSource(source, find, heads=False)
        everywhere = {"hidden": np.arange(kept)} if kept < source.config.hidden else {}
        found = Kept(tuple(range(source.config.layers)), everywhere)
        shape = of_sizes(turned.config, {"hidden": kept})
        return CutSource(turned, shape, lambda: found, source.config)

    def _kept(self, config: DecoderConfig) -> int:
        """How many stay; raises UserError where that cannot be."""
        kept = self.hidden
        if kept is None:
            kept = int(config.hidden * (1 - self.fraction))
            kept -= kept % self.multiple if kept < config.hidden else 0
        if not 0 < kept <= config.hidden:
            raise UserError(
                f"structure: {kept} of {config.hidden} hidden channels cannot stay: set "
                "structure.hidden, or a lower structure.fraction or structure.multiple."
            )
        return kept

    def _directions(self, source: Source, windows: Any, chunk: int) -> Float[Array, "D D"]:
        see = _SEE[self.normalized]
        seen, flows = observe_blocks(source, windows, see, chunk=chunk)
        last = [principal.observe(f.residual, normalized=self.normalized) for f in flows]
        total = np.sum([np.asarray(each, np.float64) for each in (*seen, *last)], 0)
        return jnp.asarray(principal.principal_directions(total), jnp.float32)


def slicegpt(
    *,
    hidden: int | None = None,
    fraction: float | int = 0.2,
    multiple: int = 8,
    normalized: bool = True,
) -> Slices:
    """SliceGPT: directions of the residual stream that hold little go."""
    return Slices(hidden=hidden, fraction=fraction, multiple=multiple, normalized=normalized)


def _see(block: Block, flow: Flow, *, normalized: bool) -> tuple[Float[Array, "D D"], Flow]:
    """XᵀX before every norm of a block."""
    total, (*stages, last) = jnp.zeros((flow.residual.shape[-1],) * 2), block.stages()
    for stage, site in zip(stages, block.sites, strict=True):
        flow = stage(flow)
        if site.producer.endswith("norm"):
            total += principal.observe(flow.residual, normalized=normalized)
    flow = last(flow)
    return total, Flow(flow.residual, flow.residual, flow.positions)


_SEE = {each: functools.partial(_see, normalized=each) for each in (True, False)}
