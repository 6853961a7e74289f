"""Evaluate a model or a compressed checkpoint: python -m experiments.evaluate checkpoint=..."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from experiments import records
from experiments.checkpoints.orbax import Checkpoint
from experiments.checkpoints.sources import Source, open_source
from experiments.entry import build, entry_point, resolved
from experiments.evaluation.footprint import bytes_on_disk, footprint
from experiments.progress import console
from experiments.report import table


def open_model(config: DictConfig) -> Source:
    """What `checkpoint` names, or else the configured model."""
    return open_source(config.checkpoint) if config.checkpoint else build(config, "model")


def run(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Evaluate and record."""
    recorder = records.Recorder("evaluate", resolved(config))
    source = open_model(config)
    windows = build(config, "data").windows(
        source.tokenizer(), source.config.vocabulary, longest=source.config.context
    )
    with recorder.phase("evaluate"):
        metrics = build(config, "evaluation")(source, windows)
    record = recorder.finish(
        model={"location": Path(source.location).name, "digest": source.digest()},
        data={"name": windows.name, "digest": windows.digest},
        metrics=metrics,
        **_size(source),
        status="finished",
    )
    records.write(record, folder)
    return record


def _size(source: Source) -> dict[str, Any]:
    if not isinstance(source, Checkpoint):
        return {"bytes_on_disk": bytes_on_disk(Path(source.location))}
    return {
        "recipe": source.description["recipe"],
        "footprint": footprint(source.description["tensors"])._asdict(),
        "bytes_on_disk": bytes_on_disk(Path(source.location)),
    }


@entry_point("evaluate")
def main(config: DictConfig, folder: Path) -> None:
    record = run(config, folder)
    console.print(table([record]))
    console.print(f"record: {folder / records.FILE}", soft_wrap=True)


if __name__ == "__main__":
    main()
