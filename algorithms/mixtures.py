"""Sites of a mixture of experts: each expert sees its own tokens, all are solved by one program.

An expert that no calibration token reaches is calibrated on every token that its mixture reads, as
if all of them had been sent to it; its name goes into the report. It never gets empty statistics.
Letters: e experts, R rows of all experts, n rows of one.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from algorithms.layerwise import LayerwiseMethod, Statistics, add
from algorithms.tensors import ExpertsTensor

AT_ONCE = 4  # experts that are solved side by side
PIECE = 1024  # rows that are observed at once


class Observed(NamedTuple):
    """Statistics of every expert, each leaf with an axis of experts in front."""

    stats: Statistics
    unreached: list[int]  # experts that no token was sent to


def observe(block: Any, site: Any, chunks: Sequence[Any], method: LayerwiseMethod) -> Observed:
    """The statistics of each expert at a site of experts."""
    if method.paired:
        raise ValueError(
            f"{site.name}: a method that compares with the original's activations cannot take "
            "experts, to which the original sends other tokens: set calibration=none for them."
        )
    counts = np.sum([np.asarray(flow.routing.counts) for flow in chunks], 0)
    unreached = np.flatnonzero(counts == 0).tolist()
    own = [_by_expert(flow) for flow in chunks]
    graph, state = nnx.split(block)
    stats = []
    for expert in range(len(counts)):
        rows = [rows[expert] for rows in own]
        if expert in unreached:
            rows = [_as_if_sent(graph, state, flow.mixed, expert, site=site.name)
                    for flow in chunks]  # fmt: skip
        stats.append(_observed(np.concatenate(rows), method))
    return Observed(jax.tree.map(lambda *leaves: jnp.stack(leaves), *stats), unreached)


def _by_expert(flow: Any) -> list[np.ndarray]:
    """The rows of each."""
    return np.split(np.asarray(flow.activation), np.cumsum(flow.routing.counts)[:-1])


@functools.partial(jax.jit, static_argnames=("graph", "site"))
def _as_if_sent(graph, state, x, expert, *, site: str):
    return nnx.merge(graph, state).as_if_sent(x, expert, site)


def _observed(rows: Float[np.ndarray, "n i"], method: LayerwiseMethod) -> Statistics:
    """In pieces of powers of two, so that few programs serve any number of rows."""
    assert method.init is not None
    stats, start = method.init(rows.shape[1]), 0
    while start < len(rows):
        size = min(PIECE, 1 << (len(rows) - start).bit_length() - 1)
        stats = add(stats, jnp.asarray(rows[start : start + size]), observe=method.observe)
        start += size
    return stats


@functools.partial(jax.jit, static_argnames="method")
def solve(w: Float[Array, "e o i"], stats, key, *, method: LayerwiseMethod) -> ExpertsTensor:
    """The compressed weights of all experts, with statistics of each or, data-free, of none."""
    keys = None if key is None or not method.seeded else jax.random.split(key, len(w))

    def one(args):
        w, stats, key = args
        return method.compress(w, stats) if key is None else method.compress(w, stats, key)

    return ExpertsTensor(jax.lax.map(one, (w, stats, keys), batch_size=AT_ONCE))


@functools.partial(jax.jit, static_argnames="of")
def error(w, approximation, stats, *, of: Callable[..., Any]) -> Float[Array, ""]:
    """The largest of the experts'."""

    def one(args):
        return of(*args)

    return jax.lax.map(one, (w, approximation, stats), batch_size=AT_ONCE).max()


@functools.partial(jax.jit, static_argnames="of")
def notes(stats, *, of: Callable[..., Any] | None) -> dict[str, Array]:
    """What a method notes of each, added up."""
    if of is None:
        return {}
    return {name: each.sum() for name, each in jax.vmap(of)(stats).items()}
