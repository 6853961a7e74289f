"""What a training run measured, one JSON line per step that is logged or evaluated.

Nothing in it depends on when or in how many attempts the run was done: an interrupted run's file is
cut back to the state that it goes on from, and ends with the bytes of an undisturbed one's.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.files import kept_so_far
from experiments.runs.journal import Listener

FILE = "metrics.jsonl"


class MetricsLog:
    """Appends lines; every listener hears of each one."""

    def __init__(self, folder: Path, listeners: Iterable[Listener] = ()):
        self.path, self._listeners = folder / FILE, list(listeners)

    def cut(self, size: int) -> None:
        """Forget all but the first `size` bytes, which a saved state stands for."""
        with kept_so_far(self.path), self.path.open("ab") as file:
            file.truncate(size)

    def append(self, **fields: Any) -> None:
        with kept_so_far(self.path), self.path.open("ab") as file:
            file.write(json.dumps(fields).encode() + b"\n")
        for listener in self._listeners:
            listener(fields)

    def sync(self) -> int:
        """Have the disk hold all lines; how many bytes they are."""
        with kept_so_far(self.path), self.path.open("ab") as file:
            os.fsync(file.fileno())
            return file.tell()


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's file, oldest first."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def numbers(means: Mapping[str, Any]) -> dict[str, float]:
    """Of device scalars, as JSON keeps them: what is not finite is refused by the caller."""
    return {name: float(value) for name, value in sorted(means.items())}


def finite(values: Mapping[str, float]) -> bool:
    return all(math.isfinite(value) for value in values.values())
