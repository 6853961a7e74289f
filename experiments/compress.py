"""Compress a model, evaluate it, record what it cost: python -m experiments.compress --help"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from experiments import (
    allocated,
    exporting,
    memory,
    planning,
    records,
    streaming,
    task_scores,
)
from experiments.checkpoints.exports import Export, Writer
from experiments.checkpoints.planish import DESCRIPTION, Checkpoint, CheckpointWriter
from experiments.checkpoints.sources import of_weights
from experiments.data.windows import Windows
from experiments.entry import build, entry_point, resolved
from experiments.errors import UserError
from experiments.evaluation.footprint import bytes_on_disk, footprint
from experiments.progress import console
from experiments.recipes import steps
from experiments.report import table
from experiments.runs import run as runs


def run(config: DictConfig) -> runs.Run:
    """Compress, evaluate, record: given back if finished before, gone on with if interrupted.

    What is asked for beside the checkpoint is added to a finished run that has it not.
    """
    plain = resolved(config)
    at = runs.place("compress", plain)
    done, export = runs.finished(at), exporting.chosen(config)
    if done is None:
        return _run(config, plain, at)
    if export is not None:
        exporting.add(done, export)
    return done


def prepare(config: DictConfig) -> planning.Plan:
    """What the configuration asks for, opened but not loaded, and what it will take."""
    return _plan(allocated.with_rules(config)[0])


def _plan(config: DictConfig) -> planning.Plan:
    return planning.plan(config, of_weights(build(config, "model")), compressing=True)


def _run(config: DictConfig, plain: dict[str, Any], at: runs.Place) -> runs.Run:
    ruled, search = allocated.with_rules(config)
    plan = _plan(ruled)
    source, windows = plan.source, plan.windows
    assert windows is not None
    plan.require(at.folder)
    with runs.begin(at) as run:
        notes = {
            "identity": at.identity,
            "recipe": steps(resolved(ruled)),
            "source": source.facts(),
            "calibration": {"name": windows.name, "digest": windows.digest},
        }
        export = _begin_export(run, plan, exporting.chosen(config), at.identity)
        layers = _compress(run, plan, plain["seeds"]["method"], notes, export)
        compressed = Checkpoint(run.folder / "checkpoint")
        with run.recorder.phase("evaluate"):
            metrics = plan.evaluation(compressed, windows)
        size = footprint(compressed.config, compressed.description["tensors"])._asdict()
        if export is not None:
            exporting.complete(compressed, export, {"metrics": metrics, "footprint": size})
        cut = compressed.description.get("structure")
        return run.finish(
            model=notes["source"],
            **({} if cut is None else {"structure": cut}),
            data=data_facts(windows),
            metrics=metrics,
            footprint=size,
            bytes_on_disk=bytes_on_disk(run.folder / "checkpoint"),
            layers=[dataclasses.asdict(layer) for layer in layers],
            estimate=plan.facts(),
            **search,
        )


def _begin_export(
    run: runs.OpenRun, plan: planning.Plan, export: Export | None, identity: str
) -> Writer | None:
    """What writes the export, unless an earlier attempt finished it."""
    if export is None or exporting.place(run.folder, export).exists():
        return None
    writer = export.writer(
        exporting.place(run.folder, export), plan.source.config,
        origin=identity, check=run.claim.check,
    )  # fmt: skip
    for part in writer.damaged:
        run.warn(f"{part} of the export was damaged: it is written again.")
    return writer


def _compress(
    run: runs.OpenRun,
    plan: planning.Plan,
    seed: int,
    notes: Mapping[str, Any],
    export: Writer | None,
) -> list[streaming.LayerReport]:
    """The checkpoint in the run's folder, from wherever an earlier attempt left it."""
    source, known = plan.source, _known(run)
    if (run.folder / "checkpoint" / DESCRIPTION).is_file():
        if missing := set(range(source.config.layers)) - set(known):
            raise UserError(
                f"{run.journal.path} lacks block {min(missing)} of the finished checkpoint beside "
                "it: restore it, or remove the run's folder to begin anew."
            )
        layers = [known[layer] for layer in range(source.config.layers)]
        run.recorder.seconds["compress"] = sum(sum(layer.seconds.values()) for layer in layers)
        return layers
    assert plan.recipe is not None
    writer = _writer(run, export)
    for part in writer.damaged:
        run.warn(f"{part} in {writer.partial} was damaged: it is compressed again.")

    def report(layer: streaming.LayerReport) -> None:
        run.note("layer", **dataclasses.asdict(layer), peak_memory=memory.peak())
        for site, found in layer.notes.items():
            if lost := found.get("unreached_experts"):
                run.warn(
                    f"Block {layer.layer}, {site}: no calibration token reached "
                    f"{', '.join(f'mlp.experts.{n}' for n in lost)}; calibrated on every token "
                    "that their mixture reads."
                )
            if dead := int(found.get("dead_inputs", 0)):
                run.warn(
                    f"Block {layer.layer}, {site}: {dead} inputs are zero in all calibration text; "
                    "their weights do nothing there and were set to zero."
                )

    assert plan.windows is not None
    with run.recorder.phase("compress"):
        layers = streaming.compress_model(
            source, writer, plan.recipe, plan.windows.calibration, plan.walk,
            seed=seed, known=known, report=report,
        )  # fmt: skip
        cut = {} if plan.cut is None else {"structure": plan.cut.removed()}
        writer.finish(source.config, source.tokenizer(), {**notes, **cut})
    before = [layer for layer in layers if layer.layer in known and layer is known[layer.layer]]
    run.recorder.seconds["compress"] += sum(sum(layer.seconds.values()) for layer in before)
    return layers


def _writer(run: runs.OpenRun, export: Writer | None) -> CheckpointWriter:
    folder = run.folder / "checkpoint"
    if export is None:
        return CheckpointWriter(folder, check=run.claim.check)
    return exporting.ExportingWriter(folder, export, check=run.claim.check)


def _known(run: runs.OpenRun) -> dict[int, streaming.LayerReport]:
    """What earlier attempts at this run noted of the blocks that they finished."""
    fields = [field.name for field in dataclasses.fields(streaming.LayerReport)]
    entries = run.journal.entries("layer")
    return {e["layer"]: streaming.LayerReport(**{f: e[f] for f in fields}) for e in entries}


def data_facts(windows: Windows) -> dict[str, Any]:
    """What a record says of its data; tokens: all of them, calibration and held out."""
    return {
        "name": windows.name,
        "digest": windows.digest,
        "calibration": list(windows.calibration.shape),
        "heldout": list(windows.heldout.shape),
        "tokens": int(windows.calibration.size + windows.heldout.size),
    }


@entry_point("compress")
def main(config: DictConfig) -> runs.Run:
    done = run(config)
    console.print(table([done.record]))
    if task_scores.tasks_of(done.record):
        console.print(task_scores.table([done.record]))
    console.print(f"checkpoint: {done.checkpoint}", soft_wrap=True)
    if (export := exporting.chosen(config)) is not None:
        console.print(f"export:     {exporting.place(done.folder, export)}", soft_wrap=True)
    console.print(f"record:     {done.folder / records.FILE}", soft_wrap=True)
    return done


if __name__ == "__main__":
    main()
