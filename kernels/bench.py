"""How fast the operations are on the device at hand: python -m kernels.bench [op] [shape]

First the rates that this device reaches: bytes copied, and products by type. Then each operation on
each of its real shapes: the kernel, the best XLA form and what they take the place of take turns,
on random data that no cache holds, with the error against float64 beside each time. Rows go to
`kernels/results/<device>.json` as they are measured; the same command leaves those of the same
code alone, unless --again. `python -m experiments.survey` renders them.

Most of its time is compilation, on one core: --part 1/8, --part 2/8, … started at once compile side
by side, and measure one after another when all have compiled.
"""

import argparse
import contextlib
import fcntl
import functools
import hashlib
import importlib
import json
import os
import pkgutil
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import kernels
from kernels import dispatch
from kernels.timing import CACHED, Form, Program, compiled, seconds
from kernels.workload import Arrays, Cost, Workload, Workloads, distance, shapes, widened

RESULTS = Path(__file__).parent / "results"
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

    def of(form: Form) -> float:
        return seconds([compiled(form)])[0]

    copy = 2 * x.nbytes / of(Form(lambda x: x + 1, lambda _: (x,)))
    found = {}
    for unit in ("bfloat16", "float32", "int8", "float8"):
        dtype, wide = _types(unit, platform)
        product = functools.partial(jnp.matmul, preferred_element_type=wide)
        arguments = functools.partial(_square, n=n, dtype=dtype)
        found[unit] = 2 * n**3 / of(Form(product, arguments))
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


class Prepared(NamedTuple):
    """A workload, compiled."""

    programs: dict[str, Program]  # by the form's name
    refused: dict[str, str]  # why another form does not run
    error: Callable[..., Any] | None  # of a result and its arguments; None where it takes too long


def prepare(workload: Workload) -> Prepared:
    programs: dict[str, Program] = {}
    refused: dict[str, str] = {}
    for name, form in forms(workload, dispatch.device().platform).items():
        try:
            programs[name] = compiled(form)
        except ValueError as reason:
            refused[name] = str(reason)
    ours = [name for name in programs if name != "plain"]
    return Prepared(programs, refused, _error(workload, ours[0]) if ours else None)


def _error(workload: Workload, implementation: str) -> Callable[..., Any] | None:
    """‖found - exact‖ / ‖exact‖, with the reference in float64 as what is exact."""
    affordable = EXACT if dispatch.device().platform == "cuda" else EXACT / 100
    if workload.cost.operations > affordable:
        return None

    def error(found: Any, arguments: Arrays) -> Any:
        exact = workload.run(*widened(arguments), implementation="reference")
        # Else a GPU's compiler leaves out the rounding of float8 that is widened again.
        return distance(found, jax.lax.optimization_barrier(exact))

    arguments = shapes(workload)
    run = functools.partial(workload.run, implementation=implementation)
    found = jax.eval_shape(run, *arguments)
    with jax.enable_x64(True):
        return jax.jit(error).lower(found, arguments).compile()


def measure(
    op: str, name: str, workload: Workload, prepared: Prepared, reached: Rates
) -> dict[str, Any]:
    """One row: seconds of every form, and how far its result is from float64."""
    programs = prepared.programs
    return {
        "op": op,
        "shape": name,
        "cost": workload.cost._asdict(),
        "roofline_seconds": reached.seconds(workload.cost),
        "seconds": dict(zip(programs, seconds(list(programs.values())), strict=True)),
        "refused": prepared.refused,
        "errors": {n: _judged(programs[n], prepared) for n in programs if n != "plain"},
        "version": version(op),
    }


def _judged(program: Program, prepared: Prepared) -> float | None:
    if prepared.error is None:
        return None
    arguments = program.make(jax.random.key(1))
    found = program.run(*arguments)
    with jax.enable_x64(True):
        return float(prepared.error(found, arguments))


def version(op: str) -> str:
    """Of the code that a row was measured with: a digest of the operation's files, but that which
    checks and chooses.
    """
    total = hashlib.sha256()
    for path in sorted((RESULTS.parent / op).glob("*.py")):
        if path.name != "api.py":
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
    pieces += [f"{name} refused: {reason}" for name, reason in row["refused"].items()]
    return f"{row['op']} {row['shape']}: {'; '.join(pieces)}"


@contextlib.contextmanager
def _locked(how: int) -> Iterator[None]:
    """Parts compile together (a shared lock), and measure alone (an exclusive one)."""
    with open(Path(tempfile.gettempdir(), "planish-kernels-bench.lock"), "w") as file:
        fcntl.flock(file, how)
        yield


def part(words: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9][0-9]*)/([1-9][0-9]*)", words)
    if not found or int(found[1]) > int(found[2]):
        raise argparse.ArgumentTypeError(f"{words!r} is no part: write 1/8, 2/8, … 8/8")
    return int(found[1]), int(found[2])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("op", nargs="?", help="one operation")
    parser.add_argument("shape", nargs="?", help="one of its shapes")
    parser.add_argument("--again", action="store_true", help="measure anew what is recorded")
    parser.add_argument("--part", type=part, help="of several that are started at once: 2/8")
    asked = parser.parse_args()
    todo, where = list(selected(asked.op, asked.shape)), dispatch.device()
    if where.capability != dispatch.CAPABILITY:
        print(f"This is a {where.kind}: kernels do not run here, XLA's forms do.")
    path = place(where.kind)
    ready: Ready = {}
    if asked.part is not None:
        nth, parts = asked.part
        todo = todo[nth - 1 :: parts]
        with _locked(fcntl.LOCK_SH):
            kept = set() if asked.again else _kept(_read(path))
            for op, name, workload in todo:
                if (op, name) not in kept:
                    ready[op, name] = _tried(op, name, functools.partial(prepare, workload))
    with _locked(fcntl.LOCK_EX):
        failed = _record(todo, path, ready, asked.again, rated=asked.part is not None)
    if failed:
        sys.exit(f"{failed} of {len(todo)} could not be measured: what was in the way is above.")


type Ready = dict[tuple[str, str], Prepared | None]  # by operation and shape; None: it failed


def _record(
    todo: Sequence[tuple[str, str, Workload]], path: Path, ready: Ready, again: bool, rated: bool
) -> int:
    """Measure and write down each that is not recorded, and say how many could not be.

    rated: what the record has of the device's rates will do.
    """
    record, where, failed = _read(path), dispatch.device(), 0
    kept = set() if again else _kept(record)
    about = {"device": where._asdict(), "jax": jax.__version__}
    if again or not rated or not about.items() <= record.items():
        record |= about | {"rates": rates()._asdict()}
    reached = Rates(**record["rates"])
    rows = {(row["op"], row["shape"]): row for row in record["rows"]}
    for n, (op, name, workload) in enumerate(todo, 1):
        print(f"[{n}/{len(todo)}] ", end="", flush=True)
        if (op, name) in kept:
            print(f"{op} {name}: kept")
            continue
        if (least := reached.seconds(workload.cost)) > LONGEST:
            print(f"{op} {name}: {least:.1f} s a run at this device's rates, left out")
            continue
        compiling = functools.partial(prepare, workload)
        prepared = ready.pop((op, name), None) or _tried(op, name, compiling)
        measuring = functools.partial(measure, op, name, workload, reached=reached)
        found = prepared and _tried(op, name, functools.partial(measuring, prepared))
        if found is None:
            failed += 1
            continue
        rows[op, name] = found
        print(line(found), flush=True)
        save(path, record | {"rows": list(rows.values())})
    save(path, record | {"rows": list(rows.values())})
    return failed


def _tried[T](op: str, name: str, what: Callable[[], T]) -> T | None:
    """None where the device or its compiler fails, which is printed: others are measured still."""
    try:
        return what()
    except jax.errors.JaxRuntimeError as error:
        print(f"{op} {name}: {error}", flush=True)
        return None


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"rows": []}


def _kept(record: Mapping[str, Any]) -> set[tuple[str, str]]:
    """What was measured with the code that stands."""
    return {(r["op"], r["shape"]) for r in record["rows"] if r["version"] == version(r["op"])}


if __name__ == "__main__":
    main()
