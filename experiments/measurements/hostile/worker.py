"""One portion of damaged files, in a process of its own that may crash or be killed:
python -m experiments.measurements.hostile.worker '{"corpus": …, "box": …, "out": …, "seed": 0, …}'

A line of JSON for each index goes to `out` as soon as it is known; a portion that was cut off goes
on behind its last line.
"""

import json
import os
import resource
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.measurements.hostile import corpus, mutations, target

UNFIT = 3  # the status of a process that cannot tell damage from what is whole
WARM = "ct-int4"  # read once before memory is limited: what JAX itself takes does not count


def main(job: dict[str, Any]) -> None:
    models = corpus.found(Path(job["corpus"]))
    box, out = Path(job["box"]), Path(job["out"])
    templates: target.Templates = {}
    if (first := target.examine(models[WARM], 120.0, templates)).kind != target.ACCEPTED:
        print(f"{WARM} as it was written is {first.kind}: {first.detail}", file=sys.stderr)
        raise SystemExit(UNFIT)
    _limit_memory(job["memory"])
    done = len(out.read_text().splitlines()) if out.exists() else 0
    with out.open("a") as lines, open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)  # panics of Rust print themselves
        for index in range(job["start"] + done, job["stop"]):
            found = one(job["seed"], index, models, box, job["seconds"], templates)
            lines.write(json.dumps({"index": index, **found}) + "\n")
            lines.flush()


def one(
    seed: int,
    index: int,
    models: dict[str, Path],
    box: Path,
    seconds: float,
    templates: target.Templates,
) -> dict[str, Any]:
    """Damage the file of one index, read its model, and say what came of it."""
    _empty(box)
    before = dict(canaries(box))
    drawn = mutations.draw(seed, index, models)
    path = mutations.damage(drawn, seed, index, models, box)
    verdict = target.examine(path, seconds, templates)
    if dict(canaries(box)) != before:
        verdict = target.Verdict(target.FINDING, f"files outside changed | {verdict.detail}")
    return {**drawn._asdict(), "verdict": verdict.kind, "detail": verdict.detail}


def _empty(box: Path) -> None:
    """A folder with nothing but valid files outside of the model, for a reader to be led to."""
    shutil.rmtree(box, ignore_errors=True)
    (box / mutations.OUTSIDE).mkdir(parents=True)
    empty = (2).to_bytes(8, "little") + b"{}"
    for suffix, content in ((".json", b"{}"), (".safetensors", empty), (".gguf", b"GGUF")):
        (box / mutations.OUTSIDE / f"canary{suffix}").write_bytes(content)


def canaries(box: Path) -> Iterator[tuple[Path, bytes]]:
    for path in sorted((box / mutations.OUTSIDE).rglob("*")):
        yield path, path.read_bytes()


def _limit_memory(more: int) -> None:
    """Beyond what the process has mapped by now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(json.loads(sys.argv[1]))
