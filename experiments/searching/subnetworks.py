"""The search over a model's sub-networks: what each costs, what it loses, which one is best.

The whole model is in memory, and a sub-network is its weights masked, so that one program evaluates
all of them. What costs more than a budget is not evaluated.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from algorithms.objectives import cross_entropy
from algorithms.search.once_for_all import LAYERS, Counts, Places, Space, subnetwork
from algorithms.tensors import DenseTensor
from experiments import progress
from experiments.checkpoints.dimensions import axes
from experiments.checkpoints.sources import shapes
from experiments.errors import UserError
from experiments.evaluation.forward import in_chunks
from experiments.searching import costs
from experiments.structures.once_for_all import OnceForAll
from models.config import DecoderConfig
from models.decoder import readers

ASKS = 32  # proposals for one evaluation, at most: samplers repeat themselves where little is left
type Trial = dict[str, Any]  # as the journal and the record keep it
type Note = Callable[..., None]  # of an event and its fields
type Evaluate = Callable[[Mapping[str, int]], Float[np.ndarray, " n"]]  # losses of windows
type Spent = Mapping[str, float | int]  # by what there may be a budget of
type CostsOf = Callable[[Mapping[str, int], Sequence[str]], Spent]  # of sizes; and the budgets


class Costs:
    """Of sub-networks, from shapes; seconds are measured, of each shape once."""

    def __init__(
        self, config: DecoderConfig, space: Space, *, itemsize: int, tokens: int,
        timed: Mapping[str, float], note: Note,
    ):  # fmt: skip
        """timed: seconds of products that were measured before, by shape."""
        self.config, self.space = config, space
        self.itemsize, self.tokens, self.note = itemsize, tokens, note
        self.timed = dict(timed)
        head = "embed" if config.tied_embeddings else "head"
        self._multiplied = {f"{head}.weight"} | {
            f"blocks.{n}.{path}.weight" for n in range(config.layers) for path in readers(config, n)
        }

    def of(self, chosen: Mapping[str, int], budgets: Sequence[str]) -> Spent:
        """What a sub-network costs; seconds only where there is a budget of them."""
        left = dict(self._left(chosen))
        count = sum(map(math.prod, left.values()))
        found: dict[str, float | int] = {"parameters": count, "bytes": count * self.itemsize,
                 "multiplications": self._summed(left, math.prod)}  # fmt: skip
        if "seconds" in budgets:
            found["seconds"] = self._summed(left, self._seconds)
        return found

    def _left(self, chosen: Mapping[str, int]) -> Any:
        """Shapes of what there is."""
        counts, sizes = self.space.counts(chosen), dict(self.space.sizes)
        for name, shape in shapes(self.config).items():
            root, _, rest = name.partition(".")
            if root == "blocks" and int(rest.split(".")[0]) >= counts[LAYERS]:
                continue
            dimensions = axes(self.config)[name]
            yield (
                name,
                tuple(
                    n * counts[d] // sizes[d] if d in sizes else n
                    for n, d in zip(shape, dimensions, strict=True)
                ),
            )

    def _summed(
        self, left: Mapping[str, tuple[int, ...]], of: Callable[[tuple[int, ...]], float | int]
    ) -> float | int:
        """Over what a token is multiplied with, of experts those that are chosen."""
        each = 1 if self.config.experts is None else self.config.experts.chosen
        return sum(
            of(shape) if len(shape) == 2 else each * of(shape[1:])
            for name, shape in left.items() if name in self._multiplied
        )  # fmt: skip

    def _seconds(self, shape: tuple[int, ...]) -> float:
        name = "x".join(map(str, shape))
        if name not in self.timed:
            spent = costs.seconds([DenseTensor(jnp.ones(shape))], self.tokens, 1)
            self.timed[name] = spent
            self.note("timed", shape=name, seconds=spent)
        return self.timed[name]


@functools.partial(jax.jit, static_argnames=("graph", "space", "places"))
def window_losses(
    state: Any, tokens: Int[Array, "B T"], chosen: Counts, *, graph: Any, space: Space,
    places: Places,
) -> Float[Array, " B"]:  # fmt: skip
    """Of a sub-network: the mean next-token loss of each window."""
    model = subnetwork(nnx.merge(graph, state), chosen, space, places)
    losses = cross_entropy(model.predictions(tokens[:, :-1]), tokens[:, 1:].reshape(-1))[0]
    return losses.reshape(len(tokens), -1).mean(1)


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Of sub-networks, on windows; one program for all."""

    model: Any
    space: Space
    places: Places
    windows: Int[np.ndarray, "n T"]
    chunk: int

    @functools.cached_property
    def split(self) -> tuple[Any, Any]:
        return nnx.split(self.model)

    def __call__(self, chosen: Mapping[str, int]) -> Float[np.ndarray, " n"]:
        graph, state = self.split
        sizes = {name: jnp.asarray(n) for name, n in chosen.items()}
        found = [
            window_losses(state, jnp.asarray(tokens), sizes, graph=graph, space=self.space,
                          places=self.places)
            for tokens in in_chunks(self.windows, self.chunk)
        ]  # fmt: skip
        return np.concatenate([np.asarray(each, np.float64) for each in found])


def key_of(sizes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(sizes.items()))


def require_feasible(
    found: OnceForAll, space: Space, costs_of: CostsOf, names: Sequence[str]
) -> None:
    """Refuse budgets, of these names, that the smallest sub-network exceeds.

    Raises UserError with by how much.
    """
    if not found.budgets:
        raise UserError(
            "structure.budgets are all null, so that the whole model is best: give one of "
            "parameters, bytes, multiplications or seconds."
        )
    least = costs_of(space.smallest(), names)
    for name in names:
        if least[name] > (budget := found.budgets[name]):
            raise UserError(
                f"structure.budgets.{name}={budget:g} leaves no sub-network: the smallest takes "
                f"{least[name]:g}, {least[name] / budget - 1:.1%} more: raise it, or train for "
                "smaller ones."
            )


def search(
    found: OnceForAll, space: Space, evaluate: Evaluate, costs_of: CostsOf, seed: int,
    known: Sequence[Trial], note: Note,
) -> dict[str, Any]:  # fmt: skip
    """What a record says: the best sub-network, and all that were evaluated.

    known: what an earlier attempt found. The sampler is asked again and told the same, so that it
    goes on as if it had not been interrupted.
    """
    proposals, begun = found.sampler(space, seed), {key_of(t["sizes"]): t for t in known}
    trials: dict[Any, Trial] = {}
    most, asked = min(found.trials, len(space)), 0
    if proposals.exhaustive:
        most = len(space)
    with progress.steps("search", most) as step:
        while len(trials) < most and asked < ASKS * most:
            sizes = proposals.ask()
            if sizes is None:
                break
            asked += 1
            spent = costs_of(sizes, list(found.budgets))
            over = {name: spent[name] / budget - 1 for name, budget in found.budgets.items()}
            if any(value > 0 for value in over.values()):
                proposals.tell(None, over)
                continue
            key = key_of(sizes)
            if key not in trials:
                trials[key] = begun.get(key) or _evaluated(sizes, spent, evaluate, note)
                step(f"loss {trials[key]['loss']:.4f}")
            proposals.tell(trials[key]["loss"], over)
    return _summary(found, space, list(trials.values()), asked)


def _evaluated(sizes: Mapping[str, int], spent: Spent, evaluate: Evaluate, note: Note) -> Trial:
    start = time.perf_counter()
    losses = evaluate(sizes)
    if not np.isfinite(losses).all():
        raise UserError(f"The sub-network {dict(sizes)} has losses that are not finite.")
    error = losses.std(ddof=1) / math.sqrt(len(losses)) if len(losses) > 1 else None
    trial = {"sizes": dict(sizes), "loss": float(losses.mean()), "costs": dict(spent),
             "standard_error": None if error is None else float(error)}  # fmt: skip
    note("trial", trial=trial, seconds=time.perf_counter() - start)
    return trial


def _summary(
    found: OnceForAll, space: Space, trials: Sequence[Trial], asked: int
) -> dict[str, Any]:
    if not trials:
        raise UserError(
            f"structure: none of {asked} sub-networks that were proposed is within the budgets "
            f"{dict(found.budgets)}: raise them, or choose structure/sampler=exhaustive."
        )
    best = min(trials, key=lambda trial: trial["loss"])
    return {
        "sizes": best["sizes"], "loss": best["loss"], "standard_error": best["standard_error"],
        "totals": best["costs"], "budgets": dict(found.budgets), "space": len(space),
        "choices": {name: list(values) for name, values in space.choices},
        "asked": asked, "evaluated": len(trials), "trials": list(trials),
    }  # fmt: skip
