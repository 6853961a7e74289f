"""A model's last activations on batches of tokens, block by block: it need not fit in memory."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from algorithms import surgery
from algorithms.walk import unpack_layers
from experiments import memory
from experiments.checkpoints.loading import load_blocks, load_stem
from experiments.checkpoints.sources import Source


def activations(
    source: Source, batches: Sequence[Int[np.ndarray, "_ _"]], *, step: Callable[[str], None]
) -> list[Float[Array, "_ _ D"]]:
    """What leaves the last block, of each batch of windows.

    Each shape among the batches is compiled. step: called after each block.
    """
    found = list(embedded(source, batches))
    for graph, state in split_blocks(source):
        for n, x in enumerate(found):
            found[n] = _run_block(graph, state, x, _positions(x.shape[1]))
        jax.block_until_ready(found)
        del graph, state
        step("")
    return found


def split_blocks(source: Source) -> Iterator[tuple[Any, Any]]:
    """Graph and state of each block, unpacked. It is let go of when the next one is asked for, by
    when the caller should hold them no more: neither in variables nor in an `enumerate`.
    """
    for block in load_blocks(source):
        unpack_layers(block)
        yield nnx.split(block)
        surgery.release(block)
        memory.give_back()


def embedded(
    source: Source, batches: Sequence[Int[np.ndarray, "_ _"]]
) -> Iterator[Float[Array, "_ _ D"]]:
    """What enters the first block, of each batch. Of the embedding, only the rows of tokens that
    occur are read: a large vocabulary takes more memory than a block.
    """
    rows = np.unique(np.concatenate([batch.ravel() for batch in batches]))
    stem = load_stem(source, rows=rows)
    for batch in batches:
        tokens = jnp.asarray(np.searchsorted(rows, batch), jnp.int32)
        yield stem(tokens, jnp.broadcast_to(_positions(tokens.shape[1]), tokens.shape))


def _positions(length: int) -> Int[Array, "1 T"]:
    return jnp.arange(length)[None]


@functools.partial(jax.jit, static_argnames="graph")
def _run_block(graph, state, x, positions):
    positions = jnp.broadcast_to(positions, x.shape[:2])
    return nnx.merge(graph, state)(x, positions)[0]


def in_chunks(windows: Int[np.ndarray, "n T"], chunk: int) -> list[Int[np.ndarray, "_ T"]]:
    """Windows as batches of `chunk`, the last one shorter."""
    return [windows[n : n + chunk] for n in range(0, len(windows), chunk)]
