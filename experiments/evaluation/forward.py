"""A model's last activations on windows of tokens, block by block: it need not fit in memory."""

import functools
from collections.abc import Callable

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
) -> tuple[list[Float[Array, "b T D"]], nnx.Embed]:
    """What leaves the last block, `chunk` windows at a time, and the embedding.

    step: called after each block.
    """
    stem, positions = load_stem(source), jnp.arange(windows.shape[1])[None]
    found = []
    for n in range(0, len(windows), chunk):
        tokens = jnp.asarray(windows[n : n + chunk])
        found.append(stem(tokens, jnp.broadcast_to(positions, tokens.shape)))
    for block in load_blocks(source):
        unpack_layers(block)
        graph, state = nnx.split(block)
        for n, x in enumerate(found):
            found[n] = _run_block(graph, state, x, positions)
        jax.block_until_ready(found[-1])
        step("")
    return found, stem.embed


@functools.partial(jax.jit, static_argnames="graph")
def _run_block(graph, state, x, positions):
    positions = jnp.broadcast_to(positions, x.shape[:2])
    return nnx.merge(graph, state)(x, positions)[0]
