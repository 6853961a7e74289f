"""Search for what each layer should get, within budgets: python -m experiments.search --help"""

import time
from typing import Any

from omegaconf import DictConfig
from rich import box
from rich.table import Table

from experiments import allocated, memory, records
from experiments.checkpoints.sources import of_weights
from experiments.compress import data_facts
from experiments.entry import build, entry_point, resolved
from experiments.progress import console
from experiments.runs import run as runs
from experiments.runs.first import STRUCTURE
from experiments.searching import elastic_planning, measuring, planning
from experiments.searching.tables import Measured, measured_before


def run(config: DictConfig) -> runs.Run:
    """Measure, choose, record: given back if finished before, gone on with if interrupted.

    A structure that has to be searched for comes first, and is all without an allocation.
    """
    if allocated.begins_with_structure(config):
        if not config.get("allocation"):
            asked = allocated.search_config(config, STRUCTURE)
            asked.again = config.again
            return _structure(asked)
        config, _ = allocated.with_structure(config)
    at = runs.place("search", resolved(config))
    return runs.finished(at) or _run(config, at)


def prepare(config: DictConfig) -> planning.Plan | elastic_planning.Plan:
    """What the configuration asks for, opened but not loaded, and what it will take."""
    if allocated.begins_with_structure(config) and not config.get("allocation"):
        return elastic_planning.plan(allocated.search_config(config, STRUCTURE))
    config, _ = allocated.with_structure(config)
    return _plan(config)


def _plan(config: DictConfig) -> planning.Plan:
    return planning.plan(config, of_weights(build(config, "model")))


def _structure(config: DictConfig) -> runs.Run:
    at = runs.place("search", resolved(config))
    if done := runs.finished(at):
        return done
    plan = elastic_planning.plan(config)
    plan.require(at.folder)
    with runs.begin(at) as run:
        entries = run.journal.entries
        timed = {e["shape"]: e["seconds"] for e in entries("timed")}
        known = [e["trial"] for e in entries("trial")]
        with run.recorder.phase("search"):
            found = plan.search(plan.costs(timed, run.note), known, run.note)
        return run.finish(
            model=plan.source.facts(),
            data=data_facts(plan.windows) | {"searched": len(plan.used)},
            search=found,
            estimate=plan.estimate.facts(),
        )


def _run(config: DictConfig, at: runs.Place) -> runs.Run:
    plan, before = _plan(config), measured_before(at)
    if before is None:
        plan.require(at.folder)
    with runs.begin(at) as run:
        last = time.perf_counter()

        def report(layer: int, rows: list[dict[str, Any]]) -> None:
            nonlocal last
            now = time.perf_counter()
            run.note(
                "measured", layer=layer, rows=rows, seconds=now - last, peak_memory=memory.peak()
            )
            last = now

        known = before or _so_far(run)
        if known.identity:
            console.print(f"measured already, by the search {known.identity[:12]}")
        with run.recorder.phase("search"):
            rows = measuring.measure(plan.job, known.rows, report)
        found: dict[str, Any] = {"seconds": known.seconds + run.recorder.seconds["search"]}
        found |= {"measured_by": known.identity} if known.identity else {}
        with run.recorder.phase("solve"):
            found |= plan.solve(rows)
        return run.finish(
            model=plan.job.source.facts(),
            data=data_facts(plan.windows) | {"searched": plan.used},
            search=found,
            estimate=plan.facts(),
        )


def _so_far(run: runs.OpenRun) -> Measured:
    """What an interrupted attempt of this search measured."""
    entries = list(run.journal.entries("measured"))
    rows = {entry["layer"]: entry["rows"] for entry in entries}
    return Measured(None, rows, sum(entry.get("seconds", 0.0) for entry in entries))


def table(search: dict[str, Any]) -> Table:
    """What was chosen, by how many units; or how sparse they are."""
    drawn = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    if "trials" in search:
        return _subnetworks(drawn, search)
    if "options" not in search:
        for name in ("unit", "sparsity"):
            drawn.add_column(name)
        for unit in search["units"]:
            drawn.add_row(unit["unit"], f"{unit['sparsity']:.4f}")
        return drawn
    for name in ("option", "units", "score of all so", "bits of all so"):
        drawn.add_column(name, justify="left" if name == "option" else "right")
    chosen = [unit["chosen"] for unit in search["units"]]
    for n, (option, alike) in enumerate(zip(search["options"], search["uniform"], strict=True)):
        drawn.add_row(
            str(option), str(chosen.count(n)), f"{alike['score']:.4g}", f"{alike['bits']:.3f}"
        )
    drawn.add_row(
        "chosen", str(len(chosen)), f"{search['score']:.4g}", f"{search['totals']['bits']:.3f}"
    )
    return drawn


SHOWN = 8  # sub-networks of those that were evaluated


def _subnetworks(drawn: Table, search: dict[str, Any]) -> Table:
    """The best ones."""
    for name in (*search["choices"], "loss", *search["totals"]):
        drawn.add_column(name, justify="right")
    best = sorted(search["trials"], key=lambda trial: trial["loss"])[:SHOWN]
    for trial in best:
        sizes = [str(trial["sizes"][name]) for name in search["choices"]]
        costs = [f"{value:.4g}" for value in trial["costs"].values()]
        drawn.add_row(*sizes, f"{trial['loss']:.4f}", *costs)
    drawn.caption = f"{search['evaluated']} evaluated of {search['space']}; the first is chosen"
    return drawn


@entry_point("search")
def main(config: DictConfig) -> runs.Run:
    done = run(config)
    console.print(table(done.record["search"]))
    console.print(f"record: {done.folder / records.FILE}", soft_wrap=True)
    return done


if __name__ == "__main__":
    main()
