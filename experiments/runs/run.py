"""A run: its folder, found by identity; its claim, journal and record.

    <runs>/<command>/<what>-<identity>/seed-0/
        journal.jsonl   every event, one JSON line each; what a resumed run goes on from
        events.out…     the same numbers for TensorBoard
        checkpoint/     packed tensors, tokenizer, recipe
        record.json     written last: a run with a record is finished

The same command finds the same folder: finished, its record is given back; interrupted, the run
goes on; claimed by a living process, it is refused. With `again`, a finished run stays as it is and
the new one goes to seed-0.2, seed-0.3, …
"""

import contextlib
import dataclasses
import os
import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments import records
from experiments.errors import UserError
from experiments.progress import console
from experiments.report import label
from experiments.runs.claim import Claim, claimed
from experiments.runs.identity import identity, seeds_label
from experiments.runs.journal import Journal
from experiments.runs.tensorboard import TensorBoard


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run lies and what it is."""

    command: str
    config: Mapping[str, Any]  # resolved
    identity: str
    folder: Path

    @property
    def finished(self) -> bool:
        return (self.folder / records.FILE).is_file()


@dataclasses.dataclass
class Run:
    """A finished run."""

    folder: Path
    record: dict[str, Any]

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"


class OpenRun:
    """A run that this process holds: it notes events, and finally its record."""

    def __init__(self, place: Place, claim: Claim, recorder: records.Recorder):
        self.folder, self.claim, self.recorder = place.folder, claim, recorder
        self.journal = Journal(place.folder)

    def note(self, event: str, **fields: Any) -> None:
        """Add an event to the journal, if this process still holds the run."""
        self.claim.check()
        self.journal.append(event, **fields)

    def warn(self, sentence: str) -> None:
        """Say it and keep it: a warning is part of the record."""
        console.print("[bold yellow]note:[/]", sentence, soft_wrap=True)
        self.note("warning", sentence=sentence)

    def finish(self, **fields: Any) -> Run:
        """Write the record, whole, and give the run back as finished."""
        begun = self.journal.entries("started")
        peaks = [e["peak_memory"] for e in self.journal.entries() if "peak_memory" in e]
        record = self.recorder.finish(**fields, status="finished")
        record["peak_memory"] = max([record["peak_memory"], *peaks])
        record["attempts"] = [{k: e[k] for k in ("time", "code", "host")} for e in begun]
        record["warnings"] = [e["sentence"] for e in self.journal.entries("warning")]
        self.claim.check()
        records.write(record, self.folder)
        self.note("finished", metrics=_scalars(record.get("metrics", {})))
        return Run(self.folder, record)


def _scalars(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics without their lists."""
    return {
        name: _scalars(value) if isinstance(value, Mapping) else value
        for name, value in metrics.items()
        if not isinstance(value, list)
    }


def place(command: str, config: Mapping[str, Any]) -> Place:
    """The folder of the run that a resolved config describes; nothing is created.

    Raises UserError if an input that identifies the run cannot be read.
    """
    found = identity(command, config)
    root = Path(config["runs"]).expanduser() / command
    known = sorted(root.glob(f"*-{found[:12]}"))  # by its hash: what labels say may change
    experiment = known[0] if known else root / f"{_slug(command, config)}-{found[:12]}"
    folder = experiment / seeds_label(config["seeds"])
    if config["again"] and (folder / records.FILE).is_file():
        folder = _next_repetition(folder)
    return Place(command, config, found, folder)


def _slug(command: str, config: Mapping[str, Any]) -> str:
    name = label({"config": dict(config)}) if command != "benchmark" else command
    if config.get("checkpoint"):
        name = Path(config["checkpoint"]).resolve().parent.name
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")[:60]


def _next_repetition(folder: Path) -> Path:
    """seed-0.2, or the first after it that is not finished: an interrupted one goes on."""
    number = 2
    while (folder.with_name(f"{folder.name}.{number}") / records.FILE).is_file():
        number += 1
    return folder.with_name(f"{folder.name}.{number}")


def finished(at: Place) -> Run | None:
    """The run, if it is finished, with a word about what has changed since."""
    if not at.finished:
        return None
    record = records.read(at.folder / records.FILE)
    console.print(f"already run: {at.folder} (again=true runs it anew)", soft_wrap=True)
    _compare_code(record["code"], "it was recorded")
    return Run(at.folder, record)


def _compare_code(then: Mapping[str, Any], what: str) -> str | None:
    now = records.code_version()
    if now == then:
        return None
    sentence = f"{what} at {_commit(then)}, and the code is now at {_commit(now)}."
    console.print("[bold yellow]note:[/]", sentence, soft_wrap=True)
    return sentence


def _commit(code: Mapping[str, Any]) -> str:
    if code["commit"] is None:
        return "an unknown commit"
    return f"commit {code['commit'][:10]}" + ("" if code["clean"] else " with changes")


@contextlib.contextmanager
def begin(at: Place) -> Iterator[OpenRun]:
    """Hold a run while the body works on it; how it ended is in its journal.

    Raises UserError if another living process holds it, or its folder cannot be written.
    """
    try:
        at.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{at.folder} cannot be made ({error.strerror}): choose another place for runs with "
            "runs=..."
        ) from error
    with claimed(at.folder) as claim:
        run = OpenRun(at, claim, records.Recorder(at.command, at.config, at.identity))
        with _watched(run, at):
            _note_start(run, at)
            try:
                yield run
            except UserError as error:
                _note_end(run, "failed", error=str(error))
                raise
            except KeyboardInterrupt:
                _note_end(run, "interrupted")
                raise
            except Exception as error:
                _note_end(run, "failed", error=f"{type(error).__name__}: {error}")
                raise


def _note_start(run: OpenRun, at: Place) -> None:
    before = run.journal.entries("started")
    code = records.code_version()
    run.note("started", command=at.command, config=dict(at.config), code=code,
             host=socket.gethostname(), process=os.getpid())  # fmt: skip
    if before:
        console.print(f"going on with {at.folder}", soft_wrap=True)
        if sentence := _compare_code(before[-1]["code"], "this run was begun"):
            run.note("warning", sentence=sentence)


def _note_end(run: OpenRun, event: str, **fields: Any) -> None:
    with contextlib.suppress(
        UserError
    ):  # what ended the run is reported, not that it was not noted
        run.note(event, **fields)


@contextlib.contextmanager
def _watched(run: OpenRun, at: Place) -> Iterator[None]:
    if not at.config.get("logger", {}).get("tensorboard", False):
        yield
        return
    board = TensorBoard(at.folder)
    run.journal.listeners.append(board)
    try:
        yield
    finally:
        board.close()
