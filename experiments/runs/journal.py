"""A run's journal: one JSON line per event, what a resumed run goes on from and TensorBoard shows.

A line is on the disk before the run goes on. A kill in the middle of a line leaves one that is not
JSON: it is passed over.
"""

import datetime
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.errors import UserError

FILE = "journal.jsonl"
Listener = Callable[[Mapping[str, Any]], None]


class Journal:
    """Appends events to a file; every listener hears of each one."""

    def __init__(self, folder: Path):
        self.path = folder / FILE
        self.listeners: list[Listener] = []

    def append(self, event: str, **fields: Any) -> None:
        """Add one event with the time. Raises UserError if it cannot be written."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        entry = {"time": now, "event": event, **fields}
        try:
            with self.path.open("ab") as file:
                whole_lines = file.tell() == 0 or self.path.read_bytes().endswith(b"\n")
                file.write((b"" if whole_lines else b"\n") + json.dumps(entry).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}): make room, or choose another "
                "place for runs with runs=..."
            ) from error
        for listener in self.listeners:
            listener(entry)

    def entries(self, event: str | None = None) -> list[dict[str, Any]]:
        """All events, or those of one name, oldest first."""
        return [e for e in read(self.path) if event in (None, e["event"])]


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a journal; none where there is no file."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [entry for line in lines if (entry := _parsed(line)) is not None]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:  # cut off by a kill
        return None
    return entry if isinstance(entry, dict) and "event" in entry else None
