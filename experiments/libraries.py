"""The library that a structure chooses from, made first if it is not there: what `compress
structure=puzzle` begins with. One command is then a whole experiment, and other budgets go on with
the same library.
"""

import dataclasses
import importlib

from omegaconf import DictConfig, OmegaConf

from experiments.entry import resolved
from experiments.errors import UserError
from experiments.progress import console
from experiments.recipes import Structure
from experiments.runs import run as runs
from experiments.structures.puzzle import Made, Puzzle

# What conf/library.yaml has, all of it a compression's own.
KEYS = ("model", "data", "structure", "hardware", "runs", "dry_run", "seed", "seeds", "logger")


def library_config(config: DictConfig) -> DictConfig:
    """The library that a compression begins with."""
    found = OmegaConf.masked_copy(config, [key for key in KEYS if key in config])
    found.walk = OmegaConf.masked_copy(config.walk, ["chunk"])
    found.again = False
    for budget in found.structure.budgets:
        found.structure.budgets[budget] = None
    return found


def with_library(config: DictConfig, structure: Structure) -> Structure:
    """The structure with its library, as it is where it needs none.

    Raises UserError in a dry run if the library has yet to be made.
    """
    if not isinstance(structure, Puzzle) or not structure.budgets:
        return structure
    asked = library_config(config)
    at = runs.place("library", resolved(asked))
    if not at.finished:
        if config.dry_run:
            raise UserError(
                "This begins with a library: run python -m experiments.library with the same "
                "settings and no budgets first, then ask."
            )
        console.print(f"making the library first: {at.folder}", soft_wrap=True, markup=False)
    done = importlib.import_module("experiments.library").run(asked)
    made = Made(done.folder / "library", done.record["identity"], done.record["library"])
    return dataclasses.replace(structure, library=made)
