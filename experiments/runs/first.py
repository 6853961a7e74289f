"""A run that another one begins with: one command is then a whole experiment."""

import importlib

from omegaconf import DictConfig

from experiments.entry import resolved
from experiments.errors import UserError
from experiments.progress import console
from experiments.runs import run as runs


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
