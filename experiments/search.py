"""Search for what each layer should get, within budgets: python -m experiments.search --help"""

from typing import Any

from omegaconf import DictConfig
from rich import box
from rich.table import Table

from experiments import memory, records
from experiments.checkpoints.sources import of_weights
from experiments.compress import data_facts
from experiments.entry import build, entry_point, resolved
from experiments.progress import console
from experiments.runs import run as runs
from experiments.searching import measuring, planning
from experiments.searching.tables import measured_before


def run(config: DictConfig) -> runs.Run:
    """Measure, choose, record: given back if finished before, gone on with if interrupted."""
    plain = resolved(config)
    at = runs.place("search", plain)
    return runs.finished(at) or _run(config, at)


def prepare(config: DictConfig) -> planning.Plan:
    """What the configuration asks for, opened but not loaded, and what it will take."""
    return planning.plan(config, of_weights(build(config, "model")))


def _run(config: DictConfig, at: runs.Place) -> runs.Run:
    plan, before = prepare(config), measured_before(at)
    if before is None:
        plan.require(at.folder)
    with runs.begin(at) as run:

        def report(layer: int, rows: list[dict[str, Any]]) -> None:
            run.note("measured", layer=layer, rows=rows, peak_memory=memory.peak())

        if before is None:
            known = {entry["layer"]: entry["rows"] for entry in run.journal.entries("measured")}
        else:
            known = before.rows
            console.print(f"measured already, by the search {before.identity[:12]}")
        with run.recorder.phase("search"):
            rows = measuring.measure(plan.job, known, report)
        with run.recorder.phase("solve"):
            found = plan.solve(rows)
        return run.finish(
            model=plan.job.source.facts(),
            data=data_facts(plan.windows) | {"searched": plan.used},
            search=found | ({} if before is None else {"measured_by": before.identity}),
            estimate=plan.facts(),
        )


def table(search: dict[str, Any]) -> Table:
    """What was chosen, by how many units; or how sparse they are."""
    drawn = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
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


@entry_point("search")
def main(config: DictConfig) -> runs.Run:
    done = run(config)
    console.print(table(done.record["search"]))
    console.print(f"record: {done.folder / records.FILE}", soft_wrap=True)
    return done


if __name__ == "__main__":
    main()
