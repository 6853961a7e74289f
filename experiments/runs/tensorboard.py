"""TensorBoard's view of a run's journal, written beside it: no server, no network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter


class TensorBoard:
    """A journal's listener: every number of an event becomes a scalar named by its path.

    The step of a scalar is the event's `layer` or `step`.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._writer: SummaryWriter | None = None  # no file for a run without numbers

    def __call__(self, entry: Mapping[str, Any]) -> None:
        step = entry.get("step", entry.get("layer", 0))
        for name, value in _numbers(entry):
            if self._writer is None:
                self._writer = SummaryWriter(str(self._folder), flush_secs=10)
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _numbers(value: Any, path: str = "") -> list[tuple[str, float]]:
    if isinstance(value, Mapping):
        inner = ((f"{path}/{key}".strip("/"), item) for key, item in value.items())
        return [pair for name, item in inner for pair in _numbers(item, name)]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [] if path in ("step", "layer") else [(path, float(value))]
    return []
