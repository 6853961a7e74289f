"""Make the library that a structure chooses from: python -m experiments.library --help"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from rich import box
from rich.table import Table

from experiments import hardware, memory, planning, records, streaming
from experiments.checkpoints.sources import of_weights, require_predictions
from experiments.compress import data_facts
from experiments.data.windows import Windows
from experiments.entry import build, entry_point, resolved
from experiments.errors import UserError
from experiments.estimate import Estimate, estimate
from experiments.progress import console
from experiments.runs import run as runs
from experiments.structures import library
from experiments.structures.alternatives import whole
from experiments.structures.puzzle import Puzzle


@dataclasses.dataclass(frozen=True)
class Plan:
    """A library's parts, opened but not made, and what they will take."""

    job: library.Job
    windows: Windows
    hardware: hardware.Hardware
    batch: int
    steps: int

    def require(self, folder: Path) -> None:
        """Refuse what memory or disk will not hold; raises UserError with the numbers."""
        found, memory = self.estimate(), self.hardware.assumed_memory()
        hardware.require(found, memory=memory, folder=folder)
        hardware.announce(found, folder)

    def show(self) -> None:
        """Print the estimate."""
        console.print(hardware.describe(self.estimate()))

    def facts(self) -> dict[str, Any]:
        """For the record: what was expected, beside what came."""
        return self.estimate().facts()

    def estimate(self) -> Estimate:
        """Passes of windows through all blocks: of the text itself; of each alternative's training,
        a gradient being two more; and of the rest of the model behind each.
        """
        job, config = self.job, self.job.source.config
        (train, context), score = job.train.shape, len(job.score)
        own = whole(config)
        others = [each for each in job.alternatives if each.size != own[each.part]]
        trained = [each for each in others if each.size]
        whole_pass = estimate(
            config, None, calibration=None, heldout=(score, context), evaluation_chunk=job.chunk,
            walk=streaming.Walk(chunk=job.chunk), views=job.source.views,
            rate=self.hardware.assumed_rate(), base=hardware.process_memory(),
        )  # fmt: skip
        windows = {
            "library": train + len(trained) * (3 * self.steps * self.batch + 2 * train),
            "score": score * (2 + len(others) / 2),
        }
        one = 4 * context * config.hidden
        weights = library.weights_of(config, job.alternatives)
        held = (4 * train + (2 + len(others)) * score) * one + 4 * 4 * weights
        work, time = whole_pass.operations["evaluate"], whole_pass.seconds["evaluate"]
        return Estimate(
            whole_pass.parameters,
            {name: n / score * work for name, n in windows.items()},
            {"library": whole_pass.peak + held},
            {"start": whole_pass.seconds["start"]}
            | {name: n / score * time for name, n in windows.items()},
            4 * weights * config.layers,
        )


def run(config: DictConfig) -> runs.Run:
    """Make, record: given back if finished before, gone on with if interrupted."""
    at = runs.place("library", resolved(config))
    return runs.finished(at) or _run(config, at)


def prepare(config: DictConfig) -> Plan:
    """What the configuration asks for, opened but not loaded; raises UserError for what has no
    library.
    """
    plain, structure = resolved(config), build(config, "structure")
    if not isinstance(structure, Puzzle):
        raise UserError("A library is what structure=puzzle chooses from: leave out the other one.")
    if structure.budgets:
        raise UserError(
            "structure.budgets are of a choice, and one library serves all of them: leave them to "
            "experiments.compress structure=puzzle."
        )
    source = of_weights(build(config, "model"))
    require_predictions(source.config, "predictions to score alternatives by")
    alternatives = structure.alternatives(source.config)
    windows = planning.open_windows(config, source, plain)
    train, score = split(windows.calibration, structure)
    job = library.Job(
        source, alternatives, structure.method, train, score, plain["walk"]["chunk"],
        structure.context, structure.latency_tokens, plain["seeds"]["method"],
    )  # fmt: skip
    machine = hardware.Hardware(**plain["hardware"])
    return Plan(job, windows, machine, structure.batch, structure.steps)


def split(calibration: np.ndarray, structure: Puzzle) -> tuple[np.ndarray, np.ndarray]:
    """Windows to train on, and to score on."""
    if len(calibration) <= structure.score_windows:
        raise UserError(
            f"structure.score_windows={structure.score_windows} of {len(calibration)} calibration "
            "windows leave none to train on: raise data.calibration."
        )
    return calibration[: -structure.score_windows], calibration[-structure.score_windows :]


def _run(config: DictConfig, at: runs.Place) -> runs.Run:
    plan = prepare(config)
    job, shape = plan.job, plan.job.source.config
    plan.require(at.folder)
    with runs.begin(at) as run:

        def report(row: library.Row) -> None:
            run.note("block", row=row, peak_memory=memory.peak())

        known = {entry["row"]["layer"]: entry["row"] for entry in run.journal.entries("block")}
        with run.recorder.phase("measure"):
            settings = (job.context, job.latency_tokens)
            costs = library.costs_of(shape, job.alternatives, *settings)
            parent = library.costs_of(shape, library.parents(shape), *settings)
        with run.recorder.phase("library"):
            rows = library.make(job, at.folder / "library", known, report, run.claim.check)
        return run.finish(
            model=job.source.facts(),
            data=data_facts(plan.windows) | {"trained": len(job.train), "scored": len(job.score)},
            library={
                "alternatives": [list(each) for each in job.alternatives],
                "costs": costs,
                "parent": parent,
                "scores": [row["scores"] for row in rows],
                "losses": [row["losses"] for row in rows],
            },
            estimate=plan.facts(),
        )


def table(made: dict[str, Any]) -> Table:
    """Every alternative over all blocks."""
    drawn = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in ("alternative", "parameters", "error as cut", "trained", "KL, median", "largest"):
        drawn.add_column(name, justify="left" if name == "alternative" else "right")
    for n, (part, size) in enumerate(made["alternatives"]):
        losses = [block[n] for block in made["losses"]]
        scores = [block[n] for block in made["scores"]]
        drawn.add_row(
            f"{part} {size}", f"{made['costs'][n]['parameters'] / 1e6:.3f} M",
            *(f"{np.mean([loss[when] for loss in losses]):.2e}" for when in ("before", "after")),
            f"{np.median(scores):.2e}", f"{max(scores):.2e}",
        )  # fmt: skip
    return drawn


@entry_point("library")
def main(config: DictConfig) -> runs.Run:
    done = run(config)
    console.print(table(done.record["library"]))
    console.print(f"record: {done.folder / records.FILE}", soft_wrap=True)
    return done


if __name__ == "__main__":
    main()
