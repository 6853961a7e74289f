"""What a model's blocks do with calibration text: one pass, one block in memory at a time."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from experiments import progress
from experiments.checkpoints.sources import Source
from experiments.errors import UserError
from experiments.evaluation.forward import split_blocks
from experiments.streaming import embed_windows
from models.block import Block, Flow

type See = Callable[[Block, Flow], tuple[Any, Flow]]  # what is found, to be added up over chunks,
# and what leaves the block


def observe_blocks(
    source: Source, windows: Int[np.ndarray, "n T"] | None, see: See, *, chunk: int
) -> tuple[list[Any], list[Flow]]:
    """What `see` finds in each block, and what leaves the last one.

    see: one object for one computation, which is compiled for it. Raises UserError where there are
    no windows and where activations are not finite.
    """
    flows, found = list(embed_windows(source, required(windows), chunk)), list[Any]()
    with progress.steps("score", source.config.layers) as step:
        for graph, state in split_blocks(source):
            total = None
            for n, flow in enumerate(flows):
                one, flows[n] = _seen(graph, state, flow, see=see)
                total = one if total is None else jax.tree.map(jnp.add, total, one)
            require_finite(len(found), flows)
            found.append(jax.block_until_ready(total))
            del graph, state
            step("")
    return found, flows


def required(windows: Int[np.ndarray, "n T"] | None) -> Int[np.ndarray, "n T"]:
    if windows is None:
        raise UserError("This structure is found on calibration windows, and got none.")
    return windows


def require_finite(layer: int, flows: list[Flow]) -> None:
    if not all(bool(jnp.isfinite(flow.residual).all()) for flow in flows):
        raise UserError(
            f"Block {layer}: The activations at its output hold NaN or infinity: look at the "
            "blocks before it, or at the calibration text."
        )


@functools.partial(jax.jit, static_argnames=("graph", "see"))
def _seen(graph, state, flow: Flow, *, see: See):
    return see(nnx.merge(graph, state), flow)


@functools.partial(jax.jit, static_argnames="graph")
def run_block(graph, state, flow: Flow) -> Flow:
    """A whole block, without a cache."""
    y, _ = nnx.merge(graph, state)(flow.residual, flow.positions)
    return Flow(y, y, flow.positions)
