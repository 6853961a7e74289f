"""A multirun in which one job fails goes on, says so at its end, and completes when run again.

Each job notes its outcome in its own folder below hydra.sweep.dir, whatever launcher runs it; the
process that started the multirun reads them all. Finished runs are found by their identity, so the
same multirun again repeats only what failed.
"""

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.table import Table

from experiments.errors import UserError
from experiments.files import write_whole
from experiments.progress import console

FILE = "outcome.json"
NOTHING: dict[str, Any] = {"overrides": []}
started: list[Path] = []  # the folders of multiruns that this process started


class Watch(Callback):
    """Hydra tells it where a multirun's jobs note their outcomes."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        started.append(Path(config.hydra.sweep.dir).absolute())


def is_job() -> bool:
    """Whether this is one job of a multirun."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def job(run: Callable[[], Any]) -> None:
    """Run one job of a multirun; how it went is noted, and a failure does not stop the others."""
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    facts = {"job": hydra.job.num, "overrides": list(hydra.overrides.task)}
    _note(folder, **facts, status="died", error="killed, or out of memory")  # until it is replaced
    try:
        done = run()
    except UserError as error:
        console.print(f"[bold red]error:[/] {error}", soft_wrap=True)
        _note(folder, **facts, status="failed", error=str(error))
    except Exception as error:
        traceback.print_exc()
        _note(folder, **facts, status="failed", error=f"{type(error).__name__}: {error}")
    else:
        where = str(done.folder) if done is not None else None
        _note(folder, **facts, status="finished", run=where)


def _note(folder: Path, **outcome: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / FILE, json.dumps(outcome, indent=1) + "\n")


def summarize(folder: Path) -> bool:
    """Print how each job went; whether all of them finished."""
    found = [json.loads(path.read_text()) for path in folder.glob(f"*/{FILE}")]
    outcomes = sorted(found, key=lambda outcome: outcome["job"])
    done = [outcome for outcome in outcomes if outcome["status"] == "finished"]
    shared = set.intersection(*(set(outcome["overrides"]) for outcome in outcomes or [NOTHING]))
    drawn = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
    drawn.add_column(overflow="fold")
    for outcome in outcomes:
        own = [word for word in outcome["overrides"] if word not in shared or len(outcomes) == 1]
        detail = outcome.get("run") or outcome.get("error")
        drawn.add_row(str(outcome["job"]), " ".join(own), outcome["status"], detail)
    console.print(drawn)
    console.print(f"{len(done)} of {len(outcomes)} jobs finished ({folder})", soft_wrap=True)
    if len(done) < len(outcomes):
        console.print("Run the same command again: finished runs are kept, the others go on.")
    return len(done) == len(outcomes) > 0
