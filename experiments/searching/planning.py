"""What a search would do and take, worked out from its configuration before it begins."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from omegaconf import DictConfig

from algorithms.blockwise import BlockwiseMethod
from algorithms.search.sparsities import SparsityMethod
from experiments import hardware, planning, streaming
from experiments.checkpoints.sources import Source, require_predictions
from experiments.data.windows import Windows
from experiments.entry import build, resolved
from experiments.errors import UserError
from experiments.estimate import Estimate, estimate
from experiments.progress import console
from experiments.recipe_builder import build_recipe, with_settings
from experiments.recipes import Recipe
from experiments.searching import mixed, sparsity, walks
from experiments.searching.mixed import Mixed
from experiments.searching.units import Unit, units
from models.decoder import sites


@dataclasses.dataclass(frozen=True)
class Plan:
    """A search's parts, opened but not loaded, and what they will take."""

    source: Source
    allocation: Mixed | SparsityMethod
    recipe: Recipe  # the configuration's own: its rules are taken out, its transform comes first
    recipes: tuple[Recipe | None, ...]  # of each option; None leaves layers as they are
    windows: Windows
    plain: dict[str, Any]
    hardware: hardware.Hardware

    @property
    def used(self) -> int:
        """Windows that are looked at."""
        if isinstance(self.allocation, SparsityMethod):
            return len(self.windows.calibration) if self.allocation.observe is not None else 0
        wanted = self.allocation.windows
        return min(wanted or len(self.windows.calibration), len(self.windows.calibration))

    @property
    def gradients(self) -> bool:
        score = getattr(self.allocation, "score", None)
        return bool(getattr(score, "gradients", False))

    @property
    def diverges(self) -> bool:
        """Whether each option takes the rest of the model."""
        score = getattr(self.allocation, "score", None)
        return isinstance(score, mixed.kl.OutputDivergence)

    def units(self, layer: int) -> list[Unit]:
        def taken(path: str) -> bool:
            return any(rule.pattern.fullmatch(path) for rule in self.recipe.rules)

        return units(self.source.config, layer, self.allocation.unit, taken)

    def require(self, folder: Path) -> None:
        """Refuse a search that memory will not hold; raises UserError with the numbers."""
        found = self.estimate
        hardware.require(
            found, memory=self.hardware.assumed_memory(), folder=folder, alternatives=self._fewer()
        )
        console.print(
            f"about {hardware.duration(found.total_seconds)}, {hardware.gigabytes(found.peak)} of "
            f"memory: {folder}",
            soft_wrap=True,
        )

    def show(self) -> None:
        """Print the estimate."""
        console.print(hardware.describe(self.estimate))

    def facts(self) -> dict[str, Any]:
        """For the record: what was expected, beside what came."""
        return self.estimate.facts()

    @property
    def estimate(self) -> Estimate:
        return self._estimate(self.used)

    def _fewer(self) -> Iterator[tuple[str, Estimate]]:
        windows = self.used if isinstance(self.allocation, Mixed) else 0
        while windows > 1:
            windows //= 2
            yield f"allocation.windows={windows}", self._estimate(windows)

    def _estimate(self, windows: int) -> Estimate:
        """As many compressions as there are options, none of them written, and passes to score."""
        context = self.windows.calibration.shape[1]
        settings: dict[str, Any] = dict(
            views=self.source.views, heldout=(max(windows, 1), context),
            walk=streaming.Walk(sequential=False, chunk=self.plain["walk"]["chunk"]),
            evaluation_chunk=self.plain["walk"]["chunk"], rate=self.hardware.assumed_rate(),
            base=hardware.process_memory(),
        )  # fmt: skip
        shape = (windows, context) if windows else None
        real = [recipe for recipe in self.recipes if recipe is not None]
        each = [estimate(self.source.config, r, calibration=shape, **settings) for r in real]
        passes, held = self._scoring(windows, context)
        solving = sum(found.seconds["compress"] for found in each)
        operations = {"search": 0.0}
        for found in each:
            operations["search"] += sum(found.operations.values()) - found.operations["evaluate"]
        evaluated = estimate(self.source.config, None, calibration=None, **settings)
        operations["score"] = passes * evaluated.operations["evaluate"]
        seconds = {
            "start": evaluated.seconds["start"],
            "search": solving,
            "score": passes * evaluated.seconds["evaluate"],
        }
        most = max(found.peak for found in (*each, evaluated)) + held
        return Estimate(evaluated.parameters, operations, {"search": most}, seconds, 0)

    def _scoring(self, windows: int, context: int) -> tuple[float, int]:
        """Forward passes over the windows that scores take, and bytes that they hold."""
        config, options = self.source.config, len(self.recipes)
        one = 4 * windows * context * config.hidden
        if isinstance(self.allocation, SparsityMethod):
            return (1.0, 0) if windows else (0.0, 0)
        if self.diverges:
            each = [options * len(self.units(layer)) for layer in range(config.layers)]
            rest = sum(n * (config.layers - k) / config.layers for k, n in enumerate(each))
            return 2 + rest, (1 + max(each)) * one
        # A product of each option's and of the layer's own; there and back: three times as much.
        return 2 + options + 3 * self.gradients, config.layers * one * self.gradients

    def measure(self, known: walks.Known, report: walks.Report) -> list[walks.Row]:
        """The rows of the table, block by block."""
        windows = self.windows.calibration[: self.used] if self.used else None
        model = walks.Model(
            self.source, windows, self.plain["walk"]["chunk"], self.recipe.transform
        )
        if isinstance(self.allocation, SparsityMethod):
            method = self.allocation

            def sparse(layer: int, block: Any, chunks: list[Any]) -> list[walks.Row]:
                return sparsity.block_rows(block, self.units(layer), chunks, method)

            return walks.forward(model, sparse, known, report)
        if self.gradients:
            return walks.backward(model, self._rows, self._paths, known, report)
        base = walks.last(model) if self.diverges else []

        def rows(layer: int, block: Any, chunks: list[Any]) -> list[walks.Row]:
            return self._rows(layer, block, chunks, base=base, model=model)

        return walks.forward(model, rows, known, report)

    def _paths(self, layer: int) -> list[str]:
        return [path for unit in self.units(layer) for path in unit.paths]

    def _rows(
        self, layer: int, block: Any, chunks: list[Any], gradients: Any = None, *,
        base: list[Any] | None = None, model: walks.Model | None = None,
    ) -> list[walks.Row]:  # fmt: skip
        """A block's units, with what each option costs and its score."""
        found, plain = self.allocation, self.plain
        assert isinstance(found, Mixed)
        own, paths = self.units(layer), frozenset(self._paths(layer))
        key = jax.random.fold_in(jax.random.key(plain["seeds"]["method"]), layer)
        options = [mixed.solved(block, chunks, self._methods(recipe, layer), paths, key)
                   for recipe in self.recipes]  # fmt: skip
        tokens = found.latency_tokens if "seconds" in found.budgets else 0
        experts = self.source.config.experts
        width, chosen = plain["walk"]["dense_dtype"] or "float32", experts.chosen if experts else 1
        rows = [mixed.cost_row(block, unit, options, width, chosen, tokens) for unit in own]
        if isinstance(found.score, mixed.Sensitivity):
            scores = mixed.layer_scores(block, own, options, chunks, gradients, found.score)
        else:
            assert model is not None and base is not None
            scores = _divergences(model, layer, block, own, options, chunks, base)
        return [{**row, "score": score} for row, score in zip(rows, scores, strict=True)]

    def _methods(self, recipe: Recipe | None, layer: int) -> Any:
        return None if recipe is None else recipe.block(self.source.config, layer).__getitem__

    def solve(self, rows: list[walks.Row]) -> dict[str, Any]:
        """What is allocated, and the rules that it comes to."""
        if isinstance(self.allocation, Mixed):
            return mixed.solve(rows, self.allocation)
        step = sparsity.step_of(self.plain)
        return sparsity.solve(rows, self.allocation, self.plain[step]["sparsity"], step)


def _divergences(model, layer, block, own, options, chunks, base) -> list[list[float]]:
    """Of each unit's options: what leaves the block with it, brought to the end."""
    branches: dict[tuple[int, int], list[Any]] = {}
    for u, unit in enumerate(own):
        for n, option in enumerate(options):
            if option:
                copy = mixed.changed(block, unit, option)
                branches[u, n] = list(chunks)
                walks.through(copy, branches[u, n])
                walks.surgery.release(copy)
    found = walks.divergences(model, layer, list(branches.values()), base)
    by_branch = dict(zip(branches, found, strict=True))
    return [[by_branch.get((u, n), 0.0) for n in range(len(options))] for u in range(len(own))]


def plan(config: DictConfig, source: Source) -> Plan:
    """Open what the configuration names; raises UserError for what cannot be searched."""
    plain = resolved(config)
    if not config.get("allocation"):
        raise UserError("allocation=none leaves nothing to search: choose one, such as mixed.")
    allocation, recipe = build(config, "allocation"), build_recipe(config, source.config)
    windows = planning.open_windows(config, source, plain)
    if recipe.rotation is not None:
        source = recipe.rotation(source, windows.calibration)
    if isinstance(allocation, Mixed):
        recipes = tuple(
            None
            if o is None
            else build_recipe(with_settings(config, "algorithm", o), source.config)
            for o in allocation.options
        )
    else:
        sparsity.step_of(plain)
        recipes = ()
    found = Plan(
        source, allocation, recipe, recipes, windows, plain,
        hardware.Hardware(**plain["hardware"]),
    )  # fmt: skip
    _require(found)
    return found


def _require(plan: Plan) -> None:
    for number, recipe in enumerate(plan.recipes):
        if recipe is None:
            continue
        if isinstance(recipe.default, BlockwiseMethod):
            raise UserError(
                f"allocation.options[{number}] learns a whole block, and options are tried layer "
                "by layer: choose algorithms such as rtn, gptq, hqq or wanda."
            )
        streaming.check_shapes(plan.source, recipe)
    layers = range(plan.source.config.layers)
    if not any(plan.units(layer) for layer in layers):
        raise UserError("rules name every layer: nothing is left for the search to decide.")
    if plan.gradients or plan.diverges:
        require_predictions(plan.source.config, "options scored by the model's predictions")
    mixtures = [n for n in layers for site in sites(plan.source.config, n) if site.experts]
    if plan.gradients and mixtures:
        raise UserError(
            f"Block {mixtures[0]} is a mixture of experts, whose tokens' gradients this score does "
            "not take apart: choose allocation/score=kl or output_error."
        )
