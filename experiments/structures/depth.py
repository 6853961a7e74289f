"""Fewer blocks: what conf/structure/shortgpt.yaml and shortened_llama.yaml name."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from algorithms.pruning import shortened_llama as shortened
from algorithms.pruning import shortgpt as short
from algorithms.pruning.structured import highest
from experiments import progress
from experiments.checkpoints.cut import CutSource, Kept, layers_differ, of_layers
from experiments.checkpoints.sources import Source, require_predictions
from experiments.errors import UserError
from experiments.evaluation import logits
from experiments.evaluation.forward import in_chunks, split_blocks
from experiments.recipes import Effort, Structure
from experiments.streaming import embed_windows
from experiments.structures.gradients import block_gradients
from experiments.structures.observing import (
    observe_blocks,
    require_finite,
    required,
    run_block,
)
from models.block import Block, Flow
from models.config import DecoderConfig

INFLUENCE, SCORES = "influence", ("perplexity", "taylor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Depth(Structure):
    """Which blocks go: those with the lowest scores, or those that are named."""

    score: str
    layers: int | tuple[int, ...] | None  # how many go, or which; None: the fraction
    fraction: float | int
    keep_first: int = 0  # blocks that stay whatever their score,
    keep_last: int = 0  # and at the end

    def __post_init__(self) -> None:
        if self.layers is None and not 0 <= self.fraction < 1:
            raise ValueError(f"fraction={self.fraction} must be from 0 to less than 1.")
        if min(self.keep_first, self.keep_last) < 0:
            raise ValueError(
                f"keep_first={self.keep_first} and keep_last={self.keep_last} must not be negative."
            )

    def effort(self, config: DecoderConfig) -> Effort:
        layers = config.layers
        if isinstance(self.layers, tuple):
            return Effort(0, 0)
        return {
            INFLUENCE: Effort(1, 0),
            "perplexity": Effort((layers + 1) / 2, layers),
            "taylor": Effort(4, layers),
        }[self.score]

    def __call__(
        self, source: Source, windows: Int[np.ndarray, "n T"] | None = None, *, chunk: int = 4
    ) -> CutSource:
        """Where blocks differ in more than their weights, which ones stay decides the shape: then
        they are scored at once, else when the first tensor is read.
        """
        config = source.config
        kept = config.layers - self._going(config)
        if isinstance(self.layers, tuple):
            named = set(self.layers)
            found = Kept(tuple(n for n in range(config.layers) if n not in named))
        elif layers_differ(config):
            found = self._find(source, windows, chunk)
        else:
            shape = of_layers(config, tuple(range(kept)))
            return CutSource(source, shape, lambda: self._find(source, windows, chunk))
        return CutSource(source, of_layers(config, found.layers), lambda: found)

    def _find(self, source: Source, windows: Int[np.ndarray, "n T"] | None, chunk: int) -> Kept:
        layers = source.config.layers
        count = layers - self._going(source.config)
        if count == layers:
            return Kept(tuple(range(layers)))
        scores = SCORED[self.score](source, windows, chunk)
        last = layers - self.keep_last
        forced = np.where([n < self.keep_first or n >= last for n in range(layers)], np.inf, scores)
        kept = highest(forced, count)
        return Kept(tuple(kept.tolist()), scores={"scores": [float(s) for s in scores]})

    def _going(self, config: DecoderConfig) -> int:
        """How many blocks go; raises UserError where that cannot be."""
        layers = config.layers
        if isinstance(self.layers, tuple):
            named = set(self.layers)
            if not named < set(range(layers)) or len(named) < len(self.layers):
                raise UserError(
                    f"structure.layers={list(self.layers)} must name blocks from 0 to "
                    f"{layers - 1}, each once, and not all of them."
                )
            return len(self.layers)
        going = round(layers * self.fraction) if self.layers is None else self.layers
        free = layers - min(layers, self.keep_first + self.keep_last)
        if not 0 <= going <= min(free, layers - 1):
            raise UserError(
                f"structure: {going} of {layers} blocks cannot go, of which {layers - free} are to "
                "stay in any case, and one has to: lower structure.layers or structure.fraction."
            )
        return going


def shortgpt(*, layers: int | Sequence[int] | None = None, fraction: float | int = 0.2) -> Depth:
    """ShortGPT: the blocks with the least influence go."""
    return Depth(score=INFLUENCE, layers=_which(layers), fraction=fraction)


def shortened_llama(
    *,
    layers: int | Sequence[int] | None = None,
    fraction: float | int = 0.2,
    score: str = "perplexity",
    keep_first: int = 0,
    keep_last: int = 0,
) -> Depth:
    """Shortened LLaMA: those go without which the perplexity is lowest, or whose weights' Taylor
    terms are.
    """
    if score not in SCORES:
        raise ValueError(f"score={score!r} must be {' or '.join(SCORES)}.")
    return Depth(
        score=score, layers=_which(layers), fraction=fraction, keep_first=keep_first,
        keep_last=keep_last,
    )  # fmt: skip


def _which(layers: int | Sequence[int] | None) -> int | tuple[int, ...] | None:
    return layers if layers is None or isinstance(layers, int) else tuple(layers)


def _similarity(block: Block, flow: Flow) -> tuple[short.Similarity, Flow]:
    y, _ = block(flow.residual, flow.positions)
    return short.observe(flow.residual, y), Flow(y, y, flow.positions)


def influences(source: Source, windows: Any, chunk: int) -> Float[np.ndarray, " layers"]:
    """BI of each block."""
    seen, _ = observe_blocks(source, windows, _similarity, chunk=chunk)
    return np.asarray([short.block_influence(each) for each in seen])


def perplexities(source: Source, windows: Any, chunk: int) -> Float[np.ndarray, " layers"]:
    """Of the model without each block. One pass: every block runs for all the models that have it,
    and differ in one before it.
    """
    require_predictions(source.config, "perplexity")
    windows = required(windows)
    whole = list(embed_windows(source, windows, chunk))
    streams: list[list[Flow]] = []  # of the models that lack one of the blocks so far
    with progress.steps("score", source.config.layers) as step:
        for graph, state in split_blocks(source):
            for flows in streams:
                flows[:] = [run_block(graph, state, flow) for flow in flows]
            streams.append(whole)
            whole = [run_block(graph, state, flow) for flow in whole]
            require_finite(len(streams) - 1, whole)
            del graph, state
            step("")
    states = [f.residual[:, :-1].reshape(-1, source.config.hidden) for s in streams for f in s]
    tokens = [jnp.asarray(batch[:, 1:].ravel()) for batch in in_chunks(windows, chunk)]
    seen = logits.following(source, states, tokens * len(streams))
    losses = [each.loss for each in seen]
    each = [losses[n : n + len(tokens)] for n in range(0, len(losses), len(tokens))]
    return np.asarray([shortened.perplexity(jnp.concatenate(one)) for one in each])


def taylors(source: Source, windows: Any, chunk: int) -> Float[np.ndarray, " layers"]:
    """Of each block's weights."""
    found = np.zeros(source.config.layers)
    for layer, arrays, gradients in (
        (b.layer, [b.arrays[n] for n in b.weights], [b.gradients[n] for n in b.weights])
        for b in block_gradients(source, windows, chunk=chunk)
    ):
        found[layer] = shortened.taylor(arrays, gradients)
    return found


SCORED = {INFLUENCE: influences, "perplexity": perplexities, "taylor": taylors}
