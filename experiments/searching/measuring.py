"""The table of a search, block by block: each unit's options or what its sparsity depends on."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from algorithms import surgery
from algorithms.search.kl import OutputDivergence
from algorithms.search.sparsities import SparsityMethod
from algorithms.walk import through
from experiments.checkpoints.sources import Source
from experiments.recipes import Recipe
from experiments.searching import mixed, sparsity, walks
from experiments.searching.mixed import Mixed
from experiments.searching.units import Unit, units


class Job(NamedTuple):
    """What is measured, and on what."""

    source: Source
    allocation: Mixed | SparsityMethod
    recipe: Recipe  # the configuration's own: its rules are taken out, its transform comes first
    recipes: tuple[Recipe | None, ...]  # of each option; None leaves layers as they are
    windows: Int[np.ndarray, "n T"] | None  # None: no activations are looked at
    chunk: int  # windows per step
    dense_dtype: str  # of layers that are left as they are
    seed: int  # of seeded methods

    @property
    def gradients(self) -> bool:
        return isinstance(self.allocation, Mixed) and (
            getattr(self.allocation.score, "gradients", False)
        )

    @property
    def diverges(self) -> bool:
        """Whether each option takes the rest of the model."""
        found = self.allocation
        return isinstance(found, Mixed) and isinstance(found.score, OutputDivergence)

    def units(self, layer: int) -> list[Unit]:
        """What is decided in a block: all that no rule names."""

        def taken(path: str) -> bool:
            return any(rule.pattern.fullmatch(path) for rule in self.recipe.rules)

        return units(self.source.config, layer, self.allocation.unit, taken)

    def paths(self, layer: int) -> list[str]:
        return [path for unit in self.units(layer) for path in unit.paths]


def measure(job: Job, known: walks.Known, report: walks.Report) -> list[walks.Row]:
    """The rows of all blocks; those that are known are not measured again."""
    if known.keys() >= set(range(job.source.config.layers)):
        return [row for layer in sorted(known) for row in known[layer]]
    model = walks.Model(job.source, job.windows, job.chunk, job.recipe.transform)
    if isinstance(job.allocation, SparsityMethod):
        of_block = functools.partial(_sparsity_rows, job, job.allocation)
        return walks.forward(model, of_block, known, report)
    rows = functools.partial(_option_rows, job, job.allocation)
    if job.gradients:
        return walks.backward(model, rows, job.paths, known, report)
    ends = (model, walks.last(model)) if job.diverges else None
    return walks.forward(model, functools.partial(rows, ends=ends), known, report)


def _sparsity_rows(job: Job, method: SparsityMethod, layer: int, block: Any, chunks: list[Any]):
    return sparsity.block_rows(block, job.units(layer), chunks, method)


def _option_rows(
    job: Job,
    found: Mixed,
    layer: int,
    block: Any,
    chunks: list[Any],
    gradients: Sequence[Any] | None = None,
    *,
    ends: tuple[walks.Model, list[Any]] | None = None,
) -> list[walks.Row]:
    """A block's units, with what each option costs and its score.

    ends: of a score by predictions, the model and its own last activations.
    """
    own, paths = job.units(layer), frozenset(job.paths(layer))
    key = jax.random.fold_in(jax.random.key(job.seed), layer)
    config = job.source.config
    methods = [None if r is None else r.block(config, layer).__getitem__ for r in job.recipes]
    options = [mixed.solved(block, chunks, each, paths, key) for each in methods]
    tokens = found.latency_tokens if "seconds" in found.budgets else 0
    chosen = config.experts.chosen if config.experts else 1
    rows = [mixed.cost_row(block, u, options, job.dense_dtype, chosen, tokens) for u in own]
    if isinstance(found.score, OutputDivergence):
        assert ends is not None
        scores = _divergences(*ends, layer, block, own, options, chunks)
    else:
        scores = mixed.layer_scores(block, own, options, chunks, gradients, found.score)
    return [{**row, "score": score} for row, score in zip(rows, scores, strict=True)]


def _divergences(
    model: walks.Model,
    base: list[Any],
    layer: int,
    block: Any,
    own: Sequence[Unit],
    options: Sequence[mixed.Solved],
    chunks: list[Any],
) -> list[list[float]]:
    """Of each unit's options: what leaves the block with it in place, brought to the end."""
    branches: dict[tuple[int, int], list[Any]] = {}
    for u, unit in enumerate(own):
        for n, option in enumerate(options):
            if option:
                copy = mixed.changed(block, unit, option)
                branches[u, n] = list(chunks)
                through(copy, branches[u, n])
                surgery.release(copy)
    found = walks.divergences(model, layer, list(branches.values()), base)
    by_branch = dict(zip(branches, found, strict=True))
    return [[by_branch.get((u, n), 0.0) for n in range(len(options))] for u in range(len(own))]
