"""What a search finds, made first if it is not there: the sub-network that `compress
structure=once_for_all` begins with, the rules of `allocation=…`. One command is then a whole
experiment.
"""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.runs.first import STRUCTURE, first, settings
from experiments.searching.tables import seconds
from experiments.structures.once_for_all import TARGET, subnetwork_node

# What conf/search.yaml has, all of it a compression's own.
KEYS = ("model", "data", "structure", "rotation", "scaling", "pruning", "algorithm", "activations",
        "correction", "allocation", "hardware", "bits", "rules", "runs", "dry_run", "seed",
        "seeds", "logger")  # fmt: skip
WALK = ("chunk", "dense_dtype")


def search_config(config: DictConfig, keys: Sequence[str] = KEYS) -> DictConfig:
    """The search that a compression begins with."""
    return settings(config, keys, WALK)


def with_rules(config: DictConfig) -> tuple[DictConfig, dict[str, Any]]:
    """The configuration with the sub-network that its structure comes to in its place, and with the
    rules that its allocation comes to behind its own, and what the record says of the searches; as
    they are without.

    Raises UserError in a dry run if a search has yet to be made.
    """
    config, first = with_structure(config)
    if not config.get("allocation"):
        return config, first
    identity, search = _made(search_config(config))
    ruled = OmegaConf.merge(config, {"rules": [*config.rules, *search["rules"]]})
    assert isinstance(ruled, DictConfig)
    kept = ("rules", "score", "bound", "totals", "sparsity", "seconds")
    said = {key: search[key] for key in kept if key in search}
    return ruled, {**first, "search": {"identity": identity, **said}}


def with_structure(config: DictConfig) -> tuple[DictConfig, dict[str, Any]]:
    """The configuration with the sub-network that a search finds, and what a record says of it."""
    if not begins_with_structure(config):
        return config, {}
    identity, search = _made(search_config(config, STRUCTURE))
    found = config.copy()
    found.structure = subnetwork_node(search["sizes"])
    said = {key: value for key, value in search.items() if key != "trials"}
    return found, {"subnetwork": {"identity": identity, **said}}


def begins_with_structure(config: DictConfig) -> bool:
    """Whether the structure has yet to be searched for."""
    return bool(config.get("structure")) and config.structure.get("_target_") == TARGET


def _made(asked: DictConfig) -> tuple[str, dict[str, Any]]:
    """The identity of a search, and what its record says of it."""
    done = first(
        "search", asked, dry_run=asked.dry_run, doing="searching first",
        missing="a search: run python -m experiments.search with the same settings first",
    )  # fmt: skip
    found = done.record["search"] | {"seconds": seconds(done.record)}
    return done.record["identity"], found
