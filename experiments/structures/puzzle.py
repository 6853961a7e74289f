"""Of each block's alternatives one, within budgets: what conf/structure/puzzle.yaml names."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from algorithms.blockwise import BlockwiseMethod
from algorithms.search.programme import Choice, choose
from algorithms.search.puzzle import local_distillation
from experiments.checkpoints.families import FAMILIES
from experiments.checkpoints.sources import Source
from experiments.errors import UserError
from experiments.recipes import Effort, Structure
from experiments.structures.alternatives import COSTS, Alternative, sizes_of, whole
from experiments.structures.assembled import Assembled, stored
from experiments.structures.library import units_of
from models.config import BlockSizes, DecoderConfig

HETEROGENEOUS = "nemotron-nas"  # the family that other software knows such models by
BUDGETS: dict[str, float | None] = {
    "parameters": 0.8, "multiplications": None, "cache": None, "seconds": None,
}  # fmt: skip


class Made(NamedTuple):
    """A library that is there."""

    folder: Path
    identity: str
    record: Mapping[str, Any]  # its alternatives, what they cost, and every block's scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Puzzle(Structure):
    """What is chosen from, and within what."""

    kv_heads: tuple[float, ...]
    feed_forward: tuple[float, ...]
    multiple: int
    budgets: tuple[tuple[str, float], ...]
    steps: int
    batch: int
    learning_rate: float
    score_windows: int
    context: int
    latency_tokens: int
    library: Made | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name, fractions in (("kv_heads", self.kv_heads), ("feed_forward", self.feed_forward)):
            if not fractions or not all(0 <= each <= 1 for each in fractions):
                raise ValueError(f"{name}={list(fractions)} must be fractions from 0 to 1.")
        for name in ("multiple", "score_windows", "latency_tokens"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        for name in ("steps", "context"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{name}={value} must not be negative.")
        for name, budget in self.budgets:
            if name not in COSTS:
                raise ValueError(f"budgets: {name} is none of {', '.join(COSTS)}.")
            if not 0 < budget <= 1:
                raise ValueError(
                    f"budgets: {name}={budget:g} must be a fraction of what the model's blocks "
                    "take, above 0 and up to 1."
                )
        if self.steps:
            _ = self.method  # which refuses its own settings

    @property
    def method(self) -> BlockwiseMethod | None:
        """What trains an alternative."""
        if not self.steps:
            return None
        return local_distillation(
            steps=self.steps, batch=self.batch, learning_rate=self.learning_rate
        )

    def alternatives(self, config: DecoderConfig) -> tuple[Alternative, ...]:
        """What each block's library holds, the parent's own too; raises UserError."""
        found = sizes_of(config, self.kv_heads, self.feed_forward, self.multiple)
        return tuple(Alternative(part, size) for part, sizes in found.items() for size in sizes)

    def effort(self, config: DecoderConfig) -> Effort:
        """Nothing: the library was made before, by a run of its own."""
        return Effort(0, 0)

    def __call__(
        self, source: Source, windows: Int[np.ndarray, "n T"] | None = None, *, chunk: int = 4
    ) -> Assembled:
        """The choice is found at once, as it decides the shape: in seconds, from what the library's
        record says.
        """
        if not self.budgets:
            raise UserError(
                "structure.budgets are all null, so that nothing would be made smaller: give one "
                f"of {', '.join(COSTS)}, as a fraction of what the model's blocks take."
            )
        if self.library is None:
            raise UserError("This structure chooses from a library, and got none.")
        config, record = source.config, self.library.record
        alternatives = self.alternatives(config)
        start = time.perf_counter()
        chosen, choice, totals = solve(config, alternatives, record, dict(self.budgets))
        said = {
            "library": self.library.identity,
            "chosen": [[each.size for each in block] for block in chosen],
            "score": choice.score,
            "bound": choice.bound,
            "totals": totals,
            "solver_seconds": time.perf_counter() - start,
        }
        own = whole(config)
        replaced = {
            layer: {each.part: each.name for each in block if each.size != own[each.part]}
            for layer, block in enumerate(chosen)
        }
        return Assembled(
            source, _shape(config, chosen), replaced, stored(self.library.folder), said
        )


type Chosen = list[tuple[Alternative, Alternative]]  # of each block: attention, feed-forward


def solve(
    config: DecoderConfig,
    alternatives: Sequence[Alternative],
    record: Mapping[str, Any],
    budgets: Mapping[str, float],
) -> tuple[Chosen, Choice, dict[str, float]]:
    """The choice, and what it takes of what the model's blocks do, by cost. A unit of the programme
    is one block's attention or its feed-forward layer.

    Raises UserError if the budgets cannot be met.
    """
    parts, scores = units_of(alternatives), np.array(record["scores"], float)
    table, costs = _table(scores, parts), record["costs"]
    every = {name: np.array([each[name] for each in costs]) for name in COSTS}
    share = {name: values / _of_parent(config, record, name) for name, values in every.items()}
    tiled = {name: _table(np.tile(values, (config.layers, 1)), parts, 0.0)
             for name, values in share.items()}  # fmt: skip
    try:
        choice = choose(table, tiled, budgets)
    except ValueError as error:
        raise UserError(f"structure: {error}") from error
    numbers = choice.options.reshape(config.layers, len(parts))
    chosen = [tuple(alternatives[own[n]] for own, n in zip(parts.values(), row, strict=True))
              for row in numbers]  # fmt: skip
    at = np.arange(len(table)), choice.options
    return chosen, choice, {name: float(cost[at].sum()) for name, cost in tiled.items()}


def _of_parent(config: DecoderConfig, record: Mapping[str, Any], cost: str) -> float:
    """What all blocks of the model as it is take."""
    return config.layers * sum(each[cost] for each in record["parent"])


def _table(
    values: Float[np.ndarray, "L n"], parts: Mapping[str, Sequence[int]], missing: float = np.inf
) -> Float[np.ndarray, "u k"]:
    """Of every block's alternatives, one row for each part; missing: where a part has fewer."""
    width = max(map(len, parts.values()))
    rows = np.full((len(values), len(parts), width), missing)
    for n, own in enumerate(parts.values()):
        rows[:, n, : len(own)] = values[:, own]
    return rows.reshape(-1, width)


def _shape(config: DecoderConfig, chosen: Chosen) -> DecoderConfig:
    """Of the model that is put together, under a family that other software knows, if it has one
    for blocks that differ.
    """
    blocks = tuple(
        BlockSizes(kv_heads=attention.size, feed_forward=mlp.size) for attention, mlp in chosen
    )
    own = whole(config)
    if set(blocks) == {BlockSizes(kv_heads=own["attention"], feed_forward=own["feed_forward"])}:
        return config
    found = dataclasses.replace(config, blocks=blocks)
    named = dataclasses.replace(found, family=HETEROGENEOUS)
    try:
        FAMILIES[HETEROGENEOUS].write(named)
    except ValueError:
        return found
    return named


def puzzle(
    *,
    kv_heads: Sequence[float | int] = (1, 0),
    feed_forward: Sequence[float | int] = (1, 0.5, 0),
    multiple: int = 256,
    budgets: Mapping[str, float | int | None] = BUDGETS,
    steps: int = 32,
    batch: int = 4,
    learning_rate: float | int = 3e-4,
    score_windows: int = 4,
    context: int = 512,
    latency_tokens: int = 1,
) -> Puzzle:
    """Puzzle: of every block its own attention and feed-forward layer, out of a library of trained
    ones. Raises ValueError for settings that make none.
    """
    given = tuple((name, float(value)) for name, value in budgets.items() if value is not None)
    return Puzzle(
        kv_heads=tuple(map(float, kv_heads)), feed_forward=tuple(map(float, feed_forward)),
        multiple=multiple,
        budgets=given, steps=steps, batch=batch, learning_rate=float(learning_rate),
        score_windows=score_windows, context=context, latency_tokens=latency_tokens,
    )  # fmt: skip
