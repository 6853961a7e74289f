"""The gradients of a model's loss, block by block from the last to the first: what enters each
block is kept, and nothing else is in memory but one block.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from algorithms import surgery
from algorithms.walk import unpack_layers
from experiments import memory, progress
from experiments.checkpoints.loading import load_block, parameters
from experiments.checkpoints.sources import Source, require_predictions
from experiments.evaluation import logits
from experiments.evaluation.forward import in_chunks, split_blocks
from experiments.streaming import embed_windows
from experiments.structures.observing import require_finite, required, run_block
from models.block import Block, Flow


class BlockGradients(NamedTuple):
    """Of one block's arrays, by name within it, weights as [o, i]."""

    layer: int
    arrays: dict[str, Array]
    gradients: dict[str, Array]

    @property
    def weights(self) -> list[str]:
        return [name for name in self.arrays if name.endswith("weight")]


def block_gradients(
    source: Source, windows: Int[np.ndarray, "n T"] | None, *, chunk: int
) -> Iterator[BlockGradients]:
    """Of the mean loss over all tokens of the windows, in nats; the last block first."""
    require_predictions(source.config, "loss")
    windows = required(windows)
    kept = [list(embed_windows(source, windows, chunk))]
    layers = source.config.layers
    with progress.steps("gradients", 2 * layers) as step:
        for graph, state in split_blocks(source):
            kept.append([run_block(graph, state, flow) for flow in kept[-1]])
            require_finite(len(kept) - 2, kept[-1])
            del graph, state
            step("")
        slopes = _of_loss(source, kept.pop(), windows, chunk)
        for layer in reversed(range(layers)):
            block = load_block(source, layer)
            unpack_layers(block)
            graph, state = nnx.split(block)
            total = None
            for n, flow in enumerate(kept.pop()):
                one, slopes[n] = _back(graph, state, flow, slopes[n])
                total = one if total is None else jax.tree.map(jnp.add, total, one)
            both = (block, nnx.merge(graph, total))
            yield BlockGradients(layer, *map(_named, both))
            surgery.release(block)
            memory.give_back()
            step("")


def _named(block: Block) -> dict[str, Array]:
    return {name: jnp.asarray(x) for name, x in parameters(block).items()}


def _of_loss(
    source: Source, flows: list[Flow], windows: Int[np.ndarray, "n T"], chunk: int
) -> list[Float[Array, "B T D"]]:
    """The gradient of the mean loss by what leaves the last block."""
    ends, share = [flow.residual for flow in flows], 1 / windows[:, 1:].size
    return [share * g for g in logits.loss_gradients(source, ends, in_chunks(windows, chunk))]


@functools.partial(jax.jit, static_argnames="graph")
def _back(graph, state, flow: Flow, slope: Float[Array, "B T D"]):
    """Of a chunk's loss by the block's arrays, and by what entered it."""

    def run(state, x):
        return nnx.merge(graph, state)(x, flow.positions)[0]

    return jax.vjp(run, state, flow.residual)[1](slope)
