"""A sub-network of given sizes, of a model that was trained so that it has many: what
conf/structure/subnetwork.yaml names.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int

from experiments.checkpoints.cut import CutSource, Kept, of_layers, of_sizes
from experiments.checkpoints.dimensions import sizes
from experiments.checkpoints.sources import Source
from experiments.errors import UserError
from experiments.recipes import Effort
from experiments.structures.width import Scores, Width
from models.config import DecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subnetwork(Width):
    """The first units of each dimension, whatever they are worth, and the first blocks."""

    layers: int | None = None

    def effort(self, config: DecoderConfig) -> Effort:
        return Effort(0, 0)

    def __call__(
        self, source: Source, windows: Int[np.ndarray, "n T"] | None = None, *, chunk: int = 4
    ) -> CutSource:
        config = source.config
        running = config.layers if self.layers is None else self.layers
        if not 0 < running <= config.layers:
            raise UserError(
                f"structure.layers={running} must be from 1 to the {config.layers} blocks that the "
                "model has."
            )
        blocks, wanted = tuple(range(running)), self.changes(config)

        def find() -> Kept:
            found = self._find(source, windows, chunk, wanted) if wanted else Kept(blocks)
            within = {n: units for n, units in found.within.items() if n in blocks}
            return found._replace(layers=blocks, within=within)

        return CutSource(source, of_sizes(of_layers(config, blocks), wanted), find)

    def scores(
        self, source: Source, windows: Any, chunk: int, wanted: frozenset[str]
    ) -> tuple[Scores, list[Scores]]:
        """All alike: of equals, the first ones stay."""
        there = sizes(source.config)
        alike = {d: np.zeros(there[d]) for d in wanted}
        everywhere = {d: s for d, s in alike.items() if d == "hidden"}
        own = {d: s for d, s in alike.items() if d != "hidden"}
        if {"heads", "kv_heads"} & own.keys():
            own |= {d: np.zeros(there[d]) for d in ("heads", "kv_heads")}
        return everywhere, [own] * source.config.layers


def subnetwork(
    *,
    layers: int | None = None,
    hidden: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    feed_forward: int | None = None,
) -> Subnetwork:
    """Once-for-all: the first units of a model whose sub-networks are all good."""
    return Subnetwork(
        layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, feed_forward=feed_forward
    )
