"""Fewer channels in every block, equally many in each: what conf/structure/minitron.yaml and
llm_pruner.yaml name.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from algorithms.pruning import llm_pruner as taylor_of
from algorithms.pruning import minitron as activations
from algorithms.pruning.structured import highest, highest_heads, require_heads
from experiments.checkpoints.cut import CutSource, Kept, of_sizes
from experiments.checkpoints.dimensions import axes, sizes
from experiments.checkpoints.loading import load_tail
from experiments.checkpoints.sources import Source
from experiments.errors import UserError
from experiments.recipes import Effort, Structure
from experiments.structures.gradients import block_gradients
from experiments.structures.observing import observe_blocks
from models.block import Block, Flow
from models.config import DecoderConfig
from models.decoder import sites

HEADS = ("heads", "kv_heads")
type Scores = Mapping[str, Float[np.ndarray, " _"]]  # of each dimension's units


@dataclasses.dataclass(frozen=True, kw_only=True)
class Width(Structure):
    """How many units of each dimension stay; None: all."""

    hidden: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    feed_forward: int | None = None

    def __call__(
        self, source: Source, windows: Int[np.ndarray, "n T"] | None = None, *, chunk: int = 4
    ) -> CutSource:
        wanted = self.changes(source.config)

        def find() -> Kept:
            layers = tuple(range(source.config.layers))
            return self._find(source, windows, chunk, wanted) if wanted else Kept(layers)

        return CutSource(source, of_sizes(source.config, wanted), find)

    def changes(self, config: DecoderConfig) -> dict[str, int]:
        """The sizes that change; raises UserError where they make no model."""
        there = sizes(config)
        wanted = {d: n for d in ("hidden", *HEADS, "feed_forward")
                  if (n := getattr(self, d)) is not None}  # fmt: skip
        if config.blocks is not None and set(wanted) - {"hidden"}:
            raise UserError(
                f"structure: {', '.join(wanted)} would be the same in every block, and the blocks "
                "of this model have sizes of their own: prune the model that it came of."
            )
        if set(wanted) & set(HEADS):
            wanted = {**wanted, **self._heads(there)}
        for dimension, count in wanted.items():
            if not 0 < count <= there[dimension]:
                raise UserError(
                    f"structure.{dimension}={count} must be from 1 to the {there[dimension]} that "
                    "the model has."
                )
            if not any(dimension in each for each in axes(config).values()):
                raise UserError(
                    f"structure.{dimension}={count}: no block has that dimension, as experts have "
                    "widths of their own: leave it out; structure=reap leaves out whole experts."
                )
        return {d: n for d, n in wanted.items() if n != there[d]}

    def _heads(self, there: Mapping[str, int]) -> dict[str, int]:
        """Query heads of a group go with it, unless it is said how many stay."""
        kv = there["kv_heads"] if self.kv_heads is None else self.kv_heads
        heads = kv * (there["heads"] // there["kv_heads"]) if self.heads is None else self.heads
        try:
            require_heads((heads, kv), (there["heads"], there["kv_heads"]))
        except ValueError as error:
            raise UserError(f"structure: {error}") from error
        return {"heads": heads, "kv_heads": kv}

    def _find(self, source: Source, windows: Any, chunk: int, wanted: Mapping[str, int]) -> Kept:
        everywhere, blocks = self.scores(source, windows, chunk, frozenset(wanted))
        within = {n: _chosen(scores, wanted, source.config) for n, scores in enumerate(blocks)}
        shared = {d: highest(scores, wanted[d]) for d, scores in everywhere.items()}
        return Kept(tuple(range(source.config.layers)), shared, within)

    @abc.abstractmethod
    def scores(
        self, source: Source, windows: Any, chunk: int, wanted: frozenset[str]
    ) -> tuple[Scores, list[Scores]]:
        """Of the wanted dimensions: what all blocks share, and each block's own. Of heads, both
        kinds.
        """


def _chosen(
    scores: Scores, wanted: Mapping[str, int], config: DecoderConfig
) -> dict[str, Int[np.ndarray, " _"]]:
    """Which units of a block's own dimensions stay."""
    found = {d: highest(scores[d], wanted[d]) for d in scores if d not in HEADS}
    if any(d in wanted for d in HEADS):
        counts = (wanted.get("heads", config.heads), wanted.get("kv_heads", config.kv_heads))
        kept = highest_heads(scores["heads"], scores["kv_heads"], counts)
        found |= zip(HEADS, kept, strict=True)
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Minitron(Width):
    """By how large activations are."""

    over_batch: str = "l2"
    over_sequence: str = "mean"

    def __post_init__(self) -> None:
        activations.require_aggregations(
            over_batch=self.over_batch, over_sequence=self.over_sequence
        )

    def effort(self, config: DecoderConfig) -> Effort:
        return Effort(1, 0)

    def _observe(self, x: Float[Array, "B T i"]) -> Float[Array, " i"]:
        return activations.observe(x, over_batch=self.over_batch, over_sequence=self.over_sequence)

    def _see(self, block: Block, flow: Flow) -> tuple[dict[str, Float[Array, " _"]], Flow]:
        """The sums of every site that has tokens in order: not within experts."""
        found, producers, (*stages, last) = {}, set(), block.stages()
        for stage, site in zip(stages, block.sites, strict=True):
            flow = stage(flow)
            x = flow.mixed if site.experts and site.others else flow.activation
            if x is not None and x.ndim == 3 and site.producer not in producers:
                found[site.name] = self._observe(x)
                producers.add(site.producer)
        flow = last(flow)
        return found, Flow(flow.residual, flow.residual, flow.positions)

    def scores(
        self, source: Source, windows: Any, chunk: int, wanted: frozenset[str]
    ) -> tuple[Scores, list[Scores]]:
        config = source.config
        seen, flows = observe_blocks(source, windows, self._see, chunk=chunk)
        blocks: list[Scores] = []
        hidden = np.zeros(config.hidden)
        for layer, sums in enumerate(seen):
            found: dict[str, Any] = {}
            for site in sites(config, layer):
                if site.name not in sums:
                    continue
                s = self._importance(sums[site.name], len(windows))
                dimension = axes(config)[f"blocks.{layer}.{site.readers[0]}.weight"][-1]
                if dimension == "hidden":
                    hidden += np.asarray(s)
                elif dimension == "heads":
                    found["heads"] = np.asarray(activations.head_importance(s, config.heads))
                    found["kv_heads"] = np.zeros(config.kv_heads)  # nothing beside their heads'
                elif dimension in wanted:
                    found[dimension] = np.asarray(s)
            blocks.append(found)
        if "hidden" not in wanted:
            return {}, blocks
        if config.predicts:
            norm = load_tail(source, rows=slice(0, 1)).norm
            hidden += np.asarray(self._importance(self._last(norm, flows), len(windows)))
        return {"hidden": hidden}, blocks

    def _importance(self, sums: Float[Array, " i"], windows: int) -> Float[Array, " i"]:
        return activations.importance(sums, windows, over_batch=self.over_batch)

    def _last(self, norm: nnx.Module, flows: list[Flow]) -> Float[Array, " D"]:
        """The sums behind the norm that follows the last block."""
        graph, state = nnx.split(norm)
        run = jax.jit(lambda state, x: self._observe(nnx.merge(graph, state)(x)))
        return jnp.sum(jnp.stack([run(state, flow.residual) for flow in flows]), 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LLMPruner(Width):
    """By the Taylor terms of the weights that go together."""

    taylor: str = "param_first"

    def __post_init__(self) -> None:
        taylor_of.require_taylor(self.taylor)

    def effort(self, config: DecoderConfig) -> Effort:
        return Effort(4, config.layers)

    def scores(
        self, source: Source, windows: Any, chunk: int, wanted: frozenset[str]
    ) -> tuple[Scores, list[Scores]]:
        config = source.config
        blocks: list[dict[str, Any]] = [{} for _ in range(config.layers)]
        dimensions = wanted | (set(HEADS) if wanted & set(HEADS) else set())
        for block in block_gradients(source, windows, chunk=chunk):
            prefix = f"blocks.{block.layer}."
            groups = {name: axes(config)[prefix + name] for name in block.weights}
            there = {each for axis in groups.values() for each in axis}
            blocks[block.layer] = taylor_of.importance(
                {name: block.arrays[name] for name in block.weights},
                block.gradients,
                groups,
                {d: sizes(config)[d] for d in dimensions & there},
                self.taylor,
            )
        return {}, [{d: np.asarray(s) for d, s in each.items()} for each in blocks]


def minitron(
    *,
    hidden: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    feed_forward: int | None = None,
    over_batch: str = "l2",
    over_sequence: str = "mean",
) -> Minitron:
    """Minitron: what has the smallest activations goes."""
    return Minitron(
        hidden=hidden, heads=heads, kv_heads=kv_heads, feed_forward=feed_forward,
        over_batch=over_batch, over_sequence=over_sequence,
    )  # fmt: skip


def llm_pruner(
    *,
    heads: int | None = None,
    kv_heads: int | None = None,
    feed_forward: int | None = None,
    taylor: str = "param_first",
) -> LLMPruner:
    """LLM-Pruner: what goes together goes where its weights seem to be worth least to the loss."""
    return LLMPruner(heads=heads, kv_heads=kv_heads, feed_forward=feed_forward, taylor=taylor)
