"""Tables and rooflines of kernels, from what `python -m kernels.bench` recorded."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.errors import UserError
from experiments.plots import MARKERS, save
from kernels import bench

type Device = dict[str, Any]  # a record: device, rates, rows
HEADER = ["shape", "MB moved", "GFLOP", "device", "roofline, µs", "kernel, µs", "XLA's best, µs"]
HEADER += ["dense bf16, µs", "GB/s", "TFLOP/s", "of roofline", "times XLA", "times dense", "error"]
UNMEASURED = "not yet measured on a GPU"
GPU = "cuda"


def read(folder: Path) -> list[Device]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def table(op: str, devices: Sequence[Device]) -> list[list[str]]:
    """A row for each shape and device that it was measured on; what no GPU has shown is said."""
    known = bench.operations()
    if op not in known:
        raise UserError(f"There is no operation {op!r} with shapes: {', '.join(known)}.")
    rows = [HEADER]
    for name, workload in known[op].items():
        front = [name, f"{workload.cost.bytes / 1e6:.1f}", f"{workload.cost.operations / 1e9:.1f}"]
        measured = [(d, row) for d in devices for row in d["rows"]
                    if (row["op"], row["shape"]) == (op, name)]  # fmt: skip
        rows += [[*front, *_measured(device, row)] for device, row in measured]
        if not any(device["device"]["platform"] == GPU for device, _ in measured):
            rows.append([*front, UNMEASURED, *["–"] * (len(HEADER) - len(front) - 1)])
    return rows


def _measured(device: Device, row: dict[str, Any]) -> list[str]:
    seconds, cost = row["seconds"], row["cost"]
    ours = "mosaic" if "mosaic" in seconds else "xla"
    best, least = seconds[ours], row["roofline_seconds"]

    def micro(name: str) -> str:
        return f"{1e6 * seconds[name]:.1f}" if name in seconds else "–"

    def times(name: str) -> str:
        return f"{seconds[name] / best:.2f}" if name in seconds and name != ours else "–"

    error = row["errors"].get(ours)
    return [
        _where(device, [row]),
        f"{1e6 * least:.1f}",
        *map(micro, ("mosaic", "xla", "plain")),
        f"{cost['bytes'] / best / 1e9:.0f}",
        f"{cost['operations'] / best / 1e12:.2f}",
        f"{100 * least / best:.0f} %",
        *map(times, ("xla", "plain")),
        "–" if error is None else f"{error:.1e}",
    ]


SUMMARY = ["operation", "device", "shapes", "faster than XLA's", "times XLA", "times dense"]
SUMMARY += ["of roofline", "largest error"]


def summary(devices: Sequence[Device]) -> list[list[str]]:
    """A row for each operation whose kernel was timed on a device: the least and the most of all
    its shapes.
    """
    rows = [SUMMARY]
    for device in devices:
        timed = [row for row in device["rows"] if "mosaic" in row["seconds"]]
        for op in sorted({row["op"] for row in timed}):
            mine = [row for row in timed if row["op"] == op]
            gains = _gains(mine, "xla")
            errors = [row["errors"]["mosaic"] for row in mine if row["errors"].get("mosaic")]
            reached = [row["roofline_seconds"] / row["seconds"]["mosaic"] for row in mine]
            rows.append([
                f"`{op}`",
                _where(device, mine),
                str(len(mine)),
                str(sum(gain > 1 for gain in gains)),
                _span(gains, "{:.2f}"),
                _span(_gains(mine, "plain"), "{:.2f}"),
                _span([100 * part for part in reached], "{:.0f}") + " %",
                f"{max(errors):.1e}" if errors else "–",
            ])  # fmt: skip
    return rows


def _where(device: Device, rows: Sequence[dict[str, Any]]) -> str:
    """The device, and whether the code has changed since."""
    stands = all(row["version"] == bench.version(row["op"]) for row in rows)
    return device["device"]["kind"] + ("" if stands else ", earlier code")


def _gains(rows: Sequence[dict[str, Any]], form: str) -> list[float]:
    return [r["seconds"][form] / r["seconds"]["mosaic"] for r in rows if form in r["seconds"]]


def _span(values: Sequence[float], form: str) -> str:
    if not values:
        return "–"
    return f"{form.format(min(values))} to {form.format(max(values))}"


def rates(devices: Sequence[Device]) -> str:
    """What each device reached, in a sentence."""
    return "".join(
        f"{device['device']['kind']}: {device['rates']['bytes'] / 1e12:.2f} TB/s of a copy, and in "
        "square products "
        + ", ".join(f"{r / 1e12:.0f} ({u})" for u, r in device["rates"]["operations"].items())
        + " TFLOP/s.\n"
        for device in devices
    )


def faster(devices: Sequence[Device]) -> dict[tuple[str, str, str], float]:
    """`kernels.measured`: by device, operation and bucket, the least that a kernel gained in it."""
    found: dict[tuple[str, str, str], float] = {}
    known = bench.operations()
    for device in devices:
        for row in device["rows"]:
            workload = known.get(row["op"], {}).get(row["shape"])
            if workload is not None and "mosaic" in row["seconds"]:
                key = (device["device"]["kind"], row["op"], workload.bucket)
                gain = row["seconds"]["xla"] / row["seconds"]["mosaic"]
                found[key] = min(gain, found.get(key, gain))
    return dict(sorted(found.items()))


def measured_source(source: str, devices: Sequence[Device]) -> str:
    """The text of `kernels/measured.py` with its table as the records have it."""
    head, mark, _ = source.partition("TIMES_FASTER")
    lines = [
        f"    {key!r}: {gain:.2f},\n".replace("'", '"') for key, gain in faster(devices).items()
    ]
    body = "{\n" + "".join(lines) + "}" if lines else "{}"
    return f"{head}{mark}: dict[tuple[str, str, str], float] = {body}\n"


def pictures(
    devices: Sequence[Device], folder: Path
) -> Iterator[tuple[Path, Callable[[Path], Path], str]]:
    """A roofline for each device: where, what draws it, and a digest of its numbers."""
    for device in devices:
        path = folder / f"{bench.place(device['device']['kind']).stem}.png"
        digest = hashlib.sha256(json.dumps(device, sort_keys=True).encode()).hexdigest()
        yield path, functools.partial(_roofline, device, digest), digest


def _roofline(device: Device, digest: str, path: Path) -> Path:
    """Operations per second against operations per byte, under what the device reaches."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    reached = bench.Rates(**device["rates"])
    rows = [row for row in device["rows"] if row["cost"]["operations"]]
    across = [row["cost"]["operations"] / row["cost"]["bytes"] for row in rows] or [1.0]
    span = [min(across) / 2, max(across) * 2]
    edges = [span[0] * (span[1] / span[0]) ** (n / 50) for n in range(51)]
    for unit in sorted({row["cost"]["unit"] for row in rows}):
        roof = [min(x * reached.bytes, reached.operations[unit]) / 1e12 for x in edges]
        axes.plot(edges, roof, linewidth=1, label=f"roofline, {unit}")
    for number, op in enumerate(sorted({row["op"] for row in rows})):
        mine = [row for row in rows if row["op"] == op]
        points = [
            (
                row["cost"]["operations"] / row["cost"]["bytes"],
                row["cost"]["operations"]
                / row["seconds"].get("mosaic", row["seconds"]["xla"]) / 1e12,
            )
            for row in mine
        ]  # fmt: skip
        axes.plot(
            *zip(*points, strict=True), MARKERS[number % len(MARKERS)], label=op, markersize=5
        )
    axes.set(xscale="log", yscale="log", xlabel="operations per byte moved", ylabel="TFLOP/s")
    axes.set_title(
        "kernels" if device["device"]["platform"] == GPU
        else f"XLA's forms on a {device['device']['kind']}: kernels run on Hopper GPUs alone",
        fontsize=9, loc="left",
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return save(figure, path, digest)
