"""A sparsity for each unit, of one for the whole model: from a `SparsityMethod` to rules."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from algorithms import surgery
from algorithms.layerwise import LayerwiseMethod
from algorithms.search.sparsities import SparsityMethod
from algorithms.walk import advance, observe_site
from experiments.errors import UserError
from experiments.searching.units import Unit

type Row = dict[str, Any]
SHOWN = 8  # numbers of a unit's measure that a record keeps at most: not a histogram


def step_of(plain: Mapping[str, Any]) -> str:
    """The step of a resolved configuration whose sparsity is allocated; raises UserError."""
    for step in ("pruning", "algorithm"):
        node = plain.get(step)
        if node and node.get("sparsity") is not None and node.get("block") is None:
            return step
    raise UserError(
        "allocation gives each layer a sparsity of its own, and neither pruning nor algorithm has "
        "a fraction that goes: choose algorithm=magnitude, wanda or sparsegpt, without keep and "
        "block."
    )


def block_rows(
    block: Any, units: Sequence[Unit], chunks: Sequence[Any], method: SparsityMethod
) -> list[Row]:
    """What the method measures of each unit; the block and its chunks stay as they are."""
    moving, stats = list(chunks), dict[str, Any]()
    for stage, site in enumerate(block.sites):
        seen = None
        if method.observe is not None:
            advance(block, moving, stage)
            own = LayerwiseMethod(method.init, method.observe, _never)
            seen, _ = observe_site(block, site, moving, own)
        stats |= dict.fromkeys(site.readers, seen)
    return [_row(block, unit, [stats[path] for path in unit.paths], method) for unit in units]


def _never(w: Any, stats: Any) -> Any:
    """Statistics alone are asked for."""
    raise AssertionError


def _row(block: Any, unit: Unit, stats: Sequence[Any], method: SparsityMethod) -> Row:
    weights = [surgery.get_weight(surgery.linear_at(block, path)) for path in unit.paths]
    measured = _measured(weights, list(stats), measure=method.measure)
    return {
        "unit": unit.full,
        "match": unit.match,
        "weights": sum(w.size for w in weights),
        "measure": np.asarray(measured).tolist(),
    }


@functools.partial(jax.jit, static_argnames="measure")
def _measured(weights, stats, *, measure):
    return measure(weights, stats)


def solve(
    rows: Sequence[Row], method: SparsityMethod, sparsity: float, step: str
) -> dict[str, Any]:
    """Every unit's sparsity, with the rules that they come to. Raises UserError."""
    measures = np.array([row["measure"] for row in rows])
    sizes = np.array([row["weights"] for row in rows])
    try:
        found = method.allocate(measures, sizes, sparsity)
    except ValueError as error:
        raise UserError(f"allocation: {error}") from error
    # A layer without any weight is no layer: one stays.
    found = np.minimum(found, 1 - 1 / sizes)
    kept = [{k: v for k, v in row.items() if k != "measure" or len(v) <= SHOWN} for row in rows]
    return {
        "units": [{**row, "sparsity": float(s)} for row, s in zip(kept, found, strict=True)],
        "sparsity": float(np.average(found, weights=sizes)),
        "rules": [
            {"match": row["match"], step: {"sparsity": float(s)}}
            for row, s in zip(rows, found, strict=True)
        ],
    }
