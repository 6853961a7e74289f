"""What a search over sub-networks would do and take, worked out before it begins."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from omegaconf import DictConfig

from algorithms.search.once_for_all import Places, Space
from experiments import hardware, planning
from experiments.checkpoints.loading import load_model, outline
from experiments.checkpoints.sources import Source, of_weights, require_predictions
from experiments.data.windows import Windows
from experiments.entry import build, resolved
from experiments.estimate import CALLS, COMPILING, STARTING, Estimate
from experiments.operations import size, work
from experiments.progress import console
from experiments.searching import subnetworks
from experiments.searching.subnetworks import Costs, Evaluator, Note, Trial
from experiments.structures.once_for_all import OnceForAll
from experiments.structures.supernet import places_of


@dataclasses.dataclass(frozen=True)
class Plan:
    """A search's parts, opened but not loaded, and what they will take."""

    source: Source
    found: OnceForAll
    space: Space
    places: Places
    windows: Windows
    plain: dict[str, Any]
    estimate: Estimate

    @property
    def used(self) -> Int[np.ndarray, "n T"]:
        """Windows that are looked at."""
        return self.windows.calibration[: self.found.windows]

    def require(self, folder: Path) -> None:
        """Refuse a search that memory will not hold; raises UserError with the numbers."""
        memory = hardware.Hardware(**self.plain["hardware"]).assumed_memory()
        hardware.require(self.estimate, memory=memory, folder=folder)
        hardware.announce(self.estimate, folder)

    def show(self) -> None:
        """Print the estimate."""
        console.print(hardware.describe(self.estimate))

    def costs(self, timed: dict[str, float], note: Note) -> Costs:
        """Raises UserError for budgets that no sub-network is within."""
        dtype = self.plain["walk"]["dense_dtype"] or "float32"
        found = Costs(
            self.source.config, self.space, itemsize=jnp.dtype(dtype).itemsize,
            tokens=self.found.latency_tokens, timed=timed, note=note,
        )  # fmt: skip
        subnetworks.require_feasible(self.found, self.space, found.of, list(self.found.budgets))
        return found

    def require_feasible(self) -> None:
        """The same before anything is measured."""
        given = {name: n for name, n in self.found.budgets.items() if name != "seconds"}
        if given or not self.found.budgets:
            less = dataclasses.replace(self.found, budgets=given)
            dataclasses.replace(self, found=less).costs({}, lambda *_, **__: None)

    def search(self, costs: Costs, known: list[Trial], note: Note) -> dict[str, Any]:
        evaluate = Evaluator(
            load_model(self.source), self.space, self.places, self.used, self.plain["walk"]["chunk"]
        )
        seed = self.plain["seeds"]["method"]
        return subnetworks.search(self.found, self.space, evaluate, costs.of, seed, known, note)


def plan(config: DictConfig) -> Plan:
    """Open what the configuration names; raises UserError for what cannot be searched."""
    source, plain = of_weights(build(config, "model")), resolved(config)
    found = build(config, "structure")
    require_predictions(source.config, "sub-networks scored by their predictions")
    space = found.space(source)
    module = outline(source)
    places = places_of(module, source.config)
    windows = planning.open_windows(config, source, plain)
    made = Plan(
        source, found, space, places, windows, plain,
        _estimate(module, found, space, places, windows, plain),
    )  # fmt: skip
    made.require_feasible()
    return made


def _estimate(
    module: Any, found: OnceForAll, space: Space, places: Places, windows: Windows,
    plain: dict[str, Any],
) -> Estimate:  # fmt: skip
    machine = hardware.Hardware(**plain["hardware"])
    count, context = windows.calibration[: found.windows].shape
    chunk = min(plain["walk"]["chunk"], count)
    evaluate = Evaluator(module, space, places, windows.calibration, chunk)
    one = work(
        subnetworks.window_losses, evaluate.split[1],
        jax.ShapeDtypeStruct((chunk, context), "int32"),
        {name: jax.ShapeDtypeStruct((), "int32") for name, _ in space.choices},
        graph=evaluate.split[0], space=space, places=places,
    )  # fmt: skip
    trials = min(found.trials, len(space))
    operations = {"search": trials * count / chunk * one.operations}
    held = size(evaluate.split[1])
    memory = hardware.process_memory() + held + CALLS * one.temporaries
    spent = operations["search"] / machine.assumed_rate()
    return Estimate(
        parameters=held // 4, operations=operations, memory={"search": memory}, disk=0,
        seconds={"start": STARTING + COMPILING * one.equations, "search": spent},
    )  # fmt: skip
