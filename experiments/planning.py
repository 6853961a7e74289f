"""What a run would take, worked out from its configuration before it begins: the real run refuses
what will not fit, a dry run shows it.
"""

from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from experiments import exporting, hardware, libraries, streaming
from experiments.checkpoints.cut import SmallerSource
from experiments.checkpoints.sources import Source
from experiments.data.windows import Windows
from experiments.entry import build, resolved
from experiments.errors import UserError
from experiments.estimate import Estimate, estimate
from experiments.evaluation.tasks import Tasks
from experiments.progress import console
from experiments.recipe_builder import build_recipe, build_structure
from experiments.recipes import Recipe


class Plan(NamedTuple):
    """A run's parts, opened but not loaded, and what they will take."""

    source: Source
    recipe: Recipe | None  # None evaluates only
    windows: Windows | None  # None where only tasks are done, which bring their own questions
    evaluation: Any  # called with a model and the windows, metrics
    walk: streaming.Walk
    estimate: Estimate
    settings: dict[str, Any]  # the arguments of `estimate`
    hardware: hardware.Hardware
    cut: SmallerSource | None = None  # the smaller model that a structure makes, before other steps

    def require(self, folder: Path) -> None:
        """Refuse a run that memory or disk will not hold; raises UserError with the numbers."""
        others = hardware.smaller(self.source.config, self.recipe, **self.settings)
        if isinstance(self.evaluation, Tasks):  # no window could be left out
            others = iter(())
        memory = self.hardware.assumed_memory()
        hardware.require(self.estimate, memory=memory, folder=folder, alternatives=others)
        hardware.announce(self.estimate, folder)

    def show(self) -> None:
        """Print the estimate."""
        console.print(hardware.describe(self.estimate))

    def facts(self) -> dict[str, Any]:
        """For the record: what was expected, beside what came."""
        return self.estimate.facts()


def plan(config: DictConfig, source: Source, *, compressing: bool) -> Plan:
    """Open what the configuration names and estimate; raises UserError for what cannot be run."""
    plain = resolved(config)
    try:
        walk = streaming.Walk(**plain["walk"]) if compressing else streaming.Walk()
    except ValueError as error:
        raise UserError(f"walk: {error}") from error
    evaluation = build(config, "evaluation")
    tasks = isinstance(evaluation, Tasks)
    windows = None if tasks and not compressing else open_windows(config, source, plain)
    original, cut, recipe = source.config, None, None
    if compressing:
        assert windows is not None
        source, recipe, cut = changed(config, source, windows, walk.chunk)
        if recipe.cache is not None:
            source = recipe.cache(source)
        streaming.check_shapes(source, recipe)
    machine = hardware.Hardware(**plain["hardware"])
    heldout, chunk, passes = _evaluated(evaluation, windows, source, plain)
    settings: dict[str, Any] = dict(
        views=source.views,
        calibration=windows.calibration.shape if windows is not None and compressing else None,
        heldout=heldout,
        original=original,
        walk=walk,
        evaluation_chunk=chunk,
        rate=machine.assumed_rate(),
        base=hardware.process_memory(),
    )
    found = estimate(source.config, recipe, **settings).evaluated(passes)
    if recipe is not None and (export := exporting.chosen(config)) is not None:
        forms = exporting.forms(source.config, recipe)
        export.require(source.config, forms)
        more = export.disk(source.config, forms, found.disk)
        found = found._replace(disk=found.disk + more)
    return Plan(source, recipe, windows, evaluation, walk, found, settings, machine, cut)


def changed(
    config: DictConfig, source: Source, windows: Windows, chunk: int
) -> tuple[Source, Recipe, SmallerSource | None]:
    """The model that a recipe's steps go on with, once its structure and its coordinates are what
    they shall be; the recipe; and the smaller model before it is turned, if it is one.
    """
    structure, cut = build_structure(config), None
    if structure is not None:
        structure = libraries.with_library(config, structure)
        source = cut = structure(source, windows.calibration, chunk=chunk)
    recipe = build_recipe(config, source.config, structure)
    if recipe.rotation is not None:
        source = recipe.rotation(source, windows.calibration)
    return source, recipe, cut


def open_windows(config: DictConfig, source: Source, plain: dict[str, Any]) -> Windows:
    """The configured windows of tokens, as this model encodes them."""
    return build(config, "data").windows(
        source.tokenizer(), source.config.vocabulary, longest=source.config.context,
        seed=plain["seeds"]["data"],
    )  # fmt: skip


def _evaluated(
    evaluation: Any, windows: Windows | None, source: Source, plain: dict[str, Any]
) -> tuple[tuple[int, int], int, int]:
    """Windows and their length, how many at a time, and how often the blocks are read for them."""
    if isinstance(evaluation, Tasks):
        return evaluation.work(source)
    assert windows is not None
    count, length = windows.heldout.shape
    return (count, length), plain["evaluation"]["chunk"], 1
