"""Write a checkpoint as others load it: python -m experiments.export checkpoint=... out=..."""

from pathlib import Path

from omegaconf import DictConfig

from experiments import exporting
from experiments.checkpoints.exports import Export
from experiments.checkpoints.planish import DESCRIPTION, Checkpoint
from experiments.entry import build, entry_point, resolved
from experiments.errors import UserError
from experiments.evaluation.footprint import bytes_on_disk
from experiments.progress import console


def run(config: DictConfig) -> Path:
    """Write the export and give back where it is."""
    plain = resolved(config)
    folder = find(Path(plain["checkpoint"]).expanduser())
    checkpoint, out = Checkpoint(folder), Path(plain["out"]).expanduser()
    format: Export = build(config, "format")
    format.require(checkpoint.config, exporting.stored_forms(checkpoint))
    writer = format.writer(out, checkpoint.config, origin=checkpoint.digest(), check=lambda: None)
    for part in writer.damaged:
        console.print(f"{part} of {out} was damaged: it is written again.", soft_wrap=True)
    exporting.complete(checkpoint, writer, exporting.measured_of(folder))
    return out


def find(path: Path) -> Path:
    """The checkpoint at a path, which may be its run's folder or that of a run's one seed."""
    places = [path, path / "checkpoint", *sorted(path.glob("seed-*/checkpoint"))]
    found = [place for place in places if (place / DESCRIPTION).is_file()]
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} checkpoints" if found else "no checkpoint that planish wrote"
    raise UserError(
        f"{path} holds {what}: name the folder that holds {DESCRIPTION}, or a run's folder."
    )


@entry_point("export")
def main(config: DictConfig) -> Path:
    out = run(config)
    console.print(f"export: {out} ({bytes_on_disk(out) / 1e6:.1f} MB)", soft_wrap=True)
    return out


if __name__ == "__main__":
    main()
