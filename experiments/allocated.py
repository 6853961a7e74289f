"""Rules that a search finds, made first if they are not there: what `compress allocation=…` begins
with. One command is then a whole experiment.
"""

import importlib
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.entry import resolved
from experiments.errors import UserError
from experiments.progress import console
from experiments.runs import run as runs

# What conf/search.yaml has, all of it a compression's own.
KEYS = ("model", "data", "structure", "rotation", "scaling", "pruning", "algorithm", "activations",
        "correction", "allocation", "hardware", "bits", "rules", "runs", "dry_run", "seed",
        "seeds", "logger")  # fmt: skip
WALK = ("chunk", "dense_dtype")


def search_config(config: DictConfig) -> DictConfig:
    """The search that a compression begins with."""
    found = OmegaConf.masked_copy(config, [key for key in KEYS if key in config])
    found.walk = OmegaConf.masked_copy(config.walk, list(WALK))
    found.again = False
    return found


def with_rules(config: DictConfig) -> tuple[DictConfig, dict[str, Any]]:
    """The configuration with the rules that its allocation comes to behind its own, and what the
    record says of the search; both as they are without an allocation.

    Raises UserError in a dry run if the search has yet to be made.
    """
    if not config.get("allocation"):
        return config, {}
    asked = search_config(config)
    at = runs.place("search", resolved(asked))
    if not at.finished:
        if config.dry_run:
            raise UserError(
                "This begins with a search: run python -m experiments.search with the same "
                "settings first, then ask."
            )
        console.print(f"searching first: {at.folder}", soft_wrap=True, markup=False)
    done = importlib.import_module("experiments.search").run(asked)
    search = done.record["search"]
    ruled = OmegaConf.merge(config, {"rules": [*config.rules, *search["rules"]]})
    assert isinstance(ruled, DictConfig)
    kept = ("rules", "score", "bound", "totals", "sparsity")
    said = {key: search[key] for key in kept if key in search}
    return ruled, {"search": {"identity": at.identity, **said}}
