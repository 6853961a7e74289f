"""Damage many files and read each: nothing may crash, hang or be touched outside, and every refusal
is a sentence: python -m experiments.benchmark what=[hostile]

Indices are worked on in portions, each by a process of its own. A process that crashes or says
nothing for long is a finding of the index that it was at, and another goes on behind it. Portions
that are done are kept, so that the same command goes on where it was cut off.
"""

import collections
import concurrent.futures
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import progress, records
from experiments.errors import UserError
from experiments.measurements.hostile import corpus, mutations
from experiments.measurements.hostile.target import ACCEPTED, FINDING, REFUSED
from experiments.measurements.hostile.worker import UNFIT

PORTION = 1000  # files that one process reads
STARTING = 120.0  # seconds that a process may say nothing in before its first file
SHARED = Path("/dev/shm")  # memory that is a disk, where there is one
SHOWN = 20  # findings in the record


def hostile(plain: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Read `hostile.files` damaged files; what they were and what came of them, by kind."""
    settings, start = plain["hostile"], time.monotonic()
    place = folder / "hostile"
    models = _corpus(place / "corpus")
    count = settings["files"]
    portions = [(at, min(at + PORTION, count)) for at in range(0, count, PORTION)]
    with (
        progress.steps("portion", len(portions)) as step,
        concurrent.futures.ThreadPoolExecutor(records.device()["cores"]) as pool,
        tempfile.TemporaryDirectory(dir=SHARED if SHARED.is_dir() else None) as boxes,
    ):
        jobs = [pool.submit(portion, plain["seed"], *each, settings, place, Path(boxes), models)
                for each in portions]  # fmt: skip
        found = []
        for job in concurrent.futures.as_completed(jobs):
            found += job.result()
            step(f"{sum(row['verdict'] == FINDING for row in found)} findings")
    spent = sum(json.loads(path.read_text())["seconds"] for path in place.glob("*.spent"))
    return {
        **summary(found),
        "corpus": [corpus.describe(name, path) for name, path in models.items()],
        "seed": plain["seed"],
        "seconds": time.monotonic() - start,
        "process_seconds": spent,
        "limits": {key: settings[key] for key in ("seconds", "memory")},
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of verdicts, by kind of damage and by model; the first findings whole."""
    rows = sorted(rows, key=lambda row: row["index"])
    findings = [row for row in rows if row["verdict"] == FINDING]
    return {
        "files": len(rows),
        **_verdicts(rows),
        "kinds": {kind: _verdicts(own) for kind, own in _by(rows, "kind").items()},
        "models": {model: _verdicts(own) for model, own in _by(rows, "model").items()},
        "first_findings": findings[:SHOWN],
    }


def _verdicts(rows: list[dict[str, Any]]) -> dict[str, int]:
    counts = collections.Counter(row["verdict"] for row in rows)
    return {verdict: counts[verdict] for verdict in (ACCEPTED, REFUSED, FINDING)}


def _by(rows: list[dict[str, Any]], key: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row[key]):
        found.setdefault(row[key], []).append(row)
    return found


def _corpus(folder: Path) -> dict[str, Path]:
    """Made once; what an interruption left of it is made anew."""
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=_made(folder.parent)) as unfinished:
            corpus.make(Path(unfinished) / folder.name)
            os.replace(Path(unfinished) / folder.name, folder)
    return corpus.found(folder)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def portion(
    seed: int,
    start: int,
    stop: int,
    settings: Mapping[str, Any],
    place: Path,
    boxes: Path,
    models: dict[str, Path],
) -> list[dict[str, Any]]:
    """What came of the indices from `start` to before `stop`; those done before are not redone."""
    out, spent = place / f"{start}.jsonl", place / f"{start}.spent"
    began = time.monotonic()
    job = {
        "corpus": str(place / "corpus"), "box": str(boxes / str(start)), "out": str(out),
        "seed": seed, "start": start, "stop": stop,
        "seconds": settings["seconds"], "memory": settings["memory"],
    }  # fmt: skip
    while start + _lines(out) < stop:
        ended = _run(job, boxes / f"{start}-cache", out)
        if start + _lines(out) < stop:
            _note(out, seed, start + _lines(out), models, ended)
    if not spent.exists():
        spent.write_text(json.dumps({"seconds": time.monotonic() - began}))
    return [json.loads(line) for line in out.read_text().splitlines()]


def _run(job: dict[str, Any], cache: Path, out: Path) -> str:
    """One process until it ends, or says nothing for long; how it ended."""
    command = [sys.executable, "-m", "experiments.measurements.hostile.worker", json.dumps(job)]
    environment = {
        **os.environ, "PLANISH_CACHE": str(cache), "PYTHONDONTWRITEBYTECODE": "1",
        "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(out.parent / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.01",
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    }  # fmt: skip
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=environment, cwd=records.ROOT, stderr=errors)
        try:
            if _watched(process, out, job["seconds"]):
                errors.seek(0)
                said = "".join(errors.read().strip().splitlines()[-1:])
                if process.returncode == UNFIT:
                    raise UserError(f"Nothing can be measured here: {said}.")
                return f"the process ended with status {process.returncode} {said}"
            return "the process said nothing for long"
        finally:
            process.kill()
            process.wait()


def _watched(process: subprocess.Popen[bytes], out: Path, seconds: float) -> bool:
    """Wait for the end of a process that writes to `out`; False if it stopped doing so."""
    size, since, patience = -1, time.monotonic(), STARTING
    while process.poll() is None:
        time.sleep(0.1)
        if (now := out.stat().st_size if out.exists() else 0) != size:
            patience = STARTING if size < 0 else 5 * seconds
            size, since = now, time.monotonic()
        elif time.monotonic() - since > patience:
            return False
    return True


def _note(out: Path, seed: int, index: int, models: dict[str, Path], ended: str) -> None:
    """A finding that its own process could not write."""
    drawn = mutations.draw(seed, index, models)
    row = {"index": index, **drawn._asdict(), "verdict": FINDING, "detail": ended}
    with out.open("a") as lines:
        lines.write(json.dumps(row) + "\n")


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
