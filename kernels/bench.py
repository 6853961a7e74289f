"""How fast the operations are on the device at hand: python -m kernels.bench [op] [shape]

First the rates that this device reaches: bytes copied, and products by type. Then each operation on
each of its real shapes: the kernel, the best XLA form and what they take the place of take turns,
on random data that no cache holds, with the error against float64 beside each time. Rows go to
`kernels/results/<device>.json` as they are measured; the same command leaves those of the same
code alone, unless --again. `python -m experiments.survey` renders them.
"""

import argparse
import functools
import hashlib
import importlib
import json
import os
import pkgutil
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import kernels
from kernels import dispatch
from kernels.workload import Arrays, Cost, Workload, Workloads, distance, widened

RESULTS = Path(__file__).parent / "results"
CACHED = 120_000_000  # bytes: more than any cache of the device keeps
ROUNDS = 20
BUDGET = 10.0  # seconds for all forms on one shape, beside their compilation
LONGEST = 0.5  # seconds at the device's rates that one run may take: longer ones are left out
EXACT = 2e12  # operations up to which a result is compared with one in float64, on an accelerator
SQUARE = {"cpu": 1024, "cuda": 8192}  # of the products whose rate is measured


class Rates(NamedTuple):
    """What the device reaches, as measured: bytes and operations per second."""

    bytes: float
    operations: dict[str, float]  # by unit, as in `Cost`

    def seconds(self, cost: Cost) -> float:
        """The least time of an operation: its roofline."""
        return max(cost.bytes / self.bytes, cost.operations / self.operations[cost.unit])


class Form(NamedTuple):
    """One way to do what a workload asks."""

    run: Callable[..., Any]
    arguments: Callable[[Any], Arrays]


def operations() -> dict[str, Workloads]:
    """Every operation's named shapes."""
    found = {}
    for module in pkgutil.iter_modules(kernels.__path__):
        if module.ispkg and (Path(RESULTS.parent, module.name, "shapes.py")).is_file():
            found[module.name] = importlib.import_module(f"kernels.{module.name}.shapes").WORKLOADS
    return found


def forms(workload: Workload, platform: str) -> dict[str, Form]:
    """What can be timed here, by name: ours, XLA's and the dense computation."""

    def named(implementation: str) -> Form:
        run = functools.partial(workload.run, implementation=implementation)
        return Form(run, workload.arguments)

    found = {"xla": named("xla")}
    if platform == "cuda":
        found["mosaic"] = named("mosaic")
    if workload.plain is not None:
        found["plain"] = Form(workload.plain, workload.plain_arguments or workload.arguments)
    return found


def rates() -> Rates:
    """Of a copy that no cache serves, and of square products of each type."""
    platform = dispatch.device().platform
    n = SQUARE.get(platform, 1024)
    x = jnp.ones(CACHED * (1 if platform == "cpu" else 8) // 4, jnp.float32)
    copy = 2 * x.nbytes / _time([Form(lambda x: x + 1, lambda _: (x,))])[0]
    found = {}
    for unit in ("bfloat16", "float32", "int8", "float8"):
        dtype, wide = _types(unit, platform)
        product = functools.partial(jnp.matmul, preferred_element_type=wide)
        arguments = functools.partial(_square, n=n, dtype=dtype)
        found[unit] = 2 * n**3 / _time([Form(product, arguments)])[0]
    return Rates(copy, found)


def _types(unit: str, platform: str) -> tuple[Any, Any]:
    if unit == "int8":
        return jnp.int8, jnp.int32
    if unit == "float8" and platform == "cuda":
        return jnp.float8_e4m3fn, jnp.float32
    return jnp.bfloat16 if unit != "float32" else jnp.float32, jnp.float32


def _square(key: Any, *, n: int, dtype: Any) -> Arrays:
    x, w = jax.random.normal(key, (2, n, n)) * (30 if dtype == jnp.int8 else 1)
    return x.astype(dtype), w.astype(dtype)


def measure(op: str, name: str, workload: Workload, reached: Rates) -> dict[str, Any]:
    """One row: seconds of every form, and how far its result is from float64."""
    platform = dispatch.device().platform
    known: dict[str, Form] = {}
    refused: dict[str, str] = {}
    for form_name, form in forms(workload, platform).items():
        try:
            jax.eval_shape(form.run, *jax.eval_shape(form.arguments, jax.random.key(0)))
            known[form_name] = form
        except ValueError as reason:
            refused[form_name] = str(reason)
    seconds = dict(zip(known, _time(list(known.values())), strict=True))
    least = reached.seconds(workload.cost)
    return {
        "op": op,
        "shape": name,
        "bucket": workload.bucket,
        "cost": workload.cost._asdict(),
        "roofline_seconds": least,
        "seconds": seconds,
        "refused": refused,
        "errors": {n: error(workload, known[n]) for n in known if n != "plain"},
        "version": version(op),
    }


def error(workload: Workload, form: Form) -> float | None:
    """‖found - exact‖ / ‖exact‖; None where float64 would take too long here."""
    affordable = EXACT if dispatch.device().platform == "cuda" else EXACT / 100
    if workload.cost.operations > affordable:
        return None
    arguments = jax.jit(form.arguments)(jax.random.key(1))
    found = jax.jit(form.run)(*arguments)
    with jax.enable_x64(True):
        exact = functools.partial(workload.run, implementation="reference")
        return distance(found, jax.jit(exact)(*widened(arguments)))


def _time(todo: Sequence[Form]) -> list[float]:
    """Seconds of each form, the median over rounds in which they take turns."""
    clocks = [_clock(form) for form in todo]
    for clock in clocks:
        clock.timed(clock.sets)  # compiled
    once = sum(clock.timed(clock.sets) for clock in clocks)
    rounds = max(3, min(ROUNDS, int(BUDGET / max(once, 1e-9))))
    samples = [[clock.timed(clock.sets) for clock in clocks] for _ in range(rounds)]
    middle = map(statistics.median, zip(*samples, strict=True))
    return [seconds / len(clock.sets) for seconds, clock in zip(middle, clocks, strict=True)]


class Clock(NamedTuple):
    """A program that runs a form on several sets of arguments, and what takes its time."""

    timed: Callable[[list[Arrays]], float]
    sets: list[Arrays]


def _clock(form: Form) -> Clock:
    """So that no cache serves a run, there are as many sets of arguments as no cache holds; none is
    zeros, which some devices multiply faster.
    """
    shapes = jax.tree.leaves(jax.eval_shape(form.arguments, jax.random.key(0)))
    size = sum(x.size * x.dtype.itemsize for x in shapes)
    copies = max(1, min(64, -(-CACHED // max(size, 1))))
    make = jax.jit(form.arguments)
    sets = [make(key) for key in jax.random.split(jax.random.key(0), copies)]
    program = jax.jit(lambda sets: [form.run(*arguments) for arguments in sets])
    return Clock(_device_time(program) or _wall_time(program), sets)


def _device_time(program: Callable[..., Any]) -> Callable[..., float] | None:
    """Of the kernels alone, as CUPTI counts it."""
    if dispatch.device().platform != "cuda":
        return None
    from jax.experimental.mosaic.gpu import profiler

    measured = profiler.measure(program)

    def timed(sets: Any) -> float:
        milliseconds = measured(sets)[1]
        assert milliseconds is not None, "the program ran no kernel"
        return milliseconds / 1e3

    return timed


def _wall_time(program: Callable[..., Any]) -> Callable[..., float]:
    def timed(sets: Any) -> float:
        start = time.perf_counter()
        jax.block_until_ready(program(sets))
        return time.perf_counter() - start

    return timed


def version(op: str) -> str:
    """Of the code that a row was measured with: a digest of the operation's files."""
    total = hashlib.sha256()
    for path in sorted((RESULTS.parent / op).glob("*.py")):
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def selected(op: str | None, shape: str | None) -> Iterator[tuple[str, str, Workload]]:
    """Raises SystemExit with a sentence for what there is not."""
    known = operations()
    if op is not None and op not in known:
        sys.exit(f"There is no operation {op!r} with shapes: choose {', '.join(known)}.")
    chosen = known if op is None else {op: known[op]}
    if shape is not None and not any(shape in workloads for workloads in chosen.values()):
        names = ", ".join(name for workloads in chosen.values() for name in workloads)
        sys.exit(f"There is no shape {shape!r}: choose {names}.")
    for name, workloads in chosen.items():
        for key, workload in workloads.items():
            if shape in (None, key):
                yield name, key, workload


def place(kind: str) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")
    return RESULTS / f"{slug}.json"


def save(path: Path, record: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, path)


def line(row: dict[str, Any]) -> str:
    least, cost = row["roofline_seconds"], row["cost"]
    pieces = [
        f"{name} {1e6 * t:.1f} µs ({cost['bytes'] / t / 1e9:.0f} GB/s, "
        f"{cost['operations'] / t / 1e12:.2f} TFLOP/s, {100 * least / t:.0f} % of roofline)"
        for name, t in row["seconds"].items()
    ]
    return f"{row['op']} {row['shape']}: {'; '.join(pieces)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("op", nargs="?", help="one operation")
    parser.add_argument("shape", nargs="?", help="one of its shapes")
    parser.add_argument("--again", action="store_true", help="measure anew what is recorded")
    asked = parser.parse_args()
    todo, where = list(selected(asked.op, asked.shape)), dispatch.device()
    path = place(where.kind)
    record = json.loads(path.read_text()) if path.exists() else {"rows": []}
    if where.capability != dispatch.CAPABILITY:
        print(f"This is a {where.kind}: kernels do not run here, XLA's forms do.")
    reached = rates()
    record |= {"device": where._asdict(), "jax": jax.__version__, "rates": reached._asdict()}
    done = {(row["op"], row["shape"]): row for row in record["rows"]}
    for n, (op, name, workload) in enumerate(todo, 1):
        print(f"[{n}/{len(todo)}] ", end="", flush=True)
        kept = done.get((op, name))
        if kept is not None and kept["version"] == version(op) and not asked.again:
            print(f"{op} {name}: kept")
            continue
        if (least := reached.seconds(workload.cost)) > LONGEST:
            print(f"{op} {name}: {least:.1f} s a run at this device's rates, left out")
            continue
        done[op, name] = measure(op, name, workload, reached)
        print(line(done[op, name]))
        record["rows"] = list(done.values())
        save(path, record)
    save(path, record)


if __name__ == "__main__":
    main()
