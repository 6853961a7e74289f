"""A model's last activations on batches of tokens, block by block: it need not fit in memory."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from algorithms.walk import unpack_layers
from experiments.checkpoints.loading import load_blocks, load_stem
from experiments.checkpoints.sources import Source
from models.decoder import Tail


def activations(
    source: Source, batches: Sequence[Int[np.ndarray, "_ _"]], *, step: Callable[[str], None]
) -> tuple[list[Float[Array, "_ _ D"]], nnx.Embed]:
    """What leaves the last block, of each batch of windows, and the embedding.

    Each shape among the batches is compiled. step: called after each block.
    """
    stem, found = load_stem(source), []
    for batch in batches:
        tokens = jnp.asarray(batch)
        found.append(stem(tokens, jnp.broadcast_to(_positions(tokens.shape[1]), tokens.shape)))
    for block in load_blocks(source):
        unpack_layers(block)
        graph, state = nnx.split(block)
        for n, x in enumerate(found):
            found[n] = _run_block(graph, state, x, _positions(x.shape[1]))
        jax.block_until_ready(found)
        step("")
    return found, stem.embed


def _positions(length: int) -> Int[Array, "1 T"]:
    return jnp.arange(length)[None]


@functools.partial(jax.jit, static_argnames="graph")
def _run_block(graph, state, x, positions):
    positions = jnp.broadcast_to(positions, x.shape[:2])
    return nnx.merge(graph, state)(x, positions)[0]


def in_chunks(windows: Int[np.ndarray, "n T"], chunk: int) -> list[Int[np.ndarray, "_ T"]]:
    """Windows as batches of `chunk`, the last one shorter."""
    return [windows[n : n + chunk] for n in range(0, len(windows), chunk)]


def next_token(
    tail: Tail, embed: nnx.Embed, x: Float[Array, " D"], following: Int[Array, ""]
) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    """The log-probability of the token that follows, in nats, and whether none is likelier."""
    logits = tail(x, embed).astype(jnp.float32)
    return logits[following] - jax.nn.logsumexp(logits), logits.argmax() == following
