"""What a search would do and take, worked out from its configuration before it begins."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
from experiments.searching import mixed, sparsity
from experiments.searching.measuring import Job
from experiments.searching.mixed import Mixed
from models.decoder import sites


@dataclasses.dataclass(frozen=True)
class Plan:
    """A search's parts, opened but not loaded, and what they will take."""

    job: Job
    windows: Windows
    plain: dict[str, Any]
    hardware: hardware.Hardware

    @property
    def used(self) -> int:
        """Windows that are looked at."""
        return 0 if self.job.windows is None else len(self.job.windows)

    def require(self, folder: Path) -> None:
        """Refuse a search that memory will not hold; raises UserError with the numbers."""
        found, memory = self._estimate(self.used), self.hardware.assumed_memory()
        hardware.require(found, memory=memory, folder=folder, alternatives=self._fewer())
        hardware.announce(found, folder)

    def show(self) -> None:
        """Print the estimate."""
        console.print(hardware.describe(self._estimate(self.used)))

    def facts(self) -> dict[str, Any]:
        """For the record: what was expected, beside what came."""
        return self._estimate(self.used).facts()

    def solve(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """What is allocated, and the rules that it comes to."""
        found = self.job.allocation
        if isinstance(found, Mixed):
            return mixed.solve(rows, found)
        step = sparsity.step_of(self.plain)
        return sparsity.solve(rows, found, self.plain[step]["sparsity"], step)

    def _fewer(self) -> Iterator[tuple[str, Estimate]]:
        """Settings that take less memory, each with its estimate."""
        windows = self.used if isinstance(self.job.allocation, Mixed) else 0
        while windows > 1:
            windows //= 2
            yield f"allocation.windows={windows}", self._estimate(windows)

    def _estimate(self, windows: int) -> Estimate:
        """As many compressions as there are options, none of them written, and passes to score."""
        job, context = self.job, self.windows.calibration.shape[1]
        settings: dict[str, Any] = dict(
            views=job.source.views, heldout=(max(windows, 1), context), evaluation_chunk=job.chunk,
            walk=streaming.Walk(sequential=False, chunk=job.chunk),
            rate=self.hardware.assumed_rate(), base=hardware.process_memory(),
        )  # fmt: skip
        shape = (windows, context) if windows else None
        real = [recipe for recipe in job.recipes if recipe is not None]
        each = [estimate(job.source.config, r, calibration=shape, **settings) for r in real]
        whole = estimate(job.source.config, None, calibration=None, **settings)
        passes, held = self._scoring(windows, context)
        solving = [sum(f.operations.values()) - f.operations["evaluate"] for f in each]
        return Estimate(
            whole.parameters,
            {"search": sum(solving), "score": passes * whole.operations["evaluate"]},
            {"search": max(found.peak for found in (*each, whole)) + held},
            {
                "start": whole.seconds["start"],
                "search": sum(found.seconds["compress"] for found in each),
                "score": passes * whole.seconds["evaluate"],
            },
            0,
        )

    def _scoring(self, windows: int, context: int) -> tuple[float, int]:
        """Forward passes over the windows that scores take, and bytes that they hold."""
        job, layers, options = self.job, self.job.source.config.layers, len(self.job.recipes)
        one = 4 * windows * context * job.source.config.hidden
        if job.diverges:
            each = [options * len(job.units(layer)) for layer in range(layers)]
            rest = sum(n * (layers - layer) / layers for layer, n in enumerate(each))
            return 2 + rest, (1 + max(each)) * one
        if not options:
            return float(windows > 0), 0
        # A product of each option's and of the layer's own; there and back: three times as much.
        return 2 + options + 3.0 * job.gradients, layers * one * job.gradients


def plan(config: DictConfig, source: Source) -> Plan:
    """Open what the configuration names; raises UserError for what cannot be searched."""
    plain = resolved(config)
    if not config.get("allocation"):
        raise UserError("allocation=none leaves nothing to search: choose one, such as mixed.")
    found, windows = build(config, "allocation"), planning.open_windows(config, source, plain)
    walk = plain["walk"]
    source, recipe, _ = planning.changed(config, source, windows, walk["chunk"])
    options = found.options if isinstance(found, Mixed) else ()
    if not isinstance(found, Mixed):
        sparsity.step_of(plain)
    recipes = tuple(
        None
        if option is None
        else build_recipe(
            with_settings(config, "algorithm", option), source.config, recipe.structure
        )
        for option in options
    )
    job = Job(
        source, found, recipe, recipes, _looked_at(found, windows), walk["chunk"],
        walk["dense_dtype"] or "float32", plain["seeds"]["method"],
    )  # fmt: skip
    _require(job)
    return Plan(job, windows, plain, hardware.Hardware(**plain["hardware"]))


def _looked_at(found: Mixed | SparsityMethod, windows: Windows) -> Any:
    """The windows of the calibration's that are looked at."""
    if isinstance(found, Mixed):
        return windows.calibration[: found.windows]
    return None if found.observe is None else windows.calibration


def _require(job: Job) -> None:
    config = job.source.config
    for number, recipe in enumerate(job.recipes):
        if recipe is None:
            continue
        if isinstance(recipe.default, BlockwiseMethod):
            raise UserError(
                f"allocation.options[{number}] learns a whole block, and options are tried layer "
                "by layer: choose algorithms such as rtn, gptq, hqq or wanda."
            )
        streaming.check_shapes(job.source, recipe)
    if not any(job.units(layer) for layer in range(config.layers)):
        raise UserError("rules name every layer: nothing is left for the search to decide.")
    if job.gradients or job.diverges:
        require_predictions(config, "options scored by the model's predictions")
    mixtures = [n for n in range(config.layers) for site in sites(config, n) if site.experts]
    if job.gradients and mixtures:
        raise UserError(
            f"Block {mixtures[0]} is a mixture of experts, whose tokens' gradients this score does "
            "not take apart: choose allocation/score=kl or output_error."
        )
