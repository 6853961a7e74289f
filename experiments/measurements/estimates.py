"""How far an estimate is from the run it was made for: peak memory and time, each in a process of
its own. The rate of products is measured before and after, since other work changes it.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from experiments import hardware
from experiments.checkpoints.sources import Source
from experiments.estimate import Estimate, estimate
from experiments.recipe_builder import build_recipe
from experiments.streaming import Walk
from models.config import DecoderConfig

type Runner = Callable[[str, Path, list[str]], dict[str, Any]]  # command, folder, overrides: record

MEASURING = 2.0  # seconds
HELDOUT = "data.heldout=20"
CONFIGURATIONS = {
    "RTN 4 bit": ("compress", ["algorithm=rtn", HELDOUT]),
    "GPTQ 4 bit, 8 windows": ("compress", ["algorithm=gptq", "data.calibration=8", HELDOUT]),
    "GPTQ 4 bit, 32 windows": ("compress", ["algorithm=gptq", "data.calibration=32", HELDOUT]),
    "GPTQ 4 bit, 128 windows": ("compress", ["algorithm=gptq", "data.calibration=128", HELDOUT]),
    "float, evaluated": ("evaluate", [HELDOUT]),
}


def estimates(
    plain: dict[str, Any], source: Source, folder: Path, run: Runner
) -> list[dict[str, Any]]:
    """Each configuration's estimate beside what its run took. run: one command in a new process."""
    rows = []
    for n, (name, (command, overrides)) in enumerate(CONFIGURATIONS.items()):
        before = hardware.product_rate(MEASURING)
        start = time.perf_counter()
        record = run(command, folder / f"estimates-{n}", overrides)
        seconds = time.perf_counter() - start
        rate = 2 / (1 / before + 1 / hardware.product_rate(MEASURING))
        rows.append(
            row(name, of_record(record, source.config, rate, source.views), record, seconds)
        )
    return rows


def of_record(
    record: dict[str, Any],
    config: DecoderConfig,
    rate: float,
    views: bool,
    calibration: tuple[int, int] | None = None,
) -> Estimate:
    """The estimate that would have been made before a recorded run.

    config: of its model, or of one with more blocks. views: of its source. calibration: in place
    of the run's own.
    """
    settings, data = record["config"], record["data"]
    compressing = record["command"] == "compress"
    return estimate(
        config,
        build_recipe(OmegaConf.create(settings), config) if compressing else None,
        calibration=(calibration or tuple(data["calibration"])) if compressing else None,
        heldout=tuple(data["heldout"]),
        walk=Walk(**settings["walk"]) if compressing else Walk(),
        evaluation_chunk=settings["evaluation"]["chunk"],
        views=views,
        rate=rate,
        base=hardware.process_memory(),
    )


def row(name: str, found: Estimate, record: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Estimated over measured: above 1, the estimate was too high."""
    return {
        "configuration": name,
        "estimated_memory": found.peak,
        "measured_peak": record["peak_memory"],
        "memory_ratio": found.peak / record["peak_memory"],
        "estimated_seconds": found.total_seconds,
        "measured_seconds": seconds,
        "time_ratio": found.total_seconds / seconds,
        "estimate": found._asdict(),
        "phases_seconds": record["seconds"],
    }
