"""A run that another one begins with: one command is then a whole experiment."""

import importlib
from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from experiments.entry import resolved
from experiments.errors import UserError
from experiments.progress import console
from experiments.runs import run as runs

# What a run depends on that makes or finds a structure: it comes before all other steps.
STRUCTURE = ("model", "data", "structure", "hardware", "runs", "dry_run", "seed", "seeds", "logger")


def settings(config: DictConfig, keys: Sequence[str], walk: Sequence[str]) -> DictConfig:
    """Of a configuration, what a run that comes before depends on."""
    found = OmegaConf.masked_copy(config, [key for key in keys if key in config])
    found.walk = OmegaConf.masked_copy(config.walk, list(walk))
    found.again = False
    return found


def first(command: str, config: DictConfig, *, dry_run: bool, doing: str, missing: str) -> runs.Run:
    """The run of the configuration, made where it is not finished yet.

    doing: what is said then. Raises UserError, that this begins with what is missing, in a dry run
    that lacks it.
    """
    at = runs.place(command, resolved(config))
    if not at.finished:
        if dry_run:
            raise UserError(f"This begins with {missing}, then ask.")
        console.print(f"{doing}: {at.folder}", soft_wrap=True, markup=False)
    return importlib.import_module(f"experiments.{command}").run(config)
