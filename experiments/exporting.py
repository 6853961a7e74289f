"""Exports beside checkpoints: of a recipe while it is computed, and of what was computed before.

An export is a function of the checkpoint's tensors and of what a record says, so that it is the
same whether it was written along with the checkpoint, gone on with after an interruption, or made
of a finished one.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from experiments import programs, records
from experiments.checkpoint_size import each_kind, tensors_of
from experiments.checkpoints.exports import Export, Forms, Writer
from experiments.checkpoints.planish import Checkpoint, CheckpointWriter, Tensor, part_of
from experiments.checkpoints.sources import shapes
from experiments.entry import build
from experiments.recipes import ENDS, Recipe
from experiments.runs import run as runs
from experiments.runs.claim import claimed
from models.config import DecoderConfig


def chosen(config: DictConfig) -> Export | None:
    """What the configuration asks for beside the checkpoint."""
    return build(config, "export") if config.get("export") else None


def place(run_folder: Path, export: Export) -> Path:
    """Where a run keeps an export."""
    return run_folder / "export" / export.name


def forms(config: DecoderConfig, recipe: Recipe) -> Forms:
    """How a recipe leaves each layer, as shapes; None: dense. Nothing is computed."""
    found = {
        f"blocks.{layer}.{path}": tensors_of(config, kind).get(path)
        for layer, kind in enumerate(each_kind(config, recipe)) for path, _ in kind.methods
    }  # fmt: skip
    for path in ENDS:
        if f"{path}.weight" in shapes(config):
            method = recipe.method(path)
            shape = shapes(config)[f"{path}.weight"]
            found[path] = None if method is None else programs.end_shape(shape, method)
    return found


class ExportingWriter(CheckpointWriter):
    """A checkpoint's writer that gives each part to an export too."""

    def __init__(self, folder: Path, export: Writer, *, check: Callable[[], None]):
        super().__init__(folder, check=check)
        self._export = export
        for part in [name for name in self.parts if name not in export.parts]:
            held = self.read(part)
            export.write(part, {name: held.tensor(name) for name in held.described})

    def write(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        super().write(part, tensors)
        self._export.write(part, tensors)


def complete(checkpoint: Checkpoint, writer: Writer, measured: Mapping[str, Any]) -> None:
    """Write the parts of a finished checkpoint that its export lacks, and finish that."""
    parts: dict[str, list[str]] = {}
    for name in sorted(checkpoint.names()):
        parts.setdefault(part_of(name), []).append(name)
    for part, names in parts.items():
        if part not in writer.parts:
            writer.write(part, {name: checkpoint.tensor(name) for name in names})
    writer.finish(checkpoint.config, checkpoint.tokenizer(), notes_of(checkpoint, measured))


def notes_of(checkpoint: Checkpoint, measured: Mapping[str, Any]) -> dict[str, Any]:
    """What the export says of itself."""
    kept = ("identity", "recipe", "source", "calibration", "structure")
    said = {key: checkpoint.description[key] for key in kept if key in checkpoint.description}
    return said | {"measured": {k: measured.get(k) for k in ("metrics", "footprint")}}


def measured_of(folder: Path) -> Mapping[str, Any]:
    """The record beside a checkpoint, or nothing where it was taken from its run."""
    path = folder.absolute().parent / records.FILE
    return records.read(path) if path.is_file() else {}


def add(done: runs.Run, export: Export) -> Path:
    """The export of a finished run, made if it is not there."""
    at, checkpoint = place(done.folder, export), Checkpoint(done.checkpoint)
    if not at.exists():
        export.require(checkpoint.config, stored_forms(checkpoint))
        with claimed(done.folder) as claim:
            origin = done.record["identity"]
            writer = export.writer(at, checkpoint.config, origin=origin, check=claim.check)
            complete(checkpoint, writer, done.record)
    return at


def stored_forms(checkpoint: Checkpoint) -> Forms:
    """How a checkpoint keeps each layer; one tensor of each form is read."""
    alike: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for name, said in sorted(checkpoint.description["tensors"].items()):
        path = name.removesuffix(".weight")
        if said["kind"] == "compressed":
            key = json.dumps(said, sort_keys=True)
            if key not in alike:
                alike[key] = checkpoint.tensor(name)
            found[path] = alike[key]
        elif path != name and len(said["shape"]) == 2:
            found[path] = None
    return found
