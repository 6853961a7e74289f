"""A model's last activations on windows of tokens, block by block: it need not fit in memory."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from algorithms.walk import unpack_layers
from experiments.checkpoints.loading import load_blocks, load_stem
from experiments.checkpoints.sources import Source


def activations(
    source: Source,
    windows: Int[np.ndarray, "n T"],
    *,
    chunk: int,
    step: Callable[[str], None],
) -> list[Float[Array, "b T D"]]:
    """What leaves the last block, `chunk` windows at a time.

    step: called after each block.
    """
    positions = jnp.arange(windows.shape[1])[None]
    found = list(embedded(source, windows, chunk))
    for block in load_blocks(source):
        unpack_layers(block)
        graph, state = nnx.split(block)
        for n, x in enumerate(found):
            found[n] = _run_block(graph, state, x, positions)
        jax.block_until_ready(found[-1])
        step("")
    return found


def embedded(
    source: Source, windows: Int[np.ndarray, "n T"], chunk: int
) -> Iterator[Float[Array, "b T D"]]:
    """What enters the first block, `chunk` windows at a time; of the embedding, only the rows of
    tokens that occur are read: a large vocabulary takes more than a block.
    """
    rows, numbered = np.unique(windows, return_inverse=True)
    stem = load_stem(source, rows=rows)
    for n in range(0, len(windows), chunk):
        tokens = jnp.asarray(numbered.reshape(windows.shape)[n : n + chunk], jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        yield stem(tokens, positions)


@functools.partial(jax.jit, static_argnames="graph")
def _run_block(graph, state, x, positions):
    positions = jnp.broadcast_to(positions, x.shape[:2])
    return nnx.merge(graph, state)(x, positions)[0]
