"""The best sub-network within budgets, searched for: what conf/structure/once_for_all.yaml names.

It is the settings of a search, which `experiments.allocated` makes before anything else is done;
what it finds is a `structure=subnetwork`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from algorithms.search.once_for_all import Space
from experiments.checkpoints.sources import Source
from experiments.errors import UserError
from experiments.structures.supernet import DIMENSIONS, Choices, space_of

TARGET = "experiments.structures.once_for_all.once_for_all"
FOUND = "experiments.structures.subnetwork.subnetwork"
BUDGETS = ("parameters", "bytes", "multiplications", "seconds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnceForAll:
    """What is chosen from, by what, within what."""

    choices: Choices
    sampler: Any
    budgets: Mapping[str, float]
    trials: int
    windows: int | None
    latency_tokens: int

    def space(self, source: Source) -> Space:
        """Raises UserError for a model that was not trained for any, where none are given."""
        given = any(values is not None for values in self.choices.values())
        return space_of(source.config, self.choices if given else _trained(source), "structure")


def once_for_all(
    *,
    layers: Sequence[int] | None = None,
    hidden: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    kv_heads: Sequence[int] | None = None,
    feed_forward: Sequence[int] | None = None,
    sampler: Any,
    budgets: Mapping[str, float | int | None],
    trials: int = 64,
    windows: int | None = 8,
    latency_tokens: int = 1,
) -> OnceForAll:
    """Raises ValueError for settings that are none."""
    for name, value in (("trials", trials), ("latency_tokens", latency_tokens)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    if windows is not None and windows < 1:
        raise ValueError(f"windows={windows} must be at least 1, or null for all of them.")
    if unknown := set(budgets) - set(BUDGETS):
        raise ValueError(f"budgets are of {', '.join(BUDGETS)}, not of {', '.join(unknown)}.")
    given = {"layers": layers, "hidden": hidden, "heads": heads, "kv_heads": kv_heads,
             "feed_forward": feed_forward}  # fmt: skip
    return OnceForAll(
        choices=given, sampler=sampler, trials=trials, windows=windows,
        budgets={name: float(v) for name, v in budgets.items() if v is not None},
        latency_tokens=latency_tokens,
    )  # fmt: skip


def subnetwork_node(sizes: Mapping[str, int]) -> dict[str, Any]:
    """The settings of structure=subnetwork."""
    return {"_target_": FOUND, **{d: sizes.get(d) for d in DIMENSIONS}}


def _trained(source: Source) -> Choices:
    """What the training of a checkpoint says that it was for."""
    recipe = getattr(source, "description", {}).get("recipe", [])
    for step in reversed(recipe):
        if elastic := step.get("elastic"):
            return {d: elastic[d] for d in DIMENSIONS}
    raise UserError(
        "structure: this model was not trained for sub-networks (experiments.train "
        "elastic=sandwich), so that none are known: give sizes to choose from, such as "
        "structure.feed_forward=[…]."
    )
