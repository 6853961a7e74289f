"""A choice of options for each unit: what conf/allocation/mixed.yaml names.

The table, units by options, holds what each option costs and what it is thought to cost the model;
the programme chooses. Everything is measured on the model as it is: options of one unit are tried
while all others are left alone.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import hydra
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from algorithms import surgery
from algorithms.search.kl import OutputDivergence
from algorithms.search.programme import choose
from algorithms.search.sensitivity import Passing, Sensitivity
from algorithms.tensors import CompressedTensor, DenseTensor, ExpertsTensor
from algorithms.walk import advance, compress_block, set_weights, unpack
from experiments.errors import UserError
from experiments.searching import costs
from experiments.searching.units import Kind, Unit

type Option = Mapping[str, Any] | None
type Row = dict[str, Any]  # of one unit, as the journal and the record keep it
type Score = Sensitivity | OutputDivergence
BUDGETS = ("bits", "bytes", "multiplications", "seconds")


@dataclasses.dataclass(frozen=True)
class Mixed:
    """What is chosen from, by what, within what."""

    score: Score
    options: tuple[Option, ...]
    unit: Kind
    budgets: Mapping[str, float]
    windows: int | None
    latency_tokens: int


def mixed(
    *,
    score: Any,
    options: Sequence[Option],
    unit: Kind = "site",
    budgets: Mapping[str, float | int | None],
    windows: int | None = 8,
    latency_tokens: int = 1,
) -> Mixed:
    """score: what conf/allocation/score names, not made yet. Raises ValueError for what is none."""
    given = {name: float(value) for name, value in budgets.items() if value is not None}
    if not given:
        raise ValueError(f"budgets are all null: give one of {', '.join(BUDGETS)}.")
    if len(options) < 2:
        raise ValueError(f"options={list(options)} leave no choice: give two or more.")
    if unit not in ("layer", "site", "block"):
        raise ValueError(f"unit={unit!r} must be layer, site or block.")
    if windows is not None and windows < 1:
        raise ValueError(f"windows={windows} must be at least 1, or null for all of them.")
    made = hydra.utils.instantiate(score)
    return Mixed(made, tuple(options), unit, given, windows, latency_tokens)


# Of one block: module paths, each with its compressed weight; none where an option leaves it.
type Solved = dict[str, CompressedTensor]
type Methods = Callable[[str], Any]


def solved(
    block: Any, chunks: Sequence[Any], methods: Methods | None, paths: frozenset[str], key: Any
) -> Solved:
    """A block's layers as one option leaves them; the block and its chunks stay as they are."""
    if methods is None:
        return {}

    def method_of(path: str) -> Any:
        return methods(path) if path in paths else None

    return compress_block(block, list(chunks), method_of, sequential=False, key=key).tensors


def cost_row(
    block: Any, unit: Unit, options: Sequence[Solved], dense_dtype: Any, chosen: int, tokens: int
) -> Row:
    """What each option of a unit costs. tokens: of which seconds are measured; 0: they are not."""
    shapes = {path: surgery.weight_shape(surgery.linear_at(block, path)) for path in unit.paths}
    row: Row = {
        "unit": unit.full,
        "match": unit.match,
        "weights": sum(map(math.prod, shapes.values())),
    }
    kept = [[o.get(path) or costs.dense(shapes[path], dense_dtype) for path in unit.paths]
            for o in options]  # fmt: skip
    row["bits"] = [sum(_bits(tensor) for tensor in each) for each in kept]
    row["multiplications"] = [
        sum(costs.multiplications(tensor, chosen) for tensor in each) for each in kept
    ]
    if tokens:
        row["seconds"] = [
            costs.seconds(
                [o.get(path) or _as_is(block, path) for path in unit.paths], tokens, chosen
            )
            for o in options
        ]
    return row


def _bits(tensor: CompressedTensor) -> int:
    leaves = jax.tree.leaves(tensor)
    if all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        return sum(8 * leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return tensor.storage_bits()


def _as_is(block: Any, path: str) -> CompressedTensor:
    w = surgery.get_weight(surgery.linear_at(block, path))
    return ExpertsTensor(DenseTensor(w)) if w.ndim == 3 else DenseTensor(w)


def layer_scores(
    block: Any,
    units: Sequence[Unit],
    options: Sequence[Solved],
    chunks: Sequence[Any],
    gradients: Sequence[Mapping[str, Any]] | None,
    sensitivity: Sensitivity,
) -> list[list[float]]:
    """The score of each unit's options: of its layers, added up.

    gradients: of each chunk, ∂L/∂y of each layer, where the score looks at them.
    """
    moving, found = list(chunks), {}
    paths = {path for unit in units for path in unit.paths}
    tokens = sum(flow.positions[:, 1:].size for flow in chunks)  # that are predicted
    for stage, site in enumerate(block.sites):
        advance(block, moving, stage)
        for path in [path for path in site.readers if path in paths]:
            for n, tensors in enumerate(options):
                if path not in tensors:
                    found[path, n] = 0.0
                    continue
                g = None if gradients is None else [each[path] for each in gradients]
                found[path, n] = _layer_score(
                    _as_is(block, path), tensors[path], moving, g, sensitivity, tokens
                )
    return [
        [sum(found[path, n] for path in unit.paths) for n in range(len(options))] for unit in units
    ]


def _layer_score(
    before: CompressedTensor,
    after: CompressedTensor,
    chunks: Sequence[Any],
    g: Sequence[Any] | None,
    sensitivity: Sensitivity,
    tokens: int,
) -> float:
    w, tensor = before.dequantize(), unpack(after, dtype=jnp.float32)
    total = None
    for n, flow in enumerate(chunks):
        counts = None if flow.routing is None else flow.routing.counts
        sums = _measured(
            before, tensor, flow.activation, counts, None if g is None else g[n],
            measure=sensitivity.measure,
        )  # fmt: skip
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    d = jnp.zeros(())
    if sensitivity.weights:
        if after.online:
            raise ValueError(
                "this score looks at how the weights change, and options that round or turn their "
                "input change more: choose allocation/score=autoquantize, or activations=none."
            )
        d = after.dequantize(w.dtype) - w
    return float(_scored(total, w, d, tokens, score=sensitivity.score))


@functools.partial(jax.jit, static_argnames="measure")
def _measured(before, after, x, counts, g, *, measure):
    def output(tensor):
        if isinstance(tensor, ExpertsTensor):
            return tensor.grouped_matmul(x, counts)
        return tensor.matmul(x.reshape(-1, x.shape[-1]))

    y = output(before)
    flat = None if g is None else g.reshape(y.shape)
    return measure(Passing(x.reshape(-1, x.shape[-1]), y, output(after) - y, flat))


@functools.partial(jax.jit, static_argnames=("score", "tokens"))
def _scored(sums, w, d, tokens, *, score):
    return score(sums, w, d, tokens)


def changed(block: Any, unit: Unit, option: Solved) -> Any:
    """A copy of the block with a unit's layers as an option leaves them."""
    copy = nnx.clone(block)
    set_weights(copy, {path: option[path] for path in unit.paths})
    return copy


def solve(rows: Sequence[Row], found: Mixed) -> dict[str, Any]:
    """The programme of a whole table: what is chosen, at what score, with the rules it comes to.

    Raises UserError if the budgets cannot be met.
    """
    names = [name for name in ("score", *BUDGETS) if name in rows[0]]
    table = {name: np.array([row[name] for row in rows], float) for name in names}
    weights = sum(row["weights"] for row in rows)
    table |= {"bits": table["bits"] / weights, "bytes": table["bits"] / 8}
    scores = table.pop("score")
    start = time.perf_counter()
    try:
        choice = choose(scores, table, found.budgets)
    except ValueError as error:
        raise UserError(f"allocation: {error}") from error
    seconds, at = time.perf_counter() - start, (np.arange(len(rows)), choice.options)
    return {
        "options": list(found.options),
        "units": [{**row, "chosen": int(n)} for row, n in zip(rows, choice.options, strict=True)],
        "budgets": dict(found.budgets),
        "totals": {name: float(cost[at].sum()) for name, cost in table.items()},
        "score": choice.score,
        "bound": choice.bound,
        "solver_seconds": seconds,
        # The trivial choices: every unit the same.
        "uniform": [
            {"score": float(scores[:, n].sum())}
            | {name: float(cost[:, n].sum()) for name, cost in table.items()}
            for n in range(len(found.options))
        ],
        "rules": [
            {"match": row["match"], "algorithm": found.options[n]}
            for row, n in zip(rows, choice.options, strict=True)
        ],
    }
