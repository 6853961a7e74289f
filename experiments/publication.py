"""Records that documents quote: finished runs copied into papers/results."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import records
from experiments.errors import UserError
from experiments.files import write_whole
from experiments.report import Record, label
from experiments.runs.identity import seeds_label
from experiments.runs.run import Run as Done


def key(record: Record) -> tuple[str, str]:
    """What tells repetitions of experiments apart; a benchmark is none."""
    return record.get("identity", ""), json.dumps(record.get("seeds"), sort_keys=True)


def publish(done: Sequence[Done], folder: Path) -> list[Path]:
    """Copy finished records into papers/results, whole; the same run's earlier one is replaced.

    Raises UserError for a record of changed code, and rather than replace another run's.
    """
    if unclean := [label(each.record) for each in done if each.record["code"]["clean"] is not True]:
        raise UserError(
            f"{', '.join(unclean)}: recorded with changes that no commit holds, so nothing is "
            "published: commit, and run again with again=true."
        )
    targets = [_target(each, folder) for each in done]
    for each, path in zip(done, targets, strict=True):
        if path.exists() and key(records.read(path)) != key(each.record):
            raise UserError(f"{path} is of another run: move it away, nothing is published.")
    for each, path in zip(done, targets, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(_without_places(each.record), indent=1) + "\n")
    return targets


def _without_places(record: Record) -> Record:
    """Where a run lay, and the one that made its model, is of the machine that made it, and no part
    of what was computed.
    """
    return {**record, "config": _placed(record["config"])} if "config" in record else record


def _placed(node: Any, key: str = "") -> Any:
    """A configuration whose runs lie where they do by default."""
    if isinstance(node, Mapping):
        return {inner: _placed(value, inner) for inner, value in node.items()}
    return "runs" if key == "runs" and isinstance(node, str) else node


def _target(done: Done, folder: Path) -> Path:
    """Named as the run's folder is, by what was done and its identity, and by seeds if not 0.

    Training runs, which are repeated with many seeds, have a folder of their own.
    """
    identity, seeds = done.record["identity"], seeds_label(done.record["seeds"])
    name = done.folder.parent.name.removesuffix(f"-{identity[:12]}")
    repetition = "" if seeds == "seed-0" else f"-{seeds}"
    within = folder / "train" if done.record["command"] == "train" else folder
    return within / f"{name}-{identity[:8]}{repetition}.json"
