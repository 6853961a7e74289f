"""What this machine has, and whether a run fits it."""

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import psutil
from rich.table import Table

from experiments.errors import UserError
from experiments.estimate import Estimate, estimate
from experiments.progress import console

CGROUP = Path("/sys/fs/cgroup")
PROCESS = 650_000_000
# (limit, usage, statistics) of a container: cgroup v2, then v1.
CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """What to assume of the machine; None: find out."""

    rate: float | int | None = None  # floating-point operations of products per second
    memory: float | int | None = None  # bytes that a run may take

    def assumed_rate(self) -> float:
        return product_rate() if self.rate is None else float(self.rate)

    def assumed_memory(self) -> int:
        return available_memory() if self.memory is None else int(self.memory)


def product_rate(seconds: float = 0.5) -> float:
    """Operations per second of float32 products of a model's usual shape, over `seconds`: the mean
    and not the best, so that a machine at work elsewhere counts as one."""
    x, w = jnp.ones((2048, 1024)), jnp.ones((1024, 1024))
    multiply = jax.jit(jnp.matmul)
    jax.block_until_ready(multiply(x, w))
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        jax.block_until_ready(multiply(x, w))
        done += 1
    return done * 2.0 * 2048 * 1024 * 1024 / (time.perf_counter() - start)


def available_memory() -> int:
    """Bytes that this process could come to hold: what it has, and what is free for it.

    On an accelerator the device's own.
    """
    device = jax.devices()[0]
    if device.platform != "cpu":
        return int(device.memory_stats()["bytes_limit"])
    free = [psutil.virtual_memory().available]
    for limit, usage, statistics in CGROUP_FILES:
        with contextlib.suppress(OSError, ValueError):  # "max", or no such file: no limit
            left = int((CGROUP / limit).read_text()) - int((CGROUP / usage).read_text())
            free.append(left + _reclaimable(CGROUP / statistics))
    return max(0, min(free)) + psutil.Process().memory_info().rss


def _reclaimable(statistics: Path) -> int:
    """Bytes of files in a container's memory, which it gives up when it needs room."""
    found = dict(line.split() for line in statistics.read_text().splitlines())
    return int(found.get("total_inactive_file", found.get("inactive_file", 0)))


def process_memory() -> int:
    """Bytes of a run's process beside the arrays it holds; none of them on an accelerator.

    Measured: 300 MB of interpreter and libraries, 210 MB that opening a model and its tokenizer
    leaves, 140 MB of compiled programs and their compiler.
    """
    return PROCESS if jax.default_backend() == "cpu" else 0


def smaller(config: Any, recipe: Any, **settings: Any) -> Iterator[tuple[str, Estimate]]:
    """Settings that take less memory, each with its estimate: first those that change no result.

    settings: the arguments of `estimate`.
    """
    walk, calibration = settings["walk"], settings["calibration"]
    changed: list[str] = []

    def change(text: str, **values: Any) -> tuple[str, Estimate]:
        settings.update(values)
        changed[:] = [c for c in changed if c.split("=")[0] != text.split("=")[0]] + [text]
        return " ".join(changed), estimate(config, recipe, **settings)

    if settings["evaluation_chunk"] > 1:
        yield change("evaluation.chunk=1", evaluation_chunk=1)
    if recipe is not None and recipe.needs_data(config):
        if walk.chunk > 1:
            yield change("walk.chunk=1", walk=dataclasses.replace(walk, chunk=1))
        windows, context = calibration
        while windows > 1:
            windows //= 2
            yield change(f"data.calibration={windows}", calibration=(windows, context))
    windows, context = settings["heldout"]
    while windows > 1:
        windows //= 2
        yield change(f"data.heldout={windows}", heldout=(windows, context))


def require(
    found: Estimate, *, memory: int, folder: Path, alternatives: Iterable[tuple[str, Estimate]] = ()
) -> None:
    """Refuse a run that memory or disk will not hold; raises UserError, with what to change.

    memory: bytes available. folder: where the checkpoint goes; it need not exist yet.
    alternatives: settings with their estimates, taken in order until one fits (see `smaller`).
    """
    if found.peak > memory:
        phase = max(found.memory, key=lambda name: found.memory[name])
        raise UserError(
            f"Not enough memory to {phase}: {gigabytes(found.peak)} needed, {gigabytes(memory)} "
            f"available; {_advice(found, memory, alternatives)}."
        )
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if found.disk > free:
        raise UserError(
            f"Not enough disk below {folder}: the checkpoint needs {gigabytes(found.disk)}, "
            f"{gigabytes(free)} are free; make room, or choose another folder with runs=..."
        )


def announce(found: Estimate, folder: Path) -> None:
    """Say what a run that begins will take, and where it lies."""
    disk = f", {gigabytes(found.disk)} of disk" if found.disk else ""
    console.print(
        f"about {duration(found.total_seconds)}, {gigabytes(found.peak)} of memory{disk}: {folder}",
        soft_wrap=True,
    )


def _advice(found: Estimate, memory: int, alternatives: Iterable[tuple[str, Estimate]]) -> str:
    least = found
    for text, other in alternatives:
        if other.peak <= memory:
            return f"{text} brings it to {gigabytes(other.peak)}"
        least = min(least, other, key=lambda e: e.peak)
    return (
        f"no smaller setting fits: the model takes a machine with {gigabytes(least.peak)} free "
        f"at the least, with these settings {gigabytes(found.peak)}"
    )


def describe(found: Estimate) -> Table:
    """What a run will take, as a dry run shows it."""
    table = Table("it takes", "", title="estimate", title_justify="left")
    table.add_row("parameters", f"{found.parameters / 1e6:,.1f} million")
    for part, count in found.operations.items():
        table.add_row(f"operations, {part}", f"{count:.2e}")
    for phase, size in found.memory.items():
        table.add_row(f"memory, {phase}", gigabytes(size))
    for phase, seconds in found.seconds.items():
        table.add_row(f"time, {phase}", duration(seconds))
    table.add_row("time, all", duration(found.total_seconds))
    table.add_row("disk", gigabytes(found.disk))
    return table


def gigabytes(size: float | int) -> str:
    return f"{size / 1e9:.2f} GB"


def duration(seconds: float | int) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
