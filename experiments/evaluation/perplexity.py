"""Perplexity by protocol E, streamed block by block, so that a model need not fit in memory.

Each window stands on its own, without bos; the loss runs over its positions 1 … T - 1; perplexity
is exp(total loss / total positions). All windows have one length, so that is exp of the mean over
windows of each one's mean loss, whose standard error is over windows.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from algorithms.walk import unpack_layers
from experiments import progress
from experiments.checkpoints.loading import load_stem, load_tail
from experiments.checkpoints.sources import Source
from experiments.data.windows import Windows, digest
from experiments.errors import UserError
from experiments.evaluation.forward import activations
from models.config import DecoderConfig

LOGITS = 256  # positions whose logits are held at once
ROWS = 256  # of the head stay together: no format's block has more
HEAD = 1 << 28  # bytes of the head's rows, as float32, that are held at once


class Perplexity(NamedTuple):
    """Mean next-token loss of each window, in nats."""

    losses: Float[np.ndarray, " n"]

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    @property
    def loss_error(self) -> float:
        """Standard error of the mean over windows."""
        n = len(self.losses)
        return float(self.losses.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan

    @property
    def value(self) -> float:
        return math.exp(self.loss)

    @property
    def error(self) -> float:
        """Standard error of the perplexity, to first order."""
        return self.value * self.loss_error


def evaluate(source: Source, windows: Windows, *, chunk: int = 2) -> dict[str, Any]:
    """Perplexity on the held-out windows as a record keeps it: what conf/evaluation names."""
    found = perplexity(source, windows.heldout, chunk=chunk)
    return {
        "perplexity": {
            "value": found.value,
            "standard_error": found.error,
            "loss": found.loss,
            "loss_standard_error": found.loss_error,
            "window_losses": found.losses.tolist(),
            "windows": list(windows.heldout.shape),
            "data": {"name": windows.name, "digest": digest(windows.heldout)},
        }
    }


def perplexity(source: Source, windows: Int[np.ndarray, "n T"], *, chunk: int = 2) -> Perplexity:
    """Evaluate a model on held-out windows, `chunk` of them at a time."""
    if not source.config.predicts:
        raise UserError(
            f"A model of family {source.config.family} predicts no tokens, so that it has no "
            "perplexity: choose evaluation=similarity."
        )
    with progress.steps("evaluate", source.config.layers + 1) as step:
        found = activations(source, windows, chunk=chunk, step=step)
        following = [jnp.asarray(windows[n : n + chunk, 1:]) for n in range(0, len(windows), chunk)]
        sums = [nothing(tokens.shape) for tokens in following]
        for first, graph, state in heads(source):
            for n, (x, tokens) in enumerate(zip(found, following, strict=True)):
                sums[n] = with_logits(graph, state, x[:, :-1], tokens - first, sums[n])
        result = Perplexity(np.concatenate([np.asarray(_means(s), np.float64) for s in sums]))
        step("")
    return result


def heads(source: Source) -> Iterator[tuple[int, Any, Any]]:
    """What gives logits from the last activations, for as many tokens at a time as fit HEAD bytes:
    the first of them, graph and state of the tail, and of the embedding where it is tied.
    """
    config, step = source.config, rows_at_once(source.config)
    for first in range(0, config.vocabulary, step):
        rows = slice(first, first + step)
        tail = load_tail(source, rows=rows)
        unpack_layers(tail)
        embed = [load_stem(source, rows=rows).embed] if config.tied_embeddings else []
        yield first, *nnx.split(nnx.List([tail, *embed]))


def rows_at_once(config: DecoderConfig) -> int:
    return min(config.vocabulary, max(1, HEAD // (4 * config.hidden) // ROWS) * ROWS)


class Sums(NamedTuple):
    """Over the logits seen, at each position: Σ exp(logit - top), and the following token's own."""

    top: Float[Array, "n t"]
    total: Float[Array, "n t"]
    own: Float[Array, "n t"]


def nothing(shape: tuple[int, ...]) -> Sums:
    return Sums(jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros(shape))


@functools.partial(jax.jit, static_argnames="graph")
def with_logits(
    graph, state, x: Float[Array, "n t D"], tokens: Int[Array, "n t"], sums: Sums
) -> Sums:
    """The sums over some more tokens' logits; `tokens` counts from the first of them.

    A part of a window at a time: logits are the largest array of an evaluation.
    """
    tail, *embed = nnx.merge(graph, state)

    def add(position):
        x, token, sums = position
        logits = tail(x, *embed).astype(jnp.float32)
        top = jnp.maximum(sums.top, logits.max())
        total = sums.total * jnp.exp(sums.top - top) + jnp.exp(logits - top).sum()
        here = (token >= 0) & (token < len(logits))
        own = jnp.where(here, logits[jnp.clip(token, 0, len(logits) - 1)], sums.own)
        return Sums(top, total, own)

    n, t, _ = x.shape
    flat = jax.tree.map(lambda a: a.reshape(n * t, *a.shape[2:]), (x, tokens, sums))
    return jax.tree.map(lambda a: a.reshape(n, t), jax.lax.map(add, flat, batch_size=LOGITS))


@jax.jit
def _means(sums: Sums) -> Float[Array, " n"]:
    """The mean loss of each window."""
    return (sums.top + jnp.log(sums.total) - sums.own).mean(1)
