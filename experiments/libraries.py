"""The library that a structure chooses from, made first if it is not there: what `compress
structure=puzzle` begins with. One command is then a whole experiment, and other budgets go on with
the same library.
"""

import dataclasses

from omegaconf import DictConfig

from experiments.recipes import Structure
from experiments.runs.first import STRUCTURE, first, settings
from experiments.structures.puzzle import Made, Puzzle


def library_config(config: DictConfig) -> DictConfig:
    """The library that a compression begins with."""
    found = settings(config, STRUCTURE, ["chunk"])
    for budget in found.structure.budgets:
        found.structure.budgets[budget] = None
    return found


def with_library(config: DictConfig, structure: Structure) -> Structure:
    """The structure with its library, as it is where it needs none.

    Raises UserError in a dry run if the library has yet to be made.
    """
    if not isinstance(structure, Puzzle) or not structure.budgets:
        return structure
    done = first(
        "library", library_config(config), dry_run=config.dry_run,
        doing="making the library first",
        missing="a library: run python -m experiments.library with the same settings and no "
        "budgets first",
    )  # fmt: skip
    made = Made(done.folder / "library", done.record["identity"], done.record["library"])
    return dataclasses.replace(structure, library=made)
