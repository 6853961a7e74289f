"""What a run would do and take, before it does: no model in memory, no device, nothing written."""

from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.table import Table

from experiments.configuration import leaves, origins
from experiments.progress import console


def show(config: DictConfig) -> None:
    """Print the resolved configuration with where each value came from, and the estimate."""
    from experiments.entry import resolved  # which imports this module

    console.print(_settings(config, resolved(config)))


def _settings(config: DictConfig, plain: dict[str, Any]) -> Table:
    drawn = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("setting", "value", "from"):
        drawn.add_column(name, overflow="fold")
    where = origins(config, HydraConfig.get())  # type: ignore[arg-type]
    for key, value in leaves(plain):
        drawn.add_row(key, str(value), where.get(key, ""))
    return drawn
