"""Compress a model, evaluate it, record what it cost: python -m experiments.compress --help"""

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from experiments import records, streaming
from experiments.checkpoints.orbax import Checkpoint, checkpoint_writer
from experiments.checkpoints.sources import Source, shapes
from experiments.entry import build, entry_point, resolved
from experiments.errors import UserError
from experiments.evaluation.footprint import bytes_on_disk, footprint
from experiments.progress import console
from experiments.report import table


def run(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Compress, evaluate, record; the checkpoint and the record lie in `folder`."""
    plain = resolved(config)
    recorder = records.Recorder("compress", plain)
    source, method = build(config, "model"), build(config, "algorithm")
    walk = streaming.Walk(**plain["walk"])
    windows = build(config, "data").windows(
        source.tokenizer(), source.config.vocabulary, longest=source.config.context
    )
    require_disk(source, folder)

    checkpoint = folder / "checkpoint"
    calibration = {"name": windows.name, "digest": windows.digest}
    with checkpoint_writer(checkpoint) as writer, recorder.phase("compress"):
        layers = streaming.compress_model(source, writer, method, windows.calibration, walk)
        notes = {
            "recipe": [plain["algorithm"]],
            "source": {"location": Path(source.location).name, "digest": source.digest()},
            "calibration": calibration,
        }
        writer.finish(source.config, source.tokenizer(), notes)

    compressed = Checkpoint(checkpoint)
    with recorder.phase("evaluate"):
        metrics = build(config, "evaluation")(compressed, windows)
    record = recorder.finish(
        model=notes["source"],
        data={**calibration, "shape": list(windows.calibration.shape)},
        metrics=metrics,
        footprint=footprint(compressed.description["tensors"])._asdict(),
        bytes_on_disk=bytes_on_disk(checkpoint),
        layers=[dataclasses.asdict(layer) for layer in layers],
        status="finished",
    )
    records.write(record, folder)
    return record


def require_disk(source: Source, folder: Path) -> None:
    """Refuse before any work if a checkpoint of the dense size would not fit beside the record."""
    folder.mkdir(parents=True, exist_ok=True)
    need = 2 * sum(math.prod(shape) for shape in shapes(source.config).values())
    free = shutil.disk_usage(folder).free
    if free < need:
        raise UserError(
            f"{folder} has {free / 1e6:.0f} MB free and the checkpoint may need {need / 1e6:.0f} "
            "MB: make room, or choose another folder with hydra.run.dir=..."
        )


@entry_point("compress")
def main(config: DictConfig, folder: Path) -> None:
    record = run(config, folder)
    console.print(table([record]))
    console.print(f"checkpoint: {folder / 'checkpoint'}", soft_wrap=True)
    console.print(f"record:     {folder / records.FILE}", soft_wrap=True)


if __name__ == "__main__":
    main()
