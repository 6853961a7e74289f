"""Evaluate a model or a compressed checkpoint: python -m experiments.evaluate checkpoint=..."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from experiments import endpoints, planning, records, task_scores
from experiments.checkpoints.planish import Checkpoint
from experiments.checkpoints.sources import Source, open_source
from experiments.compress import data_facts
from experiments.data.windows import Windows
from experiments.endpoints import Endpoint
from experiments.entry import build, entry_point, resolved
from experiments.evaluation.footprint import bytes_on_disk, footprint
from experiments.progress import console
from experiments.report import table
from experiments.runs import run as runs


def open_model(config: DictConfig) -> Source | Endpoint:
    """What `checkpoint` names, or else the configured model."""
    return open_source(config.checkpoint) if config.checkpoint else build(config, "model")


def run(config: DictConfig) -> runs.Run:
    """Evaluate and record: given back if finished before."""
    plain = resolved(config)
    at = runs.place("evaluate", plain)
    return runs.finished(at) or _run(config, plain, at)


def prepare(config: DictConfig) -> planning.Plan | endpoints.Asking:
    """What the configuration asks for, opened but not loaded, and what it will take."""
    model = open_model(config)
    if isinstance(model, Endpoint):
        return endpoints.plan(config, model)
    return planning.plan(config, model, compressing=False)


def _run(config: DictConfig, plain: dict[str, Any], at: runs.Place) -> runs.Run:
    plan = prepare(config)
    plan.require(at.folder)
    with runs.begin(at) as run:
        model = plan.source.facts()
        with run.recorder.phase("evaluate"):
            metrics = plan.evaluation(plan.source, plan.windows)
        return run.finish(
            model=model,
            data=_data(plan.windows, metrics),
            metrics=metrics,
            estimate=plan.facts(),
            **_size(plan.source),
        )


def _data(windows: Windows | None, metrics: dict[str, Any]) -> dict[str, Any]:
    """What was evaluated on: windows, or the questions of tasks."""
    if windows is not None:
        return data_facts(windows)
    return {"tasks": {name: t["digest"] for name, t in metrics["tasks"].items() if "digest" in t}}


def _size(source: Source | Endpoint) -> dict[str, Any]:
    if isinstance(source, Endpoint):
        return {}
    if not isinstance(source, Checkpoint):
        found = {"stored_as": source.stored_as} if source.stored_as else {}
        return {"bytes_on_disk": bytes_on_disk(Path(source.location)), **found}
    return {
        "recipe": source.description["recipe"],
        "footprint": footprint(source.config, source.description["tensors"])._asdict(),
        "bytes_on_disk": bytes_on_disk(Path(source.location)),
    }


@entry_point("evaluate")
def main(config: DictConfig) -> runs.Run:
    done = run(config)
    shown = task_scores.table if task_scores.tasks_of(done.record) else table
    console.print(shown([done.record]))
    console.print(f"record: {done.folder / records.FILE}", soft_wrap=True)
    return done


if __name__ == "__main__":
    main()
