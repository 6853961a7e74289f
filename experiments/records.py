"""The record of a run: one JSON file that every table, picture and claim is drawn from."""

import contextlib
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import psutil

from experiments import memory
from experiments.errors import UserError
from experiments.files import write_whole
from kernels import dispatch

SCHEMA = 2
FILE = "record.json"
ROOT = Path(__file__).parents[1]
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "orbax-checkpoint", "hydra-core", "gguf")
COMPILE_EVENTS = (
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


class Recorder:
    """Collects a run's facts while it runs: by phase, wall time, the compilation within it, and
    how much of the machine other work had meanwhile.
    """

    def __init__(self, command: str, config: Mapping[str, Any], identity: str):
        memory.reset_peak()
        self.fields: dict[str, Any] = {
            "schema": SCHEMA,
            "command": command,
            "identity": identity,
            "seeds": dict(config["seeds"]),
            "config": dict(config),
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "code": code_version(),
            "versions": versions(),
            "device": device(),
            "memory_at_start": memory.held(),
        }
        self.seconds: dict[str, float] = {}
        self.elsewhere: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the body's wall time as `name`, the compilation within it as `name`_compile."""
        with compile_seconds() as compiling:
            start, others = time.perf_counter(), _busy_elsewhere()
            yield
            elapsed = time.perf_counter() - start
        self.seconds[name] = elapsed
        self.seconds[f"{name}_compile"] = compiling.total
        share = (_busy_elsewhere() - others) / (elapsed * (psutil.cpu_count() or 1))
        self.elsewhere[name] = min(max(share, 0.0), 1.0)

    def finish(self, **fields: Any) -> dict[str, Any]:
        """The whole record."""
        peak = memory.peak()
        costs = {"seconds": self.seconds, "elsewhere": self.elsewhere, "peak_memory": peak}
        return {**self.fields, "kernels": dispatch.choices(), **fields, **costs}


def write(record: Mapping[str, Any], folder: Path) -> Path:
    """Write a record whole or not at all; an existing one is never overwritten."""
    path = folder / FILE
    if path.exists():
        raise UserError(f"{path} exists already: records are never overwritten.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return write_whole(path, json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): make room and run the command again."
        ) from error


def read(path: Path) -> dict[str, Any]:
    """A record from its file; refuses what this version does not understand."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a record: {error}.") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise UserError(f"{path} is not a record of schema {SCHEMA}: run the experiment again.")
    return record


@functools.cache
def code_version() -> dict[str, Any]:
    """Commit of the code and whether the tree was clean; None where there is no repository."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(ROOT), *arguments]
        try:
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    status = git("status", "--porcelain")
    return {"commit": git("rev-parse", "HEAD"), "clean": None if status is None else not status}


def versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found}


def device() -> dict[str, Any]:
    first = jax.devices()[0]
    return {
        "backend": jax.default_backend(),
        "kind": first.device_kind,
        "count": jax.device_count(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "machine": platform.machine(),
    }


class _Total:
    total = 0.0


@contextlib.contextmanager
def compile_seconds() -> Iterator[_Total]:
    """Seconds that JAX spends lowering and compiling while the body runs."""
    found = _Total()

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event in COMPILE_EVENTS:
            found.total += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _busy_elsewhere() -> float:
    """Core seconds since boot that went to anything but this process, other guests included."""
    machine, own = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = ("idle", "iowait", "guest", "guest_nice")  # a guest's time is in its user's too
    busy = sum(spent for name, spent in machine._asdict().items() if name not in idle)
    return busy - own.user - own.system
