"""Speed against the peers and the arithmetic floor, memory against depth, whether a run survives
being killed, how far estimates are off, whether large models pass, what damaged files do, what
algorithms cost, how far their results move from machine to machine, which optimizer learns fastest
and what it costs, what a teacher's largest logits are worth, how activations grow with the width,
our mathematics against scikit-learn's and SciPy's, the spectrum of a loss:
python -m experiments.benchmark what=[gptq,memory,…]

Every measurement is a process of its own. Ours and a peer's take turns on the same machine; a peer
runs where `peers_python` has its packages (`make test-peers` builds such an environment).
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from experiments import progress, records
from experiments.checkpoints.sources import Source
from experiments.data.corpora import STORED
from experiments.entry import build, entry_point, resolved
from experiments.errors import UserError
from experiments.evaluation import floor
from experiments.measurements.algorithms import algorithm_costs, phases, seconds
from experiments.measurements.estimates import estimates
from experiments.measurements.hostile.campaign import hostile
from experiments.measurements.interruptions import interruptions
from experiments.measurements.mathematics import mathematics
from experiments.measurements.optimizers import optimizers
from experiments.measurements.repeatability import repeatability
from experiments.measurements.scale import scale, write_random_model
from experiments.measurements.spectra import spectra
from experiments.measurements.teacher_logits import teacher_logits
from experiments.measurements.training import optimizer_costs, trainer
from experiments.measurements.widths import widths
from experiments.runs import run as runs

PEERS = records.ROOT / "tests" / "peers"
HELDOUT = 4  # windows evaluated beside a timed compression: a check that it worked


def run(config: DictConfig) -> runs.Run:
    """Measure what `what` names, record it: given back if measured before."""
    plain = resolved(config)
    at = runs.place("benchmark", plain)
    return runs.finished(at) or _run(config, plain, at)


def _run(config: DictConfig, plain: dict[str, Any], at: runs.Place) -> runs.Run:
    source = build(config, "model")
    measure = {
        "gptq": gptq,
        "perplexity": perplexity,
        "memory": memory,
        "interruptions": lambda plain, source, folder: interruptions(plain, folder),
        "hostile": lambda plain, source, folder: hostile(plain, folder),
        "estimates": lambda plain, source, folder: estimates(plain, source, folder, our_run),
        "algorithm_costs": lambda plain, source, folder: algorithm_costs(plain, folder, our_run),
        "repeatability": lambda plain, source, folder: repeatability(plain, folder, our_run),
        "optimizers": lambda plain, source, folder: optimizers(plain),
        "optimizer_costs": lambda plain, source, folder: optimizer_costs(plain),
        "trainer": lambda plain, source, folder: trainer(plain, folder),
        "teacher_logits": lambda plain, source, folder: teacher_logits(plain, source),
        "widths": lambda plain, source, folder: widths(plain),
        "mathematics": lambda plain, source, folder: mathematics(plain),
        "spectrum": lambda plain, source, folder: spectra(plain),
        "scale": lambda plain, source, folder: scale(plain, source, folder, our_run),
    }
    if unknown := set(plain["what"]) - set(measure):
        raise UserError(f"what={sorted(unknown)} is unknown: choose from {', '.join(measure)}.")
    with runs.begin(at) as run:
        folder = run.folder.absolute()
        return run.finish(
            results={name: measure[name](plain, source, folder) for name in plain["what"]}
        )


def gptq(plain: dict[str, Any], source: Source, folder: Path) -> list[dict[str, Any]]:
    """GPTQ at each number of calibration windows, ours and llm-compressor's in turns."""
    rows = []
    for windows in plain["calibration"]:
        ours, theirs = [], []
        for turn in range(plain["repeats"]):
            where = folder / f"gptq-{windows}-{turn}"
            settings = [*plain["gptq"], f"data.calibration={windows}", f"data.heldout={HELDOUT}"]
            ours.append(our_run("compress", where, settings))
            if plain["peers_python"]:
                arguments = ["--calibration", windows, "--bits", 4, "--group", 64, "--asymmetric"]
                arguments += ["--heldout", HELDOUT]
                theirs.append(peer_run(plain, source, "run_llmcompressor.py", *arguments))
        rows.append(gptq_row(source, windows, ours, theirs))
    return rows


def gptq_row(
    source: Source, windows: int, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]
) -> dict[str, Any]:
    """Times of one setting: the median run with its parts, the floor, the peer."""
    totals = list(map(seconds, ours))
    middle = ours[totals.index(statistics.median_low(totals))]
    context = middle["data"]["shape"][1]
    rate = floor.product_rate(source.config, middle["config"]["walk"]["chunk"] * context)
    work = floor.operations(source.config, windows, context)
    least = sum(work.values()) / rate
    total = statistics.median_low(totals)
    row = {
        "calibration": windows,
        "seconds": total,
        "seconds_all": totals,
        "compile_seconds": middle["seconds"]["compress_compile"],
        "parts_with_compile": phases(middle),
        "perplexity": middle["metrics"]["perplexity"]["value"],
        "peak_memory": middle["peak_memory"],
        "operations": work,
        "product_rate": rate,
        "floor_seconds": {name: count / rate for name, count in work.items()},
        "times_floor": total / least,
    }
    if theirs:
        peer = statistics.median_low([result["seconds"] for result in theirs])
        row["llmcompressor"] = theirs
        row["times_faster"] = peer / total
        row["times_faster_with_compile"] = peer / (total + row["compile_seconds"])
    return row


def perplexity(plain: dict[str, Any], source: Source, folder: Path) -> dict[str, Any]:
    """Protocol E on the float model, ours and transformers' in turns."""
    ours, theirs = [], []
    for turn in range(plain["repeats"]):
        ours.append(our_run("evaluate", folder / f"perplexity-{turn}", []))
        if plain["peers_python"]:
            theirs.append(peer_run(plain, source, "run_transformers_perplexity.py"))
    totals = [r["seconds"]["evaluate"] - r["seconds"]["evaluate_compile"] for r in ours]
    row: dict[str, Any] = {
        "seconds": statistics.median_low(totals),
        "seconds_all": totals,
        "compile_seconds": ours[0]["seconds"]["evaluate_compile"],
        "perplexity": ours[0]["metrics"]["perplexity"]["value"],
    }
    if theirs:
        row["transformers"] = theirs
        peer = statistics.median_low([result["seconds"] for result in theirs])
        loading = statistics.median_low([result["load_seconds"] for result in theirs])
        row["times_faster"] = peer / row["seconds"]  # ours reads the weights as it goes, theirs not
        row["times_faster_with_loading"] = (peer + loading) / row["seconds"]
    return row


def memory(plain: dict[str, Any], source: Source, folder: Path) -> list[dict[str, Any]]:
    """Peak memory of GPTQ on random models that differ in depth alone."""
    rows = []
    for depth in plain["depths"]:
        with tempfile.TemporaryDirectory() as model:
            config = dataclasses.replace(source.config, layers=depth, tied_embeddings=True)
            write_random_model(config, source.tokenizer(), Path(model))
            settings = ["model=local", f"model.path={model}", *plain["memory"]]
            record = our_run("compress", folder / f"memory-{depth}", settings)
        rows.append({"blocks": depth, "peak_memory": record["peak_memory"]})
    peaks = [row["peak_memory"] for row in rows]
    return [{**row, "times_least": row["peak_memory"] / min(peaks)} for row in rows]


def our_run(command: str, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """One of our commands in a process of its own, with nothing compiled before; its record."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
        arguments = [f"experiments.{command}", f"runs={folder}", *overrides]
        process([sys.executable, "-m", *arguments], environment)
    (path,) = folder.glob(f"{command}/*/*/{records.FILE}")
    return records.read(path)


def peer_run(plain: dict[str, Any], source: Source, script: str, *arguments: Any) -> dict[str, Any]:
    """A peer's script in its own environment; the JSON of its last line."""
    gguf = ["--gguf", source.location, "--windows", STORED, "--threads", plain["threads"]]
    command = [plain["peers_python"], PEERS / script, *gguf, *arguments]
    return json.loads(process(list(map(str, command)), dict(os.environ)).splitlines()[-1])


def process(command: list[str], environment: dict[str, str]) -> str:
    progress.console.print(f"[dim]{' '.join(command)}[/]", soft_wrap=True)
    done = subprocess.run(
        command, env=environment, cwd=records.ROOT, capture_output=True, text=True
    )
    if done.returncode:
        last = "\n".join(done.stderr.splitlines()[-15:])
        progress.console.print(last, markup=False)
        raise UserError(f"{' '.join(command)} failed with status {done.returncode}, see above.")
    return done.stdout


@entry_point("benchmark")
def main(config: DictConfig) -> runs.Run:
    done = run(config)
    progress.console.print_json(data=done.record["results"])
    progress.console.print(f"record: {done.folder / records.FILE}", soft_wrap=True)
    return done


if __name__ == "__main__":
    main()
