"""What a run would do and take, before it does: no model in memory, no device, nothing written."""

from collections.abc import Callable
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.table import Table

from experiments.configuration import leaves, origins
from experiments.progress import console


def show(command: str, config: DictConfig, prepare: Callable[[DictConfig], Any] | None) -> None:
    """Print the resolved configuration with where each value came from, then the estimate.

    prepare: opens what the configuration names and estimates; None: nothing is known of this one.
    """
    from experiments.entry import resolved  # which imports this module
    from experiments.runs import run as runs

    plain = resolved(config)
    console.print(_settings(config, plain))
    at = runs.place(command, plain)
    if prepare is not None:
        plan = prepare(config)
        plan.show()
        plan.require(at.folder)
    state = "finished" if at.finished else "to go on with" if at.folder.exists() else "new"
    console.print(f"output folder: {at.folder} ({state})", soft_wrap=True)


def _settings(config: DictConfig, plain: dict[str, Any]) -> Table:
    drawn = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("setting", "value", "from"):
        drawn.add_column(name, overflow="fold")
    where = origins(config, HydraConfig.get())  # type: ignore[arg-type]
    for key, value in leaves(plain):
        drawn.add_row(key, str(value), where.get(key, ""))
    return drawn
